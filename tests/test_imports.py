"""The direction of the imports (docs: the house's layout), read from the sources."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dvae", "dalle1", "launch")

# Each may import those before it.
CHAIN = (
    "layout", "attention", "sparse_attention", "transformer", "packed", "caching", "decoding",
    "model", "batching", "sampling",
)  # fmt: skip
DVAE_CHAIN = ("archives", "objective", "model", "storage", "released", "warm_start")
# What a module may import of dalle1; data is a package that knows itself, `pictures` and `files`.
LEAVES: dict[str, set[str]] = {
    "dalle1.layout": set(),
    "dalle1.files": set(),
    "dalle1.settings": {"dalle1.files"},
    "dalle1.tokenizer": {"dalle1.files", "dalle1.layout"},
    "dalle1.loss": set(),
    "dalle1.scaling": set(),
    "dalle1.clip_tokenizer": {"dalle1.files"},
    "dalle1.clip_weights": set(),
    "dalle1.clip": {"dalle1.clip_tokenizer", "dalle1.clip_weights", "dalle1.pictures"},
    "dalle1.packed": set(),
    "dalle1.ranking": {"dalle1.clip"},
    "dalle1.pictures": set(),
}
# Arrows back, inside of functions, each documented where it stands.
EXCEPTIONS = {("dalle1.model", "dalle1.sampling"), ("dvae.model", "dvae.storage")}


@dataclass(frozen=True)
class Import:
    importer: str
    target: str
    local: bool  # inside of a function
    line: int


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def module_names(root: Path) -> dict[str, Path]:
    names = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def read_imports(root: Path) -> list[Import]:
    """All imports of the packages but those for type checkers; `from a import b` may name a.b."""
    modules = module_names(root)
    found: list[Import] = []

    def visit(node: ast.AST, importer: str, local: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, importer, local)
            return
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = importer.split(".")
                if modules[importer].name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                targets.append(inner if inner in modules else base)
        found.extend(Import(importer, target, local, node.lineno) for target in targets)  # type: ignore[attr-defined]
        local = local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, importer, local)

    for name, path in modules.items():
        visit(ast.parse(path.read_text()), name, False)
    return found


def breach(i: Import) -> str | None:
    """The rule that an import breaks."""
    if (i.importer, i.target) in EXCEPTIONS and i.local:
        return None
    if within(i.target, "deepspeed") and i.importer != "dalle1.training.engine":
        return "only dalle1.training.engine imports deepspeed"
    if within(i.importer, "dvae"):
        if within(i.target, "dalle1") or within(i.target, "launch"):
            return "dvae never imports dalle1 or launch"
        ours, theirs = i.importer.partition(".")[2], i.target.partition(".")[2]
        if (
            within(i.target, "dvae")
            and ours in DVAE_CHAIN
            and (theirs not in DVAE_CHAIN or DVAE_CHAIN.index(theirs) >= DVAE_CHAIN.index(ours))
        ):
            return "dvae's modules import those before them alone"
    if within(i.importer, "dalle1") and within(i.target, "launch"):
        return "dalle1 never imports launch"
    if within(i.target, "dalle1.training") and not (
        within(i.importer, "launch")
        or within(i.importer, "dalle1.training")
        or i.importer == "dalle1.cli"
    ):
        return "only launch, cli and training import dalle1.training"
    if within(i.target, "dalle1.benchmarks") and not (
        within(i.importer, "launch") or within(i.importer, "dalle1.benchmarks")
    ):
        return "only launch imports dalle1.benchmarks"
    if within(i.target, "dalle1"):
        if i.importer in LEAVES and i.target not in LEAVES[i.importer]:
            return f"{i.importer} may import {LEAVES[i.importer] or 'nothing'} of dalle1"
        own = within(i.target, "dalle1.data") or i.target in ("dalle1.pictures", "dalle1.files")
        if within(i.importer, "dalle1.data") and not own:
            return "dalle1.data knows itself, pictures and files alone"
        chain = [f"dalle1.{name}" for name in CHAIN]
        if i.importer in chain:
            if i.target == "dalle1":
                return "a module of the package never imports the whole package"
            if i.target in chain and chain.index(i.target) >= chain.index(i.importer):
                return " <- ".join(CHAIN)
    return None


def breaches(root: Path) -> list[str]:
    return [
        f"{i.importer}:{i.line} imports {i.target}: {rule}"
        for i in read_imports(root)
        if (rule := breach(i))
    ]


def test_direction_of_imports() -> None:
    """An arrow back, which ties the parts of the library together."""
    assert breaches(ROOT) == []


def test_the_sources_were_read() -> None:
    """A walk that finds no files or no imports, and so no breach either."""
    modules = module_names(ROOT)
    named = [f"dalle1.{name}" for name in CHAIN] + [f"dvae.{name}" for name in DVAE_CHAIN]
    assert {*named, *LEAVES, "dalle1.training.engine", "launch.train"} <= modules.keys()
    found = {(i.importer, i.target) for i in read_imports(ROOT)}
    assert ("dalle1.sampling", "dalle1.ranking") in found  # from dalle1 import ranking
    assert ("dalle1.training.engine", "deepspeed") in found
    assert found >= EXCEPTIONS


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("dvae/model.py", "import dalle1.clip", "never imports dalle1"),
        ("dvae/deep/new.py", "def f():\n    from dalle1 import clip", "never imports dalle1"),
        ("dvae/objective.py", "from dvae.model import DVAE", "before them"),
        ("dvae/model.py", "from dvae.storage import save", "before them"),  # not in a function
        ("dalle1/clip.py", "import launch.train", "never imports launch"),
        ("dalle1/layout.py", "from dalle1.attention import allowed", "nothing"),
        ("dalle1/attention.py", "from dalle1 import decoding", "layout <- attention"),
        ("dalle1/attention.py", "from . import decoding", "layout <- attention"),
        ("dalle1/attention.py", "from .decoding import draw", "layout <- attention"),
        ("dalle1/decoding.py", "def f():\n    import dalle1.model", "layout <- attention"),
        ("dalle1/model.py", "from dalle1.sampling import rank", "layout <- attention"),
        ("dalle1/model.py", "import dalle1", "whole package"),
        ("dalle1/tokenizer.py", "from dalle1.clip import CLIP", "may import"),
        ("dalle1/ranking.py", "from dalle1.model import Model", "may import"),
        ("dalle1/data/shards.py", "from dalle1.tokenizer import Tokenizer", "files alone"),
        ("dalle1/data/shards.py", "from ..tokenizer import Tokenizer", "files alone"),
        ("dalle1/training/trainer.py", "from deepspeed import comm", "deepspeed"),
        ("launch/train.py", "def f():\n    import deepspeed.comm", "deepspeed"),
        ("dalle1/sampling.py", "from dalle1.training import ema", "dalle1.training"),
        ("dalle1/__init__.py", "from .training.ema import EMA", "dalle1.training"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, path: str, source: str, rule: str) -> None:
    """A check that passes whatever the sources say."""
    for name in ("clip", "decoding", "model", "tokenizer", "training/ema", "training/__init__"):
        file = tmp_path / "dalle1" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    found = breaches(tmp_path)
    assert len(found) == 1 and rule in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dvae/objective.py", "if TYPE_CHECKING:\n    from dvae.model import DVAE"),
        ("dvae/model.py", "def save():\n    from dvae.storage import save"),
        ("dalle1/model.py", "def rank():\n    from dalle1.sampling import rank"),
        ("dalle1/training/engine.py", "import deepspeed"),
        ("launch/train.py", "import dalle1.training.trainer"),
        ("dalle1/cli.py", "import dalle1.training.trainer"),
        ("dalle1/tokenizer.py", "from dalle1.layout import padding_id"),
        ("dalle1/decoding.py", "from .layout import padding_id"),
    ],
)
def test_what_is_allowed(tmp_path: Path, path: str, source: str) -> None:
    """A check that forbids the arrows that the layout draws."""
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert breaches(tmp_path) == []
