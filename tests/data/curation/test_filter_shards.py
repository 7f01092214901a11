"""Filtered shards: what stays, what is counted, and what a stop leaves."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.commands.data import filter as command
from dalle1.data.curation import filter_shards as filtering
from dalle1.data.curation import filters
from dalle1.data.curation.dedup import Looks
from dalle1.data.curation.filter_shards import filter_shards
from dalle1.data.curation.filters import CAUSES, FilterSettings
from dalle1.data.shards.index import raw_samples
from dalle1.data.shards.tar import MAX_BYTES


def image(seed: int, width: int = 24, height: int = 20, kind: str = "PNG") -> bytes:
    """An image of a few soft spots, which a hash may tell from another's."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (name, data) in enumerate(members):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1000 + i
            tar.addfile(entry, io.BytesIO(data))
    return path


def sample(key: str, png: bytes, caption: str | bytes, **more: bytes) -> list[tuple[str, bytes]]:
    text = caption if isinstance(caption, bytes) else caption.encode()
    return [
        (f"{key}.png", png),
        (f"{key}.txt", text),
        *((f"{key}.{k}", v) for k, v in more.items()),
    ]


def contents(path: Path) -> list[tuple[str, bytes, float]]:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read(), m.mtime) for m in tar]  # type: ignore[union-attr]


def keys(folder: Path, name: str = "0000.tar") -> list[str]:
    return list(dict.fromkeys(member[0].split(".")[0] for member in contents(folder / name)))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.tar*"))}


def test_each_cause_drops_its_samples_and_is_counted(tmp_path: Path) -> None:
    """A filter that is never asked, a cause that is counted as another, or counts that do not add
    up to what was read."""
    members = [
        *sample("good", image(1), "a red circle", cls=b"7", json=b"{}"),
        *sample("empty", image(2), "  "),
        *sample("bytes", image(3), b"\xff\xfe not text"),
        ("silent.png", image(4)),
        ("blind.txt", b"a red circle"),
        *sample("rubbish", b"no image", "a red circle"),
        *sample("date", image(5), "photographed on 12 May 2010"),
        *sample("short", image(6), "red circle"),
        *sample("other", image(7), "красный круг на полу"),
        *sample("long", image(8, 41, 20), "a red circle"),
        *sample("small", image(9, 16, 15), "a red circle"),
        *sample("again", image(1), "a red circle"),
        *sample("last", image(1), "another red circle"),
    ]
    write_tar(tmp_path / "in" / "0000.tar", members)
    out = tmp_path / "out"
    report = filter_shards(str(tmp_path / "in"), out, FilterSettings(min_side=16))
    assert keys(out) == ["good", "last"]
    assert report.dropped == {
        "no caption": 1,
        "empty caption": 1,
        "caption is not UTF-8": 1,
        "no image": 1,
        "unreadable image": 1,
        "mostly boilerplate": 1,
        "caption too short": 1,
        "not English": 1,
        "extreme aspect ratio": 1,
        "image too small": 1,
        "duplicate": 1,
    }
    assert (report.samples, report.kept) == (13, 2)
    assert report.kept + report.dropped.total() == report.samples
    named = {cause: [e["key"] for e in examples] for cause, examples in report.examples.items()}
    wanted = {"empty caption": "empty", "caption is not UTF-8": "bytes", "no caption": "silent"}
    wanted |= {"no image": "blind", "unreadable image": "rubbish", "duplicate": "again"}
    assert {cause: named[cause] for cause in wanted} == {c: [key] for c, key in wanted.items()}
    assert "photographed on 12 May" in report.table()


