"""Draws and ranks candidates of many captions and reports what ranking gains.

    dalle1 evaluate CONFIG [key=value ...]                  one process
    deepspeed launch/rank.py CONFIG [key=value ...]         the captions spread over all GPUs

    dalle1 evaluate shapes/rank captions=16 candidates=64

Ctrl-C loses the captions in progress only; the same command resumes.

A config with `measure: copies` judges a codec's copies of true images, one with `measure:
retrieval` a ranker alone; both are done in minutes, by one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle1.commands.command_line import add_config, exit_status, make_parser, require_deepspeed
from dalle1.common.config import load_settings
from dalle1.common.files import read_text
from dalle1.common.hardware import default_device
from dalle1.evaluation import copies, retrieval
from dalle1.evaluation.benchmark import RESULT
from dalle1.evaluation.config import CopySettings, Measure, RankSettings, RetrievalSettings
from dalle1.evaluation.run import FILES, prepare, run
from dalle1.evaluation.tables import lines_of, ranking_lines
from dalle1.training.distributed import make_barrier
from dalle1.training.launcher import read_launch
from dalle1.training.run_folder import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk fails or is full, 2 for a mistake in the settings, 130 when
    stopped."""
    parser = make_parser("evaluate", __doc__)
    add_config(parser, "shapes/rank")
    options = parser.parse_intermixed_args(arguments)
    again = "the same command resumes"
    return exit_status(lambda: _evaluate(options), f"stopped; {again}", f"; {again}")


def _evaluate(options: argparse.Namespace) -> int:
    sys.path.insert(0, str(Path.cwd()))  # where a user's own `features` or `judge` lie
    measure = load_settings(Measure, options.config, options.overrides).measure
    if measure == "ranking":
        return _rank(options)
    if read_launch(meets=False).rank == 0:  # the others have nothing to do
        _print_measured(measure, options)
    return 0


def _print_measured(measure: str, options: argparse.Namespace) -> None:
    """Measures copies or retrieval, and prints the figures and where they are."""
    device, given = str(default_device()), (options.config, options.overrides)
    tables: tuple[str, ...]
    if measure == "copies":
        path = copies.run_copies(load_settings(CopySettings, *given), device)
        tables, counted = ("copies", "true images"), "images"
    else:
        path = retrieval.run_retrieval(load_settings(RetrievalSettings, *given), device)
        tables, counted = ("true first",), "captions"
    groups = json.loads(read_text(path))["groups"]
    for key in tables:
        print("\n".join(lines_of(groups, key, counted)))
    print(f"  {path}\n  {path.with_suffix('.png')}")


def _rank(options: argparse.Namespace) -> int:
    require_deepspeed("evaluate")
    from dalle1.training.engine import start_processes

    settings = load_settings(RankSettings, options.config, options.overrides)
    rank, ranks = start_processes()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    folder = RunFolder(Path(settings.run))
    folder.started()
    try:
        page = run(prepare(settings, device), settings, rank, ranks, make_barrier())
    finally:
        folder.release()
    if page:
        for line in ranking_lines(json.loads(read_text(page.parent / RESULT))):
            print(line)
        for name in FILES:
            print(f"  {page.parent / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
