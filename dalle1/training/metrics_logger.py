"""Where a run reports: metrics.jsonl, TensorBoard, a progress line, sample sheets, wandb."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle1.common.files import write_text

METRICS = "metrics.jsonl"
SHEETS = "sheets"


class RunLog:
    """Reports of rank 0 of a run that has done `first` of `steps` updates."""

    def __init__(
        self, folder: Path, steps: int, first: int, stage: str, wandb: str | None = None
    ) -> None:
        """wandb: project to report to as well; ValueError when it is not installed."""
        self._wandb = _weights_and_biases(wandb, folder) if wandb is not None else None
        self.folder, self._warned = folder, False
        _cut(folder / METRICS, first)
        self._file = (folder / METRICS).open("a")
        self._board = _tensorboard(folder, first)
        live = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc=stage,
            unit="step",
            mininterval=0.5 if live else 20.0,
            dynamic_ncols=live,
            ncols=None if live else 110,
        )

    def advance(self) -> None:
        """One update is done."""
        self._bar.update()

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Writes the values after `step` updates, and the first of them behind the progress."""
        self.scalars(step, values)
        rate = values["images_per_second"]
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s", refresh=False)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes values after `step` updates as they are."""
        with self._going_on():
            # JSON knows neither NaN nor infinity.
            line = {k: v if math.isfinite(v) else None for k, v in values.items()}
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def sheet(self, step: int, image: Image.Image) -> None:
        """Keeps a sample sheet as `sheets/step-0000500.png`."""
        with self._going_on():
            (self.folder / SHEETS).mkdir(exist_ok=True)
            image.save(self.folder / SHEETS / f"step-{step:07d}.png")
            if self._board is not None:
                self._board.add_image("sheet", np.asarray(image), step, dataformats="HWC")

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """A report that cannot be written, as on a full disk, costs a warning and not the run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self.say(f"warning: reports are missing from here on: {error}")
            self._warned = True

    def say(self, text: str) -> None:
        """A line for the user, above the progress line."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        self._bar.close()
        with self._going_on():
            self._file.close()
            if self._board is not None:
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / METRICS).read_text().splitlines()]


def _cut(path: Path, first: int) -> None:
    """Drops lines behind the checkpoint that the run goes on from: they will come again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step(line) <= first]
        write_text(path, "".join(line + "\n" for line in lines))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a crash


def _weights_and_biases(project: str, folder: Path) -> Any:
    try:
        import wandb  # its own choice of the user: it sends what it is given over the network
    except ImportError as error:
        raise ValueError(
            f"wandb: {project!r} needs Weights & Biases: pip install wandb, or take the setting out"
        ) from error
    # One name for one folder, so that a resumed run goes on in the same place.
    name = str(folder).strip("/").replace("/", "-")
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(folder))


def _tensorboard(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "TensorBoard is not installed (pip install 'dalle1[curves]'): metrics go to "
            f"{folder / METRICS} only",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first)
