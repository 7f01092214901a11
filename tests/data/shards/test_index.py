"""Shards: found, counted, refused."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dalle1.data.shards.index import (
    PAIRS,
    TARS,
    Index,
    check_readable,
    count_samples,
    find_pairs,
    find_shards,
    make_index,
)
from tests.data.images import encoded, good, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, count in enumerate((3, 5, 2)):
        write_tar(tmp_path / f"{i:05d}.tar", good(count))
    return tmp_path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *values: object) -> None:
        pass


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """The folder over http."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_counts_of_headers_and_statistics(folder: Path) -> None:
    """Shards read through although img2dataset has counted them; counts that are not used."""
    assert make_index(str(folder)).counts == [3, 5, 2]
    stats = {"count": 9, "successes": 4, "failed_to_download": 5}
    (folder / "00001_stats.json").write_text(json.dumps(stats))
    index = make_index(str(folder))
    assert (index.kind, index.counts, index.samples) == (TARS, [3, 4, 2], 9)
    for wrong in ("", "[]", '{"count": 3}', '{"successes": "many"}', '{"successes": -1}'):
        (folder / "00001_stats.json").write_text(wrong)
        assert count_samples(str(folder / "00001.tar")) == 5


def test_streams(folder: Path, address: str) -> None:
    """Addresses taken for files that do not exist, or statistics next to them left unread."""
    pipes = make_index(f"pipe:cat {folder}/{{00000..00002}}.tar")
    assert pipes.counts == [3, 5, 2] and pipes.kind == TARS
    (folder / "00000_stats.json").write_text('{"successes": 7}')
    index = make_index(f"{address}/{{00000..00002}}.tar")
    assert index.counts == [7, 5, 2]
    with pytest.raises(ValueError, match=r"9.tar cannot be read"):
        make_index(f"{address}/9.tar")
    with pytest.raises(ValueError, match="cannot be read"):
        make_index("pipe:false")


def test_given_counts(folder: Path) -> None:
    """Counts given to other shards, or a file without one of them taken."""
    index = folder / "index.json"
    entries = [{"url": f"s3://x/{i:05d}.tar", "nsamples": 10 + i} for i in (2, 0, 1)]
    index.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": entries}))
    assert make_index(str(folder), index).counts == [10, 11, 12]
    data = f"pipe:cat {folder}/{{00000..00002}}.tar | cat"
    assert make_index(data, index).counts == [10, 11, 12]
    entries += [{"url": "0.tar", "nsamples": 1}]  # which is in 00000.tar
    index.write_text(json.dumps({"shardlist": entries}))
    assert make_index(data, index).counts == [10, 11, 12]
    none = [entry | {"nsamples": 0} for entry in entries]
    index.write_text(json.dumps({"shardlist": none}))
    with pytest.raises(ValueError, match="not one sample"):
        make_index(data, index)
    index.write_text(json.dumps({"shardlist": entries[:2]}))
    with pytest.raises(ValueError, match=r"names 0 shards for .*00001.tar"):
        make_index(str(folder), index)
    twice = json.dumps({"shardlist": [*entries, entries[0]]})
    below = json.dumps({"shardlist": [{"url": "00000.tar", "nsamples": -1}]})
    for wrong in ("no", "{}", '{"shardlist": [{"url": "a"}]}', twice, below):
        index.write_text(wrong)
        with pytest.raises(ValueError, match=r"reader.counts: .* is no index"):
            make_index(str(folder), index)


def test_ranks_share_the_counting(folder: Path) -> None:
    """Every rank reading all headers, or an order that depends on who has counted."""
    asked: list[list[float]] = []

    def largest(values: list[float]) -> list[float]:
        asked.append(values)
        return [4.0, 6.0, 3.0]

    for rank in range(2):
        assert make_index(str(folder), None, rank, 2, largest).counts == [3, 5, 2]
    assert asked == [[4.0, 0.0, 3.0], [0.0, 6.0, 0.0]]


def test_an_index_is_known_again(folder: Path, tmp_path: Path) -> None:
    """A run that resumes with other data, or that refuses its own on another disk."""
    index = make_index(str(folder))
    assert Index.from_json(index.as_json()) == index
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in folder.glob("*.tar"):
        (moved / path.name).write_bytes(path.read_bytes())
    assert make_index(str(moved)).fingerprint() == index.fingerprint()
    write_tar(moved / "00001.tar", good(4))
    assert make_index(str(moved)).fingerprint() != index.fingerprint()


