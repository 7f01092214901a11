"""Turns raw shards into token shards, with a frozen dVAE.

    python launch/tokenize.py CONFIG [key=value ...]
    deepspeed launch/tokenize.py CONFIG [key=value ...]     the shards dealt to the ranks

Ctrl-C loses the shards in work alone; the same command goes on.
"""

from __future__ import annotations

import os
import sys

if __name__ == "tokenize":
    # Not the command: Python's own module is wanted, which this file hides from the scripts beside
    # it, as their folder is searched first. Whoever imports gets what stands in sys.modules.
    from importlib.util import module_from_spec, spec_from_file_location

    _path = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    _spec = spec_from_file_location("tokenize", _path)
    assert _spec is not None and _spec.loader is not None
    sys.modules["tokenize"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["tokenize"])
else:
    import argparse
    from collections.abc import Sequence

    import torch

    from dalle1.cli import exit_status
    from dalle1.settings import load_settings
    from dalle1.tokenising import TokeniseSettings, tokenise


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk or the network fails or a disk is full, 2 for a mistake in the
    settings, 130 when stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", help="a YAML file such as configs/shapes/tokens.yaml")
    parser.add_argument("overrides", nargs="*", help="settings as key=value, after the file's")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _tokenise(options), "stopped; the same command goes on")


def _tokenise(options: argparse.Namespace) -> int:
    settings = load_settings(TokeniseSettings, options.config, options.overrides)
    # The ranks have nothing to tell each other: no group of processes is made.
    rank, ranks = _number("RANK", 0), _number("WORLD_SIZE", 1)
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{_number('LOCAL_RANK', 0) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    try:
        report = tokenise(settings, rank, ranks, device, progress=rank == 0 and sys.stderr.isatty())
    except OSError as error:
        why = error.strerror if error.strerror and not error.filename else error
        print(f"error: {why}; the same command goes on", file=sys.stderr)
        return 1
    head = f"rank {rank} of {ranks}:\n" if ranks > 1 else ""
    print(f"{head}{report.table()}\ndata={settings.out}", flush=True)  # at once: ranks share it
    return 0


def _number(name: str, otherwise: int) -> int:
    return int(os.environ.get(name, otherwise))


if __name__ == "__main__":
    sys.exit(main())