def test_what_stays_is_untouched(tmp_path: Path) -> None:
    """Images encoded anew, a json that is lost, or keys that are numbered anew."""
    long = "k" * 150  # more than the header of an old tar holds
    members = [
        *sample("a/0001", image(1), "  a red circle\n", json=b'{"x":  1}', seg=b"\0\1"),
        *sample("a/0002", image(2), "short"),
        (f"{long}.PNG", image(3)),
        (f"{long}.Txt", b"a blue square"),
    ]
    write_tar(tmp_path / "in" / "0000.tar", members)
    filter_shards(str(tmp_path / "in"), tmp_path / "out", FilterSettings())
    before = contents(tmp_path / "in" / "0000.tar")
    assert contents(tmp_path / "out" / "0000.tar") == before[:4] + before[6:]
    read = list(raw_samples(str(tmp_path / "out")))
    assert [s["__key__"] for s in read] == ["a/0001", long]


@pytest.mark.parametrize(
    ("width", "height", "kept"),
    [(20, 40, True), (40, 20, True), (20, 41, False), (41, 20, False), (30, 30, True)],
)
def test_bounds_of_the_aspect_ratio(tmp_path: Path, width: int, height: int, kept: bool) -> None:
    """Images of exactly 1/2 and 2 dropped (appendix C keeps them), or one side forgotten."""
    members = sample("x", image(1, width, height), "a red circle")
    write_tar(tmp_path / "in" / "0000.tar", members + sample("y", image(2), "a red circle"))
    filter_shards(str(tmp_path / "in"), tmp_path / "out", FilterSettings())
    assert ("x" in keys(tmp_path / "out")) is kept
    filter_shards(str(tmp_path / "in"), tmp_path / "all", FilterSettings(max_aspect=0))
    assert "x" in keys(tmp_path / "all")


@pytest.mark.parametrize(
    ("option", "value", "dropped"),
    [
        ("min_words", 0, "short"),
        ("min_words", 2, "short"),
        ("boilerplate_words", 0, "date"),
        ("boilerplate_words", 1, "date"),
        ("english", "off", "other"),
        ("duplicates", "off", "again"),
    ],
)
def test_filters_are_switched_off_one_by_one(
    tmp_path: Path, option: str, value: Any, dropped: str
) -> None:
    """A switch that does nothing, or that takes another filter along."""
    members = [
        *sample("good", image(1), "a red circle"),
        *sample("date", image(5), "sunset photographed on 12 May 2010"),
        *sample("short", image(6), "red circle"),
        *sample("other", image(7), "красный круг на полу"),
        *sample("again", image(1), "a red circle"),
    ]
    write_tar(tmp_path / "in" / "0000.tar", members)
    filter_shards(str(tmp_path / "in"), tmp_path / "out", FilterSettings(**{option: value}))
    assert keys(tmp_path / "out") == ["good", dropped]


def test_duplicates_of_pairs_and_of_images(tmp_path: Path) -> None:
    """An image's second caption dropped, or a pair that comes again in a later shard kept."""
    write_tar(tmp_path / "in" / "0000.tar", sample("a", image(1), "a red circle"))
    members = [
        *sample("b", image(1), "a circle, red"),
        *sample("c", image(1), "a red circle "),  # spaces around are no part of the caption
        *sample("d", image(2), "a red circle"),
    ]
    write_tar(tmp_path / "in" / "0001.tar", members)
    for kind, left in {"pair": ["b", "d"], "image": ["d"], "off": ["b", "c", "d"]}.items():
        out = tmp_path / kind
        filter_shards(str(tmp_path / "in"), out, FilterSettings(duplicates=kind))
        assert keys(out) == ["a"] and keys(out, "0001.tar") == left


