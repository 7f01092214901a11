"""Somebody else's models on the Hub: which of their files are fetched, and what they become."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dalle1 import Model
from dalle1.commands import import_model
from dalle1.hub.access import HubAccess
from dalle1.hub.names import HubName
from dalle1.published import families
from dalle1.published.fetching import fetch_source
from dalle1.published.parts import Files
from tests.hub.conftest import hub as hub
from tests.hub.server import Files as Contents
from tests.hub.server import Hub, Lie
from tests.parity.published_clip import PublishedCLIP
from tests.parity.test_clip_published import COUNT, LENGTH
from tests.parity.test_clip_published import SIDE as SIDE_OF_CLIP
from tests.published.every_family import CASES, Case
from tests.published.test_clip import write_open_clip, write_ruclip

# What lies beside weights on the Hub and is of no use here.
OTHERS = {".gitattributes": b"x", "README.md": b"# x", "tf_model.h5": b"x", "onnx/model.onnx": b"x"}


def contents(folder: Path) -> Contents:
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".tar.gz"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def written(folder: Path) -> Contents:
    """A folder's files, without the card."""
    return {name: data for name, data in contents(folder).items() if name != "README.md"}


@dataclass
class Uploaded:
    """A case on the Hub."""

    source: str
    options: list[str]
    names: set[str]  # of the files that are to be fetched


def upload(hub: Hub, source: Path, options: list[str]) -> Uploaded:
    """Puts a source and its options into repositories of their own, among other files."""
    names: set[str] = set()

    def put(path: Path, repository: str) -> str:
        folder = path if path.is_dir() else path.parent
        inside = folder / "1.3B" if (folder / "1.3B").is_dir() else folder
        files = contents(inside)
        if path.is_dir() or path.suffix == ".gz":
            names.update(files)
            hub.add(repository, {**files, **OTHERS})
            return f"hub:{repository}"
        names.add(path.name)
        hub.add(repository, {**files, **OTHERS})
        return f"hub:{repository}/{path.name}"

    found = put(source, "them/model")
    given = [put(Path(o), f"them/part{i}") if i % 2 else o for i, o in enumerate(options)]
    return Uploaded(found, given, names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_is_imported_by_name(hub: Hub, tmp_path: Path, case: Case) -> None:
    """Another model than the one of the same files in a folder; a repository that is fetched whole;
    a file of the model that is not."""
    torch.manual_seed(0)
    source, options = case.write(tmp_path / "source")
    assert import_model.main([str(source), "expected", *options]) == 0
    uploaded = upload(hub, source, options)
    assert import_model.main([uploaded.source, "model", *uploaded.options]) == 0
    assert written(Path("model")) == written(Path("expected"))
    assert set(hub.fetched()) - {"README.md"} <= uploaded.names
    assert not set(hub.fetched()) & OTHERS.keys()
    hub.requests.clear()
    again = ["--no-download", *uploaded.options]
    assert import_model.main([case.family, uploaded.source, "again", *again]) == 0
    assert written(Path("again")) == written(Path("expected")) and hub.requests == []


@pytest.mark.parametrize("family", ["clip", "ruclip"])
def test_rankers_are_imported_by_name(hub: Hub, tmp_path: Path, family: str) -> None:
    """A ranker that is taken for a model of another family with a file of the same name."""
    source = tmp_path / "source"
    source.mkdir()
    published = PublishedCLIP(SIDE_OF_CLIP, vocab=COUNT, length=LENGTH).eval()
    if family == "clip":
        write_open_clip(source, dict(published.state_dict()))
    else:
        write_ruclip(source, published)
    assert import_model.main([str(source), "expected"]) == 0
    hub.add("them/ranker", {**contents(source), "flax_model.msgpack": b"x", **OTHERS})
    assert import_model.main(["hub:them/ranker", "model"]) == 0
    assert written(Path("model")) == written(Path("expected"))
    assert set(hub.fetched()) == contents(source).keys()


def test_a_codec_of_ours(
    hub: Hub, tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of ours that cannot lend its codec, or that is fetched whole for it."""
    hub.add("me/model", {})
    model.push_to_hub("me/model", token="hf_owner")
    case = next(case for case in CASES if case.family == "rudalle")
    source, _ = case.write(tmp_path / "source")
    prior = next(source.glob("pytorch_model*.bin"))
    hub.requests.clear()
    status = import_model.main([str(prior), "out", "--codec", "hub:me/model"])
    assert status == 2  # it has another number of codes, which is told after it was fetched
    assert set(hub.fetched()) == {"config.json", "dvae.safetensors"}
    capsys.readouterr()
    assert import_model.main(["hub:me/model", "out"]) == 2
    assert "got me/model, a folder of ours; dalle1.load opens it" in capsys.readouterr().err


def test_nothing_of_a_pickle_is_executed(hub: Hub, tmp_path: Path) -> None:
    """A program in the place of weights."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("pytorch_model.bin", "model.ckpt"):
        hub.add("them/evil", {name: pickle.dumps(Evil()), "bpe.model": b"x"})
        for kind in ("vqgan", "rudalle"):
            assert import_model.main([kind, "hub:them/evil", "out"]) == 2
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("files", "address", "message"),
    [
        (("x.md",), "a/b", r"SOURCE: a/b: expected the files of a model of .*got none by their na"),
        (
            ("a.pt", "b.pt"),
            "a/b",
            r"expected one model, got a.pt, b.pt; name the file, as hub:a/b/",
        ),
        (
            (*("encoder.pt", "decoder.pt"), *("encoder_mini.pt", "decoder_mini.pt", "detoker.pt")),
            "a/b",
            "expected one model, got",
        ),
        (("a.pt",), "a/b/c.pt", "expected a file of the repository, got 'c.pt'"),
        (("a.pt",), "a/b@v7", "revision: expected a branch"),
        (("a.pt",), "a/none", "expected a repository at"),
    ],
)
def test_what_is_no_model_is_told(
    hub: Hub, files: tuple[str, ...], address: str, message: str
) -> None:
    """Gigabytes of several models fetched before anybody asks which is meant."""
    hub.add("a/b", dict.fromkeys(files, b"x"))
    owner, _, rest = address.partition("/")
    name, _, file = rest.partition("/")
    repository, _, revision = name.partition("@")
    asked = HubName(f"{owner}/{repository}", revision or None, file or None)
    with pytest.raises(ValueError, match=message):
        fetch_source(None, HubAccess(), asked)
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("file", "size"), [("flax_model.msgpack", 2**36 + 1), ("vocab.json", 2**27)]
)
def test_claims_without_end(hub: Hub, file: str, size: int) -> None:
    """A disk that is filled by what no model has."""
    files = {"config.json": b'{"model_type": "dallebart"}', "vocab.json": b"{}"}
    hub.add("a/b", {**files, "flax_model.msgpack": b"x"})
    hub.lies[file] = Lie(size=size)
    with pytest.raises(ValueError, match=rf"SOURCE: a/b: {file}: expected at most"):
        fetch_source(None, HubAccess(), HubName("a/b"))
    assert file not in hub.fetched() and "flax_model.msgpack" not in hub.fetched()


