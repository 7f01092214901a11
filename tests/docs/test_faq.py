"""docs/faq.md: each message that it quotes is in the sources, and some are provoked."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import dalle1
from dalle1 import Model, configs, models
from dalle1.common.config import load_settings
from dalle1.data.shards.index import find_shards
from dalle1.training.config import ParallelSettings, RunConfig
from dalle1.training.parallel import ParallelDims
from tests.docs.pages import ROOT, blocks

PAGE = "docs/faq.md"
MESSAGES = [block.text.strip() for block in blocks(PAGE, "text")]
SOURCES = [path for name in ("dalle1", "dvae") for path in sorted((ROOT / name).rglob("*.py"))]
# Messages of packages that we use.
OF_OTHERS = {"Extra inputs are not permitted": "pydantic"}


@lru_cache
def texts() -> list[str]:
    """All texts of the sources."""
    return [text for path in SOURCES for text in literals(path)]


def literals(path: Path) -> Iterator[str]:
    """The texts of a source as they are joined, with … where a value is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_quoted_from(message: str, text: str) -> bool:
    """Whether a text of the sources may read like a message: both have … for what is filled in."""
    if not (set(text) - set("… .,:;")):
        return False
    pieces = [re.escape(piece) for piece in message.split("…")]
    return re.search(".*".join(pieces), text, re.S) is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_in_the_sources(message: str) -> None:
    """A message that nobody gets any more, and that nobody finds by searching for what he got."""
    assert message in OF_OTHERS or any(is_quoted_from(message, text) for text in texts())


def test_quotes_are_told_from_others() -> None:
    """A check that finds every message."""
    assert is_quoted_from("rank …: lost another", "rank … of …: lost another one")
    assert not is_quoted_from("rank …: lost two", "rank … of …: lost another one")
    assert not is_quoted_from("model: expected a folder", "…: …")
    assert len(MESSAGES) > 12


def no_default_model(model: Model, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DALLE1_MODEL", raising=False)
        patch.setattr(models, "names", list)
        dalle1.sample("a cat")


def no_ranker(model: Model, folder: Path) -> None:
    without = Model(model.tokenizer, model.prior, model.codec)
    dalle1.sample("a cat", without, candidates=4, keep=2, progress=False)


def unknown_setting(model: Model, folder: Path) -> None:
    load_settings(RunConfig, "shapes/dvae", ["learning_rate=1e-3"])


def unknown_config(model: Model, folder: Path) -> None:
    configs.find("shapes/dvea")


def uneven_batch(model: Model, folder: Path) -> None:
    ParallelDims(10, ParallelSettings(), 4)


def no_shards(model: Model, folder: Path) -> None:
    (folder / "images.zip").write_bytes(b"")
    find_shards(str(folder / "images.zip"))


@pytest.mark.parametrize(
    ("provoke", "begins"),
    [
        (no_default_model, "model: expected a Model, its folder"),
        (no_ranker, "keep: the model has no ranker"),
        (unknown_setting, "Extra inputs"),
        (unknown_config, "config: expected a file"),
        (uneven_batch, "batch_size …"),
        (no_shards, "data: expected tars"),
    ],
)
def test_messages_are_met(
    provoke: Callable[[Model, Path], None], begins: str, model: Model, tmp_path: Path
) -> None:
    """A message that is in the sources and yet another one than a user gets for his mistake."""
    (message,) = [text for text in MESSAGES if text.startswith(begins)]
    pattern = ".*".join(map(re.escape, message.split("…")))
    with pytest.raises(ValueError) as error:
        provoke(model, tmp_path)
    assert re.search(pattern, str(error.value), re.S), str(error.value)