def test_caption_under_a_key_of_the_json(tmp_path: Path) -> None:
    """A caption_key that is ignored, so that the txt decides."""
    members = [
        *sample("a", image(1), "no", json=json.dumps({"alt": "a red circle"}).encode()),
        *sample("b", image(2), "a red circle", json=json.dumps({"alt": "no"}).encode()),
        *sample("c", image(3), "a red circle", json=b"[]"),
    ]
    write_tar(tmp_path / "in" / "0000.tar", members)
    settings = FilterSettings(caption_key="alt")
    report = filter_shards(str(tmp_path / "in"), tmp_path / "out", settings)
    assert keys(tmp_path / "out") == ["a"]
    assert report.dropped == {"caption too short": 1, "no caption": 1}


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7])
def test_bands_find_what_brute_force_finds(distance: int) -> None:
    """Near duplicates that share no band and are missed, or hashes that are too far apart."""
    rng = np.random.default_rng(distance)
    looks: list[int] = []
    for i in range(400):
        look = int(rng.integers(0, 2**64, dtype=np.uint64))
        if i % 2 and looks:  # one that is near to an earlier one, on both sides of the bound
            look = looks[int(rng.integers(len(looks)))]
            for bit in rng.choice(64, int(rng.integers(distance + 3)), replace=False):
                look ^= 1 << int(bit)
        looks.append(look)
    index, found = Looks(distance), []
    for look in looks:
        found.append(index.near(look))
        index.add(look)
    wanted = [
        any((look ^ other).bit_count() <= distance for other in looks[:i])
        for i, look in enumerate(looks)
    ]
    assert found == wanted and 40 < sum(wanted) < 300


def test_near_duplicates(tmp_path: Path) -> None:
    """The same image, smaller or saved as a JPEG, kept; or different images dropped."""
    pytest.importorskip("imagehash")
    members = [
        *sample("a", image(1, 64, 64), "a red circle"),
        *sample("b", image(2, 64, 64), "a red circle"),
        *sample("c", image(1, 64, 64, "JPEG"), "another red circle"),
        *sample("d", image(1, 48, 48), "a red circle"),
    ]
    write_tar(tmp_path / "in" / "0000.tar", members)
    report = filter_shards(
        str(tmp_path / "in"), tmp_path / "out", FilterSettings(near_duplicates=3)
    )
    assert keys(tmp_path / "out") == ["a", "b"]
    assert report.dropped == {"near duplicate": 2}
    assert "imagehash" in report.settings  # other versions may hash otherwise
    filter_shards(str(tmp_path / "in"), tmp_path / "all", FilterSettings())
    assert keys(tmp_path / "all") == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        (FilterSettings(near_duplicates=3), "imagehash"),
        (FilterSettings(english="language"), "py3langid"),
    ],
)
def test_missing_packages_are_named_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: FilterSettings, package: str
) -> None:
    """An ImportError in a worker after hours, or a filter that is left out without a word."""
    write_tar(tmp_path / "in" / "0000.tar", sample("a", image(1), "a red circle"))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "py3langid.langid", raising=False)
    filters._imagehash.cache_clear()
    filters.captions.identifier.cache_clear()
    with pytest.raises(ValueError, match=rf"{package}: pip install 'dalle1\[filter\]'"):
        filter_shards(str(tmp_path / "in"), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def four_shards(folder: Path) -> str:
    """Each with duplicates of the ones before it."""
    for shard in range(4):
        members = []
        for i in range(8):
            again = i % 3 == 2
            number = i if again else 10 * shard + i
            caption = "no" if i == 7 else f"a red circle {number}"
            members += sample(f"{shard}-{i}", image(number), caption)
        write_tar(folder / f"{shard:04d}.tar", members)
    return str(folder)


# Each shard is flushed twice: the tar before it has its name, then the record.
@pytest.mark.parametrize(("flush", "workers"), [(1, 0), (3, 0), (4, 2), (5, 0)])
def test_a_killed_run_goes_on(tmp_path: Path, flush: int, workers: int) -> None:
    """Half a shard under its name, a shard that is lost, or duplicates that come through because
    the hashes from before the stop are forgotten."""
    data, settings = four_shards(tmp_path / "in"), FilterSettings()
    whole = filter_shards(data, tmp_path / "whole", settings)
    assert whole.dropped["duplicate"] == 6

    def killed() -> None:
        count = 0

        def flush_and_die(file: Any) -> None:
            nonlocal count
            count += 1
            if count == flush:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        filtering.flush = flush_and_die
        filter_shards(data, tmp_path / "out", settings, workers)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    wanted, left = files(tmp_path / "whole"), files(tmp_path / "out")
    tars = [name for name in left if name.endswith(".tar")]
    assert len(tars) == flush // 2 and all(left[name] == wanted[name] for name in tars)
    done = [p for p in (tmp_path / "out").glob("*.tar") if p.name < f"{(flush - 1) // 2:04d}.tar"]
    stamps = {path: path.stat().st_mtime_ns for path in done}
    assert len(stamps) == (flush - 1) // 2
    again = filter_shards(data, tmp_path / "out", settings, workers)
    assert files(tmp_path / "out") == wanted and len(wanted) == 4
    assert again == whole and again.to_json() == whole.to_json()
    assert stamps == {path: path.stat().st_mtime_ns for path in done}  # not done again


def test_a_shard_that_changed_is_done_again(tmp_path: Path) -> None:
    """A shard that was fetched anew left as it was, or later ones still compared with what it held
    before; and a shard that was removed by mistake not made again."""
    data, out = four_shards(tmp_path / "in"), tmp_path / "out"
    filter_shards(data, out, FilterSettings())
    write_tar(tmp_path / "in" / "0000.tar", sample("new", image(99), "a red circle 99"))
    (out / "0003.tar").unlink()
    report = filter_shards(data, out, FilterSettings())
    fresh = filter_shards(data, tmp_path / "fresh", FilterSettings())
    assert files(out) == files(tmp_path / "fresh") and report == fresh


@pytest.mark.parametrize("settings", [FilterSettings(), FilterSettings(duplicates="off")])
def test_what_is_done_is_not_done_again(tmp_path: Path, settings: FilterSettings) -> None:
    """All of it done anew where the shards are links to files of other names, as caches have them,
    or where no hashes are kept; new shards behind the old ones left out."""
    four_shards(tmp_path / "cache")
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"shard-{i}.tar").symlink_to(tmp_path / "cache" / f"{i:04d}.tar")
    out = tmp_path / "out"
    first = filter_shards(str(tmp_path / "in" / "shard-{0..2}.tar"), out, settings)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    again = filter_shards(str(tmp_path / "in"), out, settings)
    assert (first.shards, again.shards) == (3, 4)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and len(stamps) == 3
    filter_shards(str(tmp_path / "in"), tmp_path / "whole", settings)
    assert files(out) == files(tmp_path / "whole")


