"""Other people's public models of the family, read as they are published.

One module a family; `dalle1.published.parts` says what a reader gives.
"""
