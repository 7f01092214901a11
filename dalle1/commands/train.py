"""Trains one stage: a codec, a ranker or a prior.

    dalle1 train CONFIG [key=value ...] [--resume]                   one process
    deepspeed --module dalle1.train CONFIG [key=value ...]           all GPUs of this machine
    deepspeed launch/train.py CONFIG [key=value ...]                 the same, in a checkout

    dalle1 train shapes/dvae steps=500 run=runs/mine

Ctrl-C and SIGTERM save a checkpoint; the same command with --resume resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from signal import SIGTERM

from dalle1.commands.command_line import (
    RANK_LOST,
    STOPPED,
    add_config,
    exit_status,
    make_parser,
    require_deepspeed,
)
from dalle1.training.config import load_config
from dalle1.training.launcher import read_launch
from dalle1.training.signals import Interrupted, RanksLost
from dalle1.training.supervisor import HEARTBEAT, Supervisor


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when trained to the end or stopped by SIGTERM, the scheduler's warning, 130 by
    Ctrl-C; 1 when a disk fails or is full; 2 for a mistake in the settings or a run that diverged;
    75 when a rank was lost."""
    parser = make_parser("train", __doc__)
    add_config(parser, "shapes/dvae")
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint")
    parser.add_argument(
        "--restarts", type=int, default=0, help="times to start again after a lost rank"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(given)
    return exit_status(lambda: _train(options, given))


def _train(options: argparse.Namespace, given: list[str]) -> int:
    require_deepspeed("train")
    read_launch()  # before DeepSpeed is imported, and before a supervisor tries it again
    if options.restarts and HEARTBEAT not in os.environ:  # else this is the rank that was started
        command = [sys.executable, "-m", "dalle1.commands.train", *given]
        return Supervisor(command, options.restarts).run()
    from dalle1.training.trainer import train  # needs DeepSpeed

    try:
        train(load_config(options.config, options.overrides), options.resume)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 0 if stop.number == SIGTERM else STOPPED
    except RanksLost as error:
        print(f"error: {error}", file=sys.stderr)
        return RANK_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