def test_a_bad_first_shard_does_not_end_the_run(tmp_path: Path) -> None:
    """A wrong setting suspected because the first shard has no captions."""
    bad = [(f"{i}.png", image(i)) for i in range(99)]
    write_tar(tmp_path / "in" / "0000.tar", bad)
    write_tar(tmp_path / "in" / "0001.tar", sample("a", image(1), "a red circle"))
    report = filter_shards(str(tmp_path / "in"), tmp_path / "out", FilterSettings())
    assert report.kept == 1 and report.dropped == {"no caption": 99}


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    """Shards of two kinds side by side in one data set."""
    data, out = four_shards(tmp_path / "in"), tmp_path / "out"
    filter_shards(data, out, FilterSettings())
    with pytest.raises(ValueError, match=r"min_words was 3 and is 4; max_aspect was 2\.0 and is 3"):
        filter_shards(data, out, FilterSettings(min_words=4, max_aspect=3))
    four_shards(tmp_path / "other")
    with pytest.raises(ValueError, match="was made of"):
        filter_shards(str(tmp_path / "other"), out, FilterSettings())
    with pytest.raises(ValueError, match=r"0003\.tar, which is not among"):
        filter_shards(str(tmp_path / "in" / "{0000..0002}.tar"), out, FilterSettings())


def test_folders_that_must_not_be_written_to(tmp_path: Path) -> None:
    """The data themselves overwritten, or somebody's other shards."""
    data = four_shards(tmp_path / "in")
    before = files(tmp_path / "in")
    for out in (tmp_path / "in", tmp_path / "x" / ".." / "in"):
        with pytest.raises(ValueError, match="give another folder"):
            filter_shards(data, out, FilterSettings())
    four_shards(tmp_path / "other")
    with pytest.raises(ValueError, match=r"already holds 0000\.tar"):
        filter_shards(data, tmp_path / "other", FilterSettings())
    assert files(tmp_path / "in") == files(tmp_path / "other") == before


