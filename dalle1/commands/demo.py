"""Trains the three stages on the built-in shapes, then draws, ranks and judges: `make demo`.

    python launch/demo.py [--runs runs/shapes] [--quick]

Goes on where it stopped when run again. --quick trains each stage for a few updates, to see that
everything runs; its pictures are noise.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle1.commands.command_line import make_parser
from dalle1.common.config import load_settings
from dalle1.common.hardware import peak_memory
from dalle1.evaluation import shapes_report as report
from dalle1.evaluation.benchmark import RESULT
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.prompts import HELDOUT, UNSEEN
from dalle1.evaluation.run import prepare, run
from dalle1.training.config import load_config
from dalle1.training.metrics_logger import read_metrics

STAGES = ("dvae", "clip", "dalle")
QUICK = {
    "dvae": ["steps=60", "dvae_training.warm_start_steps=30", "dvae.codebook_size=64"],
    "clip": ["steps=10"],
    "dalle": ["steps=10", "transformer.image_vocab=64"],
}
CAPTIONS = (
    "a small green square to the left of a big yellow triangle",
    "a large red circle above a little blue square",
    "the tiny cyan cross is below the huge orange triangle",
    "there is a big purple square on a white background",
    "a little pink triangle on the right of a small blue circle",
    "a big orange circle under a large cyan square on a black background",
    "a picture of a small red cross over a big green circle",
    "a yellow square left of a purple circle on a grey background",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is not trained yet and writes the report; exit status of the first failure."""
    parser = make_parser("demo", __doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="a few updates only")
    options = parser.parse_args(arguments)
    seconds: dict[str, float] = {}
    overrides = {name: [f"run={options.runs / name}"] for name in STAGES}
    overrides["dalle"] += [f"{n}_model={options.runs / n / 'model'}" for n in ("dvae", "clip")]
    for name in STAGES:
        if options.quick:
            overrides[name] += [*QUICK[name], "reader.shapes_count=500"]
            if name == "clip":
                overrides[name].append("tokenizer.captions=500")
        start = time.monotonic()
        # A port of its own: the launcher's default collides with any other run on the machine.
        command = ["deepspeed", "--num_accelerators", "1", "--master_port", str(free_port())]
        command += ["launch/train.py", f"configs/shapes/{name}.yaml", *overrides[name], "--resume"]
        print("\n$ " + " ".join(command), flush=True)
        code = subprocess.run(command).returncode
        if code:
            return code
        seconds[name] = time.monotonic() - start

    start = time.monotonic()
    torch.manual_seed(0)
    sizes = (8, 4, 8, 2) if options.quick else (128, 64, 512, 8)
    try:
        summary = write_report(options.runs, overrides["dvae"], *sizes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds["report"] = time.monotonic() - start
    peak = peak_memory(torch.device("cpu"), children=True)
    summary |= {"seconds": seconds, "peak_memory_gb": peak / 1e9}
    path = options.runs / "report" / "report.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    show(summary, path.parent)
    return 0


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_report(
    runs: Path, dvae_overrides: list[str], count: int, candidates: int, drawn: int, keep: int
) -> dict[str, object]:
    """Judges `count` unseen captions, half as many with held-out pairs; writes the pictures."""
    folder = runs / "report"
    folder.mkdir(parents=True, exist_ok=True)
    reader = load_config("configs/shapes/dvae.yaml", dvae_overrides).reader
    settings = load_settings(
        RankSettings,
        "configs/shapes/rank.yaml",
        [
            f"model={runs / 'dalle' / 'model'}",
            f"run={runs / 'ranking'}",
            f"captions={count}",
            f"heldout_captions={count // 2}",
            f"candidates={candidates}",
            f"training_captions={reader.shapes_count}",
        ],
    )
    prepared = prepare(settings)
    model, prompts = prepared.model, prepared.prompts
    run(prepared, settings)
    groups = json.loads((runs / "ranking" / RESULT).read_text())["groups"]
    summary: dict[str, object] = {"captions": count, "candidates": candidates}
    for split, name in (("test", UNSEEN), ("heldout", HELDOUT)):
        curves = groups[name]["curves"]
        accuracy = {n: point["mean"] for n, point in curves["accuracy"].items()}
        summary[split] = {
            "reconstruction": report.reconstructed(model, [p for p in prompts if p.group == name]),
            "single_draw": accuracy["1"],
            "clip_best": accuracy[str(candidates)],
            "oracle_best": curves["oracle"][str(candidates)]["mean"],
            "best_of_n": accuracy,
        }
    report.plot_losses({name: read_metrics(runs / name) for name in STAGES}, folder / "losses.png")
    report.sheet(model, list(CAPTIONS), drawn, keep).save(folder / "sheet.png")
    return summary


def show(summary: dict[str, object], folder: Path) -> None:
    """Prints the few numbers that matter and where the rest is."""
    n = summary["candidates"]
    print(f"\n{'of captions, shown exactly':34}{'unseen':>10}{'held-out':>10}")
    for key, label in (
        ("reconstruction", "dVAE's copy of a true picture"),
        ("single_draw", "a single draw"),
        ("clip_best", f"CLIP's first of {n}"),
        ("oracle_best", f"at least one of {n} (oracle)"),
    ):
        cells = [100 * summary[split][key] for split in ("test", "heldout")]  # type: ignore[index]
        print(f"{label:34}" + "".join(f"{cell:9.1f}%" for cell in cells))
    seconds: dict[str, float] = summary["seconds"]  # type: ignore[assignment]
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"time: {times}; peak memory {summary['peak_memory_gb']:.1f} GB")
    for name in ("sheet.png", "losses.png", "report.json"):
        print(f"  {folder / name}")
    print(f"  {folder.parent / 'ranking' / 'index.html'}")
    print(f'try: dalle1 sample "a big red cross" --model {folder.parent / "dalle" / "model"}')


if __name__ == "__main__":
    sys.exit(main())
