"""Where packages are looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle1.data.emoji import STYLES
from dalle1.data.emoji.packages import NAMES, PACKAGES, find_packages, missing_packages
from dalle1.data.emoji.sources import read_emoji

from .packages import write_packages

USES = [*STYLES, NAMES]
LAYOUTS = {
    "as npm installs": lambda p: f"node_modules/{p.name}",
    "by name": lambda p: p.name,
    "by name, a tarball in it": lambda p: f"{p.name}/package",
    "a tarball's folder": lambda p: f"{p.tarball.removesuffix('.tgz')}/package",
    "of another version": lambda p: f"{p.stem}-0.9.0",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packages_are_found_by_name(tmp_path: Path, layout: str) -> None:
    """A user who unpacked as npm does, and is told that nothing is there."""
    packages, names = write_packages(tmp_path / "made")
    folder = tmp_path / "packages"
    for use, source in {**packages, NAMES: names}.items():
        place = folder / LAYOUTS[layout](PACKAGES[use])
        place.parent.mkdir(parents=True, exist_ok=True)
        source.rename(place)
        (place / "package.json").write_text(json.dumps({"version": "1.2.3-beta.1"}))
    found = find_packages(USES, folder)
    assert [found[use].package for use in USES] == [PACKAGES[use] for use in USES]
    assert {f.version for f in found.values()} == {"1.2.3-beta.1"}
    emoji = read_emoji({style: found[style].folder for style in STYLES}, found[NAMES].folder)
    assert emoji and not missing_packages(USES, folder)


def test_given_folders_come_first(tmp_path: Path) -> None:
    """An option of the command that does nothing where a package lies in the usual place too."""
    packages, names = write_packages(tmp_path)
    names.rename(tmp_path / "emojibase-data")
    with pytest.raises(ValueError, match="--packages: expected emoji-datasource-google"):
        find_packages(["noto", NAMES], tmp_path)
    found = find_packages(["noto", NAMES], tmp_path, {"noto": packages["noto"]})
    assert found["noto"].folder == packages["noto"] and found["noto"].version == "unknown"
    assert missing_packages(USES, tmp_path, {"noto": packages["noto"]}) == [
        PACKAGES["twemoji"],
        PACKAGES["fluent"],
    ]
    with pytest.raises(ValueError, match=r"--noto: expected the folder of .*google, got .*none"):
        find_packages(["noto"], tmp_path, {"noto": tmp_path / "none"})


def test_what_is_missing_is_named_with_remedies(tmp_path: Path) -> None:
    """One package named at a time, or no word of what to do."""
    with pytest.raises(
        ValueError, match=r"fluent-emoji-3d \(fluent\), emojibase-data \(names\)"
    ) as e:
        find_packages(["fluent", NAMES], tmp_path)
    assert "--download" in str(e.value) and "leave out fluent of --styles" in str(e.value)
    with pytest.raises(ValueError) as e:
        find_packages([NAMES], tmp_path)
    assert "--styles" not in str(e.value)


def test_of_several_versions_the_one_that_was_tried(tmp_path: Path) -> None:
    """Whichever version a file system lists first."""
    package = PACKAGES[NAMES]
    for version in ("15.0.0", "16.0.3"):
        (tmp_path / f"{package.stem}-{version}" / "en").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--names: expected one version of .*16\.0\.3; name"):
        find_packages([NAMES], tmp_path)
    (tmp_path / f"{package.stem}-{package.version}" / "en").mkdir(parents=True)
    assert find_packages([NAMES], tmp_path)[NAMES].folder.name.endswith(package.version)


@pytest.mark.parametrize(
    "said", ["", "[", "[1]", '{"version": 3}', '{"version": "a | b"}', "[" * 9999]
)
def test_a_version_is_no_more_than_a_version(tmp_path: Path, said: str) -> None:
    """Anything that a package says, in the README that names its license."""
    packages, _ = write_packages(tmp_path)
    (packages["noto"] / "package.json").write_text(said)
    found = find_packages(["noto"], tmp_path, {"noto": packages["noto"]})
    assert found["noto"].version == "unknown"