@pytest.mark.parametrize("cut", ["in an image", "behind a sample", "in a sample", "rubbish"])
def test_a_damaged_shard_keeps_what_comes_before(tmp_path: Path, cut: str) -> None:
    """The good samples of a shard lost with its rest, half a sample taken for a whole one, or the
    damage hushed up, as tarfile does where a header is rubbish."""
    members = [
        member for i in range(4) for member in sample(f"{i}", image(i), f"a red circle {i}", a=b"x")
    ]
    path = write_tar(tmp_path / "in" / "0000.tar", members)
    with tarfile.open(path) as tar:
        starts = {m.name: (m.offset, m.offset_data) for m in tar}
    data = path.read_bytes()
    end = {
        "in an image": starts["2.png"][1] + 20,
        "behind a sample": starts["2.png"][0],
        "in a sample": starts["2.a"][0],
        "rubbish": starts["2.png"][0],
    }[cut]
    path.write_bytes(data[:end] + (b"\xab" * 4096 if cut == "rubbish" else b""))
    write_tar(tmp_path / "in" / "0001.tar", sample("z", image(9), "a red circle 9"))
    report = filter_shards(str(tmp_path / "in"), tmp_path / "out", FilterSettings())
    assert keys(tmp_path / "out") == ["0", "1"] and keys(tmp_path / "out", "0001.tar") == ["z"]
    assert list(report.damaged) == ["0000.tar"] and "0000.tar" in report.table()
    half = cut in ("in an image", "in a sample")
    assert report.dropped == ({"cut off by a damaged shard": 1} if half else {})
    assert report.kept + report.dropped.total() == report.samples == (4 if half else 3)


def test_a_shard_of_which_nothing_is_left(tmp_path: Path) -> None:
    """A reader that stumbles over a shard without samples, or one that is left out so that the
    numbers have a hole."""
    write_tar(tmp_path / "in" / "0000.tar", sample("a", image(1), "no"))
    (tmp_path / "in" / "0001.tar").write_bytes(b"this is no tar")
    write_tar(tmp_path / "in" / "0002.tar", sample("b", image(2), "a red circle"))
    report = filter_shards(str(tmp_path / "in"), tmp_path / "out", FilterSettings())
    assert list(report.damaged) == ["0001.tar"] and (report.samples, report.kept) == (2, 1)
    read = list(raw_samples(str(tmp_path / "out" / "{0000..0002}.tar")))
    assert [s["__key__"] for s in read] == ["b"]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    """Empty shards without a word: by a wrong caption_key, or by filters that are too strict."""
    data, out = four_shards(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"32 x no caption.*'alt'.*caption_key"):
        filter_shards(data, out, FilterSettings(caption_key="alt"))
    assert not out.exists()  # the right key is not refused afterwards
    with pytest.raises(ValueError, match=r"not a sample .* is left .*32 x caption too short"):
        filter_shards(data, out, FilterSettings(min_words=50))


