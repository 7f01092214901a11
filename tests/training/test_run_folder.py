"""A run's folder: one run writes it at a time, and resumes with the parts that it began with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dvae
from dalle1 import registry
from dalle1.commands import train
from dalle1.common.config import save_settings
from dalle1.tokenizer import Tokenizer
from dalle1.training import checkpoints, run_folder
from dalle1.training.config import RunConfig
from dalle1.training.run_folder import LOCK, RunFolder
from dalle1.training.trainer import Trainer
from dvae.storage import save_part
from tests.conftest import reads_otherwise
from tests.forks import Forked

from .conftest import run_until, tiny
from .worker import free_port


def hold(folder: str, forks: int, seconds: float) -> None:
    """Takes a folder, with forks that live on like data workers waiting for a remote file."""
    RunFolder(Path(folder))
    pids = []
    for _ in range(forks):
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        pids.append(pid)
    Path(folder, "ready").write_text(" ".join(map(str, pids)))
    time.sleep(seconds)


def can_have(folder: str) -> int:
    try:
        RunFolder(Path(folder))
    except ValueError:
        return 3
    return 0


Holding = Callable[..., Forked]


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[Holding]:
    """Starts a process that has the folder `tmp_path`/run."""
    started: list[Forked] = []

    def start(forks: int = 0, seconds: float = 600) -> Forked:
        folder = tmp_path / "run"
        process = Forked(hold, str(folder), forks, seconds, log=tmp_path / "holder.txt")
        started.append(process)
        while not (folder / "ready").exists() or (forks and not (folder / "ready").read_text()):
            assert process.poll() is None, (tmp_path / "holder.txt").read_text()
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
    for pid in (tmp_path / "run" / "ready").read_text().split():
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["begin", "resume"])
def test_second_run_is_refused_while_the_first_lives(
    options: list[str], tmp_path: Path, shards: str, parts: Path, holding: Holding
) -> None:
    """The same command started twice, whose two runs write one folder."""
    config = tiny("clip", shards, tmp_path / "run", parts)
    save_settings(config, tmp_path / "config.yaml")
    first = holding()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    log = tmp_path / "second.txt"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = free_port()
    arguments = [str(tmp_path / "config.yaml"), *options]
    second = Forked(train.main, arguments, log=log, environment=alone)
    assert second.wait() == 2
    lines = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in log.read_text()
    for words in (str(tmp_path / "run"), str(first.pid), socket.gethostname()):
        assert words in lines[0]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_second_run_is_refused_by_another_way_to_the_folder(
    tmp_path: Path, holding: Holding
) -> None:
    """A lock by the name of the folder, which has several."""
    holding()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for other in (tmp_path / "link", tmp_path / "link" / ".." / "run"):
        with pytest.raises(ValueError, match=r"^run: expected a folder that no other run writes"):
            RunFolder(other)


@pytest.mark.parametrize("forks", [0, 2])
def test_killed_run_leaves_no_lock(forks: int, tmp_path: Path, holding: Holding) -> None:
    """A lock that outlives a killed run, as a file, or in the data workers that outlive it."""
    first = holding(forks)
    assert can_have(str(tmp_path / "run")) == 3
    first.kill()
    first.wait()
    assert (tmp_path / "run" / LOCK).exists()
    folder = RunFolder(tmp_path / "run")
    folder.release()
    assert not (tmp_path / "run" / LOCK).exists()


def test_restarted_rank_waits_for_the_one_before(tmp_path: Path, holding: Holding) -> None:
    """A run that its supervisor starts again, ended for good since its predecessor on a lost host
    was not quite gone."""
    holding(seconds=1.0)
    RunFolder(tmp_path / "run", patience=60).release()


def test_one_process_has_a_folder_until_the_last_asks_no_more(tmp_path: Path) -> None:
    """A second trainer in a notebook that gives up the lock of both when it goes."""
    path = tmp_path / "run"
    first, second = RunFolder(path), RunFolder(path)
    second.release()
    second.release()
    log = tmp_path / "log.txt"
    assert Forked(can_have, str(path), log=log).wait() == 3
    first.release()
    assert not path.exists()
    assert Forked(can_have, str(path), log=log).wait() == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that cannot be trained at all on a share without locks."""

    def lockf(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    folder = RunFolder(tmp_path / "run")
    assert "cannot be locked" in capsys.readouterr().err
    folder.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [LOCK, "checkpoints", "model"])
