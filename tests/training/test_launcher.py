"""What a launcher's environment says, half or wrong, and what is left of ours in it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dalle1.commands import demo, evaluate, tokenize, train
from dalle1.training import distributed, trainer
from dalle1.training.distributed import free_port
from dalle1.training.launcher import (
    Launch,
    deepspeed_environment,
    environment,
    read_launch,
)
from dalle1.training.signals import RanksLost
from tests.forks import ROOT, Forked

from .conftest import tiny

ALL = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}
# A job of eight tasks, as its batch script finds it.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name in ALL or name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_")):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in ALL.items() if name not in names}


WRONG = [
    *((name, without(name)) for name in ALL),  # one is missing
    *((name, ALL | {name: ""}) for name in ALL),
    ("WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", {"RANK": "0"}),
    ("RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", {"WORLD_SIZE": "4"}),
    ("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT", {"LOCAL_RANK": "3"}),
    ("MASTER_ADDR, MASTER_PORT", without("MASTER_ADDR", "MASTER_PORT")),
    ("RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", {"RANK": ""}),
    ("LOCAL_RANK, MASTER_PORT", ALL | {"LOCAL_RANK": "", "MASTER_PORT": ""}),
    ("RANK", ALL | {"RANK": "two"}),
    ("RANK", ALL | {"RANK": "-1"}),
    ("RANK", ALL | {"RANK": "2"}),
    ("RANK", ALL | {"RANK": "1.0"}),
    ("RANK", ALL | {"RANK": "$SLURM_PROCID"}),
    ("WORLD_SIZE", ALL | {"WORLD_SIZE": "0"}),
    ("WORLD_SIZE", ALL | {"WORLD_SIZE": "2x8"}),
    ("WORLD_SIZE", ALL | {"WORLD_SIZE": "9" * 30}),
    ("LOCAL_RANK", ALL | {"LOCAL_RANK": "gpu0"}),
    ("LOCAL_RANK", ALL | {"LOCAL_RANK": "7"}),
    ("LOCAL_RANK", ALL | {"LOCAL_RANK": "٣"}),
    ("MASTER_PORT", ALL | {"MASTER_PORT": "http"}),
    ("MASTER_PORT", ALL | {"MASTER_PORT": "0"}),
    ("MASTER_PORT", ALL | {"MASTER_PORT": "70000"}),
    ("MASTER_ADDR", ALL | {"MASTER_ADDR": "tcp://node1"}),
    ("MASTER_ADDR", ALL | {"MASTER_ADDR": "node1:29500"}),
    ("MASTER_ADDR", ALL | {"MASTER_ADDR": "node1 node2"}),
]


@pytest.mark.parametrize(("names", "variables"), WRONG, ids=str)
def test_half_set_variables_are_named(
    names: str,
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A KeyError, or a ValueError of `int`, for what a launcher or a job script forgot; a wait of
    ten minutes for ranks that cannot come."""
    set_all(monkeypatch, variables)
    with pytest.raises(ValueError, match=rf"^{names}: expected .*; .*unset RANK"):
        read_launch()
    for more in ([], ["--restarts=3"]):  # no supervisor that tries it again
        assert train.main(["configs/shapes/dvae.yaml", *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {names}: expected") and said.count("\n") == 1


def test_complete_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that is refused, or whose numbers get mixed up; a port that asks for a rank."""
    assert read_launch() == Launch()
    set_all(monkeypatch, {"MASTER_ADDR": "node1", "MASTER_PORT": ""})  # of a cluster's profile
    assert read_launch() == Launch(0, 1, 0, "", False)
    set_all(monkeypatch, ALL)
    assert read_launch() == Launch(1, 2, 1, "127.0.0.1:29400", True)
    set_all(monkeypatch, {"RANK": " 11\n", "WORLD_SIZE": "16", "MASTER_ADDR": "fe80::1"})
    assert read_launch() == Launch(11, 16, 1, "fe80::1:29400", True)
    set_all(monkeypatch, BATCH | {"SLURM_STEP_NUM_TASKS": "16", "OMPI_COMM_WORLD_SIZE": "16"})
    assert read_launch().rank == 11  # the job's script has said what we need
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    assert read_launch(meets=False) == Launch(11, 16, 0, "", True)


@pytest.mark.parametrize(
    "variables",
    [
        BATCH,
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"PMI_RANK": "", "OMPI_COMM_WORLD_SIZE": "?"},
    ],
    ids=str,
)
def test_plain_python_in_a_job_runs_alone(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training refused in the script or the shell of an allocation, where it runs once."""
    set_all(monkeypatch, variables)
    assert read_launch() == Launch()


@pytest.mark.parametrize(
    ("starter", "variables"),
    [
        ("srun", BATCH | {"SLURM_STEP_NUM_TASKS": "8"}),
        ("srun", BATCH | {"SLURM_PROCID": "3"}),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}),
        ("mpirun", {"OMPI_COMM_WORLD_RANK": "1"}),
        ("mpiexec", {"PMI_SIZE": "4", "PMI_RANK": "0"}),
        ("mpiexec", {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "2"}),
    ],
    ids=str,
)
def test_tasks_without_ranks_are_refused(
    starter: str,
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Tasks that each train, or encode all shards, alone and into the same folder."""
    set_all(monkeypatch, variables)
    tokens = [f"data={tmp_path}", f"codec={tmp_path}", f"out={tmp_path / 'out'}"]
    for main, arguments in (
        (train.main, ["configs/shapes/dvae.yaml"]),
        (tokenize.main, ["configs/shapes/tokens.yaml", *tokens]),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: RANK: expected") and said.count("\n") == 1
        assert f"{starter} has started several tasks" in said and "train.slurm" in said


@pytest.mark.slow
def test_evaluation_names_the_variable(tmp_path: Path) -> None:
    """The check in one command alone, and DeepSpeed's search for MPI in the others."""
    log = tmp_path / "log.txt"
    command = ["configs/shapes/rank.yaml", f"run={tmp_path / 'run'}"]
    for variables, name in (
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "RANK"),
    ):
        process = Forked(evaluate.main, command, log=log, environment=variables)
        assert process.wait() == 2
        said = log.read_text()
        assert said.count("error:") == 1 and f"error: {name}: expected" in said, said
        assert "Traceback" not in said and "MPI environment" not in said
        log.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "zero", "variables"),
    [
        ("dvae", 0, {}),
        ("clip", 1, {"MASTER_PORT": "a leftover", **BATCH}),
        ("clip", 3, {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}),
        ("clip", 2, {**ALL, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}),
    ],
    ids=str,
)
def test_training_leaves_the_environment_as_it_was(
    stage: str, zero: int, variables: dict[str, str], tmp_path: Path, shards: str
) -> None:
    """A notebook whose next command takes itself for a rank of the training that is over; a run
    that DeepSpeed ends since mpirun's LOCAL_RANK is another."""
    log = tmp_path / "log.txt"
    config = tiny(stage, shards, tmp_path / "run", tmp_path, steps=5, parallel={"zero_stage": zero})
    process = Forked(train_twice, config, log=log, environment=variables)
    assert process.wait() == 0, log.read_text()[-3000:]