def test_data_that_cannot_be_filtered(tmp_path: Path) -> None:
    """Shards that overwrite each other, or a folder of pairs answered with a traceback."""
    four_shards(tmp_path / "a")
    four_shards(tmp_path / "b")
    settings = FilterSettings()
    with pytest.raises(ValueError, match="have one name"):
        filter_shards(str(tmp_path / "{a,b}" / "0000.tar"), tmp_path / "out", settings)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.png").write_bytes(image(1))
    with pytest.raises(ValueError, match=r"launch/shard\.py"):
        filter_shards(str(tmp_path / "pairs"), tmp_path / "out", settings)
    with pytest.raises(ValueError, match="does not exist"):
        filter_shards(str(tmp_path / "no.tar"), tmp_path / "out", settings)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("min_words", -1),
        ("english", "german"),
        ("min_english", 2.0),
        ("max_aspect", 0.5),
        ("max_aspect", float("nan")),
        ("duplicates", "yes"),
        ("near_duplicates", 8),
        ("near_duplicates", -1),
    ],
)
def test_settings_out_of_range_are_named(option: str, value: Any) -> None:
    """A typing error that drops everything or nothing."""
    with pytest.raises(ValueError, match=option):
        FilterSettings(**{option: value})


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that are not passed on, a report that is not written, a traceback for a mistake."""
    data, out, report = four_shards(tmp_path / "in"), tmp_path / "out", tmp_path / "r" / "r.json"
    assert command.main([data, str(out), "--min-words", "6", "--report", str(report)]) == 2
    assert "error: data: not a sample" in capsys.readouterr().err
    flags = ["--min-words", "1", "--duplicates", "off", "--report", str(report)]
    assert command.main([data, str(out), *flags]) == 2  # other settings than the first try's
    assert "min_words was 6" in capsys.readouterr().err
    out = tmp_path / "second"
    assert command.main([data, str(out), *flags]) == 0
    printed = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["settings"]["min_words"] == 1 and found["settings"]["duplicates"] == "off"
    assert (found["shards"], found["samples"], found["kept"]) == (4, 32, 32)
    assert set(found["dropped"]) == set(CAUSES) and "kept" in printed and f"data={out}" in printed
    assert set(command.OPTIONS) == set(FilterSettings.__dataclass_fields__)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a shard left under its name or another; an error that does not say what is missing."""
    data = four_shards(tmp_path / "in")

    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(filtering, "flush", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"is full: 0000.tar needs about .* kB are missing"):
        filter_shards(data, tmp_path / "out", FilterSettings())
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    """A file that was not read, for its size, written as an empty one."""
    whole = sample("a", image(1), "a red circle 1", npy=bytes(MAX_BYTES + 1))
    write_tar(tmp_path / "in" / "0000.tar", whole + sample("b", image(2), "a red circle 2"))
    report = filter_shards(str(tmp_path / "in"), tmp_path / "out", FilterSettings())
    assert report.dropped == {"image too large": 1} and keys(tmp_path / "out") == ["b"]


def test_the_limit_of_pixels_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images dropped by PIL's limit, which no setting changes, though training would read them;
    a folder of before the setting refused."""
    data, out = four_shards(tmp_path / "in"), tmp_path / "out"
    kept = filter_shards(data, out, FilterSettings()).kept
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    for name, near in (("plain", None), ("near", 0)):
        settings = FilterSettings(near_duplicates=near, duplicates="off", max_pixels=0)
        report = filter_shards(data, tmp_path / name, settings)
        assert not report.dropped["image too large"]
    with pytest.raises(ValueError, match="x image too large"):
        filter_shards(data, tmp_path / "few", FilterSettings(max_pixels=9))
    held = out / "filtering" / "settings.json"
    content = json.loads(held.read_text())
    del content["max_pixels"]
    held.write_text(json.dumps(content))
    assert filter_shards(data, out, FilterSettings()).kept == kept


def test_a_run_of_the_former_words_goes_on(tmp_path: Path) -> None:
    """Shards of before this release refused as of other settings, or their counts lost."""
    data, out = four_shards(tmp_path / "in"), tmp_path / "out"
    write_tar(tmp_path / "in" / "0004.tar", sample("x", b"none", "a red circle"))
    whole = filter_shards(data, out, FilterSettings(duplicates="image"))
    held = out / "filtering" / "settings.json"
    held.write_text(held.read_text().replace('"image"', '"picture"'))
    path = out / "filtering" / "0004.npz"
    with np.load(path) as file:
        content = dict(file)
    record = content["record"].tobytes().replace(b"unreadable image", b"no readable picture")
    content["record"] = np.frombuffer(record, np.uint8)
    np.savez(path, **content)
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    with pytest.warns(FutureWarning, match="'picture' is called 'image'"):
        settings = FilterSettings(duplicates="picture")
    again = filter_shards(data, out, settings)
    assert again == whole and again.dropped["unreadable image"] == 1
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    with pytest.warns(FutureWarning):
        assert command.main([data, str(out), "--duplicates", "picture"]) == 0
