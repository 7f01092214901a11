"""`import dalle1`: its public names, which are imported when they are first asked for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dalle1

SOURCE = Path(dalle1.__file__ or "")
# What training, plots, pages and tests need alone, and torch's compiler, which takes as long to be
# imported as torch itself.
HEAVY = ("deepspeed", "gradio", "huggingface_hub", "matplotlib", "tensorboard", "transformers")
HEAVY += ("torch._dynamo",)


def declared() -> dict[str, tuple[str, str | None]]:
    """What a type checker is told: name -> (module, name there, or None for the module itself)."""
    found: dict[str, tuple[str, str | None]] = {}
    block = next(n for n in ast.parse(SOURCE.read_text()).body if isinstance(n, ast.If))
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            is_module = (SOURCE.parents[1] / whole.replace(".", "/")).with_suffix(".py").exists()
            is_module |= (SOURCE.parents[1] / whole.replace(".", "/")).is_dir()
            place = (whole, None) if is_module else (node.module, alias.name)
            found[alias.asname or alias.name] = place
    return found


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh Python has after a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_a_name_is_what_type_checkers_take_it_for() -> None:
    """A name that a type checker finds elsewhere than Python does, or one of the two does not."""
    assert sorted(declared()) == sorted(dalle1.__all__)
    for name, (module, inner) in declared().items():
        expected = import_module(module)
        assert getattr(dalle1, name) is (getattr(expected, inner) if inner else expected), name
    assert set(dalle1.__all__) <= set(dir(dalle1))


def test_modules_are_there_without_an_import() -> None:
    """`dalle1.registry.register`, which worked after `import dalle1`, that no longer does."""
    program = "import dalle1; print(dalle1.registry.register, dalle1.sampling.sample)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "function register" in done.stdout and "function sample" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["smaple", "__wrapped__", "_private"])
def test_a_name_that_is_none(name: str) -> None:
    """Another error than Python's own, of which `hasattr` and notebooks would die."""
    assert not hasattr(dalle1, name)
    with pytest.raises(AttributeError, match=f"module 'dalle1' has no attribute '{name}'"):
        getattr(dalle1, name)


def test_what_a_module_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed told as a name that dalle1 has not."""
    monkeypatch.delitem(sys.modules, "dalle1.published")
    monkeypatch.delitem(dalle1.__dict__, "published", raising=False)
    monkeypatch.setitem(sys.modules, "dalle1.published.importing", None)
    with pytest.raises(ModuleNotFoundError, match=r"dalle1\.published\.importing"):
        dalle1.published  # noqa: B018


def test_importing_is_light() -> None:
    """Seconds of what only training or plots need, or of a compiler that nothing calls."""
    assert not {"torch", "dvae"} & modules_after("import dalle1")
    loaded = modules_after("from dalle1 import *")
    assert {"torch", "dalle1.sampling", "dalle1.published"} <= loaded
    assert [name for name in HEAVY if name in loaded] == []