def train_twice(config: trainer.RunConfig) -> None:
    before = dict(os.environ)
    trainer.train(config)
    assert dict(os.environ) == before
    trainer.train(config.model_copy(update={"steps": 6}), resume=True)
    assert dict(os.environ) == before


def test_import_leaves_the_environment_as_it_was() -> None:
    """DeepSpeed's variables, ours for it among them, in all that a notebook starts later."""
    code = (
        "import os; import dalle1; before = dict(os.environ)\n"
        "import dalle1.training.trainer\n"
        "assert dict(os.environ) == before, set(os.environ.items()) - set(before.items())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_variables_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that stay behind an error, or a user's own that is lost."""
    monkeypatch.setenv("ONE", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    before = dict(os.environ)
    with pytest.raises(KeyError), environment(ONE="2", TWO="2"), deepspeed_environment():
        assert os.environ["ONE"] == os.environ["TWO"] == "2"
        assert os.environ["LOCAL_RANK"] == "0"
        raise KeyError(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])
    assert dict(os.environ) == before
    with environment(ONE=None):
        assert "ONE" not in os.environ
    assert dict(os.environ) == before


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that another program listens at, as DeepSpeed's 29500 of another run."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", free_port()))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.slow
def test_runs_of_one_rank_share_a_port(tmp_path: Path, shards: str, taken_port: int) -> None:
    """A second run on a machine that dies of the launcher's default port, which nobody needs."""
    place = ALL | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place["MASTER_PORT"] = str(taken_port)
    processes = []
    for number in range(2):
        run = tmp_path / f"run-{number}"
        config = tiny("clip", shards, run, tmp_path, steps=5)
        log = tmp_path / f"log-{number}.txt"
        processes.append(Forked(trainer.train, config, log=log, environment=place))
    codes = [process.wait() for process in processes]
    logs = [path.read_text()[-3000:] for path in sorted(tmp_path.glob("log-*.txt"))]
    assert codes == [0, 0], logs


def test_taken_port_is_named(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    """A first rank that waits for the others, or advises to look at their machines, while another
    run holds its port."""
    set_all(monkeypatch, ALL | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(taken_port)})
    with pytest.raises(RanksLost, match=rf"{taken_port}: another run .* --master_port \d+"):
        distributed.meet(read_launch(), 600)


def test_free_ports_are_free_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """One port for all, a port that someone listens at, or one of those that the system itself
    gives to the next connection."""
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and min(ports) >= 1024 and max(ports) < 32768
    taken = socket.socket()
    with taken:
        taken.bind(("", free_port()))
        port = taken.getsockname()[1]
        numbers = iter([port - 10_000, port - 10_000, 77])
        monkeypatch.setattr(distributed.secrets, "randbelow", lambda _: next(numbers))
        assert free_port() == 10_077


def test_our_own_launches_choose_a_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two demos side by side at one port; a new call that forgets the port; a page that does not
    say what a user's own call needs."""
    monkeypatch.setattr(demo, "cpu_count", lambda: 6)
    monkeypatch.setattr(demo, "default_device", lambda: torch.device("cpu"))
    started = [demo._ranks("rank", "evaluate", [], tmp_path) for _ in range(2)]
    demos = [[job.environment for job in jobs] for jobs in started]
    for ranks in demos:
        assert [rank["RANK"] for rank in ranks] == [rank["LOCAL_RANK"] for rank in ranks]
        assert [int(rank["RANK"]) for rank in ranks] == list(range(demo.MAX_RANKS))
        assert {rank["WORLD_SIZE"] for rank in ranks} == {str(demo.MAX_RANKS)}
        assert {rank["OMP_NUM_THREADS"] for rank in ranks} == {"1"}
    ports = [{rank["MASTER_PORT"] for rank in ranks} for ranks in demos]
    assert [len(port) for port in ports] == [1, 1] and ports[0] != ports[1]
    calls = re.compile(r"\[f?\"[^\" ]*\bdeepspeed\", ")
    sources = [
        path for folder in ("dalle1", "tests", "launch") for path in (ROOT / folder).rglob("*.py")
    ]
    calling = [path for path in sources if calls.search(path.read_text(encoding="utf-8"))]
    assert ROOT / "tests/commands/test_launch.py" in calling
    for path in calling:
        assert "--master_port" in path.read_text(encoding="utf-8"), path
    for page in ("docs/training.md", "launch/cluster/hostfile"):
        assert "--master_port" in (ROOT / page).read_text(encoding="utf-8")
