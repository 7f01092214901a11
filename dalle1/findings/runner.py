"""Makes the runs of findings that have no result yet, one after the other, and their reports."""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle1.common.files import check_writable, make_folder
from dalle1.findings.base import Finding, Options
from dalle1.findings.report import write_report
from dalle1.findings.results import Run, runs_of
from dalle1.findings.workspace import Workspace
from dalle1.training.signals import Interrupted


def run_findings(
    findings: Sequence[Finding],
    seeds: Sequence[int],
    options: Options,
    out: Path,
    threads: int | None = None,
    keep: bool = False,
) -> bool:
    """Runs what has no result yet, and writes the report of each finding.

    Where a run fails, such as one that diverged, the others are still made; its error is printed
    and the next call tries it again.

    Args:
        findings: in this order.
        seeds: of each arm.
        options: for all findings alike.
        out: folder of all results; what was made there before is not made again.
        threads: CPU threads; None: as torch chooses.
        keep: whether the training runs stay on disk; False: only results and pictures do.

    Returns:
        Whether all runs have a result.

    Raises:
        ValueError: before the first run, seeds or a folder that will not do, a damaged result, or
            what the only finding lacks.
        OSError: a disk is full or fails.
        Interrupted: by Ctrl-C or SIGTERM, once what was running is saved.
    """
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"--seeds: expected different numbers, got {list(seeds)}; name each once")
    check_writable(out, "--out")
    if threads is not None:
        torch.set_num_threads(threads)
    ready = []
    for finding in findings:
        missing = finding.needs(options)
        if missing is None:
            runs = runs_of(finding, list(seeds), options, out)
            for run in runs:
                run.read()  # raises for a damaged result before hours of others
            ready.append((finding, runs))
        elif len(findings) == 1:
            raise ValueError(missing)
        else:
            print(f"{finding.name}: left out; {missing}", flush=True)
    complete = True
    for finding, runs in ready:
        for number, run in enumerate(runs, 1):
            where = f"{finding.name} {number}/{len(runs)}: {run.arm.name}, seed {run.seed}"
            if run.path.exists():
                continue
            print(f"\n{where}", flush=True)
            complete &= _make(run, run.workspace(threads, options), keep)
        found = {(run.arm.name, run.seed): result for run in runs if (result := run.read())}
        if found:
            print(f"\n{write_report(finding, found, options, runs[0].folder)}", flush=True)
    return complete


def _make(run: Run, workspace: Workspace, keep: bool) -> bool:
    """Whether the run has a result now."""
    make_folder(workspace.folder)
    start = time.monotonic()
    try:
        run.write(run.finding.run(run.settings, workspace), time.monotonic() - start)
    except (Interrupted, OSError):  # which would end all others, too, as a full disk does
        raise
    except Exception as error:  # whatever it is: the others take a night
        if not isinstance(error, ValueError):
            traceback.print_exc()
        print(f"error: {run.finding.name}, {run.name}: {error}", file=sys.stderr, flush=True)
        return False
    if not keep:
        shutil.rmtree(workspace.folder)
    return True
