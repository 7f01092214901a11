"""The reader against shards that are damaged at random; `tests.data.fuzz` plays more rounds."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from dalle1.data.shards.names import is_data, read_folder
from tests.data.clutter import FOLDERS, cluttered, other_case, write_linked
from tests.data.fuzz import fuzz, healthy
from tests.data.mutations import TAR, headers, mutate, mutated_sample, tar_of


def test_shards_by_themselves(tmp_path: Path) -> None:
    """Bytes of a tar, an image or a caption that raise neither damage nor BadSample, or are
    followed for ever; other samples by the headers alone than by the files."""
    report = fuzz(300, 1, tmp_path, batches=False)
    assert report.shards == 600
    # The mutations are of use: neither is all lost, nor nothing.
    assert 200 < report.damaged < 500 and report.good > 500 and len(report.bad) >= 6


def test_batches(tmp_path: Path) -> None:
    """A damaged shard that ends a run, costs samples of a healthy one, or gets images of another
    size, empty captions or names that cannot be printed into a batch."""
    report = fuzz(60, 2, tmp_path)
    assert report.delivered > 800 and len(report.dropped) >= 6 and report.refused.total() < 8


def test_mutations_change_something() -> None:
    """A fuzz test of nothing: mutations that leave a tar as it is, or always its headers."""
    samples = {str(i): files for i, files in enumerate(healthy()[:4])}
    data = tar_of(samples)
    rng = np.random.default_rng(0)
    for mutation in TAR:
        changed = [mutation(data, rng) != data for _ in range(20)]
        assert sum(changed) >= 15, mutation.__name__
    blocks = {data[i : i + 512] for i in headers(data)}
    assert len(blocks) == 12
    hit = [not blocks <= {d[i : i + 512] for i in headers(d)} for d in _mutated(data, rng)]
    assert sum(hit) > 100
    for files in samples.values():
        assert sum(mutated_sample(files, rng) != files for _ in range(20)) >= 12


def _mutated(data: bytes, rng: np.random.Generator) -> list[bytes]:
    return [mutate(data, rng) for _ in range(200)]


def test_clutter_is_no_data_and_links_reach_all(tmp_path: Path) -> None:
    """Rounds that try no twins, links or letter cases, or that lose samples by themselves."""
    rng = np.random.default_rng(0)
    names = [f"{folder}{i}.{end}" for i, folder in enumerate(FOLDERS) for end in ("jpg", "txt")]
    given = [(name, name.encode()) for name in names]
    seen: set[str] = set()
    linked = 0
    for _ in range(40):
        members, count = cluttered(given, rng)
        more = [name for name, _ in members if name not in names]
        assert len(more) == count and not any(map(is_data, more))
        seen.update(PurePosixPath(name).name for name in more)
        write_linked(tmp_path / "a", members, rng)
        found = read_folder(tmp_path / "a" / "in")
        assert sorted(path.read_text() for path in found.files if path.is_file()) == sorted(names)
        assert len(found.images) == len(FOLDERS) and all(found.images.values())
        linked += sum("linked" in path.parts for path in found.files)
    assert {"._0.jpg", "Thumbs.db", ".DS_Store", "desktop.ini"} <= seen and linked > 40
    endings = {other_case("jpg", rng) for _ in range(200)}
    assert {"jpg", "JPG", "Jpg"} < endings and len(endings) > 4
