"""Measures speed, memory and what 16 bits lose: ours against the usual ways.

    dalle1 benchmark attention [CONFIG] [--batch 8] [--dtype bfloat16]
    dalle1 benchmark train CONFIG [--batch 2] [key=value ...]
    dalle1 benchmark sample CONFIG [--candidates 1,8,64,512] [key=value ...]
    dalle1 benchmark windows MODEL CAPTION ... [--candidates 1,4] [--windows 4,16,64]
    dalle1 benchmark serving MODEL CAPTION ... [--candidates 1,8] [--clients 8]
    dalle1 benchmark published [malevich mindalle dalle_mini] [--candidates 1,16] [--dtype bfloat16]
    dalle1 benchmark half [--layers 64] [--width 32] [--updates 240] [--span 30]
    dalle1 benchmark data [--samples 640] [--workers 0,1,2]
    dalle1 benchmark dropout [--repeats 5]
    dalle1 benchmark loading CONFIG [--dtype bfloat16] [--repeats 5]
    dalle1 benchmark import [--repeats 5]
    python launch/benchmark.py ...

    dalle1 benchmark train paper/250m --batch 2

`attention` runs one attention call of each pattern, forward and backward. `train` runs full
training steps: loss, gradients, clipping, AdamW. `sample` draws images of one caption with random
weights. They print the median and the extremes of the repeats; `sample`, those of the grid's rows.
`windows` draws images of a trained model, with windows of tokens in one pass and without.
`serving` asks a server for images of a trained model by several clients at once.
`published` draws the image tokens of other people's models at full size with random weights.
`half` trains a deep narrow model in float16 on the CPU, with one loss scale and with one for each
block, and draws docs/half-precision.png. `data` reads photographs and token shards that it makes,
encodes the photographs, and trains a few steps on both. `dropout` makes tokens of captions in five
scripts with BPE dropout. `loading` writes a prior of random weights to a temporary folder and opens
it in a process of its own. `import` imports the library and, beside it, torch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dalle1.benchmarks.dataloading import report_dataloading
from dalle1.benchmarks.dropout import report_dropout
from dalle1.benchmarks.float16 import report_float16
from dalle1.benchmarks.generation import report_sample
from dalle1.benchmarks.importing import report_importing
from dalle1.benchmarks.loading import report_loading
from dalle1.benchmarks.published import report_published
from dalle1.benchmarks.serving import report_serving
from dalle1.benchmarks.training import report_attention, report_training
from dalle1.benchmarks.windows import report_windows
from dalle1.commands.command_line import as_path, exit_status, make_parser
from dalle1.common.files import check_writable_file, write_text
from dalle1.common.hardware import DTYPES, default_device, device_name
from dalle1.training.config import load_config
from dalle1.transformer.config import Execution, TransformerConfig

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk fails or is full, 2 for a mistake in the settings, 130 when
    stopped."""
    parser = make_parser("benchmark", __doc__)
    parser.add_argument("what", choices=list(BENCHMARKS), help="what to measure")
    parser.add_argument("config", nargs="?", help="a YAML file with a transformer, or a model")
    parser.add_argument(
        "overrides", nargs="*", help="settings as key=value, after the file's, or captions"
    )
    parser.add_argument("--batch", type=int, default=2, help="samples of a call or step")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of products")
    parser.add_argument("--repeats", type=int, default=5, help="that are measured")
    parser.add_argument(
        "--candidates",
        type=_integers,
        help="of a caption: 1,8,64,512; windows 1,4, serving 1,8, published 1,16",
    )
    parser.add_argument("--clients", type=int, default=8, help="of serving: at once")
    parser.add_argument("--in-flight", type=int, default=1, help="of serving: a client's at once")
    parser.add_argument("--requests", type=int, default=64, help="of serving: of all clients")
    parser.add_argument("--windows", type=_integers, default="4,16,64", help="of windows")
    parser.add_argument("--layers", type=int, default=64, help="of half")
    parser.add_argument("--width", type=int, default=32, help="of half")
    parser.add_argument("--updates", type=int, default=240, help="of half")
    parser.add_argument("--span", type=float, default=30, help="of half: gradients over 2^span")
    parser.add_argument(
        "--figure", type=as_path, default=Path("docs/half-precision.png"), help="of half: its file"
    )
    parser.add_argument("--samples", type=int, default=640, help="of data: images of a round")
    parser.add_argument("--workers", type=_integers, default="0,1,2", help="of data: processes")
    parser.add_argument("--out", type=as_path, help="a JSON file for all figures")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_intermixed_args(given)
    return exit_status(lambda: _benchmark(options, given))


