"""The reader: order, splitting, resuming, bad samples."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle1.data import shapes
from dalle1.data.shards import reader as reading
from dalle1.data.shards import tar as tars
from dalle1.data.shards.index import Index, make_index, raw_samples, read_captions
from dalle1.data.shards.loader import Batch, Batches
from dalle1.data.transforms import augment_dalle, augment_dvae, read_image, resize_area
from tests.data.images import encoded, good, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> str:
    for shard in range(3):
        write_tar(tmp_path / f"{shard:04d}.tar", good(10, 10 * shard))
    return str(tmp_path / "{0000..0002}.tar")


def read(batches: Batches, count: int, workers: int = 0) -> list[Batch]:
    loader = batches.loader(workers)
    return [next(loader) for _ in range(count)]


def captions(batches: Batches, count: int, workers: int = 0) -> list[list[str]]:
    return [batch.captions for batch in read(batches, count, workers)]


def state_after(batches: Batches, ranks: list[list[Batch]]) -> dict[str, Any]:
    """The state of a run whose ranks have read these batches; through a JSON file."""
    taken = {stream: n for rank in ranks for stream, n in rank[-1].taken.items()}
    counts = [taken[stream] for stream in range(batches.streams)]
    state = batches.state(batches.first + len(ranks[0]), counts)
    return cast(dict[str, Any], json.loads(json.dumps(state)))


def made(data: str | Index, **settings: object) -> Batches:
    return Batches(
        data,
        **({"batch_size": 6, "image_size": 16, "augmentation": augment_dvae, "seed": 3} | settings),  # type: ignore[arg-type]
    )


def test_an_epoch_has_every_sample_once(shards: str) -> None:
    """Samples lost at shard ends or in the shuffle buffer, or an order that is no shuffle."""
    batches = [c for batch in captions(made(shards, buffer=8), 10) for c in batch]
    epoch, second = batches[:30], batches[30:]
    assert sorted(epoch) == sorted(f"number {i}" for i in range(30))
    assert epoch != sorted(epoch)
    assert sorted(second) == sorted(epoch) and second != epoch


def test_order_depends_on_the_seed_alone(shards: str) -> None:
    """Runs that differ by hidden state, or seeds that make no difference."""
    assert captions(made(shards), 4) == captions(made(shards), 4)
    assert captions(made(shards), 4) != captions(made(shards, seed=4), 4)


def same(found: list[Batch], wanted: list[Batch]) -> bool:
    return len(found) == len(wanted) and all(
        (a.keys, a.captions, a.seeds) == (b.keys, b.captions, b.seeds)
        and torch.equal(cast(Tensor, a.images), cast(Tensor, b.images))
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("with_bad", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resuming_and_workers_change_nothing(shards: str, workers: int, with_bad: bool) -> None:
    """Samples that are repeated or left out after a stop, or reordered by worker processes; a
    state that forgets the bad samples that a stream has skipped."""
    if with_bad:
        rows = [{"png": encoded(i) if i % 3 else b"no", "txt": b"x"} for i in range(10)]
        write_tar(Path(shards).parent / "0001.tar", rows)
    wanted = read(made(shards), 13)
    first = made(shards)
    state = state_after(first, [read(first, 7, workers)])
    assert same(read(made(shards, state=state), 6, workers), wanted[7:])
    assert with_bad == any(batch.dropped for batch in wanted)


@pytest.mark.parametrize("ranks", [(1, 2), (2, 3), (3, 1)])
def test_resuming_with_other_ranks(shards: str, ranks: tuple[int, int]) -> None:
    """A sample of the epoch that no rank, or two ranks, read once their number has changed."""
    settings = {"batch_size": 12, "streams": 6}
    whole = read(made(shards, **settings), 10)
    before = [
        read(made(shards, **settings, rank=r, world_size=ranks[0]), 4) for r in range(ranks[0])
    ]
    state = state_after(made(shards, **settings), before)
    after = [
        read(
            made(shards, batch_size=12, streams=6, rank=r, world_size=ranks[1], state=state),
            6,
            r % 3,
        )
        for r in range(ranks[1])
    ]
    keys = [[key for b in step for key in b.keys] for step in zip(*before, strict=True)]
    keys += [[key for b in step for key in b.keys] for step in zip(*after, strict=True)]
    assert keys == [batch.keys for batch in whole]
    assert [s for b in after for s in b[0].seeds] == whole[4].seeds


def test_a_state_of_another_run(shards: str) -> None:
    """Resuming with other data, or in another order, without a word."""
    batches = made(shards, buffer=8)
    state = state_after(batches, [read(batches, 2)])
    assert state["epoch"] == 0 and state["batches"] == 2
    for settings, name in (
        ({"buffer": 9}, "shuffle_buffer"),
        ({"streams": 3}, "streams"),
        ({"seed": 4}, "seed"),
    ):
        with pytest.raises(ValueError, match=name):
            made(shards, **({"buffer": 8} | settings), state=state)
    write_tar(Path(shards).parent / "0001.tar", [{"png": encoded(1), "txt": b"x"}])
    with pytest.raises(ValueError, match="not what the run was trained on"):
        made(shards, buffer=8, state=state)


def test_a_state_that_calls_streams_lanes(shards: str) -> None:
    """A run of before this release that no longer resumes, or resumes in any order."""
    first = made(shards, streams=3)
    wanted = read(made(shards, streams=3), 4)
    state = state_after(first, [read(first, 2)])
    state["lanes"] = state.pop("streams")
    assert same(read(made(shards, streams=3, state=state), 2), wanted[2:])
    with pytest.raises(ValueError, match=r"reader\.streams: the run was trained with 3"):
        made(shards, streams=6, state=state)


def test_streams_that_do_not_fit(shards: str) -> None:
    """Samples lost at the end of a rank's places."""
    for streams, ranks in ((4, 1), (3, 2)):
        with pytest.raises(ValueError, match=f"reader.streams {streams}"):
            made(shards, streams=streams, world_size=ranks)


