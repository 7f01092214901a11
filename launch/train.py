"""Trains one stage: `deepspeed launch/train.py CONFIG [--resume] [key=value ...]`.

The same with plain `python` runs as one process. Ctrl-C and SIGTERM save a checkpoint; --resume
goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from signal import SIGTERM

from dalle1.training.config import load_config
from dalle1.training.faults import Interrupted, RanksLost
from dalle1.training.restarts import BEATS, Guard
from dalle1.training.trainer import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when trained to the end or stopped by SIGTERM, the scheduler's warning, 130 by
    Ctrl-C; 2 for a mistake in the settings or a run that diverged, 75 when a rank was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", help="a YAML file such as configs/shapes/dvae.yaml")
    parser.add_argument("overrides", nargs="*", help="settings as key=value, after the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    parser.add_argument(
        "--restarts", type=int, default=0, help="times to start again after a lost rank"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(given)
    if options.restarts and BEATS not in os.environ:  # else this is the rank that a guard started
        return Guard([sys.executable, __file__, *given], options.restarts).run()
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
