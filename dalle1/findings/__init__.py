"""The paper's findings as experiments: arms that differ in one setting, three seeds, a report.

`table.py` lists them, `base.py` says what one is, `runner.py` makes the runs that have no result
yet, `report.py` compares the arms. docs/findings.md says what came out.
"""