def test_an_index_of_something_else(folder: Path) -> None:
    """A command in a file that came with a run's folder, executed because `data` is the same."""
    index = make_index(str(folder))
    assert index.is_of(str(folder)) and not index.is_of(str(folder.parent))
    pattern = f"{folder}/{{00000..00001}}.tar"
    assert make_index(pattern).is_of(pattern)
    for shard in (f"pipe:cat {folder}/00000.tar; touch x", f"{folder}/../00000.tar"):
        for data in (str(folder), pattern):
            assert not replace(index, data=data, shards=[shard], counts=[3]).is_of(data)


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    """A run that ends at its first save, for a file's name."""
    name = os.fsdecode(b"\xff")
    (tmp_path / f"{name}.png").write_bytes(encoded(1))
    (tmp_path / f"{name}.txt").write_text("x")
    index = make_index(str(tmp_path))
    assert len(index.fingerprint()) == 16 and Index.from_json(index.as_json()) == index


def test_a_image_that_is_gone(tmp_path: Path) -> None:
    """One dangling link that ends a run before it begins."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b.png").write_bytes(encoded(1))
    index = make_index(str(tmp_path))
    assert index.samples == 1
    (tmp_path / "b.png").unlink()
    check_readable(index, "txt")  # the reader counts it as bad
    assert find_pairs(tmp_path) == []


def test_folder_of_pairs(tmp_path: Path) -> None:
    """Images in folders below left out, or those without a caption counted."""
    (tmp_path / "below").mkdir()
    for name in ("a.png", "below/b.JPG", "lonely.png"):
        (tmp_path / name).write_bytes(encoded(1))
    for name in ("a.txt", "below/b.txt"):
        (tmp_path / name).write_text("x")
    index = make_index(str(tmp_path))
    assert index.kind == PAIRS and index.counts == [1, 1]
    check_readable(index, "txt")


@pytest.mark.parametrize("data", ["{0..2.tar", "no/{0..2}.tar", "no.tar", "nowhere"])
def test_missing_shards_are_named(data: str) -> None:
    """A misspelled path found out by a worker process an hour later."""
    with pytest.raises(ValueError, match=r"does not exist|not a valid"):
        find_shards(data)


def test_nothing_to_read(tmp_path: Path) -> None:
    """A reader that waits for ever on data without samples."""
    with pytest.raises(ValueError, match=r"neither .tar shards nor images"):
        make_index(str(tmp_path))
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match="not one sample in the 1 shards"):
        make_index(str(tmp_path))


def test_two_kinds_of_shards(folder: Path) -> None:
    """Token shards in a folder with their images: half of the data, or each sample twice."""
    (folder / "00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="tars and token shards"):
        make_index(str(folder))
    with pytest.raises(ValueError, match="tars and token shards"):
        make_index(f"{folder}/00000.{{tar,safetensors}}")
    assert make_index(f"{folder}/{{00000..00001}}.tar").samples == 8


def test_unknown_caption_key_lists_what_is_there(tmp_path: Path) -> None:
    """An hour of dropped samples for a misspelled key."""
    content = json.dumps({"alt": "x", "width": 3, "all": ["x", "y"], "url": "z"}).encode()
    write_tar(tmp_path / "a.tar", [{"png": encoded(1), "json": content}] * 5)
    index = make_index(str(tmp_path))
    for key in ("alt", "all"):
        check_readable(index, key)
    with pytest.raises(ValueError, match=r"'caption' gives no caption.*: alt, all, url$"):
        check_readable(index, "caption")
    with pytest.raises(ValueError, match=r"'txt' gives no caption.*: alt, all, url$"):
        check_readable(index, "txt")


def test_shards_without_captions(tmp_path: Path) -> None:
    """Images alone taken for training data; or one such shard for all of them."""
    write_tar(tmp_path / "a.tar", [{"png": encoded(1)}] * 5)
    with pytest.raises(ValueError, match=r"5 x no caption\); keys that are there: none"):
        check_readable(make_index(str(tmp_path)), "txt")
    write_tar(tmp_path / "b.tar", good(2))
    check_readable(make_index(str(tmp_path)), "txt")
