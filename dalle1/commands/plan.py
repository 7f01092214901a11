"""Says what a run needs of a cluster: memory, FLOPs, messages and time.

    dalle1 plan CONFIG [key=value ...] --gpus 128 [--memory 80] [--network 400]
    python launch/plan.py CONFIG [key=value ...] --gpus 128

    dalle1 plan paper/12b --gpus 128

Nothing is run, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from dalle1.commands.command_line import FAILED, add_config, exit_status, make_parser
from dalle1.training.config import load_config
from dalle1.training.initialization import with_initial_parts
from dalle1.training.planning.network import ClusterSettings
from dalle1.training.planning.plan import plan
from dalle1.training.planning.report import describe

HELP = {
    "gpus": "in all",
    "gpus_per_node": "GPUs of a machine",
    "memory": "GB (1e9 bytes) of a GPU",
    "network": "Gbit/s of a machine, each way",
    "mfu": "share of the peak that the matrix products reach",
    "peak": "TFLOP/s of a GPU's dense products in the run's precision",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the run fits, 1 when it does not, 2 for a mistake in the settings."""
    parser = make_parser("plan", __doc__)
    add_config(parser, "paper/12b")
    for field in fields(ClusterSettings):
        flag, kind = "--" + field.name.replace("_", "-"), type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, help=HELP[field.name])
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    cluster = ClusterSettings(**{f.name: getattr(options, f.name) for f in fields(ClusterSettings)})
    made = plan(with_initial_parts(load_config(options.config, options.overrides)), cluster)
    print(describe(made))
    return 0 if made.fits else FAILED


if __name__ == "__main__":
    sys.exit(main())
