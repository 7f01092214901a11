"""The notebooks of examples/: run from the first cell to the last, as a reader runs them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from dalle1 import CLIP, CLIPConfig, Model, Tokenizer, Transformer, TransformerConfig, models
from dalle1.common.png_settings import read_png_settings
from dvae import DVAE, DVAEConfig
from tests.published.every_family import write_mindalle

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
Run = Callable[[str], Any]


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any, kind: str) -> list[str]:
    """What all cells show of a kind of content, such as image/png."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def printed(notebook: Any) -> str:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a notebook in an empty folder; a cell that raises is an error."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("DALLE1_MODEL", raising=False)

    def execute(name: str) -> Any:
        notebook = read(name)
        folder = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, kernel_name="python3", timeout=None, resources=folder).execute()
        assert all(o.output_type != "error" for cell in code(notebook) for o in cell.outputs)
        return notebook

    return execute


def random_model() -> Model:
    """All parts at random, for images of 32 x 32 pixels and captions of the built-in shapes."""
    torch.manual_seed(0)
    captions = ["a noto emoji of a frog", "a big red circle above a little blue square"]
    tokenizer = Tokenizer.train(captions, vocab_size=300, text_length=64)
    transformer = TransformerConfig(
        width=16,
        layers=2,
        heads=2,
        head_size=8,
        text_vocab=tokenizer.vocab_size,
        text_length=64,
        image_vocab=16,
        grid=8,
    )
    codec = DVAEConfig(width=8, bottleneck=8, groups=3, blocks_per_group=1, codebook_size=16)
    clip = CLIPConfig(
        embedding=8,
        image_size=32,
        patch_size=16,
        vision_width=8,
        vision_layers=1,
        vision_heads=2,
        text_vocab=tokenizer.vocab_size + 2,
        text_length=64,
        text_width=8,
        text_layers=1,
        text_heads=2,
    )
    return Model(tokenizer, Transformer(transformer), DVAE(codec), CLIP(clip))


def test_there_are_four() -> None:
    """A notebook that no test runs."""
    assert NOTEBOOKS.keys() == {
        "best_of_n_curve",
        "first_pictures",
        "public_checkpoints",
        "train_on_your_own_pictures",
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_without_outputs(name: str) -> None:
    """Megabytes of images in every commit, or somebody's paths in a public file."""
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.source
    assert all(not cell.metadata for cell in notebook.cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert NOTEBOOKS[name].stat().st_size < 20_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_begins_with_what_it_shows_and_costs(name: str) -> None:
    """A reader who waits for hours, or changes a number in one cell and not in another."""
    first, settings_title, settings, *rest = read(name).cells
    assert first.cell_type == settings_title.cell_type == "markdown"
    assert re.match(r"# \S", first.source) and settings_title.source.startswith("## Settings")
    for heading in ("**What it shows.**", "**What it costs.**", "It needs "):
        assert heading in first.source
    assert re.search(r"second|minute|hour|GB", first.source.split("**What it costs.**")[1])
    constants = re.findall(r"^([A-Z_]+) = ", settings.source, re.M)
    assert len(constants) >= 4
    later = "\n".join(cell.source for cell in rest)
    for constant in constants:
        assert re.search(rf"\b{constant}\b", later), f"{constant} is never used"
        assert not re.search(rf"^{constant} = ", later, re.M), f"{constant} is set twice"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_names_what_there_is(name: str) -> None:
    """A page, a folder or a notebook that a reader is sent to and does not find."""
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for found in re.findall(r"`(docs/[^`]+|configs/[^`]+)`", text):
        assert (ROOT / found).exists(), found
    assert set(re.findall(r"`(\w+)\.ipynb`", text)) <= NOTEBOOKS.keys()
    assert text.isascii()  # no quotes or dashes that keyboards do not have


@pytest.mark.slow
def test_first_pictures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that a newcomer runs, broken; previews that a kernel does not show."""
    if models.DEFAULT not in models.names():
        random_model().save(tmp_path / "model")
        monkeypatch.setenv("DALLE1_MODEL", str(tmp_path / "model"))
    notebook = run("first_pictures")
    # The cell of the preview, the image drawn again, three temperatures, a completion.
    assert len(shown(notebook, "text/html")) == 6 == len(shown(notebook, "image/png"))
    files = sorted((tmp_path / "out").glob("000-*.png"))
    assert len(files) == 4
    found = read_png_settings(files[0])
    assert found is not None and str(found["candidate"]) in printed(notebook)
    drawing = next(cell for cell in code(notebook) if "preview=True" in cell.source)
    displays = [o for o in drawing.outputs if o.output_type == "display_data"]
    assert len(displays) == 1 and "<table>" in displays[0].data["text/html"]


@pytest.mark.slow
def test_train_on_your_own_pictures(run: Run, tmp_path: Path) -> None:
    """A command of the way from a folder of images to a model that no longer runs."""
    notebook = run("train_on_your_own_pictures")
    runs = tmp_path / "runs" / "mine"
    for part in ("dvae", "clip", "dalle", "more"):
        assert (runs / part / "model" / "config.json").is_file(), part
    assert "loss" in printed(notebook) and len(shown(notebook, "text/html")) == 2
    assert len(shown(notebook, "image/png")) == 5  # an image, two sheets, two results


@pytest.mark.slow
def test_public_checkpoints(run: Run, tmp_path: Path) -> None:
    """An import that the notebook calls otherwise than the command is."""
    archive, _ = write_mindalle(tmp_path / "downloads")
    assert archive == tmp_path / "downloads" / "1.3B.tar.gz"
    notebook = run("public_checkpoints")
    said = printed(notebook)
    assert "mindalle" in said and "license of the weights" in said
    (card,) = shown(notebook, "text/markdown")
    assert "minDALL-E" in card and "CC-BY-NC-SA" in card
    assert "tensor([[" in said and len(shown(notebook, "text/html")) == 1


def test_public_checkpoints_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader without the files who is told a path and not what to do."""
    monkeypatch.chdir(tmp_path)
    settings, *rest = (cell.source for cell in code(read("public_checkpoints")))
    importing = next(source for source in rest if "FileNotFoundError" in source)
    with pytest.raises(FileNotFoundError, match=r"1\.3B\.tar\.gz: download a model"):
        exec(f"{settings}\n{importing}", {})


@pytest.mark.slow
def test_best_of_n_curve(run: Run, tmp_path: Path) -> None:
    """A curve that the notebook looks for under another name than the command writes."""
    random_model().save(tmp_path / "runs" / "shapes" / "dalle" / "model")
    notebook = run("best_of_n_curve")
    said = printed(notebook)
    assert "unseen captions, 6 captions" in said and "held-out pairs, 4 captions" in said
    assert re.findall(r"^ +(\d+) +\d+\.\d%", said, re.M) == ["1", "2", "4", "8"] * 2
    assert len(shown(notebook, "image/png")) == 2
