"""Text files that a Windows editor has saved: a mark (U+FEFF) in front, lines that end in CRLF."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

import dalle1
import dvae
from dalle1 import Model
from dalle1.clip.tokenizer import CLIPTokenizer, _byte_signs
from dalle1.common.config import load_settings
from dalle1.data.precompute.encode import shard_name
from dalle1.data.shards.index import make_index
from dalle1.evaluation.config import RankSettings
from tests.data.images import good, write_tar


def mark(path: Path) -> None:
    """Saves a file as such an editor does."""
    text = path.read_text(encoding="utf-8").replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())


def test_a_model_folder_with_marks(model: Model, tmp_path: Path) -> None:
    """A config.json that was edited by hand, "truncated or not JSON"."""
    model.save(tmp_path)
    for path in (*tmp_path.glob("*.json"), tmp_path / "README.md"):
        mark(path)
    opened = dalle1.load(tmp_path)
    assert opened.tokenizer.encode("a red cat").equal(model.tokenizer.encode("a red cat"))
    assert isinstance(dvae.load(tmp_path), dvae.DVAE) and opened.ranker is not None


@pytest.mark.parametrize("zipped", [False, True])
def test_a_vocabulary_with_marks(zipped: bool, tmp_path: Path) -> None:
    """Merges whose second half ends in a carriage return, so that no word is merged."""
    signs = _byte_signs()
    text = "#version: 0.2\n" + "".join(f"{signs[i]} {signs[i + 1]}\n" for i in range(65, 75))
    for name, content in (("a", text), ("b", "\ufeff" + text.replace("\n", "\r\n"))):
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if zipped else data)
    plain, marked = (CLIPTokenizer.from_published(tmp_path / n, 514 + 10) for n in "ab")
    for caption in ("bc de", "abcdefgh", "ü"):
        assert plain.encode_for_clip(caption, 9).equal(marked.encode_for_clip(caption, 9))
    marked.save(tmp_path / "saved.json")
    mark(tmp_path / "saved.json")
    saved = CLIPTokenizer.load(tmp_path / "saved.json")
    assert saved.encode_for_clip("bc", 9).equal(plain.encode_for_clip("bc", 9))


def test_an_index_with_marks(tmp_path: Path) -> None:
    """Counts of samples that are "no index" for a mark in front."""
    write_tar(tmp_path / "0.tar", good(3))
    index = tmp_path / "index.json"
    index.write_text('{"shardlist": [{"url": "0.tar",\n "nsamples": 2}]}', encoding="utf-8")
    mark(index)
    assert make_index(str(tmp_path / "0.tar"), str(index)).counts == [2]


def test_a_ranking_config_with_marks(tmp_path: Path) -> None:
    """An unknown setting of the name U+FEFF and `model`."""
    path = tmp_path / "RANK.YAML"
    path.write_text("model: m\nrun: r\ndata: LIST.TXT\n", encoding="utf-8")
    mark(path)
    assert load_settings(RankSettings, path, ["captions=3"]).data == "LIST.TXT"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("a/00012.TAR", "00012"),
        ("a/00012.Tar.GZ", "00012"),
        ("a/00012.TGZ", "00012"),
        ("a/b.tar/00012.tar", "00012"),
        ("pipe:curl http://x/00012.TAR?y", "00012"),
        ("https://x/00012.tar", "00012"),
    ],
)
def test_a_shard_is_called_as_its_source(address: str, name: str) -> None:
    """A token shard 00012.TAR.safetensors beside 00013.safetensors."""
    assert shard_name(address) == name
