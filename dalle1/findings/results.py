"""Results of runs on disk: one JSON file each, with all settings and their fingerprint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle1.common.files import make_folder, read_text, write_text
from dalle1.findings.base import Arm, Finding, Measurements, Options, Settings
from dalle1.findings.workspace import Workspace, file_name, fingerprint


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    finding: Finding
    arm: Arm
    seed: int
    settings: Settings
    out: Path  # of all findings
    folder: Path  # of this finding: a trial at another scale has its own, and its own report

    @property
    def name(self) -> str:
        """Of its files: other settings have another name, and never meet this one's result."""
        return f"{file_name(self.arm.name)}-seed{self.seed}-{fingerprint(self.settings)}"

    @property
    def path(self) -> Path:
        """Of its result."""
        return self.folder / "results" / f"{self.name}.json"

    def workspace(self, threads: int | None, options: Options) -> Workspace:
        """Its folders."""
        work, pictures = self.folder / "work" / self.name, self.folder / "pictures"
        o = options
        return Workspace(
            work, self.out, pictures, threads, o.photographs, o.model, o.emoji, o.packages
        )

    def read(self) -> Measurements | None:
        """What it has shown; None where it has no result.

        Raises ValueError for a file that is damaged or lacks a measure.
        """
        if not self.path.exists():
            return None
        try:
            data = json.loads(read_text(self.path))
            values = {m.name: float(data["values"][m.name]) for m in self.finding.measures}
            curves = {
                c.name: [(float(x), float(y)) for x, y in data["curves"][c.name]]
                for c in self.finding.curves
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"result: expected the measures of {self.finding.name!r} in {str(self.path)!r}, "
                f"got a damaged file ({error!r}); remove it to measure them again"
            ) from error
        return Measurements(values, curves)

    def write(self, found: Measurements, seconds: float) -> None:
        """Writes the result.

        Raises ValueError where `found` lacks a measure or curve, or has one that nobody declared.
        """
        for names, declared, what in (
            (found.values.keys(), {m.name for m in self.finding.measures}, "measures"),
            (found.curves.keys(), {c.name for c in self.finding.curves}, "curves"),
        ):
            if names != declared:
                raise ValueError(
                    f"{what} of {self.finding.name!r}: expected {sorted(declared)}, got "
                    f"{sorted(names)}; correct the finding"
                )
        content: dict[str, Any] = {
            "finding": self.finding.name,
            "arm": self.arm.name,
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "values": found.values,
            "curves": found.curves,
            "fingerprint": fingerprint(self.settings),
            "settings": self.settings,
        }
        make_folder(self.path.parent)
        write_text(self.path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def runs_of(finding: Finding, seeds: list[int], options: Options, out: Path) -> list[Run]:
    """All runs, seed by seed: a finding that is stopped early has full seeds of all arms."""

    def settings(arm: Arm, seed: int) -> Settings:
        own = finding.settings(arm, seed, options)
        return {"finding": finding.name, "version": finding.version, "seed": seed, **own}

    label = "" if options.scale == 1 else f"-scale-{options.scale:g}"
    folder = out / f"{finding.name}{label}"
    return [
        Run(finding, arm, seed, settings(arm, seed), out, folder)
        for seed in seeds
        for arm in finding.arms
    ]