@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_places_in_the_folder_that_are_taken(
    name: str, what: str, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A run to the end whose checkpoints and model cannot be written, since something else is in
    their place; a lock that cannot be opened, of which the other ranks hear nothing."""
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if what == "folder":
        path.mkdir()
        (path / "notes").touch()
    elif what == "link":
        path.symlink_to(tmp_path / "nowhere" / "disk")
    else:
        path.touch()
    config = tiny("clip", shards, tmp_path / "run", parts, steps=2)
    if (name, what) in [(LOCK, "file"), ("checkpoints", "folder")]:
        Trainer(config).run()
        return
    with pytest.raises(ValueError, match=r"^run: expected a"):
        Trainer(config)
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_is_taken_as_the_lock_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a file that its former holder removed a moment ago: a third run would get another
    file."""
    path = tmp_path / "run"
    real, removed = fcntl.lockf, []

    def lockf(file: Any, how: int) -> None:
        if not removed:
            removed.append((path / LOCK).unlink())
        real(file, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    folder = RunFolder(path)
    assert Forked(can_have, str(path), log=tmp_path / "log.txt").wait() == 3
    folder.release()


@pytest.mark.parametrize(
    "settings",
    [
        {"data": "nowhere/{0..3}.tar"},
        {"reader": {"image_size": 8}},
        {"tokenizer": "nowhere"},
        {"batch_size": 8, "reader": {"streams": 3, "image_size": 16}},
    ],
    ids=str,
)
def test_mistake_leaves_nothing_behind(
    settings: dict[str, object], tmp_path: Path, shards: str, parts: Path
) -> None:
    """Folders, a lock or a tokenizer of a run that never began."""
    run = tmp_path / "runs" / "new"
    with pytest.raises(ValueError):
        Trainer(tiny("clip", shards, run, parts, **settings))
    assert not run.parent.exists()


def test_folder_is_free_after_a_run(tmp_path: Path, shards: str, parts: Path) -> None:
    """A lock that a notebook holds until it is closed."""
    run = tmp_path / "run"
    Trainer(tiny("clip", shards, run, parts, steps=2)).run()
    assert not (run / LOCK).exists()
    assert Forked(can_have, str(run), log=tmp_path / "log.txt").wait() == 0


def test_model_of_something_else_stays(tmp_path: Path, shards: str, parts: Path) -> None:
    """A user's model in the folder that is given to a new run, replaced at the first save."""
    run = tmp_path / "run"
    shutil.copytree(parts / "clip" / "model", run / "model")
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=r"^run: expected a new folder .* holds a model/"):
        Trainer(tiny("clip", shards, run, parts, steps=2))
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("named", ["file", "folder", "no"])
@pytest.mark.parametrize("left", ["nothing", LOCK])
def test_tokenizer_of_something_else_stays(
    named: str,
    left: str,
    tmp_path: Path,
    shards: str,
    parts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A user's tokenizer in the folder that is given to a new run, removed as what a failed start
    has left; or the very file that the settings name."""
    run = tmp_path / "run"
    run.mkdir()
    if left == LOCK:
        (run / LOCK).touch()
    shutil.copy(parts / "clip" / "tokenizer.json", run)
    reads_otherwise(run / "tokenizer.json")
    mine = (run / "tokenizer.json").read_text()
    names = {"file": str(run / "tokenizer.json"), "folder": str(run)}
    given = {"tokenizer": names[named]} if named != "no" else {}
    with pytest.raises(ValueError, match=r"reader\.image_size"):
        Trainer(tiny("clip", shards, run, parts, **given, reader={"image_size": 4}))
    Trainer(tiny("clip", shards, run, parts, steps=2, **given)).run()
    if named != "no":
        assert (run / "tokenizer.json").read_text() == mine
    elif left == "nothing":
        assert (run / "tokenizer.json.old").read_text() == mine
        assert "tokenizer.json.old" in capsys.readouterr().err


@pytest.mark.parametrize("left", [LOCK, run_folder.CONFIG])
def test_killed_start_begins_anew(left: str, tmp_path: Path, shards: str, parts: Path) -> None:
    """A tokenizer that a start without a checkpoint has left: taken for that of the new run, or
    for somebody else's."""
    run = tmp_path / "run"
    run.mkdir()
    (run / left).touch()
    (run / "tokenizer.json").write_text("{}")
    Trainer(tiny("clip", shards, run, parts, steps=2)).run()
    assert Tokenizer.load(run / "tokenizer.json").vocab_size == 300


def other_codec(folder: Path) -> None:
    torch.manual_seed(1)
    dvae.DVAE(dvae.load(folder / "codec").config).save(folder / "codec")


def nudged_codec(folder: Path) -> None:
    codec = dvae.load(folder / "codec")
    with torch.no_grad():
        next(codec.parameters()).view(-1)[0] += 1e-3
    codec.save(folder / "codec")


def other_ranker(folder: Path) -> None:
    ranker = registry.load("ranker", folder / "ranker")
    with torch.no_grad():
        ranker.logit_scale += 1
    save_part(registry.kind_of("ranker", ranker), ranker, folder / "ranker")


def ranker_reads_otherwise(folder: Path) -> None:
    reads_otherwise(folder / "ranker" / "clip_tokenizer.json")


def other_tokenizer(folder: Path) -> None:
    reads_otherwise(folder / "tokenizer.json")


def other_kept_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    reads_otherwise(folder / "run" / "tokenizer.json")


def other_dropout(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    path = folder / "run" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout": 0.3}))


def prior_config(folder: Path, shards: str, parts: Path, **settings: object) -> RunConfig:
    """Stage two, whose parts are copies in a folder of its own."""
    given: dict[str, object] = {
        "codec": str(folder / "codec"),
        "ranker": str(folder / "ranker"),
        "tokenizer": str(folder / "tokenizer.json"),
    }
    return tiny("dalle", shards, folder / "run", parts, steps=6, **(given | settings))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, shards: str, parts: Path) -> Path:
    """A folder with the parts and a run of stage two, stopped after update 3."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(parts / "dvae" / "model", folder / "codec")
    shutil.copytree(parts / "clip" / "model", folder / "ranker")
    shutil.copy(parts / "clip" / "tokenizer.json", folder)
    run_until(prior_config(folder, shards, parts), 3)
    return folder


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (other_codec, "codec"),
        (nudged_codec, "codec"),
        (other_ranker, "ranker"),
        (ranker_reads_otherwise, "ranker"),
        (other_tokenizer, "tokenizer"),
        (other_kept_tokenizer, "tokenizer"),
        (other_dropout, "tokenizer"),
    ],
)
def test_another_part_under_the_same_path_is_refused(
    change: Callable[[Path], None],
    part: str,
    stopped: Path,
    tmp_path: Path,
    shards: str,
    parts: Path,
) -> None:
    """A run that trains on with other tokens than it began with, or exports another ranker, since
    the folder that its settings name was trained anew meanwhile."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    config = prior_config(folder, shards, parts)
    change(folder)
    with pytest.raises(ValueError, match=rf"^{part}: expected what the run began with"):
        Trainer(config, resume=True)
    found = checkpoints.newest(folder / "run" / "checkpoints")
    assert found is not None and found.name == "step-0000003"


def test_same_parts_elsewhere_resume(
    stopped: Path, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A run that is bound to where its parts lay, or to a tokenizer of which it has a copy; one
    that cannot be given a ranker or do without."""
    for i, settings in enumerate(({}, {"ranker": None}, {"codec": str(stopped / "codec")})):
        folder = tmp_path / f"copy {i}"
        shutil.copytree(stopped, folder)
        (folder / "tokenizer.json").unlink()
        trainer = Trainer(prior_config(folder, shards, parts, **settings), resume=True)
        assert trainer.step == 3
    trainer.run()
    state = checkpoints.load(folder / "run" / "checkpoints" / "step-0000006").state
    assert set(state["parts"]) == {"codec", "ranker", "tokenizer"}


def test_checkpoint_without_fingerprints_resumes(
    stopped: Path, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A run of an earlier release, which kept no fingerprints, that cannot go on."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    path = folder / "run" / "checkpoints" / "step-0000003" / checkpoints.STATE
    state = json.loads(path.read_text())
    assert state.pop("parts")
    path.write_text(json.dumps(state))
    assert Trainer(prior_config(folder, shards, parts), resume=True).step == 3


def test_tokenizer_of_clip_is_compared(tmp_path: Path, shards: str, parts: Path) -> None:
    """A run of CLIP that learns its tokenizer anew, since its file is gone and its captions have
    changed, and goes on with ids that mean other things."""
    config = tiny("clip", shards, tmp_path / "run", parts)
    run_until(config, 3)
    (tmp_path / "run" / "tokenizer.json").unlink()
    fewer = config.model_copy(
        update={"tokenizer": config.tokenizer.model_copy(update={"captions": 40})}  # type: ignore[union-attr]
    )
    with pytest.raises(ValueError, match=r"^tokenizer: expected what the run began with"):
        Trainer(fewer, resume=True)
    assert Trainer(config, resume=True).step == 3
