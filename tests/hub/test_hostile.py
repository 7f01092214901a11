"""Repositories and servers that mean no good: nothing of theirs leaves the cache, or comes in that
was not told."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import dalle1
from dalle1.hub.cache import hub_cache, link_blob
from tests.hub.server import Files, Hub, Lie

NAME = "me/model"
WEIGHTS = "transformer.safetensors"


def blobs() -> list[Path]:
    """Files that lie in the cache, and not links to them."""
    return [p for p in hub_cache().rglob("*") if p.is_file() and not p.is_symlink()]


def weights_came(hub: Hub) -> bool:
    return any(name.endswith(".safetensors") for name in hub.fetched())


@pytest.mark.parametrize("size", [10**10, 10, 0])
@pytest.mark.parametrize("listed", [True, False])
def test_a_claim_that_the_config_does_not_bear_out(
    hub: Hub, saved: Files, size: int, listed: bool
) -> None:
    """Ten gigabytes fetched for a model of a few kilobytes, or a file that cannot be it."""
    hub.listed = listed
    hub.add(NAME, saved)
    hub.lies[WEIGHTS] = Lie(size=size)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*(expected \S+ kB to \S+ kB|many more)"):
        dalle1.load(NAME)
    assert not weights_came(hub)


@pytest.mark.parametrize(
    ("file", "size"), [("config.json", 2**20 + 1), ("tokenizer.json", 2**26 + 1)]
)
def test_texts_that_are_far_too_long(hub: Hub, saved: Files, file: str, size: int) -> None:
    """A small file's name for a file that fills the memory when it is parsed."""
    hub.add(NAME, saved)
    hub.lies[file] = Lie(size=size)
    with pytest.raises(ValueError, match=rf"model: me/model: {file}: expected at most"):
        dalle1.load(NAME)
    assert file not in hub.fetched() and not weights_came(hub)


def test_a_config_of_a_model_without_end(hub: Hub, saved: Files) -> None:
    """Hours in which modules are made that no file holds weights for."""
    config = json.loads(saved["config.json"])
    config["prior"]["layers"] = 10**6
    hub.add(NAME, {**saved, "config.json": json.dumps(config).encode()})
    hub.lies[WEIGHTS] = Lie(size=10**10)
    with pytest.raises(ValueError, match=r"expected many more for a prior of kind|prior.layers"):
        dalle1.load(NAME)
    assert not weights_came(hub)


