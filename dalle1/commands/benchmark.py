"""Measures speed, memory and what 16 bits lose: ours against the usual ways.

    python launch/benchmark.py attention [CONFIG] [--batch 8] [--dtype bfloat16]
    python launch/benchmark.py train CONFIG [--batch 2] [key=value ...]
    python launch/benchmark.py sample CONFIG [--candidates 1,8,64,512] [key=value ...]
    python launch/benchmark.py half [--layers 64] [--width 32] [--updates 240] [--span 30]
    python launch/benchmark.py data [--samples 640] [--workers 0,1,2]

`attention` runs one attention call, forward and backward, of each pattern; `train` whole training
steps (loss, gradients, clipping, AdamW); `sample` whole pictures of one caption, with random
weights. Medians and min-max of the repeats (in `sample`: of the rows of the grid). `half` trains a
deep narrow model in float16 with one loss scale and with one for each block, on the CPU, and draws
docs/half-precision.png. `data` reads photographs and token shards that it makes, runs the dVAE over
the former, and trains a few steps on both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dalle1.benchmarks.dataloading import report_dataloading
from dalle1.benchmarks.float16 import report_float16
from dalle1.benchmarks.generation import report_sample
from dalle1.benchmarks.training import report_attention, report_training
from dalle1.commands.command_line import exit_status, make_parser
from dalle1.common.files import write_text
from dalle1.common.hardware import DTYPES, default_device, device_name
from dalle1.training.config import load_config
from dalle1.transformer.config import Execution, TransformerConfig


def run(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of what was asked for."""
    if min(options.batch, options.repeats, *options.candidates) < 1:
        raise ValueError("--batch, --repeats and --candidates must be 1 or more")
    if options.what == "half":
        if options.config:
            raise ValueError(f"half takes no config, got {options.config!r}")
        figure = options.figure
        return report_float16(options.layers, options.width, options.updates, options.span, figure)
    if options.what == "data":
        if options.config:
            raise ValueError(f"data takes no config, got {options.config!r}")
        return report_dataloading(options.samples, options.workers, options.repeats)
    batch, dtype, repeats = options.batch, options.dtype, options.repeats
    if options.what == "attention" and not options.config:
        return report_attention(TransformerConfig(), batch, dtype, device, repeats)
    if not options.config:
        raise ValueError(f"{options.what} needs a config, such as configs/paper/250m.yaml")
    config = load_config(options.config, options.overrides)
    if config.transformer is None:
        raise ValueError(f"{options.config}: stage {config.stage!r} has no transformer")
    c, execution = config.transformer, config.execution or Execution()
    if options.what == "attention":
        return report_attention(c, batch, dtype, device, repeats)
    if options.what == "train":
        return report_training(c, execution, batch, dtype, device, repeats)
    return report_sample(c, dtype, device, options.candidates)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for a mistake in the settings."""
    parser = make_parser("benchmark", __doc__)
    parser.add_argument("what", choices=["attention", "train", "sample", "half", "data"])
    parser.add_argument("config", nargs="?", help="a YAML file with a transformer")
    parser.add_argument("overrides", nargs="*", help="settings as key=value, after the file's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--candidates", type=_numbers, default=[1, 8, 64, 512], help="1,8,64")
    parser.add_argument("--layers", type=int, default=64, help="of half, as are the next four")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--updates", type=int, default=240)
    parser.add_argument("--span", type=float, default=30, help="of planted gradients: 2^span")
    parser.add_argument("--figure", type=Path, default=Path("docs/half-precision.png"))
    parser.add_argument("--samples", type=int, default=640, help="of data: pictures a round")
    parser.add_argument("--workers", type=_numbers, default=[0, 1, 2], help="of data: 0,1,2")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_intermixed_args(arguments)
    device = torch.device("cpu") if options.what == "half" else default_device()
    print(f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    given = sys.argv[1:] if arguments is None else arguments
    print(f"$ python launch/benchmark.py {' '.join(given)}")
    return exit_status(lambda: _benchmark(options, device))


def _benchmark(options: argparse.Namespace, device: torch.device) -> int:
    results = run(options, device)
    if options.out:
        content = {"device": device_name(device), "results": results}
        write_text(options.out, json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