def _benchmark(options: argparse.Namespace, given: list[str]) -> int:
    if options.candidates is None:
        options.candidates = CANDIDATES.get(options.what, [1, 8, 64, 512])
    counts = (options.batch, options.repeats, options.clients, options.in_flight, options.requests)
    if min(*counts, *options.candidates, *options.windows) < 1:
        raise ValueError(
            "--batch, --repeats, --clients, --in-flight, --requests, --candidates and --windows: "
            "expected 1 or more"
        )
    for name in ("out", "figure") if options.what == "half" else ("out",):
        if path := getattr(options, name):
            check_writable_file(path, f"--{name}")
    device = torch.device("cpu") if options.what in ON_CPU else default_device()
    print(f"{device_name(device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"$ dalle1 benchmark {shlex.join(given)}")
    results = BENCHMARKS[options.what](options, device)
    if options.out:
        content = {"device": device_name(device), "results": results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(content, indent=1))
    return 0


def _attention(options: argparse.Namespace, device: torch.device) -> Figures:
    c = _transformer(options)[0] if options.config else TransformerConfig()
    return report_attention(c, options.batch, options.dtype, device, options.repeats)


def _train(options: argparse.Namespace, device: torch.device) -> Figures:
    c, execution = _transformer(options)
    return report_training(c, execution, options.batch, options.dtype, device, options.repeats)


def _sample(options: argparse.Namespace, device: torch.device) -> Figures:
    c, _ = _transformer(options)
    return report_sample(c, options.dtype, device, options.candidates)


def _require_captions(options: argparse.Namespace) -> None:
    if not options.overrides:
        got = repr(options.config) if options.config else "nothing"
        raise ValueError(
            f"{options.what}: expected a model's folder and captions such as it was trained on, "
            f"got {got}"
        )


def _serving(options: argparse.Namespace, device: torch.device) -> Figures:
    _require_captions(options)
    return report_serving(
        options.config,
        options.overrides,
        DTYPES[options.dtype],
        device,
        options.candidates,
        options.clients,
        options.in_flight,
        options.requests,
        options.repeats,
    )


def _windows(options: argparse.Namespace, device: torch.device) -> Figures:
    _require_captions(options)
    return report_windows(
        options.config,
        options.overrides,
        DTYPES[options.dtype],
        device,
        options.candidates,
        options.windows,
        options.repeats,
    )


def _published(options: argparse.Namespace, device: torch.device) -> Figures:
    names = [options.config, *options.overrides] if options.config else None
    return report_published(names, options.dtype, device, options.candidates)


def _half(options: argparse.Namespace, device: torch.device) -> Figures:
    _refuse_config(options)
    return report_float16(
        options.layers, options.width, options.updates, options.span, options.figure
    )


def _data(options: argparse.Namespace, device: torch.device) -> Figures:
    _refuse_config(options)
    return report_dataloading(options.samples, options.workers, options.repeats)


def _dropout(options: argparse.Namespace, device: torch.device) -> Figures:
    _refuse_config(options)
    return report_dropout(options.repeats)


def _loading(options: argparse.Namespace, device: torch.device) -> Figures:
    return report_loading(_transformer(options)[0], options.dtype, options.repeats)


def _import(options: argparse.Namespace, device: torch.device) -> Figures:
    _refuse_config(options)
    return report_importing(options.repeats)


CANDIDATES = {
    "windows": [1, 4],
    "serving": [1, 8],
    "published": [1, 16],
}  # of a caption, where nothing is said
ON_CPU = ("half", "dropout", "loading", "import")  # whatever else there is
BENCHMARKS: dict[str, Callable[[argparse.Namespace, torch.device], Figures]] = {
    "attention": _attention,
    "train": _train,
    "sample": _sample,
    "windows": _windows,
    "serving": _serving,
    "published": _published,
    "half": _half,
    "data": _data,
    "dropout": _dropout,
    "loading": _loading,
    "import": _import,
}


def _transformer(options: argparse.Namespace) -> tuple[TransformerConfig, Execution]:
    """The transformer of the config, and how it is run."""
    if not options.config:
        raise ValueError(f"{options.what} needs a config, such as paper/250m")
    config = load_config(options.config, options.overrides)
    if config.transformer is None:
        raise ValueError(f"{options.config}: stage {config.stage!r} has no transformer")
    return config.transformer, config.execution or Execution()


def _refuse_config(options: argparse.Namespace) -> None:
    if options.config:
        raise ValueError(f"{options.what} takes no config, got {options.config!r}")


def _integers(text: str) -> list[int]:
    """Numbers such as 1,8,64."""
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
