"""The pages that lead from data to images, walked at small size: every command, in order."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle1.commands import main as cli
from dalle1.common.images import to_tensor
from dalle1.data.shapes.dataset import make
from tests.docs.pages import blocks, commands
from tests.docs.test_snippets import tiny_model
from tests.forks import Forked

# What makes a command small, by its first two arguments; later settings take the place of earlier.
SHAPES = ["reader.shapes_count=500", "batch_size=4", "log_every=2"]
SMALL = {
    ("train", "shapes/dvae"): [
        *("steps=6", "dvae_training.warm_start_steps=3", "dvae.width=8", "dvae.codebook_size=16"),
        *("contact_sheet_every=6", *SHAPES),
    ],
    ("train", "shapes/clip"): [
        *("steps=2", "tokenizer.captions=500", "clip.vision_layers=1", "clip.text_layers=1"),
        *SHAPES,
    ],
    ("train", "shapes/dalle"): [
        *("steps=2", "transformer.image_vocab=16", "transformer.layers=2"),
        *("contact_sheet_every=null", *SHAPES),
    ],
    ("evaluate", "shapes/rank"): [
        *("captions=4", "heldout_captions=2", "candidates=4", "bootstrap=5", "blur=[0]"),
        *("training_captions=50", "inception_splits=1"),
    ],
    ("train", "dvae.yaml"): [
        *("steps=4", "dvae_training.warm_start_steps=2", "dvae.width=8", "dvae.codebook_size=16"),
        *("batch_size=2", "contact_sheet_every=4"),
    ],
    ("train", "clip.yaml"): ["steps=2", "batch_size=4", "clip.text_vocab=282"],
    ("train", "dalle.yaml"): [
        *("steps=2", "batch_size=2", "transformer.text_vocab=280", "transformer.image_vocab=16"),
        *("transformer.layers=2", "transformer.width=32", "transformer.heads=1"),
        "transformer.head_size=32",
    ],
}
FEWER = ["--candidates", "2", "--keep", "1"]


def run(folder: str, arguments: list[str]) -> int:
    """`dalle1` with these arguments in a folder."""
    os.chdir(folder)
    return cli.main(arguments)


def walk(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs a page's commands of `dalle1` in a folder, which stays the working one; the commands.

    Those that start DeepSpeed have a process of their own.
    """
    monkeypatch.setenv("DALLE1_MODEL", str(folder / "tiny"))  # in place of the one that comes along
    monkeypatch.chdir(folder)
    log = folder / "log.txt"
    walked = []
    for block in blocks(page, "sh"):
        for program, *words in commands(block):
            if program != "dalle1" or words == ["--version"]:
                continue
            out = words[words.index(">") + 1] if ">" in words else os.devnull
            arguments = words[: words.index(">")] if ">" in words else list(words)
            arguments += SMALL.get((words[0], words[1]), [])
            arguments += FEWER if words[0] == "sample" else []
            if words[0] in ("train", "evaluate"):
                fork = Forked(run, str(folder), arguments, log=log)
                assert fork.wait() == 0, f"{block.place}: {words}\n{log.read_text()[-3000:]}"
            else:
                with open(out, "w") as file, contextlib.redirect_stdout(file):
                    assert cli.main(arguments) == 0, f"{block.place}: {words}"
            walked.append(words)
    return walked


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the tutorial that does not fit the one before; a file that it promises and that is
    not there; a snippet that fails behind the commands."""
    tiny_model().save(tmp_path / "tiny")
    walked = walk("docs/tutorial.md", tmp_path, monkeypatch)
    assert [words[0] for words in walked] == [
        *("sample", "train", "train", "train", "sample", "evaluate")
    ]
    frog = tmp_path / "out" / "frog"
    names = {path.name for path in frog.iterdir()}
    assert names == {"000-a-noto-emoji-of-a-frog-00.png", "sheet.png", "result.json"}
    run_folder = tmp_path / "runs" / "shapes" / "dvae"
    assert {"metrics.jsonl", "sheets", "model"} <= {path.name for path in run_folder.iterdir()}
    assert "codes_used" in (run_folder / "metrics.jsonl").read_text()
    assert (tmp_path / "runs" / "shapes" / "ranking" / "index.html").is_file()
    names_of_page: dict[str, Any] = {}
    for block in blocks("docs/tutorial.md", "python"):
        exec(compile(block.text, block.place, "exec"), names_of_page)
    # The upper half of the image was kept: half of the rows of tokens.
    given = names_of_page["model"].codec.encode(to_tensor(names_of_page["image"])[None])[0, :4]
    assert (names_of_page["again"].tokens[0, :, :4] == given).all()
    assert (tmp_path / "out" / "completed" / "sheet.png").is_file()


@pytest.mark.slow
def test_images_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the page that does not fit the one before, or settings that it forgets."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        sample = make(seed=0, index=i, side=64)
        Image.fromarray(sample.image).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(sample.caption)
    verbs = [words[0] for words in walk("docs/own_images.md", tmp_path, monkeypatch)]
    assert verbs == [*["data"] * 3, *["configs"] * 3, *["train"] * 3, "sample"]
    assert (tmp_path / "sheet.png").is_file() and (tmp_path / "report.json").is_file()
    assert list((tmp_path / "runs" / "mine" / "dvae" / "sheets").glob("*.png"))
    assert (tmp_path / "out" / "mine" / "sheet.png").is_file()
