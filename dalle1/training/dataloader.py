"""The data of a run: its fixed list of shards, its batches, its position, its bad samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle1.common.config import SHAPES
from dalle1.common.files import check_writable, read_text, write_text
from dalle1.data import shapes
from dalle1.data.samples import CAUSES, DAMAGED, current_causes
from dalle1.data.shards.index import TOKENS, Index, check_readable, make_index
from dalle1.data.shards.loader import Batch, Batches, samples_of_share, too_many_bad
from dalle1.data.shards.token_shard import TokenShard
from dalle1.data.transforms import no_augmentation
from dalle1.training.config import RunConfig
from dalle1.training.distributed import (
    any_rank,
    max_over_ranks,
    mean_over_ranks,
    rank,
    world_size,
)
from dalle1.training.stages.base import Stage

INDEX = "data.json"  # in the run's folder
GOOD = "good"


class TrainingData:
    """This rank's part of a run's data. All ranks must make it and call its methods together."""

    def __init__(
        self, config: RunConfig, folder: Path, resuming: bool, barrier: Callable[[], None]
    ) -> None:
        """Finds the shards and counts their samples.

        Args:
            config: of the run.
            folder: of the run, where the list of shards is kept.
            resuming: use the shards that the run began with, whatever has been added since.
            barrier: waits for all ranks, each of which counts a part of the samples.

        Raises:
            ValueError: data are missing, or have no captions where `reader.caption_key` says.
        """
        self.config, self._folder, self._barrier = config, folder, barrier
        saved = folder / INDEX
        index = Index.from_json(read_text(saved)) if resuming and saved.exists() else None
        self.index = index if index and index.is_of(config.data) else self._find(config.data, True)
        self.held_out = self._find(config.validation.data, False) if config.validation else None
        for index in (self.index, self.held_out):
            if index is not None and index.kind == TOKENS and config.stage != "dalle":
                raise ValueError(
                    f"data: {index.data!r} holds token shards, but stage {config.stage!r} is "
                    "trained on images"
                )
        if not resuming:
            self._check()
        self._state: Mapping[str, Any] | None = None
        self._taken = [0] * (config.reader.streams or config.batch_size)
        self._epoch = 0.0  # epochs done by this rank
        self._dropped: Counter[str] = Counter()  # bad samples of the run by cause, on all ranks
        self._recent: Counter[str] = Counter()  # lately, on all ranks: by cause, and good ones
        self._new_dropped: Counter[str] = Counter()  # of this rank, since the last report
        self._new_batches = 0  # since the last report

    def _find(self, data: str, use_counts: bool) -> Index:
        """use_counts: reader.counts is about these shards."""
        counts = self.config.reader.counts if use_counts else None

        def largest(values: list[float]) -> list[float]:
            self._barrier()
            return max_over_ranks(values)

        return make_index(data, counts, rank(), world_size(), largest)

    def _check(self) -> None:
        failure: Exception | None = None
        if rank() == 0:
            try:
                check_readable(self.index, self.config.reader.caption_key)
            except (OSError, ValueError) as error:
                failure = error
        if any_rank(failure is not None):
            raise failure or ValueError("data: the first rank cannot use it")

    def set_stage(self, stage: Stage) -> None:
        """Sets the stage that is trained, before the first batch.

        Raises:
            ValueError: it cannot be trained on these data.
        """
        for index in (self.index, self.held_out):
            if index is not None:
                stage.check_data(index)
        augment = self.config.reader.augment
        self._augmentation = stage.augmentation if augment else no_augmentation
        self._batches(self.index)  # refuses settings that do not fit

    def load(self, state: Mapping[str, Any]) -> None:
        """Resumes from what `state` returned.

        Raises:
            ValueError: the data or the settings of their order have changed.
        """
        self._state, self._taken = state, list(state["taken"])
        self._dropped = current_causes(state["dropped"])
        self._batches(self.index, state)

    def state(self, step: int) -> dict[str, Any]:
        """What to resume from after `step` updates, for a checkpoint."""
        taken = [int(n) for n in max_over_ranks(self._taken)]
        dropped = dict(self._all_dropped())
        return {**self._batches(self.index).state(step, taken), "dropped": dropped}

    def save(self) -> None:
        """Writes the list of shards into the run's folder."""
        write_text(self._folder / INDEX, self.index.as_json())

    def describe(self) -> str:
        """One line that says what the run is trained on."""
        index, stage = self.index, self.config.stage
        line = f"data: {index.samples:,} samples in {len(index.shards):,} {index.kind}"
        line += f" of {index.data}, "
        if index.kind == TOKENS:
            made = TokenShard(index.shards[0]).settings
            crops = "by listing 2" if made.augmented else "of the middle"
            return line + f"the dVAE's tokens of {made.views} crop(s) {crops}"
        encoded = " that the dVAE encodes as they come" if stage == "dalle" else ""
        return line + "images" + encoded

    def _batches(
        self, index: Index, state: Mapping[str, Any] | None = None, shared: int | None = None
    ) -> Batches:
        """shared: read batches of so many samples, the same on all ranks."""
        c, r = self.config, self.config.reader
        return Batches(
            index,
            shared or c.batch_size,
            r.image_size,
            self._augmentation,
            c.seed,
            caption_key=r.caption_key,
            caption_lines=r.caption_lines,
            buffer=r.shuffle_buffer,
            streams=_streams_for(shared) if shared else r.streams,
            max_bad=r.max_bad,
            max_aspect=r.max_aspect,
            max_pixels=r.max_pixels,
            rank=0 if shared else rank(),
            world_size=1 if shared else world_size(),
            state=state,
        )

    def batches(self) -> Iterator[Batch]:
        """This rank's batches from where the run is, without end; ends its workers with it."""
        for batch in self._batches(self.index, self._state).loader(self.config.reader.workers):
            for stream, count in batch.taken.items():
                self._taken[stream] = count
            self._new_dropped += batch.dropped
            self._epoch = batch.epoch
            self._new_batches += 1
            yield batch

    def held_out_batches(self) -> Iterator[Batch]:
        """This rank's held-out batches, or training's where none are; the same at each call."""
        return self._batches(self.held_out or self.index).loader()

    def first_images(self, count: int) -> Tensor:
        """Training images, the same on all ranks: uint8 [count, 3, R, R]."""
        images = next(self._batches(self.index, shared=count).loader()).images
        assert images is not None  # no stage that asks for them is trained on tokens
        return images

    def report(self) -> dict[str, float]:
        """Epochs done, and bad samples so far by cause, for the log.

        Raises:
            ValueError: on all ranks, when the share of bad samples was lately above
                `reader.max_bad`.
        """
        dropped = {f"dropped/{cause}": float(n) for cause, n in self._all_dropped().items()}
        seen = self._recent.total()
        bad = self._recent - Counter({GOOD: seen, DAMAGED: seen})  # DAMAGED counts shards
        if seen >= samples_of_share(self.index):
            r = self.config.reader
            if bad.total() > r.max_bad * seen:
                raise too_many_bad(self.index, r.caption_key, r.max_bad, bad)
            self._recent = Counter({name: n // 2 for name, n in self._recent.items()})
        return {"epoch": self._epoch, **dropped}

    def _all_dropped(self) -> Counter[str]:
        """Adds up the ranks' bad samples since the last call; all of the run by cause."""
        means = mean_over_ranks({cause: float(self._new_dropped[cause]) for cause in CAUSES})
        dropped = Counter({cause: round(x * world_size()) for cause, x in means.items()})
        self._dropped += dropped
        self._recent += dropped + Counter({GOOD: self._new_batches * self.config.batch_size})
        self._new_batches = 0
        self._new_dropped.clear()
        return self._dropped


def with_built_in_data(config: RunConfig, barrier: Callable[[], None]) -> RunConfig:
    """The config with `data: shapes` replaced by its shards, which are written on first use."""
    if config.data != SHAPES:
        return config
    r = config.reader
    # Named after all that they depend on, so that another size or count never meets old shards.
    palette = "" if r.shapes_palette == "plain" else f"-{r.shapes_palette}"
    folder = Path(r.shapes_folder) / f"{r.image_size}px-{r.shapes_count}{palette}"
    if not folder.is_dir():
        check_writable(folder, "reader.shapes_folder")
    if rank() == 0 and not folder.is_dir():
        temporary = folder.with_name(folder.name + ".tmp")
        shapes.write_shards(
            temporary, "train", r.shapes_count, side=r.image_size, palette=r.shapes_palette
        )
        temporary.replace(folder)
    barrier()
    return config.model_copy(update={"data": str(folder)})


def _streams_for(count: int) -> int:
    """Streams for a batch that is read once; each begins in a shard of its own."""
    return max(streams for streams in range(1, 17) if count % streams == 0)
