"""All findings of the table: what they declare, and that one run of each goes through."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle1.commands import findings as command
from dalle1.commands.findings import main
from dalle1.findings import dvae_runs
from dalle1.findings import photographs as photographs_module
from dalle1.findings.base import Options
from dalle1.findings.results import runs_of
from dalle1.findings.runner import run_findings
from dalle1.findings.table import MODULES, all_findings, find
from dalle1.findings.workspace import fingerprint
from dalle1.training.signals import Interrupted
from tests.findings.conftest import Written, write_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (160, 200, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, since they share parts."""
    return tmp_path_factory.mktemp("findings")


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory, photographs: Path, written: Written) -> Options:
    """All that findings ask the user for."""
    data, packages, dataset = written
    model = write_model(tmp_path_factory.mktemp("emoji-model"), dataset, 0.5)
    return Options(photographs=photographs, model=model, emoji=data, packages=packages)


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize("name", MODULES)
def test_arms_differ_in_their_settings(name: str, named: Options) -> None:
    """Arms that run alike, so that no difference is found; seeds that make the same run."""
    finding = find(name)
    assert finding.name == name
    runs = runs_of(finding, [0, 1], named, Path("out"))
    assert len({fingerprint(run.settings) for run in runs}) == 2 * len(finding.arms)
    assert len({run.path for run in runs}) == len(runs)
    trial = runs_of(finding, [0, 1], replace(named, scale=0.02), Path("out"))
    assert not {run.path for run in runs} & {run.path for run in trial}
    json.dumps([run.settings for run in runs], allow_nan=False)


@pytest.mark.parametrize("name", MODULES)
def test_documented(name: str) -> None:
    """A finding that no page tells of."""
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert f"dalle1 findings {name}" in text and f"{name}.png" in text
    claim = " ".join(find(name).claim.split())
    assert claim in " ".join(text.split())


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dVAEs of findings, as narrow as can be."""
    for module in (dvae_runs, photographs_module):
        path = tmp_path / Path(module.CONFIG).name
        path.write_text(f"extends: {module.CONFIG}\ndvae: {{width: 4, bottleneck: 4}}\n")
        monkeypatch.setattr(module, "CONFIG", str(path))
        monkeypatch.setattr(module, "POINTS", 2)


@pytest.mark.usefixtures("narrow", "kinds")
@pytest.mark.parametrize("name", MODULES)
def test_a_run_of_each_goes_through(
    name: str, out: Path, named: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finding that fails after an hour of others: settings that do not fit, a measure that is
    not there."""
    monkeypatch.chdir(ROOT)
    finding = find(name)
    first, last = finding.arms[0], finding.arms[-1]
    short = replace(finding, arms=(first, last), predictions=(), reference=None)
    assert run_findings([short], [0], replace(named, scale=0.002), out, threads=1)
    folder = out / f"{name}-scale-0.002"
    found = json.loads((folder / "report.json").read_text())
    for arm in short.arms:
        assert found["arms"][arm.name].keys() == {m.name for m in finding.measures}
    assert (folder / f"{name}.png").exists() and not list((folder / "work").iterdir())


def test_list_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    """A finding that nobody knows of before it runs for an hour."""
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for finding in all_findings():
        assert (
            finding.name in text and finding.claim in text and f"{finding.minutes:.0f} min" in text
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "NAME: expected kl-weight"),
        ([], "NAME: expected names of findings, or all, got []"),
        (["all", "kl-weight"], "NAME: expected names"),
        (["photographs"], "--photographs: expected a folder"),
        (["completion"], "--model: expected the folder of a model trained on emoji"),
        (["kl-weight", "--seeds", "1", "1"], "--seeds: expected different"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or a mistake that is found after the first runs."""
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "101", "x"])
def test_scale_is_checked(scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of no updates."""
    with pytest.raises(SystemExit):
        main(["kl-weight", f"--scale={scale}"])
    assert "expected a number in (0, 100]" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stop_is_no_failure(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A night that is stopped and looks broken, or Ctrl-C that a script takes for the end."""

    def stopped(*arguments: object) -> bool:
        raise Interrupted("stopped after update 3; a checkpoint is saved", number)

    monkeypatch.setattr(command, "run_findings", stopped)
    assert main(["kl-weight"]) == status
    assert "the same command resumes" in capsys.readouterr().err


def test_the_list_needs_no_deepspeed() -> None:
    """A list of claims that waits for what only training needs, or cannot be shown without it."""
    code = (
        "import sys; sys.modules['deepspeed'] = None; sys.modules['matplotlib'] = None\n"
        "from dalle1.commands.findings import main; sys.exit(main(['--list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "kl-weight" in done.stdout, done.stderr