def test_a_disk_that_is_too_small(hub: Hub, saved: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is filled before anybody finds that it is too small."""
    hub.add(NAME, saved)
    usage = type("Usage", (), {"free": 2**26 + 10})
    monkeypatch.setattr("dalle1.hub.access.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"config.json: expected .* of free disk in .*HF_HOME"):
        dalle1.load(NAME)
    assert hub.fetched() == [] and blobs() == []


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda data: Lie(body=data + b"x" * 10**6), "expected .* bytes, .* got more"),
        (lambda data: Lie(body=data + b"x" * 10**6, length=False), "bytes, .* got more"),
        (lambda data: Lie(body=data[:-7]), "expected .* bytes, as the Hub tells, got"),
        (lambda data: Lie(body=data[:-7], length=False), "bytes, as the Hub tells, got"),
        (lambda data: Lie(body=b"x" * len(data)), "expected content of the checksum"),
        (lambda data: Lie(cut=len(data) // 2), "cannot be reached"),
    ],
)
def test_other_bytes_than_were_told(
    hub: Hub, saved: Files, file: str, lie: object, message: str
) -> None:
    """A file that grows without end, or one cut short or changed, that is opened from then on."""
    hub.add(NAME, saved)
    hub.lies[file] = lie(saved[file])  # type: ignore[operator]
    with pytest.raises((ValueError, ConnectionError), match=f"me/model: {file}: .*{message}"):
        dalle1.load(NAME)
    held = {path.read_bytes() for path in blobs()}
    assert held <= {*saved.values()} - {saved[file]} | {p.read_bytes() for p in refs()}
    del hub.lies[file]
    dalle1.load(NAME)


def refs() -> list[Path]:
    return [p for p in hub_cache().rglob("refs/*") if p.is_file()]


@contextmanager
def another_host() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address, and the headers of what comes there."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x", seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_the_token_stays_with_the_hub(
    hub: Hub, saved: Files, monkeypatch: pytest.MonkeyPatch, file: str, listed: bool
) -> None:
    """A user's token that a redirect carries to somebody else."""
    hub.listed = listed
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    hub.add(NAME, saved, private=True)
    with another_host() as (address, seen):
        hub.lies[file] = Lie(redirect=address)
        with pytest.raises(ValueError, match=r"bytes, as the Hub tells, got 0"):
            dalle1.load(NAME)
    assert seen and not any("authorization" in headers for headers in seen)
    assert not any("hf_owner" in value for headers in seen for value in headers.values())
    del hub.lies[file]
    dalle1.load(NAME)
    assert {request.token for request in hub.requests} == {"hf_owner"}
    assert {request.token for request in hub.elsewhere} == {None}


def test_redirects_without_end(hub: Hub, saved: Files) -> None:
    """A program that never returns."""
    hub.add(NAME, saved)
    hub.lies["config.json"] = Lie(redirect=f"{hub.endpoint}/{NAME}/resolve/main/config.json")
    with pytest.raises((ValueError, ConnectionError), match=r"me/model: config.json"):
        dalle1.load(NAME)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("checksum", ["../../../x", "/tmp/x", "a/b", "..", "x" * 200])
def test_checksums_that_are_paths(hub: Hub, saved: Files, listed: bool, checksum: str) -> None:
    """A file that is written wherever the server says, as its checksum becomes a name."""
    hub.listed = listed
    hub.add(NAME, saved)
    hub.lies["config.json"] = Lie(checksum=checksum)
    with pytest.raises(ValueError, match="expected its size and checksum from the Hub"):
        dalle1.load(NAME)
    assert blobs() == [] and not Path("/tmp/x").exists()


@pytest.mark.parametrize("commit", ["../../..", "/tmp", "a/b", "", "x" * 200])
def test_commits_that_are_paths(
    hub: Hub, saved: Files, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    """The same by the name of the commit."""
    hub.add(NAME, saved)
    repository = hub.repositories[NAME]
    repository.commits[commit], repository.branches["main"] = dict(saved), commit
    with pytest.raises(ValueError, match=r"me/model: expected a commit from the Hub, got"):
        dalle1.load(NAME)
    assert blobs() == []


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_names_that_lead_out_of_the_repository(hub: Hub, saved: Files, name: str) -> None:
    """A file outside of the cache that is written or read, by an index of shards that names it."""
    index = json.dumps({"weight_map": {"w": name}}).encode()
    rest = {file: data for file, data in saved.items() if file != WEIGHTS}
    hub.add(NAME, {**rest, f"{WEIGHTS}.index.json": index})
    with pytest.raises(ValueError, match=r"expected (names of files in the same|shards in safet)"):
        dalle1.load(NAME)
    assert name not in hub.fetched()


@pytest.mark.parametrize("name", ["../../../evil", "/tmp/evil", "a/../../b", "a\\..\\b", "C:\\b"])
def test_a_list_of_names_that_lead_out(hub: Hub, saved: Files, name: str) -> None:
    """Files that are made, anywhere, because a list names them."""
    hub.add(NAME, {**saved, name: b"x"})
    with pytest.raises(ValueError, match="me/model: expected names within the repository, got"):
        dalle1.load(NAME)
    assert blobs() == [] and hub.fetched() == []


def test_pickles_under_the_names_of_ours(hub: Hub, saved: Files, tmp_path: Path) -> None:
    """A pickle that is executed when a weights file is opened."""
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    bad = pickle.dumps(Evil()).ljust(len(saved[WEIGHTS]), b"\0")
    hub.add(NAME, {**saved, WEIGHTS: bad})
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: truncated or no safetensors"):
        dalle1.load(NAME)
    assert not (tmp_path / "executed").exists()


def test_links_of_a_repository(hub: Hub, saved: Files, tmp_path: Path) -> None:
    """A link in the repository, which is a text here, that is followed; one that somebody has put
    into the cache."""
    (tmp_path / "secret").write_bytes(saved["config.json"])
    link = b"../../../../secret"  # as Git keeps one
    hub.add(NAME, {**saved, "config.json": link})
    with pytest.raises(ValueError, match=r"config\.json: truncated or not JSON"):
        dalle1.load(NAME)
    hub.add(NAME, saved)
    dalle1.load(NAME)
    commit = hub.repositories[NAME].branches["main"]
    held = hub_cache() / "models--me--model" / "snapshots" / commit / "config.json"
    held.unlink()
    held.symlink_to(tmp_path / "secret")
    for options in ({"local_files_only": True}, {}):
        with pytest.raises(ValueError, match=r"config.json: expected a link within"):
            dalle1.load(NAME, **options)


def test_a_folder_of_the_cache_that_is_a_link(tmp_path: Path) -> None:
    """A file that is written through a link out of the cache."""
    folder = tmp_path / "models--a--b"
    (folder / "snapshots" / "c").mkdir(parents=True)
    (folder / "snapshots" / "c" / "deep").symlink_to(tmp_path)
    for name in ("deep/x", "../x", "/x"):
        with pytest.raises(ValueError, match="expected a name within the repository"):
            link_blob(folder, "c", name, "0" * 40)
    assert not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"kind": "open_clip", "model": "hf-hub:evil/model"}, "open_clip:hf-hub:evil/model"),
        ({"kind": "hugging_face", "name": "evil/model"}, "hf:evil/model"),
    ],
)
def test_a_ranker_from_elsewhere(
    hub: Hub, saved: Files, section: dict[str, str], named: str
) -> None:
    """A second repository that is fetched unasked, by a package that may execute what is in it."""
    config = {**json.loads(saved["config.json"]), "ranker": section}
    hub.add(NAME, {**saved, "config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match=f"ranker: me/model ranks by '{named}', which another"):
        dalle1.load(NAME)
    assert dalle1.load(NAME, ranker="none").ranker is None


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b'{"prior": 1}', b'{"prior": {"kind": "x"}}', b"[" * 10**5]
)
def test_configs_that_are_none(hub: Hub, saved: Files, content: bytes) -> None:
    """A traceback for a file that is no config of ours."""
    hub.add(NAME, {**saved, "config.json": content})
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        dalle1.load(NAME)
    assert hub.fetched() == ["config.json"]
