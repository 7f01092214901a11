"""The training loop of all stages: update, log, validate, draw a contact sheet, save."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dalle1.common.config import save_settings
from dalle1.common.files import check_writable
from dalle1.common.hardware import has_bfloat16, known_peak
from dalle1.common.origins import add_origins
from dalle1.data.shards.loader import Batch
from dalle1.protocols import cuts_untold
from dalle1.training import checkpoints
from dalle1.training.config import RunConfig, with_precision
from dalle1.training.dataloader import TrainingData, with_built_in_data
from dalle1.training.distributed import (
    any_rank,
    broadcast,
    device,
    lost_ranks_reported,
    make_barrier,
    max_over_ranks,
)
from dalle1.training.ema import EMA, assign_owners
from dalle1.training.engine import (
    Engine,
    Update,
    make_zero_sharding,
    start_processes,
)
from dalle1.training.initialization import InitialWeights, passed_on, with_initial_parts
from dalle1.training.launcher import read_launch
from dalle1.training.loss_guard import LossGuard
from dalle1.training.metrics_logger import MetricsLogger
from dalle1.training.run_folder import CONFIG, EXPORTED, RunFolder, check_resumes
from dalle1.training.schedules import PlateauHalving, cosine, linear_warmup
from dalle1.training.signals import Interrupted, StopSignals
from dalle1.training.stages.base import Stage, device_of
from dalle1.training.stages.table import MakeStage, make_stage
from dalle1.training.supervisor import Heartbeat, attempt, restarted
from dalle1.training.throughput import Throughput
from dalle1.transformer.gradient_scale import load_scales, scales_state

CHECKPOINTS = "checkpoints"  # their folder in the run's
MODEL = "model."  # prefix of the names, among a stage's, of what is averaged and exported


class Trainer:
    """One run: its settings, its stage, and the state that a checkpoint holds.

    Raises:
        ValueError: before the first update, when the settings, the data, the folder of the run or
            a checkpoint do not fit.
    """

    def __init__(
        self, config: RunConfig, resume: bool = False, stage: MakeStage = make_stage
    ) -> None:
        """resume: from the newest checkpoint, where there is one. stage: makes what is trained; a
        variant of the stage that the config names."""
        self._make_stage = stage
        self._launched = read_launch().launched
        for path in (config.run, Path(config.run, CHECKPOINTS), Path(config.run, EXPORTED)):
            check_writable(path, "run")
        self._heartbeat = Heartbeat()
        # Longer at each attempt: ranks at different attempts find each other at a later one's port.
        start_timeout = (attempt() + 1) * config.faults.start_timeout
        self._heartbeat.next_within(start_timeout + config.faults.save_timeout)
        self.rank, self.world_size = start_processes(config.faults.timeout, start_timeout)
        self._barrier = make_barrier(timedelta(seconds=config.faults.save_timeout))
        self.folder = Path(config.run)
        # A rank that starts again may meet the one before it, on a host that is just lost.
        patience = min(start_timeout, config.faults.timeout) / 2 if restarted() else 0.0
        self._run_folder = RunFolder(self.folder, patience)
        weakref.finalize(self, self._run_folder.release)
        try:
            self._start(config, resume)
        except BaseException:
            self._run_folder.release()
            raise

    def _start(self, config: RunConfig, resume: bool) -> None:
        """Makes all that is trained, new or from the newest checkpoint."""
        latest = checkpoints.newest(self.folder / CHECKPOINTS)
        if latest is not None and not resume:
            raise ValueError(
                f"run: {config.run} already holds {latest.name}; resume it with --resume, or give "
                "another folder (run=...)"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        lacks_bfloat16 = max_over_ranks([float(not has_bfloat16(device()))])[0]
        self._chosen = config.parallel.precision == "auto"
        config = with_precision(with_initial_parts(config), not lacks_bfloat16)
        self.config = config = with_built_in_data(config, self._barrier)
        self.data = TrainingData(config, self.folder, latest is not None, self._barrier)
        if latest is None:
            self._run_folder.begin(config.tokenizer)
        torch.manual_seed(config.seed)  # initialization
        self.stage: Stage = self._make_stage(config, make_zero_sharding(config))
        self.data.set_stage(self.stage)
        self._parts = self.stage.fingerprints()
        self.engine = Engine(self.stage, config)
        if config.init is not None and latest is None:
            self.engine.load_weights(InitialWeights(config, MODEL))
        sizes = self.engine.sizes() | {n: x.numel() for n, x in self.engine.buffers.items()}
        self._owner = assign_owners(sizes, self.world_size)
        mine = [
            name.removeprefix(MODEL)
            for name, owner in self._owner.items()
            if owner == self.rank and name.startswith(MODEL)
        ]
        e, maxima = config.ema, self.stage.maxima(MODEL)
        self.ema = EMA(self.engine.weights(MODEL), mine, e.decay, e.every, maxima)
        self.plateau = PlateauHalving(config.optimizer.plateau_patience)
        self.loss_guard = LossGuard(config.faults)
        self._sheet_batch: Batch | None = None  # what contact sheets are drawn of
        self.step = 0  # updates done
        self.unsaved: str | None = None  # "checkpoint" or "model": what the last save has failed at
        self._resumed_from = latest
        if latest is not None:
            self._load(latest)
        if self.rank == 0:
            save_settings(config, self.folder / CONFIG)
            self.data.save()
            self._run_folder.started()

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
            RanksLost: another rank is gone.
            ValueError: the run diverged (see `LossGuard`), or too many samples are bad.
        """
        logger = None
        try:
            logger = self._make_logger()
            # Of all the captions of a data set that are cut, a line each would be no news.
            with lost_ranks_reported(lambda: f"after update {self.step}"), cuts_untold():
                self._train(logger)
                self._barrier()
        finally:
            if logger:
                summary = self.loss_guard.summary(self.step)
                if summary is not None:
                    logger.message(f"warning: {summary}")
                logger.close()
            self._run_folder.release()

    def _make_logger(self) -> MetricsLogger | None:
        if self.rank:
            return None
        c = self.config
        return MetricsLogger(self.folder, c.steps, self.step, c.stage, c.wandb)

    def _train(self, logger: MetricsLogger | None) -> None:
        batches = self.data.batches()
        if logger:
            logger.message(self.data.describe())
            if self._chosen:
                logger.message(f"parallel.precision: auto is {self.config.parallel.precision} here")
        peak = None if self.config.parallel.precision == "fp32" else known_peak(device())
        throughput = Throughput(self.config, self.world_size, peak)
        with StopSignals(self._launched) as signals:
            self.stage.train()
            if self._resumed_from is not None and self.step >= self.config.steps:
                # Done before, or all but the export, such as on a disk that was full.
                self._heartbeat.next_within(self.config.faults.save_timeout)
                self._export(self._resumed_from)
            while self.step < self.config.steps:
                self._heartbeat.next_within(self.config.faults.timeout)
                with throughput.waiting_for_data():
                    batch = next(batches)
                learning_rate, update = self._update(batch)
                throughput.count_update()
                self._log(logger, update, learning_rate, throughput)
                stop = int(max_over_ranks([signals.number])[0])  # the same on all ranks
                with throughput.paused():
                    self._validate_and_save(logger, stop)
                if stop and self.step < self.config.steps:
                    saved = "a checkpoint is saved"
                    if self.unsaved == "checkpoint":
                        saved = "it could not be saved"
                    raise Interrupted(
                        f"stopped after update {self.step}; {saved}. Resume with the same command "
                        "and --resume",
                        stop,
                    )

    def _update(self, batch: Batch) -> tuple[float, Update]:
        """One update of all that trains; the learning rate and what came of it."""
        if self.stage.changes_loss(self.step):
            self.plateau.begin_phase()
            self.loss_guard.begin_phase()
        if self.stage.replaces_weights(self.step):
            self._replace_weights()
        learning_rate = self._learning_rate()
        micro_batches = self.stage.micro_batches(batch, self.engine.dims.micro_batch)
        update = self.engine.step(
            micro_batches, self.step, learning_rate, self.loss_guard.reason_to_skip
        )
        self.step += 1
        self.loss_guard.record(self.step, update.loss, update.skipped)
        done = update.skipped is None
        moved = self.stage.after_update(self.step - 1, done, self.engine.weight)
        if moved:
            self.engine.load_weights(moved)
        self.ema.after_update(self.step - 1, done, self.engine.weights(MODEL))
        if done and self.config.optimizer.schedule == "plateau":
            self.plateau.update(update.loss)
        return learning_rate, update

    def _log(
        self,
        logger: MetricsLogger | None,
        update: Update,
        learning_rate: float,
        throughput: Throughput,
    ) -> None:
        """Reports the update; all ranks call it, since they add up what they have counted."""
        if logger:
            logger.advance()
            warning = self.loss_guard.warning(self.step, update.skipped)
            if warning is not None:
                logger.message(f"warning: {warning}")
        if not self._due(self.config.log_every):
            return
        values = {"loss": update.loss, **update.metrics, "learning_rate": learning_rate}
        values["gradient_norm"] = update.gradient_norm
        values |= self.loss_guard.metrics()
        if self.config.optimizer.schedule == "plateau":
            values["plateau_factor"] = self.plateau.factor
        values |= throughput.report() | self.stage.pop_metrics() | self.data.report()
        for i, scale in enumerate(self.stage.gradient_scales):
            values[f"gradient_scale/{i:03d}"] = scale.value
        if logger:
            logger.metrics(self.step, values)

    def _validate_and_save(self, logger: MetricsLogger | None, stop: int) -> None:
        """What is due after this update; a run that was told to stop saves in any case."""
        config, save_timeout = self.config, self.config.faults.save_timeout
        if config.validation and self._due(config.validation.every):
            self._heartbeat.next_within(save_timeout)
            self._validate(logger)
        if config.contact_sheet_every and self._due(config.contact_sheet_every):
            self._heartbeat.next_within(save_timeout)
            self._draw_contact_sheet(logger)
        if stop or self._due(config.save_every):
            self._heartbeat.next_within(2 * save_timeout)  # and the export
            self._save()

    def _due(self, every: int) -> bool:
        """Whether it is time for what is done every so many updates, and after the last one."""
        return self.step % every == 0 or self.step == self.config.steps

    def _replace_weights(self) -> None:
        """Goes from one phase of a stage to the next, whose weights are made of the present."""
        weights = {name: weight.clone() for name, weight in self.engine.weights()}
        made = self.stage.replacement_weights(weights, self.data.first_images)
        # The first rank's count: sums on GPUs round anew each time, and k-means would then differ.
        made = {name: broadcast(weight.cpu(), 0) for name, weight in made.items()}
        self.engine.load_weights(made)
        self.engine.reset_optimizer()
        self.ema.reset(self.engine.weights(MODEL))

    def _learning_rate(self) -> float:
        """Of the next update: the phase's, the schedule, and the warmup of the phase."""
        o, phase = self.config.optimizer, self.stage.phase(self.step)
        step, steps = self.step - phase.first, phase.last - phase.first
        rate = phase.learning_rate
        if o.schedule == "cosine":
            end = o.cosine_end * phase.learning_rate / o.learning_rate
            rate = cosine(step, rate, end, o.cosine_steps or steps)
        elif o.schedule == "plateau":
            rate *= self.plateau.factor
        return rate * linear_warmup(step, o.warmup_steps)

    def _full_average(self) -> dict[str, Tensor]:
        """The averaged weights of all ranks, on the first one; all take part."""
        average = {}
        for name, like in self.stage.empty_model().named_parameters():
            owner = self._owner[MODEL + name]
            mine = self.ema.average.get(name, torch.empty(0))
            value = broadcast(mine if owner == self.rank else torch.empty(like.shape), owner)
            if self.rank == 0:
                average[name] = value
        return average

    def _validate(self, logger: MetricsLogger | None) -> None:
        """Losses on held-out batches, the same ones each time."""
        settings = self.config.validation
        assert settings is not None
        batches, found = self.data.held_out_batches(), []
        for _ in range(settings.batches):
            self.stage.eval()
            batch = next(batches)
            micro_batches = self.stage.micro_batches(batch, self.engine.dims.micro_batch)
            found.append(self.engine.evaluate(micro_batches, self.step))
        self.stage.train()
        if logger:
            means = {key: sum(values[key] for values in found) / len(found) for key in found[0]}
            logger.scalars(self.step, {f"validation/{key}": value for key, value in means.items()})

    def _draw_contact_sheet(self, logger: MetricsLogger | None) -> None:
        """An image of the same samples each time: held-out ones where there are any."""
        average = self._full_average()
        if logger:
            if self._sheet_batch is None:
                self._sheet_batch = next(self.data.held_out_batches())
            model = self.stage.model_with(average).to(device_of(self.stage))
            drawn = self.stage.draw_contact_sheet(model, self._sheet_batch)
            if drawn is not None:
                image, values = drawn
                logger.contact_sheet(self.step, image)
                if values:
                    logger.scalars(self.step, values)
        self._barrier()

    def _save(self) -> None:
        """Saves a checkpoint, then exports the model of it.

        A failure to write is reported, and training continues.
        """
        state = self._state()
        # Every rank goes through all tensors, which may be sharded, and keeps its share.
        tensors = {
            name: value.to("cpu", copy=True)
            for name, value in self._tensors()
            if self._owner[name.split("/")[1]] == self.rank
        }
        tensors |= {f"average/{MODEL}{name}": value for name, value in self.ema.average.items()}
        compression = self.engine.exchange.state()
        tensors |= {f"compression/{name}": value for name, value in compression.items()}
        folder, c = self.folder / CHECKPOINTS, self.config
        path = checkpoints.save(
            folder, tensors, state, c.keep_checkpoints, c.keep_every, self._barrier
        )
        if path is None:
            self.unsaved = "checkpoint"
        else:
            self._export(path)

    def _export(self, path: Path) -> None:
        """Exports the model of a checkpoint; a failure to write is reported."""
        failed = False
        if self.loss_guard.nothing_done(self.step):
            if self.rank == 0:
                print(
                    f"warning: model not exported: none of {self.step} updates was done",
                    file=sys.stderr,
                )
        elif self.rank == 0:
            try:
                average = checkpoints.load(path).tensors.under(f"average/{MODEL}")
                exported = self.folder / EXPORTED
                origins = passed_on(self.config, exported)
                self.stage.export(self.stage.model_with(average), exported)
                add_origins(exported, origins)
            except (OSError, SafetensorError, ValueError) as error:
                # A full disk raises one of the former, a file that cannot be read back the latter.
                print(f"warning: model not exported: {error}", file=sys.stderr)
                failed = True
        self._barrier()
        self.unsaved = "model" if any_rank(failed) else None

    def _state(self) -> dict[str, Any]:
        """A checkpoint's state.json. Its keys are a file format, and stay as they are."""
        return {
            "step": self.step,
            "updates": self.engine.updates_done(),
            "plateau": self.plateau.state_dict(),
            "watch": self.loss_guard.state_dict(),
            "average_missed": self.ema.missed,
            "reader": self.data.state(self.step),
            "gradient_scales": scales_state(self.stage.gradient_scales),
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "parts": self._parts,
            "versions": _versions(),
        }

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"weights/{name}", value) for name, value in self.engine.weights())
        yield from ((f"moments/{name}", value) for name, value in self.engine.moments())
        yield from ((f"buffers/{name}", value) for name, value in self.engine.buffers.items())

    def _load(self, path: Path) -> None:
        """Resumes from a checkpoint, of any number of ranks and any ZeRO stage."""
        checkpoint = checkpoints.load(path)
        check_resumes(path, checkpoint.state, self.config, self._parts)
        self.engine.load_weights(checkpoint.tensors.under("weights/"))
        average = checkpoint.tensors.under(f"average/{MODEL}")
        self.ema.average = {name: average[name].clone() for name in self.ema.mine}
        self.engine.load_moments(checkpoint.tensors.under("moments/"), checkpoint.state["updates"])
        self.engine.load_buffers(checkpoint.tensors.under("buffers/"))
        lost = self.engine.exchange.load_state(checkpoint.tensors.under("compression/"))
        if lost is not None and self.rank == 0:
            print(f"warning: compression: {path} {lost}", file=sys.stderr)
        self.plateau.load_state_dict(checkpoint.state["plateau"])
        self.loss_guard.load_state_dict(checkpoint.state["watch"])
        self.ema.missed = checkpoint.state.get("average_missed", False)  # not in older ones
        if self.stage.gradient_scales and checkpoint.state["gradient_scales"]:
            # Both, since a run may resume in another precision.
            load_scales(self.stage.gradient_scales, checkpoint.state["gradient_scales"])
        self.step = int(checkpoint.state["step"])
        self.data.load(checkpoint.state["reader"])


def _versions() -> dict[str, str]:
    names = ("dalle1", "torch", "deepspeed", "numpy", "webdataset", "tokenizers")
    return {name: version(name) for name in names}


def train(config: RunConfig, resume: bool = False, stage: MakeStage = make_stage) -> None:
    """Trains one run from its beginning or its newest checkpoint to its end; see `Trainer`.

    Raises:
        ValueError: all of its updates were skipped: there is no model to go on with.
        OSError: the last checkpoint, or the model of it, could not be written.
    """
    with lost_ranks_reported(lambda: "while starting"):
        trainer = Trainer(config, resume, stage)
    trainer.run()
    if trainer.loss_guard.nothing_done(trainer.step):
        raise ValueError(
            "steps: expected an update that is done, got none: "
            f"{trainer.loss_guard.summary(trainer.step)}; change parallel.precision or lower "
            "optimizer.learning_rate, and resume with --resume and more steps"
        )
    if trainer.unsaved is not None:
        raise OSError(
            f"run: the last {trainer.unsaved} could not be written into {config.run}, as the "
            "warning says; make room, and resume with the same command and --resume"
        )
