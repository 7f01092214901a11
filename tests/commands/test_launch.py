"""The scripts behind the README's commands, run as a user runs them."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dalle1 import Model
from dalle1.commands import benchmark, demo, evaluate, tokenize, train
from dalle1.commands import main as cli
from dalle1.common.jobs import Job
from dalle1.evaluation.run import FILES
from dalle1.training.distributed import free_port
from dalle1.training.metrics_logger import read_metrics
from tests.forks import Forked

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


MAINS = {"train": train.main, "tokenize": tokenize.main, "evaluate": evaluate.main}


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_demo_from_shards_to_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make demo` broken in a step that no other test runs; a few updates through DeepSpeed.

    DeepSpeed's launcher itself, which takes longer to start than to train, runs the first stage.
    """
    log = tmp_path / "log.txt"

    def run_forked(jobs: list[Job], seconds: dict[str, float]) -> int:
        forks = []
        for job in jobs:
            module, package, verb, *arguments = job.command
            assert (module, package) == ("-m", "dalle1")
            seconds[job.name] = 1.0
            if "shapes/dvae" in arguments:
                options = ["--num_accelerators", "1", "--master_port", str(free_port())]
                command = ["deepspeed", *options, "--module", "dalle1.train", *arguments]
                assert subprocess.run(command, env=ENVIRONMENT).returncode == 0
                continue
            main = MAINS[verb]
            environment = ENVIRONMENT | job.environment
            forks.append(Forked(main, arguments, log=log, environment=environment))
        return max((fork.wait() for fork in forks), default=0)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "run_together", run_forked)
    status = demo.main(["--quick", "--runs", str(tmp_path / "runs")])
    printed, errors = capfd.readouterr()
    assert status == 0, printed[-2000:] + errors[-4000:] + log.read_text()[-4000:]
    report = tmp_path / "runs" / "report"
    numbers = json.loads((report / "report.json").read_text())
    for split in ("test", "heldout"):
        assert set(numbers[split]["best_of_n"]) == {"1", "2", "4"}
        assert 0 <= numbers[split]["single_draw"] <= numbers[split]["oracle_best"] <= 1
    for name in ("sheet.png", "losses.png"):
        with Image.open(report / name) as picture:
            assert picture.width > 300
        assert name in printed
    ranking = tmp_path / "runs" / "ranking"
    assert all((ranking / name).is_file() for name in FILES)
    results = json.loads((ranking / "ranking.json").read_text())
    assert set(results["groups"]) == {"unseen captions", "held-out pairs"}
    for group in results["groups"].values():
        claimed = [name for name, curve in group["curves"]["attributes"].items() if curve]
        assert {"count", "color", "shape"} <= set(claimed)
        assert 0 <= group["pictures"]["0"]["4"]["accuracy"]["mean"] <= 1
    # What the demo's last line tells the user to try.
    out = tmp_path / "out"
    model = str(tmp_path / "runs" / "dalle" / "model")
    flags = ["--model", model, "--candidates", "4", "--keep", "2", "--out", str(out)]
    assert cli.main(["sample", "a big red cross", *flags]) == 0
    pictures = sorted(str(path) for path in out.glob("000-*.png"))
    assert len(pictures) == 2 and (out / "sheet.png").is_file()
    assert cli.main(["rank", "a big red cross", *pictures, "--model", model]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "workers", "cold"),
    [(signal.SIGINT, 130, 0, True), (signal.SIGTERM, 0, 2, False)],
    ids=["Ctrl-C", "the scheduler's warning"],
)
def test_signal_saves_and_resume_goes_on(
    number: signal.Signals, status: int, workers: int, cold: bool, tmp_path: Path
) -> None:
    """Work lost at a signal, or a message that does not say how to go on; a scheduler that takes
    the stop for a failure; data workers that die of the signal before the rank has saved."""
    command = [
        *("configs/shapes/dvae.yaml", "steps=80", "log_every=1", "contact_sheet_every=null"),
        *("dvae_training.warm_start_steps=40", "dvae.codebook_size=32", "dvae.width=8"),
        *("reader.shapes_count=64", f"reader.shapes_folder={tmp_path / 'data'}"),
        *(f"run={tmp_path / 'run'}", f"reader.workers={workers}"),
    ]
    log = tmp_path / "log.txt"
    process = start_training(command, log, cold)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal and a scheduler do: all processes at once
    assert process.wait() == status, log.read_text()[-2000:]
    assert "--resume" in log.read_text()
    again = start_training([*command, "--resume"], tmp_path / "again.txt", cold=False)
    assert again.wait() == 0, (tmp_path / "again.txt").read_text()[-2000:]
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 81))


