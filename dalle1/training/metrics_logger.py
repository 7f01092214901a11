"""Where a run reports: metrics.jsonl, TensorBoard, wandb, contact sheets, a progress line."""

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

from dalle1.common.files import expand_home, read_text, write_text
from dalle1.common.progress import progress_bar

METRICS = "metrics.jsonl"
SHEETS = "sheets"


class MetricsLogger:
    """Writes the metrics and contact sheets of a run; the first rank alone has one.

    A report that cannot be written, as on a full disk, costs a warning and not the run.
    """

    def __init__(
        self, folder: Path, steps: int, first: int, stage: str, wandb: str | None = None
    ) -> None:
        """Opens the files of a run; metrics after update `first` are removed.

        Args:
            folder: of the run.
            steps: updates of the run.
            first: updates done so far, where a run resumes.
            stage: name for the progress line.
            wandb: project of Weights & Biases to report to as well.

        Raises:
            ValueError: wandb is not installed.
        """
        self._wandb = _weights_and_biases(wandb, folder) if wandb is not None else None
        self.folder, self._warned = folder, False
        _drop_lines_after(folder / METRICS, first)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = _tensorboard(folder, first)
        self._bar = progress_bar(total=steps, initial=first, desc=stage, unit="step")

    def advance(self) -> None:
        """Moves the progress line by one update."""
        self._bar.update()

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Writes values after `step` updates; loss and speed go to the progress line too."""
        self.scalars(step, values)
        rate = values["images_per_second"]
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s", refresh=False)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes values after `step` updates to all places."""
        with self._warn_if_it_fails():
            # JSON knows neither NaN nor infinity.
            line = {k: v if math.isfinite(v) else None for k, v in values.items()}
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def contact_sheet(self, step: int, image: Image.Image) -> None:
        """Saves a contact sheet as `sheets/step-0000500.png` and in TensorBoard."""
        with self._warn_if_it_fails():
            (self.folder / SHEETS).mkdir(exist_ok=True)
            image.save(self.folder / SHEETS / f"step-{step:07d}.png")
            if self._board is not None:
                self._board.add_image("sheet", np.asarray(image), step, dataformats="HWC")

    @contextmanager
    def _warn_if_it_fails(self) -> Iterator[None]:
        """Turns the first OSError into a warning and ignores the others."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self.message(f"warning: reports are missing from here on: {error}")
            self._warned = True

    def message(self, text: str) -> None:
        """Prints a line for the user above the progress line."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the progress line and closes all places."""
        self._bar.close()
        with self._warn_if_it_fails():
            self._file.close()
            if self._board is not None:
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in read_text(Path(expand_home(run)) / METRICS).splitlines()]


def _drop_lines_after(path: Path, first: int) -> None:
    """Drops metrics after the checkpoint that the run resumes from: they will come again."""
    if path.exists():
        lines = [line for line in read_text(path).splitlines() if _step(line) <= first]
        write_text(path, "".join(line + "\n" for line in lines))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a crash


def _weights_and_biases(project: str, folder: Path) -> Any:
    try:
        import wandb  # only if the user asks for it: it sends metrics over the network
    except ImportError as error:
        raise ValueError(
            f"wandb: {project!r} needs Weights & Biases: pip install wandb, or remove the setting"
        ) from error
    # The name comes from the folder, so that a resumed run continues the same curves.
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
