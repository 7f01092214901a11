"""Where the packages of emoji lie: in a folder, as npm or a user unpacked them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dalle1.common.files import read_text
from dalle1.data.emoji.sources import NAMES_FILE, NAMES_PACKAGE, NAMES_VERSION, STYLES

NAMES = "names"  # what the package of the names is called where styles are called by theirs
INSIDE = "package"  # the folder in npm's tarballs
LARGEST_MANIFEST = 2**20  # bytes of a package.json
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,64}$")


@dataclass(frozen=True)
class Package:
    """A published package.

    Attributes:
        use: the style of its pictures, or `NAMES`.
        name: of the public registry of JavaScript packages.
        version: that was tried.
        parts: folders and files of it that are used.
    """

    use: str
    name: str
    version: str
    parts: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The name of its tarball as npm packs it, without the version."""
        return self.name.removeprefix("@").replace("/", "-")

    @property
    def tarball(self) -> str:
        """The name of the tarball of this version."""
        return f"{self.stem}-{self.version}.tgz"


PACKAGES: dict[str, Package] = {
    **{s.name: Package(s.name, s.package, s.version, s.folders) for s in STYLES.values()},
    NAMES: Package(NAMES, NAMES_PACKAGE, NAMES_VERSION, (NAMES_FILE,)),
}


@dataclass(frozen=True)
class FoundPackage:
    """A package that lies unpacked in `folder`; its version by package.json, or "unknown"."""

    package: Package
    folder: Path
    version: str


def find_packages(
    uses: Iterable[str], folder: Path, given: Mapping[str, Path] | None = None
) -> dict[str, FoundPackage]:
    """The unpacked packages, by use.

    Args:
        uses: styles and `NAMES`.
        folder: where each package is looked for by its name: `node_modules/NAME`, `NAME`, or the
            folder of its tarball, `STEM-VERSION`; in any of them the files may lie in `package`.
        given: folders of single packages, which are not looked for.

    Raises:
        ValueError: a package that is not there, or there in several versions of which none is the
            one that was tried.
    """
    given = given or {}
    found, missing = {}, []
    for use in uses:
        package = PACKAGES[use]
        place = _given(package, given[use]) if use in given else _look_for(package, folder)
        if place is None:
            missing.append(package)
        else:
            found[use] = FoundPackage(package, place, _version(place))
    if missing:
        styles = [p.use for p in missing if p.use != NAMES]
        fewer = f", or leave out {', '.join(styles)} of --styles" if styles else ""
        raise ValueError(
            f"--packages: expected {_listed(missing)} in {str(folder)!r}, got none; name another "
            f"folder, give --download, which asks npm for what is missing{fewer}"
        )
    return found


def missing_packages(
    uses: Iterable[str], folder: Path, given: Mapping[str, Path] | None = None
) -> list[Package]:
    """The packages that are neither given nor in a folder."""
    return [
        PACKAGES[use]
        for use in uses
        if use not in (given or {}) and _look_for(PACKAGES[use], folder) is None
    ]


def _listed(packages: list[Package]) -> str:
    return ", ".join(f"{p.name} ({p.use})" for p in packages)


def _given(package: Package, folder: Path) -> Path:
    """The folder of a package that the user named; what is wrong in it is found by the reader."""
    if not folder.is_dir():
        raise ValueError(
            f"--{package.use}: expected the folder of the unpacked package {package.name}, got "
            f"{str(folder)!r}, which is none; unpack it there"
        )
    return _without_wrapper(package, folder)


def _look_for(package: Package, folder: Path) -> Path | None:
    """The package in a folder of packages; None where it is not."""
    for name in (f"node_modules/{package.name}", package.name, package.tarball[: -len(".tgz")]):
        if (folder / name).is_dir():
            return _without_wrapper(package, folder / name)
    versions = [
        path
        for path in sorted(folder.glob(f"{package.stem}-*"))
        if path.is_dir() and path.name[len(package.stem) + 1 :][:1].isdigit()
    ]
    if len(versions) > 1:
        raise ValueError(
            f"--{package.use}: expected one version of {package.name} in {str(folder)!r}, got "
            f"{', '.join(path.name for path in versions)}; name the folder of one by "
            f"--{package.use}"
        )
    return _without_wrapper(package, versions[0]) if versions else None


def _without_wrapper(package: Package, folder: Path) -> Path:
    """The folder itself, or `package` in it where the package's files are there."""
    here = any((folder / part).exists() for part in package.parts)
    return folder / INSIDE if not here and (folder / INSIDE).is_dir() else folder


def _version(folder: Path) -> str:
    """What a package says of itself; nothing else of its package.json is read."""
    path = folder / "package.json"
    try:
        if path.stat().st_size <= LARGEST_MANIFEST:
            version = json.loads(read_text(path)).get("version")
            if isinstance(version, str) and _VERSION.match(version):
                return version
    except (OSError, ValueError, RecursionError, AttributeError):
        pass
    return "unknown"
