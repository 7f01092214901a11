"""Raw shards to token shards: what is encoded, what is counted, and what a stop leaves."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1.commands import tokenize as command
from dalle1.common.config import load_settings
from dalle1.data.precompute import crops as views
from dalle1.data.precompute import encode as tokenizing
from dalle1.data.precompute.encode import (
    TokenizeReport,
    TokenizeSettings,
    fingerprint,
    shard_name,
    tokenize,
)
from dalle1.data.samples import (
    DAMAGED,
    DUPLICATE_KEY,
    EMPTY_CAPTION,
    EXTREME_ASPECT,
    IMAGE_TOO_LARGE,
    NO_CAPTION,
    NO_IMAGE,
    NOT_UTF8,
    UNREADABLE,
)
from dalle1.data.shards import token_shard as tokens
from dalle1.data.shards.token_shard import TokenSettings, TokenShard
from dalle1.data.transforms import augment_dalle, middle_square
from dvae import DVAE, DVAEConfig, load
from tests.conftest import randomize
from tests.data.images import write_members as write_tar

ROOT = Path(__file__).parents[3]
Members = list[tuple[str, bytes]]


def make_codec(**changes: Any) -> DVAE:
    """Tokens of 2x2 pixels."""
    config: dict[str, Any] = {"width": 8, "bottleneck": 6, "groups": 2, "blocks_per_group": 1}
    codec = DVAE(DVAEConfig(**{**config, "codebook_size": 700, **changes}))
    randomize(codec, 0)
    return codec.eval()


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DVAE]:
    """A dVAE and its folder."""
    folder = tmp_path_factory.mktemp("dvae")
    made = make_codec()
    made.save(folder)
    return str(folder), made


def pixels(seed: int, width: int = 24, height: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(seed: int, *size: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, *size)).save(buffer, kind)
    return buffer.getvalue()


def sample(key: str, png: bytes, caption: str | bytes, **more: bytes) -> Members:
    text = caption if isinstance(caption, bytes) else caption.encode()
    return [
        (f"{key}.png", png),
        (f"{key}.txt", text),
        *((f"{key}.{end}", data) for end, data in more.items()),
    ]


def write_shards(folder: Path, shards: int = 5, samples: int = 7) -> str:
    """With a bad sample in each."""
    for i in range(shards):
        members: Members = []
        for j in range(samples):
            caption = "" if j == 3 else f"number {j} of {i}"
            members += sample(f"{i}-{j}", encoded(100 * i + j, 20 + j, 24), caption)
        write_tar(folder / f"{i:05d}.tar", members)
    return str(folder)


def settings_of(
    trained: tuple[str, DVAE], data: str, out: Path, **changes: Any
) -> TokenizeSettings:
    base = {"data": data, "out": str(out), "codec": trained[0], "grid": 4}
    return TokenizeSettings(**{**base, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))}


def test_tokens_are_the_encoders(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """Another part of the image, pixels that are not scaled to [0, 1], tokens column by column,
    samples in another order, or captions with another's tokens."""
    sizes = [(8, 8), (30, 9), (9, 30), (64, 48), (5, 7)]
    members: Members = []
    for i, size in enumerate(sizes):
        members += sample(f"{9 - i}", encoded(i, *size), f" number {i}\n")
    write_tar(tmp_path / "in" / "00012.tar", members)
    settings = settings_of(codec, str(tmp_path / "in"), tmp_path / "out", batch_size=2)
    assert tokenize(settings) == TokenizeReport(done=1, samples=5, kept=5)
    shard = TokenShard(tmp_path / "out" / "00012.safetensors")
    assert shard.keys() == ["9", "8", "7", "6", "5"]
    assert shard.captions() == [[f"number {i}"] for i in range(5)]
    for i, (found, size) in enumerate(zip(shard.read(0, 5), sizes, strict=True)):
        square = torch.from_numpy(middle_square(pixels(i, *size), 8).transpose(2, 0, 1).copy())
        wanted = codec[1].encode(square[None].float() / 255)[0]
        assert wanted.max() > 255 and not torch.equal(wanted, wanted.T)
        assert found.tokens.tolist() == [wanted.flatten().tolist()]


