"""Paths as users type them: the home folder, and places that cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dalle1
import dvae
from dalle1 import Model
from dalle1.clip.tokenizer import CLIPTokenizer
from dalle1.commands import benchmark, demo, evaluate, sample, settings
from dalle1.commands import main as cli
from dalle1.commands.data import inspect
from dalle1.common.config import save_settings
from dalle1.data import shapes
from dalle1.data.curation.filter_shards import filter_shards
from dalle1.data.curation.filters import FilterSettings
from dalle1.data.curation.inspect import inspect as inspect_data
from dalle1.data.curation.write_shards import write_shards
from dalle1.tokenizer import Tokenizer
from dalle1.training.config import load_config
from dalle1.training.metrics_logger import METRICS, read_metrics
from dalle1.training.stages.text_tokenizer import open_tokenizer
from tests.conftest import CAPTIONS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model, shards and pairs; the working folder is an empty one."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model.save(home / "model")
    shapes.write_shards(home / "shards", "train", 4, side=16)
    pairs = home / "pairs"
    pairs.mkdir()
    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(pairs / f"{i}.png")
        (pairs / f"{i}.txt").write_text(caption, encoding="utf-8")
    return home


def test_options_know_the_home_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder called `~`, or a file in it that does not exist, since a shell expands no
    `--out=~/x`."""
    model, few = "--model=~/model", ["--candidates=2", "--keep=1"]
    assert cli.main(["sample", "a red cat", model, *few, "--out=~/a/b"]) == 0
    assert cli.main(["rank", "a red cat", "~/a/b/sheet.png", "~/pairs/0.png", model]) == 0
    rows = ["--image=~/image.png", "--rows=1"]
    Image.new("RGB", (8, 8)).save(home / "image.png")
    assert cli.main(["sample", "a red cat", model, *few, *rows, "--out=~/rows"]) == 0
    assert cli.main(["data", "inspect", "~/pairs", "--sheet=~/sheets/x.png"]) == 0
    assert cli.main(["data", "inspect", "~/shards/train-{00000..00000}.tar"]) == 0
    assert cli.main(["data", "shard", "~/pairs", "~/packed"]) == 0
    assert cli.main(["data", "filter", "~/shards", "~/kept", "--report=~/reports/x.json"]) == 0
    lines = ["data: ~/shards", "codec: ~/model", "out: ~/tokens", "grid: 4"]
    (home / "tokens.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert cli.main(["tokenize", "~/tokens.yaml"]) == 0
    assert cli.main(["tokenize", "~/tokens.yaml", "out=~/again", "data=~/shards"]) == 0
    for name in ("a/b/sheet.png", "rows/sheet.png", "sheets/x_captions.txt", "packed/000000.tar"):
        assert (home / name).is_file()
    for name in ("kept", "reports/x.json", "tokens", "again"):
        assert (home / name).exists()
    assert not list(Path.cwd().iterdir()), capsys.readouterr()


def test_arguments_know_the_home_folder(
    home: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dalle1.load("~/model")` that finds nothing, or a save that makes a folder called `~`."""
    assert dalle1.load("~/model").prior.grid == (4, 4)
    assert dalle1.load(Path("~/model")).prior.grid == (4, 4)
    monkeypatch.setenv("DALLE1_MODEL", "~/model")
    for given in (None, "~/model", Path("~/model")):
        result = dalle1.sample("a red cat", given, candidates=2, keep=1, progress=False)
        assert dalle1.rank("a red cat", result.images[0], given).shape == (1,)
    assert result.save("~/result") == home / "result"
    model.save("~/saved")
    assert isinstance(dvae.load("~/saved"), dvae.DVAE)
    codec = model.codec
    assert isinstance(codec, dvae.DVAE)
    codec.save("~/codec")
    dvae.load("~/codec")
    torch.save(codec.encoder.state_dict(), home / "e.pt")
    torch.save(codec.decoder.state_dict(), home / "d.pt")
    dvae.load_released("~/e.pt", "~/d.pt")
    with pytest.raises(ValueError, match="no CLIP"):
        dalle1.clip.load_released("~/e.pt")
    with pytest.raises(ValueError, match="expected a line of version"):
        CLIPTokenizer.from_published("~/pairs/0.txt")
    tokenizer = Tokenizer.load("~/model/tokenizer.json")
    tokenizer.save("~/t/tokenizer.json")
    assert open_tokenizer("~/t").reads_like(tokenizer)
    inspect_data("~/pairs")
    write_shards("~/pairs", "~/packed")
    filter_shards("~/packed", "~/filtered", FilterSettings(duplicates="off"))
    shapes.write_shards("~/shapes", "test", 2, side=16)
    config = load_config(ROOT / "configs" / "shapes" / "dvae.yaml", ["run=~/run"])
    assert config.run == f"{home}/run"
    save_settings(config, home / "config.yaml")
    assert load_config("~/config.yaml") == config
    (home / METRICS).write_text(json.dumps({"step": 1}) + "\n", encoding="utf-8")
    assert read_metrics("~") == [{"step": 1}]
    names = {path.name for path in home.iterdir()}
    assert {"saved", "codec", "t", "packed", "filtered", "shapes", "result"} <= names
    assert not list(Path.cwd().iterdir())


def test_an_empty_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """`--out "$OUT"` with a variable that is not set, which would fill the working folder."""
    for arguments in (["sample", "a", "--out="], ["data", "filter", "x", ""], ["rank", "a", ""]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert "expected a path, got an empty text" in capsys.readouterr().err


def no_work(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("the work began")


def start(command: str, place: str, home: Path) -> int:
    """Runs a command that writes to a place."""
    (home / "tokens.yaml").write_text(
        f"data: {home}/shards\ncodec: {home}/model\nout: x\ngrid: 4", encoding="utf-8"
    )
    (home / "rank.yaml").write_text(
        f"data: {home}/pairs\nmodel: {home}/model\nrun: x\ncandidates: 2", encoding="utf-8"
    )
    dvae_config = str(ROOT / "configs" / "shapes" / "dvae.yaml")
    commands: dict[str, list[str]] = {
        "sample": ["a red cat", f"--model={home}/model", f"--out={place}"],
        "evaluate": [f"{home}/rank.yaml", f"run={place}"],
        "tokenize": [f"{home}/tokens.yaml", f"out={place}"],
        "train": [dvae_config, f"run={place}", f"data={home}/shards"],
        "data shard": [f"{home}/pairs", place],
        "data filter": [f"{home}/shards", place],
        "demo": [f"--runs={place}"],
    }
    return cli.main([*command.split(), *commands[command]])


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "sample", no_work)
    monkeypatch.setattr(evaluate, "run", no_work)
    monkeypatch.setattr("dalle1.evaluation.run.load", no_work)
    monkeypatch.setattr("dalle1.training.engine.start_processes", lambda: (0, 1))
    monkeypatch.setattr("dalle1.training.trainer.start_processes", no_work)
    monkeypatch.setattr("dalle1.data.precompute.encode._encoded", no_work)
    monkeypatch.setattr("dalle1.data.curation.write_shards._in_threads", no_work)
    monkeypatch.setattr("dalle1.data.curation.filter_shards._filter_all", no_work)
    monkeypatch.setattr(demo, "run_together", no_work)
    monkeypatch.setattr(demo, "with_built_in_data", no_work)
    monkeypatch.setattr(inspect, "inspect", no_work)
    monkeypatch.setattr(benchmark, "BENCHMARKS", dict.fromkeys(benchmark.BENCHMARKS, no_work))


@pytest.mark.parametrize(
    "command", ["sample", "evaluate", "tokenize", "train", "data shard", "data filter", "demo"]
)
@pytest.mark.usefixtures("without_work")
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or the status of a failed disk, after hours of drawing or training."""
    file = home / "file"
    file.write_text("kept", encoding="utf-8")
    for place in (str(file), f"{file}/below/x", "/proc/x", "/sys/x", f"{home}/{'x' * 300}"):
        before = sorted(home.iterdir())
        assert start(command, place, home) == 2, place
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("error: "), said
        assert str(place) in said[0] and ("file" in said[0] or "folder" in said[0])
        assert {*home.iterdir()} - {home / "tokens.yaml", home / "rank.yaml"} == {*before} - {
            home / "tokens.yaml",
            home / "rank.yaml",
        }
    assert file.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("name", ["sheet.png", "result.json"])
@pytest.mark.usefixtures("without_work")
def test_a_file_of_the_images_that_is_in_the_way_is_refused_before_the_work(
    name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in the place of `result.json` that is found when all is drawn."""
    (home / "images" / name).mkdir(parents=True)
    assert start("sample", f"{home}/images", home) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: --out: expected a file") and f"{name}' (it is a folder)" in said


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--sheet", ["data", "inspect", "pairs"]),
        ("--report", ["data", "filter", "shards", "out"]),
        ("--out", ["benchmark", "attention"]),
        ("--figure", ["benchmark", "half"]),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.usefixtures("without_work")
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    option: str,
    arguments: list[str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same for a file: the name of a folder or a device, a file in place of its folder."""
    monkeypatch.chdir(home)
    (home / "folder.png").mkdir()
    (home / "file").write_text("kept", encoding="utf-8")
    (home / "null.png").symlink_to("/dev/null")
    places = ("folder.png", "file/x.png", "/proc/x/y.png", f"{'x' * 300}.png", "null.png")
    for place in places:
        assert cli.main([*arguments, f"{option}={place}"]) == 2, place
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith(f"error: {option}: expected a "), said
    assert not (home / "out").exists() and (home / "null.png").is_symlink()


def test_a_missing_folder_of_a_file_is_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures lost after the measurement since their folder is not there."""
    figures: Callable[..., dict[str, Any]] = lambda options, device: {"x": 1}  # noqa: E731
    monkeypatch.setattr(benchmark, "BENCHMARKS", {**benchmark.BENCHMARKS, "attention": figures})
    assert cli.main(["benchmark", "attention", "--out=~/new/figures.json"]) == 0
    assert json.loads((home / "new/figures.json").read_text(encoding="utf-8"))["results"]


def test_the_page_of_settings_is_checked(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dalle1 settings --write` where the page is a folder: a traceback."""
    (home / "config.md").mkdir()
    monkeypatch.setattr(settings, "PAGE", home / "config.md")
    assert cli.main(["settings", "--write"]) == 2
    assert capsys.readouterr().err.startswith("error: --write: expected a file that can be")


def test_a_sheet_that_nothing_can_write_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kind of image that can be read alone, noticed when all is inspected."""
    for name in ("x.psd", "x.txt", "x"):
        assert cli.main(["data", "inspect", f"{home}/pairs", f"--sheet={home}/{name}"]) == 2
        assert "--sheet: expected a name that ends in .png" in capsys.readouterr().err
    assert cli.main(["data", "inspect", f"{home}/pairs", f"--sheet={home}/X.PNG"]) == 0