def start_training(command: list[str], log: Path, cold: bool) -> subprocess.Popen[bytes] | Forked:
    """Starts `launch/train.py` in a process group of its own, from nothing or as a fork."""
    if not cold:
        return Forked(train.main, command, log=log, environment=ENVIRONMENT, session=True)
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "launch/train.py", *command],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def test_train_names_mistakes_without_a_traceback(tmp_path: Path) -> None:
    """A wall of text in which the one line that matters drowns."""
    run = f"run={tmp_path / 'run'}"  # the default folder may hold the demo's
    done = launch("launch/train.py", "configs/shapes/dvae.yaml", "data=none/{0..3}.tar", run)
    assert done.returncode == 2
    assert "error: data: none/0.tar does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_cli_names_a_missing_device(
    capsys: pytest.CaptureFixture[str], model: Model, tmp_path: Path
) -> None:
    """A traceback, or the CPU without a word, where a device is asked for that is not there."""
    model.save(tmp_path)
    command = ["sample", "a cat", "--model", str(tmp_path), "--candidates", "1", "--keep", "1"]
    assert cli.main([*command, "--device", "cuda:99", "--out", str(tmp_path / "out")]) == 2
    assert "--device cuda:99" in capsys.readouterr().err
    half = ["--dtype", "bfloat16", "--out", str(tmp_path / "out")]
    assert cli.main([*command, *half]) == 0
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_cli_names_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A traceback for a folder that is no model."""
    assert cli.main(["sample", "a circle", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["attention", "train", "sample"])
def test_benchmark(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark that fails, measures one variant twice, or counts FLOPs of another model."""
    out = tmp_path / "figures.json"
    command = [what, "configs/paper/250m.yaml", "--batch", "1", "--repeats", "2", "--out", str(out)]
    sizes = {"width": 16, "heads": 2, "head_size": 8, "layers": 2, "grid": 6, "text_length": 8}
    command += [f"transformer.{name}={value}" for name, value in sizes.items()]
    command += ["transformer.text_vocab=50", "transformer.image_vocab=60"]
    if what == "sample":
        command += ["--candidates", "3"]
    assert benchmark.main([*command, "execution.compile=false"]) == 0
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())["results"]
    if what == "attention":
        assert results.keys() == {"row", "column", "conv"}
        assert all(ways.keys() == {"causal", "dense mask", "ours"} for ways in results.values())
        assert all(len(w["seconds"]) == 2 for ways in results.values() for w in ways.values())
    elif what == "sample":
        assert "100.0% of the tokens are equal" in printed and "of the roofline" in printed
        assert all(len(results["3"][w]["seconds"]) == 6 for w in ("ours", "plain cache"))
        assert results["3"]["ours"]["memory"] < results["3"]["plain cache"]["memory"]
    else:
        assert results.keys() == {"dense mask", "ours"} and "MFU = FLOPs" in printed
        assert all(w["memory"] > 0 and w["tokens_per_second"] > 0 for w in results.values())


def test_benchmark_names_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for a config without a transformer, or for no config."""
    assert benchmark.main(["train", "configs/paper/dvae.yaml"]) == 2
    assert "has no transformer" in capsys.readouterr().err
    assert benchmark.main(["train"]) == 2
    assert "needs a config" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_scripts_do_not_hide_modules_of_python(script: str, tmp_path: Path) -> None:
    """launch/tokenize.py imported in place of Python's own, by whatever reads source files."""
    log = tmp_path / "log.txt"
    assert Forked(import_tokenize_after, script, log=log).wait() == 0, log.read_text()
    assert Path(log.read_text().strip()).parent == Path(os.__file__).parent


def import_tokenize_after(script: str) -> None:
    """Prints which file is `tokenize` once a script of launch/ has set its path."""
    sys.path.insert(0, str(ROOT / "launch"))
    runpy.run_path(str(ROOT / "launch" / script))
    sys.modules.pop("tokenize", None)
    print(importlib.import_module("tokenize").__file__)