def test_what_a_shard_was_made_with_is_kept(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """A reader that cannot tell whether tokens are its dVAE's, or of how many views."""
    data = write_shards(tmp_path / "in", 1)
    changes = {"augment": True, "views": 2, "seed": 5, "max_pixels": 1000, "max_aspect": 3.0}
    settings = settings_of(codec, data, tmp_path / "out", precision="bf16", **changes)
    tokenize(settings)
    shard = TokenShard(tmp_path / "out" / "00000.safetensors")
    assert shard.settings == TokenSettings(
        codebook_size=700,
        grid=4,
        views=2,
        augmented=True,
        dvae=fingerprint(codec[1]),
        precision="bf16",
        seed=5,
        caption_key="txt",
        caption_lines=False,
        max_aspect=3.0,
        max_pixels=1000,
    )
    assert shard.source.name == "00000.tar" and shard.source.dropped == {EMPTY_CAPTION: 1}
    assert shard.source.bytes == (tmp_path / "in" / "00000.tar").stat().st_size


def test_fingerprint(tmp_path: Path) -> None:
    """Tokens of a dVAE that was trained on taken for those of the one before; or a dVAE that is
    another one after it was copied."""
    codec = make_codec()
    codec.save(tmp_path)
    found = fingerprint(codec)
    assert fingerprint(load(tmp_path)) == found and len(found) == 16
    assert fingerprint(make_codec(residual_gain=0.5)) != found
    with torch.no_grad():
        next(codec.decoder.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(codec) != found


def test_all_captions_are_kept(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """The first of several captions alone, or lines of one caption taken for several."""
    several = json.dumps({"alt": [" one ", "two", "", 3]}).encode()
    single = json.dumps({"alt": "three"}).encode()
    write_tar(
        tmp_path / "in" / "0.tar",
        [
            *sample("a", encoded(1), "first\n\n second \r\nthird", json=several),
            *sample("b", encoded(2), "only", json=single),
        ],
    )
    data = str(tmp_path / "in" / "0.tar")
    for name, changes, wanted in (
        ("txt", {}, [["first\n\n second \r\nthird"], ["only"]]),
        ("lines", {"caption_lines": True}, [["first", "second", "third"], ["only"]]),
        ("json", {"caption_key": "alt"}, [["one", "two"], ["three"]]),
    ):
        tokenize(settings_of(codec, data, tmp_path / name, **changes))
        assert TokenShard(tmp_path / name / "0.safetensors").captions() == wanted


def test_views(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """Views that are all the same, crops of another augmentation, draws that hang on a sample's
    place or on the number of views, or that no seed changes."""
    members = [m for i in range(4) for m in sample(f"{i}", encoded(i, 200, 30), "a picture")]
    write_tar(tmp_path / "in" / "0.tar", members)
    write_tar(tmp_path / "turned" / "0.tar", [*members[4:], *members[:4]])

    def made(folder: str, views: int, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
        out = tmp_path / f"{folder}-{views}-{seed}"
        base = {"augment": True, "views": views, "seed": seed} | changes
        tokenize(settings_of(codec, str(tmp_path / folder), out, **base))
        return {s.key: s.tokens for s in TokenShard(out / "0.safetensors").read(0, 4)}

    three, two = made("in", 3), made("in", 2, batch_size=1)
    turned, other = made("turned", 3), made("in", 3, 1)
    for key, found in three.items():
        assert found.shape == (3, 16)
        assert len({view.tobytes() for view in found}) == 3
        assert np.array_equal(found[:2], two[key]) and np.array_equal(found, turned[key])
        assert not np.array_equal(found, other[key])
        for v, view in enumerate(found):
            crop = augment_dalle(pixels(int(key), 200, 30), 8, views.view_rng(0, key, v))
            image = torch.from_numpy(crop.transpose(2, 0, 1).copy())[None].float() / 255
            assert view.tolist() == codec[1].encode(image).flatten().tolist()


def test_draws_are_a_function_of_seed_key_and_view() -> None:
    """Two keys, views or seeds that share their draws; names that are no Unicode."""
    cases = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (1, "0 a", 0), (10, "a", 0)]
    cases += [(0, "\udcff", 0), (0, "\udcfe", 0), (0, "?", 0)]
    drawn = [views.view_rng(*case).integers(2**62) for case in cases]
    assert len(set(drawn)) == len(cases)
    assert drawn == [views.view_rng(*case).integers(2**62) for case in cases]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_files_hang_on_the_data_alone(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """Shards that are other ones, missing or done twice with other ranks, workers or batch sizes;
    batches of one shard in another's file."""
    data = write_shards(tmp_path / "in")

    def made(name: str, ranks: int = 1, **changes: Any) -> dict[str, bytes]:
        out = tmp_path / name
        settings = settings_of(codec, data, out, augment=True, views=2, **changes)
        reports = [tokenize(settings, rank, ranks) for rank in range(ranks)]
        assert [r.done for r in reports] == [len(range(r, 5, ranks)) for r in range(ranks)]
        assert sum(r.kept for r in reports) == 30 and sum(r.samples for r in reports) == 35
        return files(out)

    wanted = made("whole")
    assert len(wanted) == 10
    assert made("ranks", 3, batch_size=6) == wanted
    assert made("more ranks than shards", 5, workers=1) == wanted
    assert made("workers", batch_size=5, workers=2) == wanted
    assert made("both", 2, batch_size=1, workers=9) == wanted


def test_ranks_without_shards(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """A rank that finds nothing usable, where there is nothing for it to do; numbers of ranks that
    leave shards out without a word."""
    settings = settings_of(codec, write_shards(tmp_path / "in", 1), tmp_path / "out")
    assert tokenize(settings, 1, 2) == TokenizeReport()
    for rank, ranks in ((1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="RANK and WORLD_SIZE"):
            tokenize(settings, rank, ranks)


def test_precision(codec: tuple[str, DVAE], tmp_path: Path, monkeypatch: Any) -> None:
    """bf16 that is asked for and not computed in, or the other way round."""
    seen: list[bool] = []
    encode = DVAE.encode

    def recorded(self: DVAE, images: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return encode(self, images)

    monkeypatch.setattr(DVAE, "encode", recorded)
    data = write_shards(tmp_path / "in", 1)
    for precision in ("fp32", "bf16"):
        tokenize(settings_of(codec, data, tmp_path / precision, precision=precision))
    assert seen[1::2] == [False, True]  # the first call of each run is a trial of the codec


class Killer:
    """Ends its process, as by kill -9, at a call of a function."""

    def __init__(self, call: int, function: Any) -> None:
        self.left, self.function = call, function

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if not self.left:
            if hasattr(arguments[0], "flush"):
                arguments[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(*arguments)


# Of each shard two batches are encoded, then its file is flushed, then its counts are written.
@pytest.mark.parametrize(
    ("module", "name", "call", "workers", "done"),
    [
        (tokens, "flush", 1, 0, 0),
        (tokens, "flush", 3, 0, 2),
        pytest.param(tokens, "flush", 4, 2, 3, marks=pytest.mark.slow),
        (tokenizing, "_encode", 4, 0, 1),
        (tokenizing, "_write_stats", 2, 0, 2),
    ],
)
def test_a_killed_run_goes_on(
    codec: tuple[str, DVAE],
    tmp_path: Path,
    module: Any,
    name: str,
    call: int,
    workers: int,
    done: int,
) -> None:
    """Half a shard under its name, a shard that is lost or done twice, counts that are missing."""
    data, out = write_shards(tmp_path / "in"), tmp_path / "out"
    whole = tokenize(settings_of(codec, data, tmp_path / "whole", augment=True))
    settings = settings_of(codec, data, out, augment=True, batch_size=4, workers=workers)

    def killed() -> None:
        setattr(module, name, Killer(call, getattr(module, name)))
        tokenize(settings)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    wanted, before = files(tmp_path / "whole"), stamps(out)
    assert len(before) == done
    assert all((out / name).read_bytes() == wanted[name] for name in before)
    again = tokenize(settings)
    assert (again.done, again.skipped) == (5 - done, done)
    assert (again.samples, again.kept, again.dropped) == (35, 30, whole.dropped)
    assert {name: data for name, data in files(out).items() if not name.endswith(".tmp")} == wanted
    assert before == {name: stamps(out)[name] for name in before}
    assert tokenize(settings).skipped == 5


def test_what_changed_is_done_again(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """Tokens of a tar that was fetched anew, or half a copy, left as they are; a leftover of a
    stopped run that is in the way."""
    data, out = write_shards(tmp_path / "in"), tmp_path / "out"
    settings = settings_of(codec, data, out)
    tokenize(settings)
    before = stamps(out)
    write_tar(tmp_path / "in" / "00001.tar", sample("new", encoded(99), "x", json=b"{}" * 50_000))
    half = (out / "00002.safetensors").read_bytes()[:-5]
    (out / "00002.safetensors").write_bytes(half)
    (out / "00003.safetensors").unlink()
    (out / "00003.safetensors.tmp").write_bytes(b"x")
    (out / "00004_stats.json").unlink()
    report = tokenize(settings)
    assert (report.done, report.skipped) == (3, 2)
    tokenize(settings_of(codec, data, tmp_path / "fresh"))
    assert files(out) == files(tmp_path / "fresh")
    assert TokenShard(out / "00001.safetensors").keys() == ["new"]
    same = [name for name, stamp in stamps(out).items() if before[name] == stamp]
    assert same == ["00000.safetensors", "00004.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 5}, "grid was 4 and is 5"),
        ({"views": 3}, "views was 2 and is 3"),
        ({"augment": False, "views": 1}, "views was 2 and is 1; augment was True and is False"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
        ({"caption_lines": True}, "caption_lines was False and is True"),
        ({"max_aspect": 2.0}, r"max_aspect was 20\.0 and is 2\.0"),
        ({"max_pixels": 9999}, "max_pixels was 50000000 and is 9999"),
        ({"codec": "other"}, "codec was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"),
        ({"codec": "codes"}, "codec was 700 and is 9"),
    ],
)
def test_other_settings_are_refused_and_named(
    codec: tuple[str, DVAE], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Tokens of two kinds side by side in one data set, also where it is another rank that finds
    them."""
    data, out = write_shards(tmp_path / "in", 3), tmp_path / "out"
    if "codec" in changes:
        other = make_codec(**({"codebook_size": 9} if changes["codec"] == "codes" else {}))
        randomize(other, 1)
        other.save(tmp_path / "other")
        changes = {"codec": str(tmp_path / "other")}
    base = {"augment": True, "views": 2}
    tokenize(settings_of(codec, data, out, **base), rank=1, world_size=3)
    before = files(out)
    for rank in range(3):
        with pytest.raises(ValueError, match=rf"^out: .*00001.* other settings: .*{message}"):
            tokenize(settings_of(codec, data, out, **(base | changes)), rank, 3)
    assert files(out) == before
    # What does not change the files is not refused.
    more = {"batch_size": 3, "workers": 1, "threads": 1}
    assert tokenize(settings_of(codec, data, out, **base, **more)).skipped == 1


def test_bad_samples_are_counted_by_cause(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """A bad sample that ends the run or is written, a cause that is counted as another, counts
    that do not add up to what was read."""
    whole = encoded(1, 50, 50, kind="JPEG")
    members = [
        *sample("good", encoded(1), "a"),
        ("silent.png", encoded(2)),
        ("blind.txt", b"a"),
        *sample("empty", encoded(3), " \n"),
        *sample("bytes", encoded(4), b"\xff\xfe"),
        *sample("html", b"<html>", "a"),
        ("half.jpg", whole[: len(whole) // 2]),
        ("half.txt", b"a"),
        *sample("long", encoded(5, 210, 10), "a"),
        *sample("large", encoded(6, 60, 60), "a"),
        *sample("good", encoded(7), "again"),
        *sample("html", encoded(8), "again"),
        *sample("glued", encoded(9), "b"),
        *sample("glued", encoded(10), "c"),
        ("__meta__", b"x"),
        *sample("grey", encoded(11, kind="GIF"), "d"),
    ]
    write_tar(tmp_path / "in" / "0.tar", members)
    settings = settings_of(codec, str(tmp_path / "in"), tmp_path / "out", max_pixels=3000)
    report = tokenize(settings)
    shard = TokenShard(tmp_path / "out" / "0.safetensors")
    assert shard.keys() == ["good", "glued", "grey"]
    assert shard.captions() == [["a"], ["b"], ["d"]]
    wanted = {
        NO_CAPTION: 1,
        NO_IMAGE: 1,
        EMPTY_CAPTION: 1,
        NOT_UTF8: 1,
        UNREADABLE: 2,
        EXTREME_ASPECT: 1,
        IMAGE_TOO_LARGE: 1,
        DUPLICATE_KEY: 3,
    }
    assert report == TokenizeReport(1, 0, 14, 3, tokenizing.Counter(wanted))
    stats = json.loads((tmp_path / "out" / "0_stats.json").read_text())
    assert stats == {
        "count": 14,
        "successes": 3,
        "failed": 11,
        "status_dict": {"success": 3, **wanted},
    }
    lines = report.table().splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["1", "0", "14", "3"]
    assert {line[:28].strip() for line in lines[4:]} == set(wanted)
    again = tokenize(settings)
    assert again == TokenizeReport(0, 1, 14, 3, tokenizing.Counter(wanted))


def test_files_that_are_too_large_are_not_read(
    codec: tuple[str, DVAE], tmp_path: Path, monkeypatch: Any
) -> None:
    """A file of gigabytes that takes a worker's memory."""
    monkeypatch.setattr(views, "MAX_BYTES", 2000)
    write_tar(
        tmp_path / "in" / "0.tar",
        [*sample("a", encoded(1), "a"), *sample("b", b"x" * 9999, "b")],
    )
    report = tokenize(settings_of(codec, str(tmp_path / "in"), tmp_path / "out"))
    assert report.kept == 1 and report.dropped == {IMAGE_TOO_LARGE: 1}


@pytest.mark.parametrize("cut", ["in an image", "behind a sample", "rubbish", "no tar"])
def test_a_damaged_shard_keeps_what_comes_before(
    codec: tuple[str, DVAE], tmp_path: Path, cut: str
) -> None:
    """The good samples of a shard lost with its rest, or the damage hushed up; a shard without one
    usable sample that is missing, so that numbers have a hole."""
    members = [m for i in range(4) for m in sample(f"{i}", encoded(i), f"{i}")]
    path = write_tar(tmp_path / "in" / "00000.tar", members)
    with tarfile.open(path) as tar:
        start = next(m.offset for m in tar if m.name == "2.png")
    data = path.read_bytes()
    end = {"in an image": start + 700, "no tar": 0}.get(cut, start)
    path.write_bytes(data[:end] + {"rubbish": b"\xab" * 4096, "no tar": b"<html>"}.get(cut, b""))
    write_tar(tmp_path / "in" / "00001.tar", members)
    settings = settings_of(codec, str(tmp_path / "in"), tmp_path / "out")
    report = tokenize(settings)
    shard = TokenShard(tmp_path / "out" / "00000.safetensors")
    assert shard.keys() == ([] if cut == "no tar" else ["0", "1"])
    assert list(report.damaged) == ["00000.tar"] and "00000.tar" in report.table()
    assert report.dropped == ({DAMAGED: 1} if cut == "in an image" else {})
    assert tokenize(settings).damaged == report.damaged


def test_compressed_tars(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """A compressed tar that is refused, or written under a name that holds .tar."""
    write_tar(tmp_path / "in" / "a.b.tar.gz", sample("a", encoded(1), "a"), "w:gz")
    tokenize(settings_of(codec, str(tmp_path / "in" / "a.b.tar.gz"), tmp_path / "out"))
    assert set(files(tmp_path / "out")) == {"a.b.safetensors", "a.b_stats.json"}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("x/00012.tar", "00012"),
        ("x.tar/my shard.tar", "my shard"),
        ("x/00012.tgz", "00012"),
        ("x/00012", "00012"),
        ("pipe:cat x/00012.tar", "00012"),
        ("pipe:aws s3 cp s3://b/00012.tar.gz - | gzip -dc", "00012"),
        ("https://h/a/00012.tar?signature=x/y", "00012"),
        ("https://h/get?file=00012.tar&key=1", "00012"),
        ("pipe:cat '00012.tar' | tee y.target", "00012"),
        ("pipe:cat x", ""),
    ],
)
def test_names_of_shards(address: str, name: str) -> None:
    """Token shards whose names are half an address, or the same for all."""
    assert shard_name(address) == name


def test_streams(codec: tuple[str, DVAE], tmp_path: Path, monkeypatch: Any) -> None:
    """A stream that broke off once taken for a tar that is damaged, samples before the break
    written twice, or a stream that is done read again."""
    monkeypatch.setattr(views, "RETRIES", (0.0, 0.0))
    members = [m for i in range(6) for m in sample(f"{i}", encoded(i), f"{i}")]
    whole = write_tar(tmp_path / "in" / "00000.tar", members)
    script = tmp_path / "give.sh"
    # The first opening looks for captions, the second one breaks off.
    script.write_text(
        f"cd {tmp_path}; echo >> opened; case $(wc -l < opened) in\n"
        f"2) head -c 9000 {whole};;\n*) cat {whole};;\nesac\n"
    )
    data = f"pipe:sh {script} 0000{{0..1}}.tar"
    settings = settings_of(codec, data, tmp_path / "out", batch_size=2)
    with pytest.warns(UserWarning, match="broke off, trying again"):
        report = tokenize(settings)
    assert report == TokenizeReport(done=2, samples=12, kept=12)
    tokenize(settings_of(codec, str(tmp_path / "in"), tmp_path / "plain"))
    for name in ("00000", "00001"):
        shard = TokenShard(tmp_path / "out" / f"{name}.safetensors")
        plain = TokenShard(tmp_path / "plain" / "00000.safetensors")
        assert shard.keys() == plain.keys() and shard.source.bytes is None
        for ours, theirs in zip(shard.read(0, 6), plain.read(0, 6), strict=True):
            assert np.array_equal(ours.tokens, theirs.tokens)
    opened = (tmp_path / "opened").read_text()
    assert tokenize(settings).skipped == 2 and (tmp_path / "opened").read_text() == opened


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_streams_that_stay_broken(
    codec: tuple[str, DVAE], tmp_path: Path, monkeypatch: Any
) -> None:
    """A server that is down written as a shard without samples, which no later run would mend; a
    tar that is damaged at its source tried without end."""
    monkeypatch.setattr(views, "RETRIES", (0.0, 0.0))
    members = [m for i in range(6) for m in sample(f"{i}", encoded(i), f"{i}")]
    whole = write_tar(tmp_path / "00000.tar", members)
    settings = settings_of(codec, f"pipe:head -c 9000 {whole}", tmp_path / "half")
    report = tokenize(settings)
    assert 0 < report.kept < 6 and list(report.damaged) == ["00000.tar"]
    for workers in (0, 1):
        settings = settings_of(codec, "pipe:false 0.tar", tmp_path / "none", workers=workers)
        with pytest.raises(OSError, match=r"pipe:false 0\.tar cannot be read"):
            tokenize(settings)
        assert not list((tmp_path / "none").iterdir())


def test_a_wrong_caption_key_is_found_before_work(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """Empty shards without a word, which the right key would then be refused for; a key that the
    user has to guess."""
    about = json.dumps({"alt": "a", "title": ["b"], "width": 3}).encode()
    write_tar(tmp_path / "in" / "0.tar", sample("a", encoded(1), "a", json=about))
    settings = settings_of(codec, str(tmp_path / "in"), tmp_path / "out", caption_key="caption")
    with pytest.raises(ValueError, match=r"^caption_key: 'caption' .*there: txt, alt, title"):
        tokenize(settings)
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_an_error(
    codec: tuple[str, DVAE], tmp_path: Path, monkeypatch: Any
) -> None:
    """A data set without a sample that a training then waits on; also at the next try."""
    data = tmp_path / "in"
    for i in range(2):
        write_tar(data / f"{i}.tar", [m for j in "abc" for m in sample(j, b"<html>", "a")])
    settings = settings_of(codec, str(data), tmp_path / "out")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\(6 x unreadable image\).*another try remove"):
            tokenize(settings)
    assert len(stamps(tmp_path / "out")) == 2  # a shard without a good one is no mistake
    write_tar(data / "2.tar", sample("a", encoded(1), "a"))
    assert tokenize(settings).kept == 1
    # Where no look at the first samples finds it out.
    about = json.dumps({"alt": "a"}).encode()
    write_tar(tmp_path / "mute" / "0.tar", [("a.png", encoded(1)), ("a.json", about)])
    monkeypatch.setattr(tokenizing, "check_readable", lambda index, key: None)
    with pytest.raises(ValueError, match=r"1 x no caption.*keys that are there: alt"):
        tokenize(settings_of(codec, str(tmp_path / "mute"), tmp_path / "muted"))


def test_data_that_cannot_be_tokenized(codec: tuple[str, DVAE], tmp_path: Path) -> None:
    """Shards that overwrite each other or the data; a traceback for a folder of pairs, or one of
    token shards encoded once more."""
    data, out = write_shards(tmp_path / "a", 2), tmp_path / "out"
    write_shards(tmp_path / "b", 2)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            tokenize(settings_of(codec, data, out).model_copy(update=changes))

    refused("have one name", data=str(tmp_path / "{a,b}" / "00000.tar"))
    refused("does not exist", data=str(tmp_path / "no.tar"))
    refused("is where .* give another folder", out=str(tmp_path / "b" / ".." / "a"))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.png").write_bytes(encoded(1))
    (tmp_path / "pairs" / "a.txt").write_text("a")
    refused(r"launch/shard\.py", data=str(tmp_path / "pairs"))
    refused("is a file", out=str(tmp_path / "pairs" / "a.txt"))
    assert not out.exists()
    tokenize(settings_of(codec, data, out))
    refused("token shards already", data=str(out), out=str(tmp_path / "twice"))
    refused(r"holds 00001\.safetensors, which is of none", data=str(tmp_path / "a" / "00000.tar"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 2**16 + 1, "groups": 1, "width": 4}, "65,537 codes.*at most 65,536"),
        ({"encoder_window": 3}, "codec: .* cannot encode images of 8x8 pixels.*multiples of 6"),
        ({"channels": 1}, r"codec: .* cannot encode.*expected \[b, 1, H, W\]"),
        ({}, "not finite"),
        (None, "is missing"),
    ],
)
def test_codecs_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any] | None, message: str
) -> None:
    """Codes that wrap around in 16 bits; an error that comes with the first batch, after the first
    minutes; tokens of a network that has diverged."""
    if changes is not None:
        codec = make_codec(**changes)
        if not changes:
            with torch.no_grad():
                codec.encoder.blocks.input.w[0, 0, 0, 0] = float("nan")  # type: ignore[index, union-attr]
        codec.save(tmp_path / "dvae")
    data = write_shards(tmp_path / "in", 1, 1)
    settings = TokenizeSettings(
        data=data, out=str(tmp_path / "out"), codec=str(tmp_path / "dvae"), grid=4
    )
    with pytest.raises(ValueError, match=message):
        tokenize(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("views=2", "views=2 of the middle square are all the same: set augment=true"),
        ("seed=1", "seed=1 is read with augment=true alone"),
        ("caption_lines=true caption_key=alt", "caption_lines is read with caption_key=txt"),
        ("views=0", "views"),
        ("max_aspect=0.5", "max_aspect"),
        ("max_aspect=.nan", "max_aspect"),
        ("precision=fp16", "precision"),
        ("batch_size=0", "batch_size"),
        ("image_size=32", "image_size: Extra inputs"),
    ],
)
def test_mistakes_in_settings_are_named(changes: str, message: str) -> None:
    """A typing error that is found after hours, or never."""
    path = ROOT / "configs" / "shapes" / "tokens.yaml"
    with pytest.raises(ValueError, match=message):
        load_settings(TokenizeSettings, path, changes.split())


@pytest.mark.parametrize("name", ["shapes", "paper"])
def test_configs(name: str) -> None:
    """A committed file with a setting that nothing reads, or that stage two does not fit."""
    settings = load_settings(TokenizeSettings, ROOT / "configs" / name / "tokens.yaml")
    assert settings.grid == {"shapes": 8, "paper": 32}[name]
    assert settings.augment == (name == "paper")


def test_a_full_disk(
    codec: tuple[str, DVAE], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Finished shards lost to a full disk, a message without a size, or a next try that does not
    go on."""
    data, out = write_shards(tmp_path / "in"), tmp_path / "out"
    left = [3]

    def full(file: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "flush", full)
        patch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 5}))
        path = ROOT / "configs" / "shapes" / "tokens.yaml"
        own = [f"data={data}", f"out={out}", f"codec={codec[0]}", "grid=4", "workers=0"]
        assert command.main([str(path), *own]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: '{out}' is full: 00002.safetensors needs about 1.")
        assert "kB are missing; the same command resumes\n" in said and said.count("\n") == 1
    assert [name for name in files(out) if "stats" not in name] == list(stamps(out))
    assert len(stamps(out)) == 2
    report = tokenize(settings_of(codec, data, out))
    assert (report.done, report.skipped) == (3, 2)


def test_command(codec: tuple[str, DVAE], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Settings that are not passed on, a launcher's flag refused, ranks that all do the same
    shards, a traceback for a mistake."""
    data, out = write_shards(tmp_path / "in"), tmp_path / "out"
    path = tmp_path / "tokens.yaml"
    path.write_text(f"data: {data}\nout: {out}\ncodec: {codec[0]}\ngrid: 4\n")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command.main(["--local_rank=1", str(path), "batch_size=3"]) == 0
    printed = capsys.readouterr().out
    assert "rank 1 of 2" in printed and f"data={out}" in printed
    assert list(stamps(out)) == ["00001.safetensors", "00003.safetensors"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert command.main([str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["shards", "done", "3"] and lines[1] == ["skipped", "2"]
    assert ["empty", "caption", "5"] in lines
    for mistake in ("grid=5", "gird=4", "data=no.tar"):
        assert command.main([str(path), mistake]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c(codec: tuple[str, DVAE], tmp_path: Path, workers: int) -> None:
    """A traceback of every process for Ctrl-C, workers that live on, or half a shard left."""
    data, out = write_shards(tmp_path / "in", 400, 30), tmp_path / "out"
    run = subprocess.Popen(
        [
            *(sys.executable, "launch/tokenize.py", "configs/shapes/tokens.yaml"),
            *(f"data={data}", f"out={out}", f"codec={codec[0]}"),
            *("grid=16", "augment=true", "views=4", f"workers={workers}"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.safetensors"))) < 3:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    printed, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert said.splitlines()[-1] == "stopped; the same command resumes"
    assert "Traceback" not in said and not printed
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
    assert 3 <= len(stamps(out)) < 400
    assert all(TokenShard(out / name).count == 29 for name in stamps(out))
