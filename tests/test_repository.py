"""The files around the code: what CI runs, the citation, hooks and templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import dalle1

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
FILES = sorted(
    path
    for pattern in (".github/**/*.yml", ".pre-commit-config.yaml", "CITATION.cff")
    for path in ROOT.glob(pattern)
)


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_yaml(path: Path) -> None:
    """A file that no service can read, which nobody notices until it is needed."""
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_workflow_runs_what_ci_runs() -> None:
    """A target that is checked in one place alone, or one that is not there."""
    jobs = read(".github/workflows/ci.yml")["jobs"]
    ran: list[str] = []
    for job in jobs.values():
        targets = job["strategy"]["matrix"].get("target", [])
        for step in job["steps"]:
            for target in re.findall(r"\bmake (\S.*?) PYTHON=", step.get("run", "")):
                ran += targets if "matrix.target" in target else [target]
    ours = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert sorted(ran) == sorted(ours) and set(ran) <= TARGETS


def test_the_workflow_tests_every_python_that_we_claim() -> None:
    """A version of Python in pyproject.toml that nothing is tested with, or the other way round."""
    versions = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    text = (ROOT / "pyproject.toml").read_text()
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    least = re.search(r'requires-python = ">=(3\.\d+)"', text)
    assert versions == claimed and least is not None and least[1] == versions[0]


def test_hooks_are_those_of_lint() -> None:
    """A hook that passes what `make lint` refuses."""
    (lint,) = re.findall(r"^lint:.*\n\t.*?&& (.*)$", (ROOT / "Makefile").read_text(), re.M)
    hooks = read(".pre-commit-config.yaml")["repos"][0]["hooks"]
    checks = [hook["entry"].replace("--force-exclude", ".") for hook in hooks]
    assert checks == lint.split(" && ")


def test_the_citation_is_of_this_version() -> None:
    """A version, a license or a paper that is another one's."""
    citation = read("CITATION.cff")
    assert citation["version"] == dalle1.__version__ and citation["license"] == "MIT"
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    paper = citation["preferred-citation"]
    assert paper["title"] == "Zero-Shot Text-to-Image Generation" and len(paper["authors"]) == 8
