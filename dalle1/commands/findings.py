"""Runs the paper's findings as small experiments: several arms, three seeds, a report each.

    dalle1 findings kl-weight                     one of them
    dalle1 findings all                           all of them, which takes hours
    dalle1 findings --list                        claims and minutes
    python launch/findings.py all                 the same, without installing

Results are kept: the same command resumes at the first run that has none. It runs in a checkout,
whose configs it reads. docs/findings.md says what came out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM

from dalle1.commands.command_line import (
    FAILED,
    STOPPED,
    as_model,
    as_path,
    exit_status,
    make_parser,
    require_deepspeed,
)
from dalle1.findings.base import Options
from dalle1.findings.runner import run_findings
from dalle1.findings.table import all_findings, find
from dalle1.hub.finding import find_folder
from dalle1.training.signals import Interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when all runs have a result; 1 when a run or a disk failed, 2 for a mistake of
    the user's, 130 by Ctrl-C; 0 by SIGTERM, after which the same command resumes."""
    parser = make_parser("findings", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a finding, or all")
    parser.add_argument("--list", action="store_true", help="show all findings and end")
    parser.add_argument(
        "--seeds", type=_seed, nargs="+", default=[0, 1, 2], metavar="N", help="seeds of each arm"
    )
    parser.add_argument(
        "--out", type=as_path, default=Path("runs/findings"), help="folder of results and reports"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads; default: all cores")
    parser.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        help="factor on updates: 0.02 to see that everything runs, 10 for a longer look",
    )
    parser.add_argument(
        "--photographs", type=as_path, help="folder of images, for findings that need photographs"
    )
    parser.add_argument(
        "--model", type=as_model, help="a model trained on emoji: its folder or its name"
    )
    parser.add_argument("--emoji", type=as_path, help="folder that `dalle1 data emoji` wrote")
    parser.add_argument(
        "--packages", type=as_path, help="folder of the emoji's packages; default: data/packages"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the training runs, too, and not only results"
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: _findings(options), "stopped; the same command resumes")


def _findings(options: argparse.Namespace) -> int:
    if options.list:
        for finding in all_findings():
            print(f"{finding.name:18} {finding.minutes:4.0f} min  {finding.claim}")
            print(f"{'':28} {finding.section}; arms: {', '.join(a.name for a in finding.arms)}")
        return 0
    names = options.names
    if not names or ("all" in names and len(names) > 1):
        raise ValueError(f"NAME: expected names of findings, or all, got {names}; see --list")
    chosen = all_findings() if names == ["all"] else [find(name) for name in names]
    require_deepspeed("findings")
    given = ("scale", "photographs", "model", "emoji", "packages")
    values = {name: getattr(options, name) for name in given}
    if options.model is not None:
        values["model"] = find_folder(options.model)
    common = Options(**values)
    try:
        done = run_findings(
            chosen, options.seeds, common, options.out, options.threads, options.keep
        )
    except Interrupted as stop:
        print("stopped; a checkpoint is saved, and the same command resumes", file=sys.stderr)
        return 0 if stop.number == SIGTERM else STOPPED
    return 0 if done else FAILED


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 100], got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