def test_ranks_share_a_batch(shards: str) -> None:
    """Ranks that train on the same samples, or on other ones than a single process would."""
    whole = captions(made(shards), 3)
    parts = [captions(made(shards, rank=r, world_size=2), 3) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="batch_size 6"):
        made(shards, world_size=4)


def test_folder_of_pairs(tmp_path: Path) -> None:
    """Images matched with another's caption, or those without a caption taken along."""
    for i, kind in enumerate(("png", "jpg", "webp")):
        encoder = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind]
        (tmp_path / f"p{i}.{kind}").write_bytes(encoded(40 * i, encoder))
        (tmp_path / f"p{i}.txt").write_text(f"picture {i}\n")
    (tmp_path / "lonely.png").write_bytes(encoded(9))
    loader = made(str(tmp_path), batch_size=3).loader()
    batch = next(loader)
    assert sorted(batch.captions) == ["picture 0", "picture 1", "picture 2"]
    for caption, image in zip(batch.captions, cast(Tensor, batch.images), strict=True):
        assert abs(float(image.float().mean()) - 40 * int(caption[-1])) < 3


def test_caption_under_a_key_of_the_json(tmp_path: Path) -> None:
    """caption_key ignored, so that the txt (or nothing) is trained on."""
    rows = [
        {"jpg": encoded(i, "JPEG"), "txt": b"no", "json": json.dumps({"alt": f"é {i}"}).encode()}
        for i in range(4)
    ]
    write_tar(tmp_path / "a.tar", rows)
    data = str(tmp_path / "a.tar")
    batch = next(made(data, batch_size=4, caption_key="alt").loader())
    assert sorted(batch.captions) == ["é 0", "é 1", "é 2", "é 3"]
    assert read_captions(data, "alt", 2) == ["é 0", "é 1"]
    rows = [{"png": encoded(i), "txt": b"one\n\ntwo\n"} for i in range(2)]
    lines = str(write_tar(tmp_path / "lines.tar", rows))
    assert read_captions(lines, "txt", 3, lines=True) == ["one", "two", "one"]


