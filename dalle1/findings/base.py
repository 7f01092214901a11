"""What a finding is: a claim of the paper, the arms compared, and how one of them is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle1.findings.workspace import Workspace

Settings = dict[str, Any]  # of one run, as JSON


@dataclass(frozen=True)
class Arm:
    """One of the settings compared."""

    name: str  # short, for tables and legends: "beta 6.6"
    change: str  # what differs from the other arms, in a phrase
    settings: Mapping[str, Any] = field(default_factory=dict)  # read by `Finding.settings` alone


@dataclass(frozen=True)
class Measure:
    """A number that is measured of each run."""

    name: str  # among `Measurements.values`
    label: str  # with the unit
    digits: int = 2  # after the point, in tables


@dataclass(frozen=True)
class Curve:
    """A line that is measured of each run."""

    name: str  # among `Measurements.curves`
    label: str  # of y, with the unit
    x: str = "updates"
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Prediction:
    """What the paper says, or what follows from it: the measure is larger in one arm."""

    measure: str
    higher: str  # name of an arm
    lower: str  # name of another


@dataclass(frozen=True)
class Options:
    """What the user sets for all findings alike."""

    scale: float = 1.0  # factor on updates; below 1, on counts of samples too
    photographs: Path | None = None  # folder of images, for findings that need them
    model: Path | None = None  # folder of a model of emoji, likewise
    emoji: Path | None = None  # folder that `dalle1 data emoji` wrote
    packages: Path | None = None  # of those emoji; None: where `dalle1 data emoji` looks for them

    def scaled(self, count: int, least: int = 1) -> int:
        """A number of updates at this scale."""
        return max(least, round(count * self.scale))

    def fewer(self, count: int, least: int = 1) -> int:
        """A number of samples: fewer of them in a trial, and no more in a longer run."""
        return max(least, round(count * min(1.0, self.scale)))


@dataclass(frozen=True)
class Measurements:
    """What one run has shown."""

    values: dict[str, float]
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # (x, y), x rising


@dataclass(frozen=True)
class Finding:
    """A claim of the paper as an experiment.

    `settings(arm, seed, options)` says as JSON all that a run's result depends on, and
    `run(settings, workspace)` reads nothing else, so that a result is never taken for one of other
    settings. Where `run` is stopped, it is called again with the same workspace and resumes.
    """

    name: str
    claim: str  # one sentence
    section: str  # of the paper
    paper: str  # what the paper says of it, in its own setting
    setting: str  # what is trained here, in a sentence
    minutes: float  # of one core, for all arms and three seeds
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    settings: Callable[[Arm, int, Options], Settings]
    run: Callable[[Settings, Workspace], Measurements]
    curves: tuple[Curve, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    reference: str | None = None  # the arm that others are compared with; None: the first
    needs: Callable[[Options], str | None] = lambda options: None  # what is missing, or None
    version: int = 1  # counts changes of `run` that old results do not show

    def __post_init__(self) -> None:
        arms, measures = [arm.name for arm in self.arms], [m.name for m in self.measures]
        for names, what in ((arms, "arms"), (measures, "measures")):
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: expected different names, got {names}; rename one")
        for prediction in self.predictions:
            known = {prediction.higher, prediction.lower} <= set(arms)
            if not known or prediction.measure not in measures:
                raise ValueError(
                    f"predictions: expected arms of {arms} and a measure of {measures}, got "
                    f"{prediction}; correct it"
                )
        if self.reference is not None and self.reference not in arms:
            raise ValueError(
                f"reference: expected one of {arms}, got {self.reference!r}; correct it"
            )

    @property
    def reference_arm(self) -> Arm:
        """The arm that the others are compared with."""
        return next((arm for arm in self.arms if arm.name == self.reference), self.arms[0])
