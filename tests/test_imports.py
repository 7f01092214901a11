"""The direction of the imports, read from the sources: floors by package, and no circles.

Every import counts, those inside of functions and those for type checkers alone too. There are no
exceptions: where an arrow back seems to be needed, a piece lies in the wrong room.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dvae", "dalle1", "launch")
MAX_MODULES = 10  # directly in dalle1/

# A module may import its own room and those on the floors below; see docs/architecture.md.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("dvae",),
    ("dalle1.configs", "dalle1.models", "dalle1.version"),
    ("dalle1.common",),
    ("dalle1.protocols",),
    ("dalle1.tokenizer",),
    ("dalle1.text",),
    ("dalle1.data.generated",),
    ("dalle1.transformer", "dalle1.clip", "dalle1.data.shapes", "dalle1.data.emoji"),
    ("dalle1.seq2seq",),  # is made of the transformer's residual layers, losses and maps
    ("dalle1.generation",),
    ("dalle1.registry",),
    ("dalle1.hub",),  # turns a name into a folder, of the kinds in the registry
    ("dalle1.model",),
    ("dalle1.published",),
    ("dalle1.sampling",),
    ("dalle1.data.samples",),
    ("dalle1.data.transforms",),
    ("dalle1.data.shards",),
    ("dalle1.data.precompute", "dalle1.data.curation"),
    ("dalle1.training", "dalle1.evaluation", "dalle1.serving"),
    ("dalle1.benchmarks", "dalle1.findings"),
    ("dalle1.web",),
    ("dalle1.commands",),
    ("dalle1", "dalle1.data"),  # their __init__, __main__ and train
    ("launch",),
)
# Rooms that only hand on to others, and what may be imported of other packages in one place alone.
ONLY_IN = {"deepspeed": "dalle1.training.engine", "gradio": "dalle1.web.page"}
# What `import dalle1` must not load, however it gets there: slow, or not there on every machine.
HEAVY = (
    *("deepspeed", "matplotlib", "tensorboard", "torchmetrics", "transformers", "wandb"),
    *("fastapi", "uvicorn", "gradio", "huggingface_hub", "prometheus_client"),
)


@dataclass(frozen=True)
class Import:
    importer: str
    target: str
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


def read_imports(root: Path) -> Iterator[Import]:
    """All imports of the packages; `from a import b` may name a.b."""
    modules = module_names(root)
    for importer, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = importer.split(".")
                    package = package if path.name == "__init__.py" else package[:-1]
                    package = package[: len(package) - node.level + 1]
                    base = ".".join([*package, base] if base else package)
                inner = [f"{base}.{alias.name}" for alias in node.names]
                targets = [name if name in modules else base for name in inner]
            yield from (Import(importer, t, node.lineno) for t in targets)  # type: ignore[attr-defined]


def floor_of(name: str) -> tuple[int, str]:
    """The floor of a module and its room: the longest name of FLOORS that it is within."""
    rooms = [(i, room) for i, rooms in enumerate(FLOORS) for room in rooms if within(name, room)]
    return max(rooms, key=lambda found: len(found[1]))


def breach(i: Import) -> str | None:
    """The rule that an import breaks."""
    for package, owner in ONLY_IN.items():
        if within(i.target, package) and i.importer != owner:
            return f"only {owner} imports {package}"
    if not any(within(i.target, package) for package in PACKAGES):
        return None
    (ours, room), (theirs, other) = floor_of(i.importer), floor_of(i.target)
    if room != other and theirs >= ours:
        return f"{other} is not below {room}"
    return None


def breaches(root: Path) -> list[str]:
    return [
        f"{i.importer}:{i.line} imports {i.target}: {rule}"
        for i in read_imports(root)
        if (rule := breach(i))
    ]


def circle(root: Path) -> list[str]:
    """Modules that import each other in a ring; empty where there is none."""
    graph: dict[str, set[str]] = {name: set() for name in module_names(root)}
    for i in read_imports(root):
        if i.target in graph and i.target != i.importer:
            graph[i.importer].add(i.target)
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := search(target, [*path, name]):
                return found
        done.add(name)
        return []

    for name in graph:
        if found := search(name, []):
            return found
    return []


def test_direction_of_imports() -> None:
    """An arrow back, which ties the rooms of the library together."""
    assert breaches(ROOT) == []


def test_no_circles() -> None:
    """Modules that can only be understood, moved or tested together."""
    assert circle(ROOT) == []


def test_few_modules_stand_alone() -> None:
    """A module outside of the rooms, whose name a stranger has to guess."""
    modules = [name for name in module_names(ROOT) if name.count(".") == 1 and "dalle1." in name]
    alone = [name for name in modules if module_names(ROOT)[name].name != "__init__.py"]
    assert len(alone) <= MAX_MODULES, alone


def test_the_sources_were_read() -> None:
    """A walk that finds no files or no imports, and so no breach either."""
    modules = module_names(ROOT)
    assert {"dalle1.sampling", "dalle1.training.engine", "launch.train", "dvae"} <= modules.keys()
    found = {(i.importer, i.target) for i in read_imports(ROOT)}
    assert ("dalle1.training.engine", "deepspeed") in found
    assert ("dalle1.model", "dalle1.registry") in found  # from dalle1 import registry
    assert ("dalle1.commands.evaluate", "dalle1.training.engine") in found  # in a function
    rooms = {room for floor in FLOORS for room in floor}
    assert {floor_of(name)[1] for name in modules} == rooms  # none is left over


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("dvae/model.py", "import dalle1.clip", "dalle1.clip is not below dvae"),
        ("dvae/deep/new.py", "def f():\n    from dalle1 import clip", "is not below dvae"),
        ("dalle1/common/files.py", "from dalle1.tokenizer import Tokenizer", "not below"),
        ("dalle1/common/files.py", "from ..tokenizer import Tokenizer", "not below"),
        ("dalle1/common/files.py", "if TYPE_CHECKING:\n    import dalle1.tokenizer", "not below"),
        ("dalle1/transformer/model.py", "from dalle1.clip import CLIP", "not below"),
        ("dalle1/transformer/model.py", "from dalle1 import generation", "not below"),
        ("dalle1/generation/a.py", "from dalle1.model import Model", "not below"),
        ("dalle1/model.py", "import dalle1", "dalle1 is not below dalle1.model"),
        ("dalle1/data/shards/a.py", "from dalle1.data.curation import b", "not below"),
        ("dalle1/evaluation/a.py", "from dalle1.training import ema", "not below"),
        ("dalle1/training/trainer.py", "from deepspeed import comm", "imports deepspeed"),
        ("launch/train.py", "def f():\n    import deepspeed.comm", "imports deepspeed"),
        ("dalle1/commands/train.py", "import launch.train", "not below"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, path: str, source: str, rule: str) -> None:
    """A check that passes whatever the sources say."""
    names = ("clip/__init__", "generation/__init__", "tokenizer", "training/ema", "model")
    for name in (*names, "data/curation/b", "training/__init__", "__init__"):
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
        ("dvae/model.py", "from dvae.storage import save_part"),
        ("dalle1/common/weights.py", "import dvae.storage"),
        ("dalle1/model.py", "from dalle1 import registry"),
        ("dalle1/training/engine.py", "import deepspeed"),
        ("dalle1/training/stages/dvae.py", "from dalle1.training.stages.base import Stage"),
        ("dalle1/commands/train.py", "def f():\n    import dalle1.training.trainer"),
        ("launch/train.py", "from dalle1.commands.train import main"),
        ("dalle1/__init__.py", "from dalle1.sampling import sample"),
        ("dalle1/data/precompute/a.py", "from dalle1.data.shards.tar import Shard"),
    ],
)
def test_what_is_allowed(tmp_path: Path, path: str, source: str) -> None:
    """A check that forbids the arrows that the layout draws."""
    for name in ("dalle1/registry", "dalle1/sampling", "dalle1/__init__"):
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    assert breaches(tmp_path) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    """A search that ends at the first module, or does not look into functions."""
    for name, source in {
        "a": "import dalle1.b",
        "b": "def f():\n    from dalle1 import c",
        "c": "if TYPE_CHECKING:\n    from dalle1.a import x",
        "d": "import dalle1.a",
    }.items():
        file = tmp_path / "dalle1" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    assert circle(tmp_path) == ["dalle1.a", "dalle1.b", "dalle1.c", "dalle1.a"]
    (tmp_path / "dalle1" / "c.py").write_text("")
    assert circle(tmp_path) == []


def test_import_is_light() -> None:
    """`import dalle1` that loads what only training, plots or tests need."""
    graph: dict[str, set[str]] = {}
    for i in read_imports(ROOT):
        graph.setdefault(i.importer, set()).add(i.target)
    reached, waiting = set(), ["dalle1"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += graph.get(name, set())
    assert "dalle1.sampling" in reached and "torch" in reached
    assert [n for n in reached if any(within(n, heavy) for heavy in HEAVY)] == []
