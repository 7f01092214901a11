"""Encodes shards of images as token shards, with a frozen codec.

    dalle1 tokenize CONFIG [key=value ...]                  one process
    deepspeed launch/tokenize.py CONFIG [key=value ...]     the shards spread over all GPUs

    dalle1 tokenize shapes/tokens out=data/tokens

Ctrl-C loses the shards in progress only; the same command resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from dalle1.commands.command_line import add_config, exit_status, make_parser
from dalle1.common.config import load_settings
from dalle1.data.precompute.encode import TokenizeSettings, tokenize
from dalle1.training.launcher import read_launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk or the network fails or a disk is full, 2 for a mistake in the
    settings, 130 when stopped."""
    parser = make_parser("tokenize", __doc__)
    add_config(parser, "shapes/tokens")
    options = parser.parse_intermixed_args(arguments)
    again = "the same command resumes"
    return exit_status(lambda: _tokenize(options), f"stopped; {again}", f"; {again}")


def _tokenize(options: argparse.Namespace) -> int:
    settings = load_settings(TokenizeSettings, options.config, options.overrides)
    # The ranks exchange nothing, so that no process group is made.
    launch = read_launch(meets=False)
    rank, world_size = launch.rank, launch.world_size
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{launch.local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    progress = rank == 0 and sys.stderr.isatty()
    report = tokenize(settings, rank, world_size, device, progress=progress)
    head = f"rank {rank} of {world_size}:\n" if world_size > 1 else ""
    # One write: the ranks share the output.
    print(f"{head}{report.table()}\ndata={settings.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
