"""Every Python block of README and docs, and the other blocks that a program reads."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

import dalle1
import dvae
from dalle1 import CLIP, CLIPConfig, Model, Tokenizer, Transformer, TransformerConfig
from dalle1.common.config import choices
from dalle1.training.config import RunConfig
from dvae import DVAE, DVAEConfig
from tests.conftest import randomize
from tests.docs.pages import PAGES, Block, blocks, blocks_of

# Languages of blocks, and what checks them.
CHECKED = {
    "sh": "test_commands.py",
    "bash": "test_commands.py",
    "python": "this file",
    "yaml": "this file",
    "json": "this file",
    "toml": "this file",
    "text": "no program reads it: test_commands.py makes sure that no command is in it",
    "": "the same",
    "{toctree}": "make docs",
}
# Blocks that are not run here, by their page and their first line, with the reason. The names that
# they use are checked.
NOT_RUN = {
    ("docs/extending.md", None): "tests/test_extending.py runs all of them in order",
    ("docs/hub.md", None): "tests/hub/test_docs.py runs them, and the commands, on a small server",
    ("docs/tutorial.md", None): "tests/docs/test_walks.py runs them behind the page's commands",
    ("docs/serving.md", "import base64, openai"): "needs a server; see tests/serving/test_api.py",
    ("docs/serving.md", "client.images.edit("): "the same",
    ("docs/web.md", "from fastapi import FastAPI"): "needs a server; see tests/web/test_mount.py",
    (
        "README.md",
        'codec = dvae.load_released("encoder.pkl", "decoder.pkl")',
    ): "needs the published files; tests/dvae/test_released.py and tests/parity open others",
}
PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]


def why_not_run(block: Block) -> str | None:
    """The reason for which a block is not run here."""
    first = block.text.splitlines()[0]
    return NOT_RUN.get((block.page, None)) or NOT_RUN.get((block.page, first))


def tiny_model() -> Model:
    """A random model of 32x32 pixels and 8x8 tokens, as the demo's, that draws in milliseconds."""
    torch.manual_seed(0)
    captions = ["a red circle above a blue square", "a small yellow cross", "a big green triangle"]
    tokenizer = Tokenizer.train(captions, vocab_size=300, text_length=24)
    shape = {"width": 16, "layers": 2, "heads": 2, "head_size": 8, "grid": 8}
    prior = Transformer(
        TransformerConfig(
            **shape, text_vocab=tokenizer.vocab_size, text_length=24, image_vocab=16, conv_kernel=3
        )
    )
    codec = DVAE(DVAEConfig(width=8, bottleneck=8, groups=3, blocks_per_group=1, codebook_size=16))
    ranker = CLIP(
        CLIPConfig(
            embedding=8,
            image_size=32,
            patch_size=16,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            text_vocab=tokenizer.vocab_size + 2,
            text_length=26,
            text_width=16,
            text_layers=1,
            text_heads=2,
        )
    )
    for part in (prior, codec, ranker):
        randomize(part.eval(), seed=0)
    return Model(tokenizer, prior, codec, ranker)


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snippet that fails for whoever copies it. The blocks of a page run in order, with a tiny
    model where the page has a trained one."""
    folder = tmp_path / "runs" / "shapes" / "dalle" / "model"
    tiny_model().save(folder)
    monkeypatch.setenv("DALLE1_MODEL", str(folder))  # in place of the one that comes along
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        code = compile(block.text, block.place, "exec")
        if why_not_run(block) is None:
            exec(code, names)
        else:
            assert list(wrong_names(block.text)) == []


def wrong_names(text: str) -> Iterator[str]:
    """Names of dalle1 and dvae in a text of Python that do not exist, and arguments of their
    functions that they do not take."""
    modules: dict[str, Any] = {"dalle1": dalle1, "dvae": dvae}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in modules:
            module = importlib.import_module(node.module or "")
            yield from (
                f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)
            )
        if (
            isinstance(node, ast.Attribute)
            and find(node, modules) is None
            and is_ours(node, modules)
        ):
            yield ast.unparse(node)
        if isinstance(node, ast.Call) and callable(function := find(node.func, modules)):
            taken = inspect.signature(function).parameters
            yield from (f"{k.arg}=" for k in node.keywords if k.arg and k.arg not in taken)


def is_ours(node: ast.expr, modules: dict[str, Any]) -> bool:
    """Whether a dotted name begins with one of the modules."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in modules


def find(node: ast.expr, modules: dict[str, Any]) -> Any:
    """What a dotted name stands for, or None."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = find(node.value, modules)
        return None if owner is None else getattr(owner, node.attr, None)
    return None


def test_wrong_names_are_found() -> None:
    """A check of blocks that are not run which finds nothing."""
    assert list(wrong_names("dalle1.clip.load_released('a', vocabulary='b')")) == []
    assert list(wrong_names("dalle1.clip.load_publishd('a')")) == ["dalle1.clip.load_publishd"]
    assert list(wrong_names("dvae.load_released(encoders='a')")) == ["encoders="]
    assert list(wrong_names("from dalle1.protocols import Priors")) == ["dalle1.protocols.Priors"]


def test_reasons_are_of_blocks_that_exist() -> None:
    """A reason that stays behind when its block goes, and hides the next one."""
    found = {(b.page, b.text.splitlines()[0]) for page in PAGES for b in blocks(page, "python")}
    pages = {page for page, _ in found}
    assert all(
        (page in pages) if first is None else ((page, first) in found) for page, first in NOT_RUN
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_checked(page: str) -> None:
    """A block that is neither run, parsed, nor listed with a reason."""
    unknown = [f"{b.place}: {b.language!r}" for b in blocks(page) if b.language not in CHECKED]
    assert unknown == []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml", "json", "toml")])
def test_settings_exist(page: str) -> None:
    """A setting in a YAML block that there is not; JSON or TOML that cannot be read."""
    for block in blocks(page, "json"):
        json.loads(block.text)
    for block in blocks(page, "yaml"):
        assert list(unknown_settings(yaml.safe_load(block.text), RunConfig)) == [], block.place
    for block in blocks(page, "toml"):
        pytest.importorskip("tomllib").loads(block.text)  # Python 3.10 cannot read it


def unknown_settings(content: dict[str, Any], kind: type[BaseModel]) -> Iterator[str]:
    """Names in a YAML file that a class of settings does not have, in its sections too."""
    for name, value in content.items():
        if name not in kind.model_fields:
            yield name
        elif isinstance(value, dict):
            sections = [c for c in choices(kind.model_fields[name].annotation) if is_section(c)]
            yield from (
                f"{name}.{n}" for section in sections for n in unknown_settings(value, section)
            )


def is_section(kind: Any) -> bool:
    """Whether a type is a class of settings."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_unknown_settings_are_found() -> None:
    """A check of YAML blocks that finds nothing."""
    content = {"stage": "dvae", "reader": {"image_side": 3}, "optimiser": {}}
    assert list(unknown_settings(content, RunConfig)) == ["reader.image_side", "optimiser"]


def test_blocks_are_found() -> None:
    """A reader of pages that misses indented blocks or fences within fences."""
    text = "- a\n\n  ```python\n  x = 1\n    # y\n  ```\n````text\n```sh\n```\n````\n```\nz\n```\n"
    found = [(b.line, b.language, b.text) for b in blocks_of(text, "page.md")]
    assert found == [(3, "python", "x = 1\n  # y\n"), (7, "text", "```sh\n```\n"), (11, "", "z\n")]
    assert len(PYTHON_PAGES) >= 5
