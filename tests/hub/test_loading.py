"""Models by their names on the Hub: what is fetched, kept and asked for again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dalle1
from dalle1 import Model
from dalle1.commands import main as cli
from tests.conftest import CAPTIONS
from tests.hub.server import Files, Hub

FEW = {"candidates": 2, "keep": 1, "progress": False}
NAME = "me/model"
NEEDED = {"config.json", "tokenizer.json", "transformer.safetensors", "dvae.safetensors"}
RANKER = {"clip.safetensors"}
COPY = "clip_tokenizer.json"  # of the tokenizer, which is not fetched twice


def tokens(model: Model | str) -> torch.Tensor:
    return dalle1.sample(CAPTIONS[0], model, **FEW).tokens


def test_a_name_is_fetched_and_kept(hub: Hub, saved: Files, model: Model) -> None:
    """Other weights than those of the repository; files that are none of a model's, such as a
    pickle; a second start that fetches all again."""
    others = {"pytorch_model.bin": b"pickle", "notes/a.txt": b"x", "training.py": b"exit()"}
    hub.add(NAME, {**saved, **others})
    assert torch.equal(tokens(NAME), tokens(model))
    assert set(hub.fetched()) == NEEDED | RANKER and len(hub.fetched()) == 5
    hub.requests.clear()
    assert torch.equal(tokens(f"hub:{NAME}"), tokens(model))
    assert hub.asked() == [f"/api/models/{NAME}/revision/main"]


def test_nothing_is_asked_without_a_network(
    hub: Hub, saved: Files, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request in a train or on a cluster without network, where the cache holds everything; a
    message that does not say so where it does not."""
    commit = hub.add(NAME, saved)
    for at in (NAME, f"{NAME}@{commit}"):
        with pytest.raises(
            ValueError, match=r"model: me/model\S* is not in the cache .*offline|cac"
        ):
            dalle1.load(at, local_files_only=True)
    dalle1.load(NAME)
    hub.requests.clear()
    assert torch.equal(tokens(dalle1.load(NAME, local_files_only=True)), tokens(model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(tokens(NAME), tokens(model))
    assert torch.equal(tokens(f"{NAME}@{commit}"), tokens(model))
    with pytest.raises(ValueError, match="is not in the cache"):
        dalle1.load(NAME, revision="v2")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    dalle1.load(NAME, revision=commit)  # which no repository can change
    assert hub.requests == []


def test_a_server_that_fails(hub: Hub, saved: Files, model: Model) -> None:
    """Work that waits for a Hub which is down, though the model lies in the cache."""
    hub.add(NAME, saved)
    hub.failing = 503
    with pytest.raises(ConnectionError, match=r"me/model: http://127\S+ cannot be reached"):
        dalle1.load(NAME)
    hub.failing = 0
    dalle1.load(NAME)
    hub.failing = 503
    with pytest.warns(UserWarning, match=r"cannot be reached.*the copy in the cache is used"):
        loaded = dalle1.load(NAME)
    assert torch.equal(tokens(loaded), tokens(model))
    hub.__exit__()
    with pytest.warns(UserWarning, match="the copy in the cache is used"):
        dalle1.load(NAME)
    hub.__enter__()


def test_revisions(hub: Hub, saved: Files, make_model: type) -> None:
    """The newest commit in place of the one that is named, or a cache that mixes two."""
    first = hub.add(NAME, saved)
    folder = Path("other")
    make_model(seed=1).save(folder)
    other = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.repositories[NAME].commit(other, "feature/x")
    expected = tokens(str(folder))
    assert not torch.equal(tokens(NAME), expected)
    assert torch.equal(tokens(dalle1.load(NAME, revision="feature/x")), expected)
    assert torch.equal(tokens(f"{NAME}@feature/x"), expected)
    hub.repositories[NAME].commit(other)
    assert torch.equal(tokens(NAME), expected)
    assert not torch.equal(tokens(f"{NAME}@{first}"), expected)
    with pytest.raises(ValueError, match="revision: expected 'a', as in me/model@a, got 'b'"):
        dalle1.load(f"{NAME}@a", revision="b")
    for bad in ("../x", "", "a b", "/etc"):
        with pytest.raises(ValueError, match="revision: expected a branch, a tag or a commit"):
            dalle1.load(NAME, revision=bad)


def test_what_goes_wrong_is_told_in_a_line(
    hub: Hub, saved: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or a page of text, in place of what is wrong and what to do."""
    hub.add(NAME, saved)
    hub.add("me/secret", saved, private=True)
    hub.add("me/gated", saved, gated=True)
    hub.add("me/other", {"README.md": b"x"})
    hub.add("me/bert", {"config.json": b'{"model_type": "bert"}'})
    login = "log in with `hf auth login`"
    for name, words in {
        "me/none": f"expected a repository at {hub.endpoint}, got none of this name",
        "me/secret": login,
        "me/gated": "got a gate; ask for it at",
        f"{NAME}@v9": "revision: expected a branch, a tag or a commit of the repository",
        "me/other": "holds no config.json, and so no model of dalle1; for somebody else",
        "me/bert": "for somebody else's model, `dalle1 import hub:me/bert OUT`",
    }.items():
        with pytest.raises(ValueError, match=r"^[^\n]+$") as told:
            dalle1.load(name)
        assert words in str(told.value)
        assert cli.main(["sample", "x", "--model", name]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(ValueError, match=r"token: expected one that .* knows, got another; give"):
        dalle1.load(NAME, token="hf_wrong")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="token: expected one") as told:
        dalle1.load(NAME)
    assert "hf_wrong" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    dalle1.load("me/secret")
    monkeypatch.delenv("HF_TOKEN")
    dalle1.load("me/secret", token="hf_reader")
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/nowhere")
    with pytest.raises(ValueError, match=r"me/model: expected|refuses"):
        dalle1.load(NAME)


def test_names_and_folders(hub: Hub, saved: Files, model: Model) -> None:
    """A folder, or a typing mistake in a path, that is looked for on the network."""
    model.save("me/model")
    dalle1.load(NAME)
    dalle1.load(Path("me") / "model")
    for path in (
        "./a/b",
        "../a/b",
        "a/b/c",
        "a",
        "a/",
        "/a/b",
        "~/a",
        "a b/c",
        "a--b/c",
        "a/b.git",
    ):
        with pytest.raises(
            ValueError, match=r"model: .* is no folder(, and no name of emoji)?; training writes"
        ):
            dalle1.load(path)
    with pytest.raises(ValueError, match="is no folder"):
        dalle1.load(Path("me/none"))
    with pytest.raises(
        ValueError, match=r"model: expected hub:OWNER/NAME\[@REVISION\], got 'hub:a'"
    ):
        dalle1.load("hub:a")
    with pytest.raises(
        ValueError, match="revision: expected a model on the Hub, got the folder me/"
    ):
        dalle1.load(NAME, revision="main")
    assert hub.requests == []


def test_another_ranker_is_not_fetched(hub: Hub, saved: Files) -> None:
    """Gigabytes of a ranker that the user has put another in the place of."""
    hub.add(NAME, saved)
    model = dalle1.load(NAME, ranker="none")
    assert set(hub.fetched()) == NEEDED and model.ranker is None
    assert dalle1.load(NAME).ranker is not None  # the cache is completed
    assert set(hub.fetched()) == NEEDED | RANKER


def test_commands_and_the_variable(
    hub: Hub, saved: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command whose --model takes folders alone."""
    commit = hub.add(NAME, saved)
    few = ["--candidates", "2", "--keep", "1"]
    assert cli.main(["sample", CAPTIONS[0], *few, "--model", f"{NAME}@{commit}"]) == 0
    assert cli.main(["rank", CAPTIONS[0], "out/sheet.png", "--model", f"hub:{NAME}"]) == 0
    monkeypatch.setenv("DALLE1_MODEL", NAME)
    assert cli.main(["sample", CAPTIONS[0], *few]) == 0
    assert "which comes with dalle1" not in capsys.readouterr().err
    drawn = dalle1.sample(CAPTIONS[0], **FEW)
    assert dalle1.rank(CAPTIONS[0], drawn.images[0]).shape == (1,)


def test_where_the_cache_lies(hub: Hub, saved: Files, tmp_path: Path) -> None:
    """Files that other programs of the Hub do not find, or that lie where nobody expects them."""
    commit = hub.add(NAME, saved)
    dalle1.load(NAME, cache_dir=tmp_path / "mine")
    dalle1.load(NAME)
    for cache in (tmp_path / "mine", tmp_path / "home" / "hub"):
        folder = cache / "models--me--model"
        assert (folder / "refs" / "main").read_text() == commit
        snapshot = folder / "snapshots" / commit
        assert {p.name for p in snapshot.iterdir()} == NEEDED | RANKER | {COPY}
        assert all(p.resolve().parent == folder / "blobs" for p in snapshot.iterdir())
        assert not list(folder.rglob("*.incomplete")) and not list(folder.rglob("*.tmp"))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(NAME, "config.json", cache_dir=tmp_path / "mine")
    assert Path(str(found)).read_bytes() == saved["config.json"]


def test_what_the_hubs_own_package_fetched(hub: Hub, saved: Files) -> None:
    """A model that `hf download` fetched, and that is fetched again."""
    from huggingface_hub import snapshot_download

    hub.add(NAME, saved)
    cache = dalle1.hub.cache.hub_cache()
    snapshot_download(NAME, cache_dir=cache, endpoint=hub.endpoint)
    hub.requests.clear()
    dalle1.load(NAME)
    assert hub.fetched() == []


def test_a_mirror_that_lists_names_alone(hub: Hub, saved: Files, model: Model) -> None:
    """A mirror behind HF_ENDPOINT that does not know of sizes in lists."""
    hub.listed = False
    hub.add(NAME, saved)
    assert torch.equal(tokens(NAME), tokens(model))
    assert set(hub.fetched()) == NEEDED | RANKER


def test_weights_in_shards(hub: Hub, saved: Files, model: Model) -> None:
    """A large prior in several files, of which some are not fetched."""
    from safetensors.torch import load, save

    weights = load(saved["transformer.safetensors"])
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    files = {f: save({n: weights[n] for n in held}) for f, held in halves.items()}
    index = {"weight_map": {n: f for f, held in halves.items() for n in held}}
    rest = {name: data for name, data in saved.items() if name != "transformer.safetensors"}
    index_name = "transformer.safetensors.index.json"
    hub.add(NAME, {**rest, **files, index_name: json.dumps(index).encode()})
    assert torch.equal(tokens(NAME), tokens(model))
    hub.requests.clear()
    assert torch.equal(tokens(dalle1.load(NAME, local_files_only=True)), tokens(model))
    hub.add("me/half", {**rest, "a.safetensors": files["a.safetensors"],
                        index_name: json.dumps(index).encode()})  # fmt: skip
    with pytest.raises(ValueError, match=r"the shard b.safetensors of .*index.json is missing"):
        dalle1.load("me/half")


def test_without_the_package(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback in place of what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'dalle1\[hub\]'"):
        dalle1.load(NAME)


def test_pushed_here_and_opened_elsewhere(
    hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other pictures for the colleague who opens a model by its name."""
    model.push_to_hub(NAME, token="hf_owner", private=True)
    program = (
        "import json, dalle1\n"
        f"model = dalle1.load({NAME!r})\n"
        f"print(json.dumps(dalle1.sample({CAPTIONS[0]!r}, model, **{FEW!r}).tokens.tolist()))\n"
    )
    environment = {**os.environ, "HF_TOKEN": "hf_reader", "HF_HOME": str(tmp_path / "colleague")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == tokens(model).tolist()
    # What the other process fetched lies where this one looks for it.
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "colleague" / "hub"))
    hub.requests.clear()
    assert torch.equal(tokens(dalle1.load(NAME, local_files_only=True)), tokens(model))
    assert hub.requests == []
