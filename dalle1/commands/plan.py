"""Says what a run asks of a cluster: `python launch/plan.py CONFIG [key=value ...] --gpus 8`.

Parameters, memory of each GPU and CPU, FLOPs, bytes on the network and time; nothing is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from dalle1.commands.command_line import exit_status, make_parser
from dalle1.training.config import load_config
from dalle1.training.planning.network import ClusterSettings
from dalle1.training.planning.plan import plan
from dalle1.training.planning.report import describe

HELP = {
    "gpus": "in all",
    "gpus_per_node": "GPUs of a machine",
    "memory": "GB (1e9 bytes) of a GPU",
    "network": "Gbit/s of a machine",
    "mfu": "share of the peak that the products reach",
    "peak": "dense TFLOP/s of a GPU in the run's precision",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the run fits, 1 when it does not, 2 for a mistake in the settings."""
    parser = make_parser("plan", __doc__)
    parser.add_argument("config", help="a YAML file such as configs/paper/12b.yaml")
    parser.add_argument("overrides", nargs="*", help="settings as key=value, after the file's")
    for field in fields(ClusterSettings):
        flag = "--" + field.name.replace("_", "-")
        help_ = f"{HELP[field.name]} (default: {field.default:g})"
        parser.add_argument(flag, type=type(field.default), default=field.default, help=help_)
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    cluster = ClusterSettings(**{f.name: getattr(options, f.name) for f in fields(ClusterSettings)})
    made = plan(load_config(options.config, options.overrides), cluster)
    print(describe(made))
    return 0 if made.fits else 1


if __name__ == "__main__":
    sys.exit(main())
