"""pyproject.toml against the sources: what is imported, which extras are named, which Pythons."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for name in ("dalle1", "dvae") for path in sorted((ROOT / name).rglob("*.py"))]
# Packages whose module is called otherwise.
CALLED = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "open_clip": "open_clip_torch",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}
NOT_OURS = ("ipython", "wandb")  # taken where a user has installed them


@pytest.fixture
def project() -> dict[str, Any]:
    """The section `project`; Python 3.10 cannot read TOML."""
    tomllib = pytest.importorskip("tomllib")
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def package(requirement: str) -> str:
    """What a requirement is of: "torch" of "torch>=2.13"."""
    return re.split(r"[\[<>=;! ]", requirement)[0].lower()


def imported() -> set[str]:
    """The modules of others that the sources import, by statement or by name, as packages."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                first = node.args[0] if node.args else None
                is_name = isinstance(first, ast.Constant) and isinstance(first.value, str)
                if node.func.id in ("import_extra", "import_module", "find_spec") and is_name:
                    found.add(first.value)  # type: ignore[union-attr]
    names = {name.partition(".")[0] for name in found}
    return {CALLED.get(n, n).lower() for n in names - {*sys.stdlib_module_names, "dalle1", "dvae"}}


def test_what_is_imported_is_asked_for(project: dict[str, Any]) -> None:
    """A package that only a developer's environment has; one that is installed and never used."""
    needed = {package(text) for text in project["dependencies"]}
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ("dev", "docs")}
    optional = {package(text) for texts in extras.values() for text in texts}
    assert imported() - needed - optional == {*NOT_OURS}
    assert needed - imported() == set()


def test_extras_that_are_named_exist(project: dict[str, Any]) -> None:
    """`pip install 'dalle1[EXTRA]'` that installs nothing more; an extra that nobody is told of."""
    pages = [*SOURCES, *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    named = set(re.findall(r"dalle1\[(\w+)\]", text)) - {"EXTRA"}
    named |= set(re.findall(r"import_extra\(\s*\"\w+\",\s*\"(\w+)\"", text))
    assert named == project["optional-dependencies"].keys() - {"dev", "docs"}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_sources_are_read_by_every_python(version: str, tmp_path: Path) -> None:
    """Syntax that a Python which we claim to run on does not know."""
    python = shutil.which(f"python{version}")
    works = python and not subprocess.run([python, "--version"], capture_output=True).returncode
    if not python or not works:
        pytest.skip(f"python{version} is not on this machine")
    folders = [str(ROOT / name) for name in ("dalle1", "dvae", "launch", "setup.py")]
    command = [python, "-X", f"pycache_prefix={tmp_path}", "-m", "compileall", "-q", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.rglob("*.pyc"))
