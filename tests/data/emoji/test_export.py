"""The emoji data set as a folder, and the command that writes it."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalle1.commands import main as cli
from dalle1.commands.data import emoji as command
from dalle1.data import generated
from dalle1.data.emoji import SPLITS, STYLES, EmojiDataset, read_emoji
from dalle1.data.emoji.packages import NAMES, PACKAGES
from dalle1.data.shards.index import find_shards

from .packages import write_packages


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as npm installs packages into; the twemoji tells no version."""
    folder = tmp_path_factory.mktemp("installed")
    packages, names = write_packages(folder / "made")
    for use, source in {**packages, NAMES: names}.items():
        place = folder / "node_modules" / PACKAGES[use].name
        place.parent.mkdir(parents=True, exist_ok=True)
        source.rename(place)
        if use != "twemoji":
            (place / "package.json").write_text(json.dumps({"version": PACKAGES[use].version}))
    return folder


def write(installed: Path, out: Path, *options: str) -> int:
    few = () if "--count" in options else ("--count", "6")
    return cli.main(["data", "emoji", str(out), "--packages", str(installed), *few, *options])


def shards(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*.tar"))}


def test_the_command_writes_splits(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that do nothing, splits that a reader mixes, counts that are not so."""
    out = tmp_path / "out"
    options = ("--side", "40", "--seed", "3", "--shard-size", "4")
    assert write(installed, out, "--split", "test", "heldout_pairs", *options) == 0
    said = capsys.readouterr().out
    assert "84 emoji (84 noto, 84 twemoji, 7" in said and "left out" not in said
    assert "6 samples of test, " in said and f"data={out / 'test'}" in said
    assert [p.rsplit("/", 1)[1] for p in map(str, find_shards(str(out / "test")))] == [
        "test-00000.tar",
        "test-00001.tar",
    ]
    assert not find_shards(str(out))
    node = installed / "node_modules"
    packages = {s: node / PACKAGES[s].name for s in STYLES}
    dataset = EmojiDataset(read_emoji(packages, node / PACKAGES[NAMES].name))
    made = [dataset.make(3, i, "test", 40) for i in range(6)]
    text = b"".join(shards(out).values())
    assert all(sample.caption.encode() in text for sample in made)
    record = json.loads((out / "emoji.json").read_text())
    assert record["splits"]["test"] == {"count": 6, "seed": 3, "side": 40, "shard_size": 4}
    assert write(installed, out, "--split", "all", *options) == 0
    assert set(json.loads((out / "emoji.json").read_text())["splits"]) == set(SPLITS)
    assert {p.name for p in out.iterdir()} == {*SPLITS, "emoji.json", "README.md"}


def test_the_readme_says_what_licenses_ask(installed: Path, tmp_path: Path) -> None:
    """Pictures handed on without their artists, or under a license of a style that is not in."""
    assert (
        write(installed, tmp_path / "a")
        == write(installed, tmp_path / "b", "--styles", "noto", "fluent")
        == 0
    )
    for folder, names in (("a", STYLES), ("b", ("noto", "fluent"))):
        text = (tmp_path / folder / "README.md").read_text()
        for style in STYLES.values():
            inside = [style.attribution in text, style.package in text, style.license_text in text]
            assert inside == [style.name in names] * 3
        assert "emojibase-data 17.0.0" in text and "CLDR" in text and "were scaled" in text
        assert "| train | 6 | 0 | 48 |" in text
        assert ("version unknown" in text) == (folder == "a")


def test_the_same_command_writes_the_same(installed: Path, tmp_path: Path) -> None:
    """A try after Ctrl-C that is refused, or that leaves other bytes."""
    assert write(installed, tmp_path / "a") == 0
    before = shards(tmp_path / "a")
    (tmp_path / "a" / "train" / "train-00000.tar").unlink()
    (tmp_path / "a" / "train" / "train-00000.tar.tmp").write_text("half")
    assert write(installed, tmp_path / "a") == 0 and shards(tmp_path / "a") == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_emoji_of_one_style_are_left_out_and_counted(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Emoji that vanish without a word."""
    assert write(installed, tmp_path, "--styles", "noto", "fluent") == 0
    said = capsys.readouterr().out
    assert "71 emoji (71 noto, 71 fluent)" in said
    assert "left out 13 that fewer than 2 of these styles have" in said


def test_emoji_without_skin_tones_alone(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A switch that leaves a tone in, that nobody can see afterwards, or that lets a folder hold
    splits with and without tones."""
    out = tmp_path / "out"
    assert write(installed, out, "--no-skin-tones", "--count", "80") == 0
    assert "60 emoji (60 noto, 60 twemoji, 51 fluent)" in capsys.readouterr().out
    assert json.loads((out / "emoji.json").read_text())["skin_tones"] is False
    assert "without skin tones" in (out / "README.md").read_text()
    assert b"-1f3f" not in b"".join(shards(out).values())
    assert write(installed, out, "--split", "test") == 2
    assert "other packages, styles or skin tones than these" in capsys.readouterr().err
    assert write(installed, tmp_path / "all", "--count", "80") == 0
    assert json.loads((tmp_path / "all" / "emoji.json").read_text())["skin_tones"] is True
    assert "without skin tones" not in (tmp_path / "all" / "README.md").read_text()
    assert b"-1f3f" in b"".join(shards(tmp_path / "all").values())


def test_a_split_whose_folder_was_deleted_may_be_written_anew(
    installed: Path, tmp_path: Path
) -> None:
    """A remedy, "delete this one", that does not help."""
    assert write(installed, tmp_path) == 0
    for shard in (tmp_path / "train").iterdir():
        shard.unlink()
    (tmp_path / "train").rmdir()
    assert write(installed, tmp_path, "--count", "7") == 0
    assert json.loads((tmp_path / "emoji.json").read_text())["splits"]["train"]["count"] == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--seed", "1"],
            "was made with count 6, seed 0, side 48, shard_size 1000, got count 6, seed 1",
        ),
        (["--count", "7"], "was made with count 6, "),
        (["--styles", "noto", "twemoji"], "was made of other packages, styles or skin tones"),
        (["--styles", "noto"], "--styles: expected 2 or more of noto, "),
        (
            ["--styles", "noto", "twemoji", "--fluent", "."],
            "--fluent: expected a style of --styles",
        ),
        (["--count", "0"], "count, shard_size: expected 1 or more, got 0"),
        (["--split", "test", "--side", "8"], "side: expected at least 32 pixels, got 8"),
        (["--split", "test", "--seed", "-1"], "seed, index: expected 0 or more"),
        (["--noto", "nowhere"], "--noto: expected the folder of the unpacked package"),
        (["--packages", "nowhere"], "--packages: expected emoji-datasource-google (noto), "),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    installed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    """Two data sets in one folder, or an hour's work that ends in a traceback."""
    assert write(installed, tmp_path / "out") == 0
    before = shards(tmp_path / "out"), (tmp_path / "out" / "emoji.json").read_text()
    capsys.readouterr()
    assert write(installed, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err
    assert (shards(tmp_path / "out"), (tmp_path / "out" / "emoji.json").read_text()) == before


@pytest.mark.parametrize(
    "name", ["thesis.txt", "train/photo.jpg", "train/train-00000.tar", "emoji.json"]
)
def test_a_folder_of_something_else_is_refused(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A user's files among shards, or shards of another origin written over."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert write(installed, tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: OUT: ") and path.read_text() == "mine"
    assert len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == 1


def test_a_style_with_few_pictures_is_named(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that was unpacked by half, and a data set of what is left."""
    half = tmp_path / "half"
    shutil.copytree(installed / "node_modules" / PACKAGES["noto"].name, half)
    for path in sorted(half.rglob("*.png"))[10:]:
        path.unlink()
    assert write(installed, tmp_path / "out", "--noto", str(half)) == 2
    said = capsys.readouterr().err
    assert "noto: " in said and "pictures of 10 of the 84 emoji" in said and "unpack all" in said
    for path in half.rglob("*.png"):
        path.unlink()
    assert write(installed, tmp_path / "out", "--noto", str(half)) == 2
    assert "holds no pictures that end in .png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_download_is_only_for_what_is_missing(
    installed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """npm asked for what lies there; asked without --download; or missing, with a traceback."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert write(installed, tmp_path / "out", "--download") == 0
    asked: list[str] = []

    def fetch(packages: list[object], folder: Path, say: object) -> None:
        asked.extend(p.use for p in packages)  # type: ignore[attr-defined]

    node = installed / "node_modules"
    folders = [f"--{u}={node / PACKAGES[u].name}" for u in ("noto", "twemoji")]
    elsewhere = ["--packages", str(tmp_path / "empty"), *folders]
    assert write(installed, tmp_path / "out", "--download", *elsewhere) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: --download: expected npm to be installed") and said.count("\n") == 1
    )
    monkeypatch.setattr(command, "fetch_packages", fetch)
    assert write(installed, tmp_path / "out", *elsewhere) == 2 and not asked
    assert write(installed, tmp_path / "out", "--download", *elsewhere) == 2
    assert asked == ["fluent", "names"]


def test_a_full_disk_and_ctrl_c(
    installed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a shard under a whole one's name, a traceback, or a disk found full after an hour."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    assert write(installed, tmp_path / "a") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: OUT: the shards need about ") and "are missing" in said
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()

    def ending(error: BaseException) -> None:
        calls = iter(range(10))
        add = generated.add_file

        def add_file(*arguments: object) -> None:
            if next(calls) == 7:
                raise error
            add(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(generated, "add_file", add_file)

    for out, error, status, line in (
        (
            "b",
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "is full: the rest needs about ",
        ),
        ("c", KeyboardInterrupt(), 130, "stopped; what is finished stays"),
    ):
        ending(error)
        assert write(installed, tmp_path / out, "--shard-size", "2") == status
        monkeypatch.undo()
        assert line in capsys.readouterr().err
        assert list(shards(tmp_path / out)) == ["train/train-00000.tar"]
        assert not list((tmp_path / out).rglob("*.tmp"))
        assert write(installed, tmp_path / out, "--shard-size", "2") == 0
        assert len(shards(tmp_path / out)) == 3