def test_names_that_lead_out(hub: Hub) -> None:
    """A file that is written outside of the cache because its name has a reader."""
    hub.add("a/b", {"../../x.ckpt": b"x"})
    with pytest.raises(ValueError, match="expected names within the repository"):
        fetch_source(None, HubAccess(), HubName("a/b"))


@pytest.mark.parametrize(
    ("names", "file", "chosen"),
    [
        (["a.bin", "b.txt"], None, ["a.bin"]),
        (["a.bin", "c.json"], None, ["a.bin", "c.json"]),
        (["a.safetensors", "a.bin"], None, ["a.bin"]),
        (["c.json"], None, None),
        (["sub/a.bin"], None, None),
        (["x.bin", "y.bin", "x.json", "y.json"], "y.bin", ["y.bin", "y.json"]),
        (["x.bin", "y.bin", "z.json"], "y.bin", ["y.bin", "z.json"]),
        (["a.bin", "q.safetensors"], "q.safetensors", ["q.safetensors"]),
        (["a.bin", "q.txt"], "q.txt", None),
    ],
)
def test_choosing(names: list[str], file: str | None, chosen: list[str] | None) -> None:
    """Files of two models together, or another one than was named."""
    files = Files(needed=(("*.bin", "*.safetensors"),), beside=(("*.json",),))
    assert files.choose(names, file) == chosen


def test_choosing_among_several() -> None:
    """The first of several models, taken without a word."""
    with pytest.raises(ValueError, match=r"expected one model, got x\.bin, y\.bin; name the file"):
        Files(needed=(("*.bin",),)).choose(["x.bin", "y.bin"])


@pytest.mark.parametrize(
    ("kind", "names", "file", "left"),
    [
        (
            "min_dalle",
            "encoder.pt decoder.pt encoder_mini.pt decoder_mini.pt detoker.pt "
            "vocab.json vocab_mini.json merges.txt merges_mini.txt",
            "decoder_mini.pt",
            {"encoder.pt", "decoder.pt", "vocab.json", "merges.txt"},
        ),
        (
            "clip",
            "config.json preprocessor_config.json merges.txt vocab.json pytorch_model.bin "
            "model.safetensors flax_model.msgpack tokenizer.json",
            None,
            {"pytorch_model.bin", "flax_model.msgpack", "vocab.json", "tokenizer.json"},
        ),
        (
            "rudalle",
            "pytorch_model.bin bpe.model vqgan.gumbelf8-sber.model.ckpt "
            "vqgan.gumbelf8-sber-dwt.model.ckpt README.md",
            None,
            {"vqgan.gumbelf8-sber-dwt.model.ckpt", "README.md"},
        ),
    ],
)
def test_published_repositories(kind: str, names: str, file: str | None, left: set[str]) -> None:
    """Weights fetched twice or three times, in formats that nobody opens."""
    chosen = families()[kind].files.choose(names.split(), file)
    assert chosen is not None and set(chosen) == set(names.split()) - left