def test_bad_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    """One broken image that ends a run, shrinks a batch, or makes a good one come twice."""
    rows = [{"png": encoded(i), "txt": f"good {i}".encode()} for i in range(9)]
    rows += [
        {"png": b"no image", "txt": b"bad"},
        {"png": encoded(1), "txt": b"  "},
        {"txt": b"bad"},
    ]
    write_tar(tmp_path / "a.tar", rows)
    batches = read(made(str(tmp_path / "a.tar"), batch_size=3), 12)
    assert all(len(batch.captions) == len(cast(Tensor, batch.images)) == 3 for batch in batches)
    counts = Counter(caption for batch in batches for caption in batch.captions)
    assert set(counts) == {f"good {i}" for i in range(9)} and set(counts.values()) <= {3, 4, 5}
    dropped = sum((batch.dropped for batch in batches), Counter())
    assert set(dropped) == {"unreadable image", "empty caption", "no image"}
    assert all(3 <= n <= 5 for n in dropped.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_read_as_files_are(shards: str, workers: int) -> None:
    """Another order for pipes, or samples lost where a stream begins in the middle of a shard."""
    wanted = read(made(shards), 10)
    folder = Path(shards).parent
    data = f"pipe:cat {folder}/{{0000..0002}}.tar"
    assert same(read(made(data), 10, workers), wanted)
    first = made(data)
    state = state_after(first, [read(first, 4, workers)])
    assert same(read(made(data, state=state), 6, workers), wanted[4:])


def test_a_stream_that_breaks_off_is_opened_again(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a shard lost for ever to one dropped connection."""
    monkeypatch.setattr(reading, "RETRIES", (0.0,))
    path, flag = tmp_path / "0001.tar", tmp_path / "flag"
    size = path.stat().st_size
    # Once whole (it is counted), then cut off until it is opened again.
    script = (
        f"if [ -e {flag}2 ]; then cat {path}; elif [ -e {flag} ]; then touch {flag}2; "
        f"head -c {size // 3} {path}; else touch {flag}; cat {path}; fi"
    )
    data = f"pipe:{script}"
    with pytest.warns(UserWarning, match="broke off"):
        batches = read(made(data, batch_size=5, streams=1), 2)
    assert sorted(key for batch in batches for key in batch.keys) == [
        f"0001-{i:04d}" for i in range(10)
    ]
    assert not any(batch.dropped for batch in batches)


def test_a_stream_that_ends_early_every_time(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that tries for ever, or one that takes the end for the epoch's."""
    monkeypatch.setattr(reading, "RETRIES", (0.0,))
    size = (tmp_path / "0001.tar").stat().st_size
    index = make_index(f"pipe:cat {tmp_path}/0001.tar")
    cut = replace(index, shards=[f"pipe:head -c {size // 2} {tmp_path}/0001.tar"])
    with pytest.warns(UserWarning, match="broke off"):
        batches = read(made(cut, batch_size=2, streams=1), 6)
    dropped = sum((batch.dropped for batch in batches), Counter())
    assert 3 <= dropped["missing from its shard"] <= 18 and dropped["cut off by a damaged shard"]


@pytest.mark.parametrize("module", [tars, reading])
def test_a_disk_that_fails_once(
    shards: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard taken for empty, for the whole run, because a network disk failed for a second."""
    monkeypatch.setattr(reading, "RETRIES", (0.0,))
    failed: list[str] = []

    def flaky(path: str, mode: str) -> Any:
        if path.endswith("0001.tar") and len(failed) < 1:
            failed.append(path)
            raise OSError(errno.ESTALE, "stale file handle")
        return open(path, mode)

    batches = made(shards, batch_size=5)
    monkeypatch.setattr(module, "open", flaky, raising=False)
    with pytest.warns(UserWarning, match="stale file handle"):
        found = read(batches, 6)
    assert failed and len({key for batch in found for key in batch.keys}) == 30
    assert not any(batch.dropped for batch in found)


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_keep_the_process(shards: str, tmp_path: Path) -> None:
    """A run that is done, or stopped, and waits for ever for a stream that says nothing more."""
    script = (
        "from dataclasses import replace\n"
        "from dalle1.data.transforms import augment_dvae\n"
        "from dalle1.data.shards.order import Order\n"
        "from dalle1.data.shards.loader import Batches\n"
        "from dalle1.data.shards.index import make_index\n"
        f"index = make_index('pipe:cat {tmp_path}/0000.tar')\n"
        f"stuck = 'pipe:head -c 20000 {tmp_path}/0000.tar; exec sleep 120'\n"
        "index = replace(index, shards=[stuck])\n"
        "def begins(seed):\n"
        "    return Order([10], 1, 1, 1, seed).window(0, 0).pieces[0].first\n"
        "seed = next(seed for seed in range(1000) if begins(seed) == 0)\n"
        "batches = Batches(index, 1, 16, augment_dvae, seed, buffer=1).loader(1)\n"
        "for _ in range(3):\n"
        "    print(next(batches).keys, flush=True)\n"
        "print('done', flush=True)\n"
    )
    # Into files: the command that hangs holds the worker's pipes open.
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        subprocess.run(
            [sys.executable, "-c", script], stdout=out, stderr=err, timeout=60, check=True
        )
    assert (tmp_path / "out").read_text().endswith("done\n")


def test_files_are_read_as_the_shard_has_them(tmp_path: Path) -> None:
    """Offsets of another file; the last of two files with one extension; sparse files, links or
    long names read from where their headers stand."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(30):
            key = f"{i}" * int(rng.integers(1, 120))
            for extension in ("PNG", "txt", "json", "txt")[: 4 if i % 7 == 0 else 3]:
                data = rng.bytes(int(rng.integers(0, 2000)))
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
                tar.addfile(tarfile.TarInfo(f"__meta{i}__"))
    sparse = tmp_path / "hole.png"
    with sparse.open("wb") as file:
        file.seek(2**20)
        file.write(b"end")
    subprocess.run(
        ["tar", "--sparse", "-rf", str(path), "-C", str(tmp_path), "hole.png"], check=True
    )
    index = make_index(str(path))
    found = reading.make_reading(index, 1).read(0, 0, 0, 40)
    wanted = [sample.raw() for sample in tars.Shard(str(path))]
    assert len(wanted) == 31 and len(wanted[-1]["png"]) == 2**20 + 3
    assert found[:31] == wanted and all(isinstance(x, reading.BadSample) for x in found[31:])
    some = reading.make_reading(index, 1, frozenset({"txt"})).read(0, 0, 3, 9)
    for sample, whole in zip(some, wanted[3:9], strict=True):
        assert sample == {"__key__": whole["__key__"], "txt": whole["txt"]}


def test_fewer_samples_than_promised(shards: str, tmp_path: Path) -> None:
    """A wrong _stats.json that ends a run, or shifts the samples of the other shards."""
    (tmp_path / "0001_stats.json").write_text(json.dumps({"count": 14, "successes": 14}))
    with pytest.warns(UserWarning, match="holds 10 samples.*says 14"):
        batches = read(made(shards, batch_size=2), 30)
    assert len({key for batch in batches for key in batch.keys}) == 30
    dropped = sum((batch.dropped for batch in batches), Counter())
    assert set(dropped) == {"missing from its shard"} and dropped.total() > 3


def test_one_of_several_captions_is_drawn_each_time(tmp_path: Path) -> None:
    """The first caption alone, or one that is always the same for an image."""
    texts = ["rot", "أحمر", "红色", "लाल"]
    rows = [
        {
            "png": encoded(i),
            "txt": "\n".join(texts).encode(),
            "json": json.dumps({"captions": texts}).encode(),
        }
        for i in range(2)
    ]
    data = str(write_tar(tmp_path / "a.tar", rows))
    for settings in ({"caption_key": "captions"}, {"caption_lines": True}):
        batches = read(made(data, batch_size=2, **settings), 100)
        for key in ("a-0000", "a-0001"):
            drawn = Counter(b.captions[b.keys.index(key)] for b in batches if key in b.keys)
            assert set(drawn) == set(texts) and min(drawn.values()) >= 10
    assert read(made(data, batch_size=2), 1)[0].captions == ["\n".join(texts)] * 2


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_share_of_bad_samples_that_is_borne(tmp_path: Path, share: float) -> None:
    """A setting that does nothing, so that a run trains on a tenth of its data."""
    rows = [{"png": encoded(i), "txt": b"x" if i % 5 else b" "} for i in range(200)]
    batches = made(str(write_tar(tmp_path / "a.tar", rows)), max_bad=share)
    if share < 0.2:
        with pytest.raises(ValueError, match=r"empty caption.*max_bad is 0.1"):
            read(batches, 40)
    else:
        read(batches, 40)


def test_a_bad_shard_does_not_end_a_run(tmp_path: Path) -> None:
    """A share taken of the first samples, which happen to be of the one bad shard."""
    for i in range(12):
        rows = good(80) if i != 5 else [{"png": b"no", "txt": b"x"}] * 80
        write_tar(tmp_path / f"{i:04d}.tar", rows)
    for seed in range(6):
        batches = read(made(str(tmp_path), batch_size=4, streams=1, seed=seed), 240)
        assert sum((b.dropped for b in batches), Counter())["unreadable image"] >= 60


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_failure_is_said_as_it_is(tmp_path: Path, workers: int) -> None:
    """A traceback of another process in place of a line that names the setting."""
    data = str(write_tar(tmp_path / "a.tar", [{"png": b"no", "txt": b"x"}] * 8))
    with pytest.raises(ValueError, match=r"^data: hardly a usable sample.*x unreadable"):
        next(made(data, batch_size=4).loader(workers))


def test_duplicate_keys(tmp_path: Path) -> None:
    """A sample that comes twice because its shard was written twice, in a file or a stream."""
    once = write_tar(tmp_path / "a.tar", good(10)).read_bytes()
    whole = tmp_path / "b.tar"
    whole.write_bytes(once[: len(once) // 10240 * 10240])
    rows = good(10)
    with tarfile.open(whole, "w") as tar:
        for i in [*range(10), 3, 4]:
            for extension, data in rows[i].items():
                entry = tarfile.TarInfo(f"b-{i:04d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    for data in (str(whole), f"pipe:cat {whole}"):
        batches = read(made(data, batch_size=1, streams=1), 20)
        assert max(Counter(b.keys[0] for b in batches).values()) == 2
        assert sum((b.dropped for b in batches), Counter()) == {"duplicate key": 4}


def test_a_truncated_shard_costs_its_rest_only(tmp_path: Path) -> None:
    """A download cut short that ends the run."""
    rows = [{"png": encoded(i, side=64), "txt": f"good {i}".encode()} for i in range(20)]
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", rows)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2 + 700])
    with pytest.warns(UserWarning, match="damaged"):
        read = list(raw_samples(str(tmp_path)))
    assert 20 < len(read) < 40


def test_hardly_a_good_sample_is_an_error(tmp_path: Path) -> None:
    """A wrong caption_key that trains on one sample over and over."""
    write_tar(tmp_path / "a.tar", [{"png": encoded(1), "txt": b"x"}] * 8)
    with pytest.raises(ValueError, match="caption_key"):
        next(made(str(tmp_path / "a.tar"), batch_size=4, caption_key="alt").loader())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA"])
def test_image_modes(mode: str) -> None:
    """Grey, palette, transparent or CMYK images refused, or read with shifted channels."""
    kind = "TIFF" if mode in ("CMYK", "LA") else "PNG"
    pixels = read_image(encoded(102, kind, mode))  # 102 is a level of the palette
    assert pixels.shape == (20, 24, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - 102).max() <= 3


def test_area_resize_against_exact_means() -> None:
    """Point sampling in place of areas, or weights that do not sum to 1."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 18, 3), dtype=np.uint8)
    half = resize_area(image, 6, 9)
    exact = image.reshape(6, 2, 9, 2, 3).astype(float).mean((1, 3))
    assert np.abs(half - exact).max() <= 0.5 + 1e-4
    # 3 -> 2 pixels: each is one whole neighbor and half of the middle one.
    row = np.array([[[30] * 3, [60] * 3, [90] * 3]], np.uint8)
    assert resize_area(row, 1, 2)[0, :, 0].tolist() == [40, 80]


@pytest.mark.parametrize("augment", [augment_dvae, augment_dalle])
@pytest.mark.parametrize("size", [(40, 40), (100, 70), (33, 90), (20, 25)])
def test_augmentations_give_the_models_size(augment: object, size: tuple[int, int]) -> None:
    """A crop that runs over the edge for some aspect ratio, also of images that are too small."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    for _ in range(20):
        assert augment(image, 32, rng).shape == (32, 32, 3)  # type: ignore[operator]


def test_only_the_dvae_flips() -> None:
    """Mirrored text and relations in the transformer's images (listing 2 has no flip)."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    rng = np.random.default_rng(2)
    for augment, flips in ((augment_dvae, True), (augment_dalle, False)):
        seen = {bool(augment(image, 32, rng)[0, 0, 0]) for _ in range(30)}
        assert seen == ({True, False} if flips else {True})


def test_builtin_shards_read_like_any(tmp_path: Path) -> None:
    """A private path for the built-in data that hides faults of the reader."""
    shapes.write_shards(tmp_path, "train", 12, side=16, samples_per_shard=5)
    batch = next(made(str(tmp_path), batch_size=12, augmentation=augment_dalle).loader())
    wanted = {shapes.make(0, i, "train", 16).caption for i in range(12)}
    assert set(batch.captions) == wanted
