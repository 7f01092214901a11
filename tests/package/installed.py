"""The wheel, the source distribution, and an environment elsewhere that the wheel is put into."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# Too large to be fetched or unpacked once more: gigabytes where it is built for CUDA.
LINKED = "torch"


def build(out: Path) -> tuple[Path, Path]:
    """The wheel and the sdist. The wheel is built from the sdist, which so is shown to be whole."""
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


class Environment:
    """A virtual environment with a wheel and what the wheel asks for, in the pinned versions.

    All is installed from the index but torch with what torch asks for, which is linked to.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.bin = folder / "bin"
        run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
        (packages,) = (folder / "lib").glob("python*/site-packages")
        for name in sorted(closure(LINKED)):
            for entry in top_level(name):
                if not (packages / entry.name).exists():
                    (packages / entry.name).symlink_to(entry)
        constraints = ROOT / "constraints.txt"
        self.run("pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=folder)

    def run(self, command: str, *arguments: object, cwd: Path) -> str:
        """What a command of the environment prints; AssertionError where it fails."""
        return run(self.bin / command, *arguments, cwd=cwd, path=self.bin)


def run(command: object, *arguments: object, cwd: Path, path: Path | None = None) -> str:
    """What a command prints, which is told nothing of this checkout or its environment.

    path: the first folder of PATH.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DALLE1"))}
    environment["OMP_NUM_THREADS"] = "1"
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(command), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    said = f"{command} {arguments}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert done.returncode == 0, said
    return done.stdout + done.stderr


def closure(name: str) -> set[str]:
    """A distribution of this environment and all that it asks for."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    return found


def top_level(name: str) -> Iterator[Path]:
    """The files and folders that a distribution has put directly into site-packages."""
    distribution = metadata.distribution(name)
    for entry in {file.parts[0] for file in distribution.files or ()} - {".."}:
        if (path := Path(str(distribution.locate_file(entry)))).exists():
            yield path
