"""The templates of launch/cluster: what they name, and how a job begins and ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dalle1.commands import train as train_command

ROOT = Path(__file__).parents[3]
SLURM = ROOT / "launch" / "cluster" / "train.slurm"


def test_templates_name_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """A template with a flag, a script or a config that is not, or no longer, there."""
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    with pytest.raises(SystemExit):
        train_command.main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    hostfile = SLURM.with_name("hostfile").read_text()
    for text in (SLURM.read_text(), hostfile.replace("\\\n#", "")):
        lines = [line for line in text.splitlines() if "launch/train.py" in line]
        flags = {
            flag for line in lines for flag in re.findall(r"--[\w-]+", line.split("train.py")[1])
        }
        assert lines and flags and flags <= known
        assert all(
            (ROOT / path).exists() for path in re.findall(r"(?:launch|configs)/[\w./-]+\w", text)
        )
    machines = [line for line in hostfile.splitlines() if not line.startswith("#")]
    assert machines and all(re.fullmatch(r"\S+ slots=\d+", line) for line in machines)


# Two tasks of a job, whose processes all get its signals, as SLURM's do.
STUBS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" > requeued; else echo node1; fi',
    "srun": """
while [ "$1" != bash ]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & echo $! >> pids; done
wait -n; first=$?; wait -n; second=$?
[ $first -gt $second ] && exit $first; exit $second""",
    "scancel": 'echo "$@" > canceled; kill -USR1 $(cat pids)',
    "python": """
echo $$ >> pids
trap 'sleep 0.2; touch saved-$RANK; exit 0' TERM
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > started-$RANK
[ -n "$STATUS" ] && exit $STATUS
for i in $(seq 200); do sleep 0.05; done; exit 1""",
}


def start_job(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    for name, source in STUBS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/bash\n" + source.strip() + "\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "25007", "SLURM_JOB_NODELIST": "node[1-2]", "PATH": f"{folder / 'bin'}:"}
    job["PATH"] += os.environ["PATH"]
    return subprocess.Popen(
        ["bash", str(SLURM), *arguments],
        cwd=folder,
        env=os.environ | job | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_slurm_job_saves_and_goes_back_to_the_queue(tmp_path: Path) -> None:
    """A warning that does not reach the ranks, kills what they need to save, or loses the job."""
    job = start_job(tmp_path, "a.yaml", "data=p/{0..9}.tar", STATUS="")
    for _ in range(200):
        if (tmp_path / "started-0").exists() and (tmp_path / "started-1").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)  # until the shells have set their traps
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0, out
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert (tmp_path / "canceled").read_text().split() == ["--signal=USR1", "25007.0"]
    assert (tmp_path / "requeued").read_text().strip() == "25007"
    arguments = "launch/train.py a.yaml data=p/{0..9}.tar --resume"
    for rank in (0, 1):
        started = (tmp_path / f"started-{rank}").read_text().strip()
        assert started == f"{rank} {rank} 2 node1 25007 {arguments}"


@pytest.mark.parametrize("status", [0, 2, 75])
def test_slurm_job_ends_with_training(tmp_path: Path, status: int) -> None:
    """A job that starts over what is done or cannot go well, or hides how it ended."""
    job = start_job(tmp_path, "a.yaml", STATUS=str(status))
    job.communicate(timeout=30)
    assert job.returncode == status and not (tmp_path / "requeued").exists()
    assert start_job(tmp_path).wait(timeout=30) == 2  # without a config
