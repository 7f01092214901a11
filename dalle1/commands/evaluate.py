"""Draws and ranks candidates of many captions and reports what ranking gains.

    dalle1 evaluate CONFIG [key=value ...]                  one process
    deepspeed launch/rank.py CONFIG [key=value ...]         the captions spread over all GPUs

Ctrl-C loses the captions in progress only; the same command resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle1.commands.command_line import add_config, exit_status, make_parser, require_deepspeed
from dalle1.common.config import load_settings
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.run import FILES, prepare, run
from dalle1.training.distributed import make_barrier
from dalle1.training.run_folder import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk fails or is full, 2 for a mistake in the settings, 130 when
    stopped."""
    parser = make_parser("evaluate", __doc__)
    add_config(parser, "configs/shapes/rank.yaml")
    options = parser.parse_intermixed_args(arguments)
    again = "the same command resumes"
    return exit_status(lambda: _evaluate(options), f"stopped; {again}", f"; {again}")


def _evaluate(options: argparse.Namespace) -> int:
    require_deepspeed("evaluate")
    from dalle1.training.engine import start_processes

    sys.path.insert(0, str(Path.cwd()))  # where a user's own `features` lie
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
        for name in FILES:
            print(f"  {page.parent / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
