"""The training loop of all three stages, top to bottom: sheet, save, step, log."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType

import numpy as np
import torch
from torch import Tensor

from dalle1.data import shapes
from dalle1.data.shards import Batches, find_shards
from dalle1.settings import SHAPES, save_settings
from dalle1.training import checkpoints
from dalle1.training.checkpoints import Checkpoint
from dalle1.training.config import RunConfig
from dalle1.training.ema import EMA
from dalle1.training.engine import Engine, any_rank, barrier, mean_over_ranks, start_processes
from dalle1.training.log import RunLog
from dalle1.training.schedules import PlateauHalving, cosine, warm_up
from dalle1.training.stages import STAGES, Stage

CONFIG = "config.yaml"


class Interrupted(Exception):
    """Training was asked to stop, and has saved a checkpoint."""


class StopSignals:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between two updates."""

    def __init__(self) -> None:
        self.stop = False

    def __enter__(self) -> StopSignals:
        self._former = {
            number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class Trainer:
    """One run: a config, its stage, and the state that a checkpoint holds.

    Raises ValueError before the first update when the settings, the data, the folder of the run
    or a checkpoint do not fit.
    """

    def __init__(self, config: RunConfig, resume: bool = False) -> None:
        self.rank, self.ranks = start_processes()
        self.folder = Path(config.run)
        latest = checkpoints.newest(self.folder / "checkpoints")
        if latest is not None and not resume:
            raise ValueError(
                f"run: {config.run} already holds {latest.name}; go on with --resume, or give "
                "another folder (run=...)"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config = _with_data(config, self.rank)
        torch.manual_seed(config.seed)  # initialisation
        self.stage: Stage = STAGES[config.stage](config)
        self.engine = Engine(self.stage, config.optimiser, config.batch_size, self.ranks)
        self.ema = EMA(self.stage.model, config.ema.decay, config.ema.every)
        self.plateau = PlateauHalving(config.optimiser.plateau_patience)
        self.step = 0
        if latest is not None:
            self._load(latest)
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_settings(config, self.folder / CONFIG)

    def run(self) -> None:
        """Trains to the end; Interrupted after Ctrl-C or SIGTERM, when a checkpoint is saved."""
        config, stage = self.config, self.stage
        batches = self._batches(self.step).loader(config.reader.workers)
        log = RunLog(self.folder, config.steps, self.step, config.stage) if self.rank == 0 else None
        dropped: Counter[str] = Counter()
        try:
            with StopSignals() as signals:
                stage.train()
                while self.step < config.steps:
                    batch = next(batches)
                    dropped.update(batch.dropped)
                    if stage.before_step(self.step, self._read):
                        self.engine.reset_optimiser()
                        self.ema.reset(stage.model)
                    rate = self._learning_rate()
                    loss, metrics = self.engine.step(batch, self.step, rate)
                    self.ema.update(stage.model, self.step)
                    if config.optimiser.schedule == "plateau":
                        # The mean, so that all ranks halve at the same update.
                        self.plateau.update(mean_over_ranks({"loss": loss.item()})["loss"])
                    self.step += 1
                    last = self.step == config.steps
                    if log:
                        log.advance(config.batch_size)
                    if self.step % config.log_every == 0 or last:
                        values = {"loss": loss, **metrics}
                        means = mean_over_ranks({k: float(v) for k, v in values.items()})
                        if not np.isfinite(means["loss"]):
                            raise ValueError(
                                f"the loss is {means['loss']} at update {self.step}: lower "
                                "optimiser.learning_rate or optimiser.clip_norm"
                            )
                        causes = {f"dropped/{cause}": n for cause, n in dropped.items()}
                        if log:
                            means |= {"learning_rate": rate, **stage.counts(), **causes}
                            log.metrics(self.step, means)
                    if log and (self.step % config.sheet_every == 0 or last):
                        self._sheet(log, batch)
                    stop = any_rank(signals.stop)
                    if stop or last or self.step % config.save_every == 0:
                        self._save()
                    if stop and not last:
                        raise Interrupted(
                            f"stopped after update {self.step}; a checkpoint is saved. Go on with "
                            "the same command and --resume"
                        )
        finally:
            if log:
                log.close()
            barrier()

    def _batches(self, first: int) -> Batches:
        c = self.config
        return Batches(
            c.data,
            c.batch_size,
            c.reader.image_size,
            self.stage.augmentation,
            c.seed,
            c.reader.caption_key,
            c.reader.shuffle_buffer,
            first,
            self.rank,
            self.ranks,
        )

    def _read(self, count: int) -> Tensor:
        batches = self._batches(0)
        batches.batch_size, batches.rank, batches.ranks = count, 0, 1
        return next(iter(batches)).images

    def _learning_rate(self) -> float:
        o, phase = self.config.optimiser, self.stage.phase(self.step)
        step, steps = self.step - phase.first, phase.last - phase.first
        rate = phase.learning_rate
        if o.schedule == "cosine":
            end = o.cosine_end * phase.learning_rate / o.learning_rate
            rate = cosine(step, rate, end, o.cosine_steps or steps)
        elif o.schedule == "plateau":
            rate *= self.plateau.factor
        return rate * warm_up(step, o.warm_up)

    def _sheet(self, log: RunLog, batch: object) -> None:
        with self.ema.applied(self.stage.model):
            drawn = self.stage.sheet(batch)  # type: ignore[arg-type]
        if drawn is not None:
            image, values = drawn
            log.sheet(self.step, image)
            if values:
                log.scalars(self.step, values)

    def _save(self) -> None:
        """Checkpoint and exported model; a failure to write is reported and training goes on."""
        if self.rank == 0:
            state = {
                "step": self.step,
                "plateau": self.plateau.state_dict(),
                "config": self.config.model_dump(mode="json", exclude_none=True),
            }
            weights = dict(self.stage.state_dict())
            optimiser = self.engine.optimiser_state()
            checkpoint = Checkpoint(weights, self.ema.average, optimiser, state)
            try:
                checkpoints.save(
                    self.folder / "checkpoints", checkpoint, self.config.keep_checkpoints
                )
                with self.ema.applied(self.stage.model):
                    self.stage.export(self.folder / "model")
            except OSError as error:
                print(f"warning: checkpoint not saved: {error}", file=sys.stderr)
        barrier()

    def _load(self, path: Path) -> None:
        checkpoint = checkpoints.load(path)
        saved = checkpoint.state["config"]
        mine = self.config.model_dump(mode="json", exclude_none=True)
        for key in ("stage", "seed", "batch_size", "dvae", "clip", "transformer"):
            if saved.get(key) != mine.get(key):
                raise ValueError(
                    f"{key}: {path} was trained with {saved.get(key)!r}, the config says "
                    f"{mine.get(key)!r}; a run goes on with the settings it began with"
                )
        self.stage.load_state_dict(checkpoint.weights)
        self.ema.average = checkpoint.average
        self.engine.load_optimiser_state(checkpoint.optimiser)
        self.plateau.load_state_dict(checkpoint.state["plateau"])
        self.step = int(checkpoint.state["step"])


def _with_data(config: RunConfig, rank: int) -> RunConfig:
    """The config with `data: shapes` replaced by its shards, written on first use."""
    if config.data != SHAPES:
        find_shards(config.data)
        return config
    r = config.reader
    # Named after all that they depend on, so that another size or count never meets old shards.
    folder = Path(r.shapes_folder) / f"{r.image_size}px-{r.shapes_count}"
    if rank == 0 and not folder.is_dir():
        beside = folder.with_name(folder.name + ".tmp")
        shapes.write_shards(beside, "train", r.shapes_count, side=r.image_size)
        beside.replace(folder)
    barrier()
    return config.model_copy(update={"data": str(folder)})


def train(config: RunConfig, resume: bool = False) -> None:
    """Trains one run from its beginning or its newest checkpoint to its end."""
    Trainer(config, resume).run()
