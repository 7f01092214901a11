"""How long the library takes to be imported, against torch alone, and what heavy it brings along.

Each import runs in a process of its own. They take turns, so that a busy machine slows down all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from typing import Any

# Prints the seconds of one import and the packages that it has loaded.
PROGRAM = """
import json, sys, time
start = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "packages": sorted(n for n in sys.modules if "." not in n)}))
"""
REFERENCE = "import torch"
STATEMENTS = (REFERENCE, "import dalle1", "from dalle1 import *")  # the last: all public names
HEAVY = ("deepspeed", "gradio", "matplotlib", "tensorboard", "transformers")


def report_importing(repeats: int) -> dict[str, Any]:
    """Measures the imports, each so many times after one that fills the disk's cache; prints, and
    returns for a JSON file, the figures."""
    runs: dict[str, list[dict[str, Any]]] = {statement: [] for statement in STATEMENTS}
    for _ in range(repeats + 1):
        for statement, found in runs.items():
            found.append(_import(statement))
    figures = {}
    for statement, found in runs.items():
        seconds = [run["seconds"] for run in found[1:]]
        heavy = [name for name in HEAVY if name in found[-1]["packages"]]
        figures[statement] = {"seconds": seconds, "median": median(seconds), "heavy": heavy}
        ratio = figures[statement]["median"] / figures[REFERENCE]["median"]
        print(
            f"  {statement:<22}{median(seconds):7.2f} s  ({min(seconds):.2f} to "
            f"{max(seconds):.2f}), {ratio:.2f} times torch's" + "".join(f", {n}" for n in heavy),
            flush=True,
        )
    return figures


def _import(statement: str) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, statement]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
