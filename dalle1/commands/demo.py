"""Trains all parts on the built-in shapes, then draws, ranks and reports.

    dalle1 demo [--runs runs/shapes] [--quick]
    python launch/demo.py [--runs runs/shapes] [--quick]      what `make demo` runs

    dalle1 demo --runs runs/mine --quick

When it is stopped, the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle1.commands.command_line import as_path, exit_status, make_parser, require_deepspeed
from dalle1.common.config import load_settings
from dalle1.common.files import check_writable, read_text, write_text
from dalle1.common.hardware import cpu_count, default_device, peak_memory
from dalle1.common.jobs import Job, run_together
from dalle1.evaluation import shapes_report as report
from dalle1.evaluation.benchmark import RESULT
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.plots import pyplot
from dalle1.evaluation.shapes_data import HELDOUT, UNSEEN, ShapesData
from dalle1.model import load
from dalle1.training.config import load_config
from dalle1.training.dataloader import with_built_in_data
from dalle1.training.distributed import free_port
from dalle1.training.metrics_logger import read_metrics

DALLE1 = ("-m", "dalle1")  # the command line, as Python's arguments
STAGES = ("dvae", "clip", "dalle")
MAX_RANKS = 4  # processes that encode or draw; each holds the model
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
    """Exit status 0, or that of the first stage that failed; 1 when a disk fails or is full, 2 for
    a mistake of the user's, 130 when stopped."""
    parser = make_parser("demo", __doc__)
    parser.add_argument(
        "--runs", type=as_path, default=Path("runs/shapes"), help="folder of the runs"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few updates only, to see that everything runs"
    )
    options = parser.parse_args(arguments)
    again = "the same command resumes"
    return exit_status(lambda: _demo(options), f"stopped; {again}", f"; {again}")


def _demo(options: argparse.Namespace) -> int:
    require_deepspeed("demo")
    check_writable(options.runs, "--runs")
    pyplot()  # refuses here what would fail after all training
    config = load_config("shapes/dvae", _overrides("dvae", options.runs, options.quick))
    seconds: dict[str, float] = {}
    # Before the stages, two of which would write it at once.
    images = str(with_built_in_data(config, barrier=lambda: None).data)
    sizes = (8, 4, 8, 2) if options.quick else (128, 64, 128, 8)
    rank_overrides = _rank_overrides(options.runs, config.reader.shapes_count, *sizes[:2])
    tokens_overrides = _tokens_overrides(options.runs, images)
    for jobs in (
        [_train_job(stage, options, at_once=2) for stage in ("dvae", "clip")],
        _ranks("tokens", "tokenize", tokens_overrides, options.runs),
        [_train_job("dalle", options)],
        _ranks("rank", "evaluate", rank_overrides, options.runs),
    ):
        status = run_together(jobs, seconds)
        if not status and any(_is_unfinished(job.name, options) for job in jobs):
            raise KeyboardInterrupt  # a stage that SIGTERM stops has saved and is content
        if status:
            return status
    start = time.monotonic()
    torch.manual_seed(0)
    summary = write_report(options.runs, rank_overrides, *sizes)
    seconds["report"] = time.monotonic() - start
    peak = peak_memory(torch.device("cpu"), children=True)  # of the largest process
    summary |= {"seconds": seconds, "peak_memory_gb": peak / 1e9}
    path = options.runs / "report" / "report.json"
    write_text(path, json.dumps(summary, indent=2) + "\n")
    show(summary, path.parent)
    return 0


def _overrides(stage: str, runs: Path, quick: bool) -> list[str]:
    """The settings of a stage's run that differ from its config."""
    overrides = [f"run={runs / stage}"]
    if stage == "dalle":
        overrides += [
            f"codec={runs / 'dvae' / 'model'}",
            f"ranker={runs / 'clip' / 'model'}",
            f"tokenizer={runs / 'clip'}",
            f"data={runs / 'tokens'}",
        ]
    if quick:
        overrides += [*QUICK[stage], "reader.shapes_count=500"]
        if stage == "clip":
            overrides.append("tokenizer.captions=500")
    return overrides


