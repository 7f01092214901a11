"""Trains one stage: `deepspeed launch/train.py CONFIG [--resume] [key=value ...]`.

The same with plain `python` runs as one process. Ctrl-C and SIGTERM save a checkpoint; --resume
goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from signal import SIGTERM

from dalle1.commands.command_line import add_config, make_parser
from dalle1.training.config import load_config
from dalle1.training.signals import Interrupted, RanksLost
from dalle1.training.supervisor import HEARTBEAT, Supervisor
from dalle1.training.trainer import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when trained to the end or stopped by SIGTERM, the scheduler's warning, 130 by
    Ctrl-C; 2 for a mistake in the settings or a run that diverged, 75 when a rank was lost."""
    parser = make_parser("train", __doc__)
    add_config(parser, "configs/shapes/dvae.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--restarts", type=int, default=0, help="times to start again after a lost rank"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(given)
    if options.restarts and HEARTBEAT not in os.environ:  # else this is the rank
        return Supervisor(
            [sys.executable, "-m", "dalle1.commands.train", *given], options.restarts
        ).run()
    try:
        train(load_config(options.config, options.overrides), options.resume)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 0 if stop.number == SIGTERM else 130
    except RanksLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 75
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
