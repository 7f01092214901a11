"""Turns raw shards into token shards, with a frozen dVAE.

    python launch/tokenize.py CONFIG [key=value ...]
    deepspeed launch/tokenize.py CONFIG [key=value ...]     the shards dealt to the ranks

Ctrl-C loses the shards in work alone; the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from dalle1.commands.command_line import add_config, exit_status, make_parser
from dalle1.common.config import load_settings
from dalle1.data.precompute.encode import TokenizeSettings, tokenize


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk or the network fails or a disk is full, 2 for a mistake in the
    settings, 130 when stopped."""
    parser = make_parser("tokenize", __doc__)
    add_config(parser, "configs/shapes/tokens.yaml")
    options = parser.parse_args(arguments)
    again = "the same command goes on"
    return exit_status(lambda: _tokenize(options), f"stopped; {again}", f"; {again}")


def _tokenize(options: argparse.Namespace) -> int:
    settings = load_settings(TokenizeSettings, options.config, options.overrides)
    # The ranks have nothing to tell each other: no group of processes is made.
    rank, ranks = _number("RANK", 0), _number("WORLD_SIZE", 1)
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{_number('LOCAL_RANK', 0) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    report = tokenize(settings, rank, ranks, device, progress=rank == 0 and sys.stderr.isatty())
    head = f"rank {rank} of {ranks}:\n" if ranks > 1 else ""
    print(f"{head}{report.table()}\ndata={settings.out}", flush=True)  # at once: ranks share it
    return 0


def _number(name: str, otherwise: int) -> int:
    return int(os.environ.get(name, otherwise))


if __name__ == "__main__":
    sys.exit(main())