def _train_job(stage: str, options: argparse.Namespace, at_once: int = 1) -> Job:
    """Trains one stage, or what is left of it; at_once: stages that share the processor.

    The dVAE and CLIP need nothing of each other, and both are so small that they gain little from
    twice the cores. One process needs no launcher, which takes longer to start than the process.
    """
    overrides = _overrides(stage, options.runs, options.quick)
    if at_once > 1 and default_device().type == "cpu":
        overrides.append(f"threads={max(1, cpu_count() // at_once)}")
    command = [*DALLE1, "train", f"shapes/{stage}", *overrides, "--resume"]
    return Job(stage, command, options.runs / f"{stage}.log")


def _is_unfinished(name: str, options: argparse.Namespace) -> bool:
    """Whether a job is a stage that has updates left."""
    if name not in STAGES:
        return False
    overrides = _overrides(name, options.runs, options.quick)
    steps = load_config(f"shapes/{name}", overrides).steps
    done = [line["step"] for line in read_metrics(options.runs / name) if "step" in line]
    return not done or done[-1] < steps


def _tokens_overrides(runs: Path, images: str) -> list[str]:
    """The settings of the token shards that differ from their config."""
    return [f"data={images}", f"out={runs / 'tokens'}", f"codec={runs / 'dvae' / 'model'}"]


def _rank_overrides(runs: Path, training_captions: int, count: int, candidates: int) -> list[str]:
    """The settings of the ranking that differ from its config: of so many unseen captions, and
    half as many with held-out pairs of attributes."""
    return [
        f"model={runs / 'dalle' / 'model'}",
        f"run={runs / 'ranking'}",
        f"captions={count}",
        f"heldout_captions={count // 2}",
        f"candidates={candidates}",
        f"training_captions={training_captions}",
    ]


def _ranks(name: str, verb: str, overrides: list[str], runs: Path) -> list[Job]:
    """The ranks of a command, each of which does its share."""
    ranks = 1 if default_device().type == "cuda" else min(MAX_RANKS, cpu_count())
    command = [*DALLE1, verb, f"shapes/{name}", *overrides]
    if ranks == 1:
        return [Job(name, command)]
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": str(max(1, cpu_count() // ranks)),
    }
    return [
        Job(
            name, command, runs / f"{name}-{i}.log", shared | {"RANK": str(i), "LOCAL_RANK": str(i)}
        )
        for i in range(ranks)
    ]


def write_report(
    runs: Path, rank_overrides: list[str], count: int, candidates: int, drawn: int, keep: int
) -> dict[str, object]:
    """Reports on what was ranked, with a contact sheet.

    Args:
        runs: folder of the runs.
        rank_overrides: the settings of the ranking that differ from its config.
        count: unseen captions.
        candidates: drawn for each of them.
        drawn: candidates of each caption on the contact sheet.
        keep: the best of those, which the sheet shows.

    Returns:
        The numbers of report.json.
    """
    folder = runs / "report"
    folder.mkdir(parents=True, exist_ok=True)
    settings = load_settings(RankSettings, "shapes/rank", rank_overrides)
    model, data = load(settings.model), ShapesData(settings)
    prompts = data.prompts()
    groups = json.loads(read_text(runs / "ranking" / RESULT))["groups"]
    summary: dict[str, object] = {"captions": count, "candidates": candidates}
    for split, name in (("test", UNSEEN), ("heldout", HELDOUT)):
        curves = groups[name]["curves"]
        accuracy = {n: point["mean"] for n, point in curves["accuracy"].items()}
        summary[split] = {
            "reconstruction": report.reconstruction_accuracy(
                model, data, [p for p in prompts if p.group == name]
            ),
            "single_draw": accuracy["1"],
            "clip_best": accuracy[str(candidates)],
            "oracle_best": curves["oracle"][str(candidates)]["mean"],
            "best_of_n": accuracy,
        }
    report.plot_losses({name: read_metrics(runs / name) for name in STAGES}, folder / "losses.png")
    report.sample_sheet(model, list(CAPTIONS), drawn, keep).save(folder / "sheet.png")
    return summary


def show(summary: dict[str, object], folder: Path) -> None:
    """Prints the few numbers that matter and where the rest is."""
    n = summary["candidates"]
    print(f"\n{'of captions, shown exactly':34}{'unseen':>10}{'held-out':>10}")
    for key, label in (
        ("reconstruction", "dVAE's copy of a true image"),
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
