"""The training loop of all three stages, top to bottom: step, judge, average, log, sheet, save."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle1.common.config import SHAPES, save_settings
from dalle1.data import shapes
from dalle1.data.shards.loader import Batch
from dalle1.training import checkpoints
from dalle1.training.config import RunConfig
from dalle1.training.dataloader import Feed
from dalle1.training.distributed import (
    device,
    from_rank,
    largest_over_ranks,
    meeting,
    rank,
    ranks,
)
from dalle1.training.ema import EMA, shares
from dalle1.training.engine import OVERFLOW, Engine, make_sharding, start_processes
from dalle1.training.loss_guard import Watch
from dalle1.training.metrics_logger import RunLog
from dalle1.training.schedules import PlateauHalving, cosine, warm_up
from dalle1.training.signals import Interrupted, RanksLost, StopSignals, ranks_lost
from dalle1.training.stages.base import Stage
from dalle1.training.stages.table import make_stage
from dalle1.training.stages.text_tokenizer import TOKENIZER
from dalle1.training.supervisor import Heartbeat, attempt
from dalle1.training.throughput import Speed, known_peak
from dalle1.transformer.gradient_scale import load_scales, scales_state

CONFIG = "config.yaml"
MODEL = "model."  # prefix of the names, among a stage's, of what is averaged and exported


class Trainer:
    """One run: a config, its stage, and the state that a checkpoint holds.

    Raises ValueError before the first update when the settings, the data, the folder of the run
    or a checkpoint do not fit.
    """

    def __init__(self, config: RunConfig, resume: bool = False) -> None:
        self._launched = "RANK" in os.environ
        self._beat = Heartbeat()
        # Longer at each attempt: ranks that are out of step meet at the next one's port.
        patience = (attempt() + 1) * config.faults.start_timeout
        self._beat.next_within(patience + config.faults.save_timeout)
        self.rank, self.ranks = start_processes(config.faults.timeout, patience)
        self._meet = meeting(timedelta(seconds=config.faults.save_timeout))
        self.folder = Path(config.run)
        latest = checkpoints.newest(self.folder / "checkpoints")
        if latest is not None and not resume:
            raise ValueError(
                f"run: {config.run} already holds {latest.name}; go on with --resume, or give "
                "another folder (run=...)"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config = _with_data(config, self._meet)
        self.feed = Feed(config, self.folder, latest is not None, self._meet)
        if latest is None and self.rank == 0:  # of a start that failed
            (self.folder / TOKENIZER).unlink(missing_ok=True)
        torch.manual_seed(config.seed)  # initialization
        self.stage: Stage = make_stage(config, make_sharding(config))
        self.feed.set_stage(self.stage)
        self.engine = Engine(self.stage, config)
        self._owner = shares(self.engine.sizes(), self.ranks)
        mine = [
            name.removeprefix(MODEL)
            for name, owner in self._owner.items()
            if owner == self.rank and name.startswith(MODEL)
        ]
        self.ema = EMA(self.engine.weights(MODEL), mine, config.ema.decay, config.ema.every)
        self.plateau = PlateauHalving(config.optimizer.plateau_patience)
        self.watch = Watch(config.faults)
        self._shown: Batch | None = None  # what sheets are drawn of
        self.step = 0
        if latest is not None:
            self._load(latest)
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_settings(config, self.folder / CONFIG)
            self.feed.save()

    def run(self) -> None:
        """Trains to the end.

        Raises Interrupted after Ctrl-C or SIGTERM, when a checkpoint is saved; RanksLost when
        another rank is gone; ValueError when the numbers are, see `Watch`.
        """
        log = self._log()
        try:
            with _noticing_lost_ranks(lambda: f"after update {self.step}"):
                self._train(log)
                self._meet()
        finally:
            if log:
                log.close()

    def _log(self) -> RunLog | None:
        if self.rank:
            return None
        c = self.config
        return RunLog(self.folder, c.steps, self.step, c.stage, c.wandb)

    def _train(self, log: RunLog | None) -> None:
        config, stage, engine = self.config, self.stage, self.engine
        batches = self.feed.batches()  # its workers end with it
        if log:
            log.say(self.feed.line())
        peak = None if config.parallel.precision == "fp32" else known_peak(device())
        speed = Speed(config, self.ranks, peak)
        with StopSignals(self._launched) as signals:
            stage.train()
            while self.step < config.steps:
                self._beat.next_within(config.faults.timeout)
                with speed.waiting():
                    batch = next(batches)
                if stage.sets_weights(self.step):
                    self._set_weights()
                rate = self._learning_rate()
                parts = stage.parts(batch, engine.dims.micro_batch)
                update = engine.step(parts, self.step, rate, self.watch.accept)
                if update.skipped != OVERFLOW:
                    self.watch.after(self.step + 1, update.loss, update.skipped)
                if update.skipped is None:
                    if self.ema.due(self.step):
                        self.ema.update(engine.weights(MODEL))
                    if config.optimizer.schedule == "plateau":
                        self.plateau.update(update.loss)
                self.step += 1
                last = self.step == config.steps
                speed.update()
                if log:
                    log.advance()
                    if update.skipped not in (None, OVERFLOW):
                        log.say(f"warning: update {self.step} was left out: {update.skipped}")
                if self.step % config.log_every == 0 or last:
                    values = {"loss": update.loss, **update.metrics, "learning_rate": rate}
                    values["gradient_norm"] = update.gradient_norm
                    if self.watch.skipped:
                        values["updates_skipped"] = self.watch.skipped
                    if config.optimizer.schedule == "plateau":
                        values["plateau_factor"] = self.plateau.factor
                    values |= speed.report() | stage.counts() | self.feed.report()
                    for i, scale in enumerate(stage.gradient_scales):
                        values[f"gradient_scale/{i:03d}"] = scale.value
                    if log:
                        log.metrics(self.step, values)
                stop = int(largest_over_ranks([signals.number])[0])
                with speed.aside():
                    if config.validation and (self.step % config.validation.every == 0 or last):
                        self._beat.next_within(config.faults.save_timeout)
                        self._validate(log)
                    if config.contact_sheet_every and (
                        self.step % config.contact_sheet_every == 0 or last
                    ):
                        self._beat.next_within(config.faults.save_timeout)
                        self._sheet(log)
                    if stop or last or self.step % config.save_every == 0:
                        self._beat.next_within(2 * config.faults.save_timeout)  # and the export
                        self._save()
                if stop and not last:
                    raise Interrupted(
                        f"stopped after update {self.step}; a checkpoint is saved. Go on with "
                        "the same command and --resume",
                        stop,
                    )

    def _set_weights(self) -> None:
        weights = {name: weight.clone() for name, weight in self.engine.weights()}
        self.engine.load_weights(self.stage.new_weights(weights, self.feed.first_pictures))
        self.engine.reset_optimizer()
        self.ema.reset(self.engine.weights(MODEL))

    def _learning_rate(self) -> float:
        o, phase = self.config.optimizer, self.stage.phase(self.step)
        step, steps = self.step - phase.first, phase.last - phase.first
        rate = phase.learning_rate
        if o.schedule == "cosine":
            end = o.cosine_end * phase.learning_rate / o.learning_rate
            rate = cosine(step, rate, end, o.cosine_steps or steps)
        elif o.schedule == "plateau":
            rate *= self.plateau.factor
        return rate * warm_up(step, o.warmup_steps)

    def _whole_average(self) -> dict[str, Tensor]:
        """The average of all ranks, on the first one; all take part."""
        average = {}
        for name, like in self.stage.blank().named_parameters():
            owner = self._owner[MODEL + name]
            mine = self.ema.average.get(name, torch.empty(0))
            held = from_rank(mine if owner == self.rank else torch.empty(like.shape), owner)
            if self.rank == 0:
                average[name] = held
        return average

    def _validate(self, log: RunLog | None) -> None:
        """Losses on held-out batches, the same ones each time."""
        settings = self.config.validation
        assert settings is not None
        batches, found = self.feed.held_out_batches(), []
        for _ in range(settings.batches):
            self.stage.eval()
            parts = self.stage.parts(next(batches), self.engine.dims.micro_batch)
            found.append(self.engine.evaluate(parts, self.step))
        self.stage.train()
        if log:
            means = {key: sum(values[key] for values in found) / len(found) for key in found[0]}
            log.scalars(self.step, {f"validation/{key}": value for key, value in means.items()})

    def _sheet(self, log: RunLog | None) -> None:
        """A sheet of the same samples each time: held-out ones where there are any."""
        average = self._whole_average()
        if log:
            if self._shown is None:
                self._shown = next(self.feed.held_out_batches())
            batch = self._shown
            model = self.stage.copy_with(average).to(next(self.stage.parameters()).device)
            drawn = self.stage.sheet(model, batch)
            if drawn is not None:
                image, values = drawn
                log.sheet(self.step, image)
                if values:
                    log.scalars(self.step, values)
        self._meet()

    def _save(self) -> None:
        """Checkpoint and exported model; a failure to write is reported and training goes on."""
        state = {
            "step": self.step,
            "updates": self.engine.updates_done(),
            "plateau": self.plateau.state_dict(),
            "watch": self.watch.state_dict(),
            "reader": self.feed.state(self.step),
            "gradient_scales": scales_state(self.stage.gradient_scales),
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "versions": _versions(),
        }
        # Every rank goes through all tensors, which may be sharded, and keeps its share.
        tensors = {
            name: value.to("cpu", copy=True)
            for name, value in self._tensors()
            if self._owner[name.split("/")[1]] == self.rank
        }
        tensors |= {f"average/{MODEL}{name}": value for name, value in self.ema.average.items()}
        compression = self.engine.compression_state()
        tensors |= {f"compression/{name}": value for name, value in compression.items()}
        folder, c = self.folder / "checkpoints", self.config
        path = checkpoints.save(
            folder, tensors, state, c.keep_checkpoints, c.keep_every, self._meet
        )
        if path is not None and self.rank == 0:
            try:
                average = checkpoints.load(path).tensors.under(f"average/{MODEL}")
                self.stage.export(self.stage.copy_with(average), self.folder / "model")
            except (OSError, SafetensorError) as error:  # a full disk raises either
                print(f"warning: model not exported: {error}", file=sys.stderr)
        self._meet()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"weights/{name}", value) for name, value in self.engine.weights())
        yield from ((f"moments/{name}", value) for name, value in self.engine.moments())

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
        self.engine.load_weights(checkpoint.tensors.under("weights/"))
        average = checkpoint.tensors.under(f"average/{MODEL}")
        self.ema.average = {name: average[name].clone() for name in self.ema.mine}
        self.engine.load_moments(checkpoint.tensors.under("moments/"), checkpoint.state["updates"])
        buffers = checkpoint.tensors.under("compression/")
        if not self.engine.load_compression_state(buffers) and self.rank == 0:
            print(
                f"warning: compression: {path} holds no error buffers for this rank and cut of the "
                "weights; they begin with zeros",
                file=sys.stderr,
            )
        self.plateau.load_state_dict(checkpoint.state["plateau"])
        self.watch.load_state_dict(checkpoint.state["watch"])
        if self.stage.gradient_scales and checkpoint.state["gradient_scales"]:
            # Both: a run may go on in another precision.
            load_scales(self.stage.gradient_scales, checkpoint.state["gradient_scales"])
        self.step = int(checkpoint.state["step"])
        self.feed.load(checkpoint.state["reader"])


def _with_data(config: RunConfig, meet: Callable[[], None]) -> RunConfig:
    """The config with `data: shapes` replaced by its shards, written on first use."""
    if config.data != SHAPES:
        return config
    r = config.reader
    # Named after all that they depend on, so that another size or count never meets old shards.
    folder = Path(r.shapes_folder) / f"{r.image_size}px-{r.shapes_count}"
    if rank() == 0 and not folder.is_dir():
        beside = folder.with_name(folder.name + ".tmp")
        shapes.write_shards(beside, "train", r.shapes_count, side=r.image_size)
        beside.replace(folder)
    meet()
    return config.model_copy(update={"data": str(folder)})


@contextmanager
def _noticing_lost_ranks(when: Callable[[], str]) -> Iterator[None]:
    """Turns what a collective says of a lost rank into one line that says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if not ranks_lost(error):
            raise
        # Without the path of the source that says so.
        reason = str(error).splitlines()[0].split("] ", 1)[-1][:120]
        raise RanksLost(
            f"rank {rank()} of {ranks()} lost another one {when()} ({reason}); go on with the same "
            "command and --resume"
        ) from error


def _versions() -> dict[str, str]:
    names = ("dalle1", "torch", "deepspeed", "numpy", "webdataset", "tokenizers")
    return {name: version(name) for name in names}


def train(config: RunConfig, resume: bool = False) -> None:
    """Trains one run from its beginning or its newest checkpoint to its end."""
    with _noticing_lost_ranks(lambda: "while starting"):
        trainer = Trainer(config, resume)
    trainer.run()
