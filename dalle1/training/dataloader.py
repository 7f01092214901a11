"""What a run is trained on: the shards it keeps to, its batches, how far it is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle1.common.files import write_text
from dalle1.data.samples import CAUSES, DAMAGED, current_causes
from dalle1.data.shards.index import TOKENS, Index, check_readable, make_index
from dalle1.data.shards.loader import Batch, Batches, samples_of_share, too_many_bad
from dalle1.data.shards.token_shard import TokenShard
from dalle1.data.transforms import no_augmentation
from dalle1.training.config import RunConfig
from dalle1.training.distributed import any_rank, largest_over_ranks, mean_over_ranks, rank, ranks
from dalle1.training.stages.base import Stage

INDEX = "data.json"  # in the run's folder
GOOD = "good"


class Feed:
    """This rank's part of a run's data. All ranks make it, and call its methods, together."""

    def __init__(
        self, config: RunConfig, folder: Path, resuming: bool, meet: Callable[[], None]
    ) -> None:
        """resuming: the shards are those that the run began with, whatever has been added since.
        meet: waits for all ranks, of which each counts a part of the samples.

        Raises ValueError for data that is missing or has no captions where they are looked for.
        """
        self.config, self._folder, self._meet = config, folder, meet
        known = folder / INDEX
        held = Index.from_json(known.read_text()) if resuming and known.exists() else None
        self.index = held if held and held.is_of(config.data) else self._find(config.data, True)
        self.held_out = self._find(config.validation.data, False) if config.validation else None
        for index in (self.index, self.held_out):
            if index is not None and index.kind == TOKENS and config.stage != "dalle":
                raise ValueError(
                    f"data: {index.data!r} holds token shards, but stage {config.stage!r} is "
                    "trained on pictures"
                )
        if not resuming:
            self._check()
        self._state: Mapping[str, Any] | None = None
        self._taken = [0] * (config.reader.streams or config.batch_size)
        self._epoch, self._done = 0.0, 0  # of this rank; batches since the last report
        self._judged: Counter[str] = Counter()  # samples of late, over all ranks
        self._dropped: Counter[str] = Counter()  # bad samples of the whole run, over all ranks
        self._noticed: Counter[str] = Counter()  # by this rank, and not among those yet

    def _find(self, data: str, counted: bool) -> Index:
        """counted: reader.counts is about these shards."""
        counts = self.config.reader.counts if counted else None

        def largest(values: list[float]) -> list[float]:
            self._meet()
            return largest_over_ranks(values)

        return make_index(data, counts, rank(), ranks(), largest)

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
        """Whose data it is; ValueError where it cannot be trained on them."""
        for index in (self.index, self.held_out):
            if index is not None:
                stage.check_data(index)
        augment = self.config.reader.augment
        self._augmentation = stage.augmentation if augment else no_augmentation
        self._batches(self.index)  # refuses settings that do not fit

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; ValueError where data or settings are others."""
        self._state, self._taken = state, list(state["taken"])
        self._dropped = current_causes(state["dropped"])
        self._batches(self.index, state)

    def state(self, step: int) -> dict[str, Any]:
        """What to go on from after so many updates, for a checkpoint."""
        taken = [int(n) for n in largest_over_ranks(self._taken)]
        dropped = dict(self._all_dropped())
        return {**self._batches(self.index).state(step, taken), "dropped": dropped}

    def save(self) -> None:
        """Writes down the shards in the run's folder."""
        write_text(self._folder / INDEX, self.index.as_json())

    def line(self) -> str:
        """What the run is trained on, for its log."""
        index, stage = self.index, self.config.stage
        line = f"data: {index.samples:,} samples in {len(index.shards):,} {index.kind}"
        line += f" of {index.data}, "
        if index.kind == TOKENS:
            made = TokenShard(index.shards[0]).settings
            crops = "by listing 2" if made.augmented else "of the middle"
            return line + f"the dVAE's tokens of {made.views} crop(s) {crops}"
        encoded = " that the dVAE encodes as they come" if stage == "dalle" else ""
        return line + "pictures" + encoded

    def _batches(
        self, index: Index, state: Mapping[str, Any] | None = None, whole: int | None = None
    ) -> Batches:
        """whole: a batch of so many samples, the same on all ranks."""
        c, r = self.config, self.config.reader
        return Batches(
            index,
            whole or c.batch_size,
            r.image_size,
            self._augmentation,
            c.seed,
            caption_key=r.caption_key,
            caption_lines=r.caption_lines,
            buffer=r.shuffle_buffer,
            streams=_few(whole) if whole else r.streams,
            max_bad=r.max_bad,
            max_aspect=r.max_aspect,
            max_pixels=r.max_pixels,
            rank=0 if whole else rank(),
            world_size=1 if whole else ranks(),
            state=state,
        )

    def batches(self) -> Iterator[Batch]:
        """This rank's batches from where the run is, without end."""
        for batch in self._batches(self.index, self._state).loader(self.config.reader.workers):
            for stream, count in batch.taken.items():
                self._taken[stream] = count
            self._noticed += batch.dropped
            self._epoch, self._done = batch.epoch, self._done + 1
            yield batch

    def held_out_batches(self) -> Iterator[Batch]:
        """This rank's held-out batches, the same ones each time; training's where there are
        none."""
        return self._batches(self.held_out or self.index).loader()

    def first_pictures(self, count: int) -> Tensor:
        """uint8 [count, 3, R, R]: training pictures, the same on all ranks."""
        images = next(self._batches(self.index, whole=count).loader()).images
        assert images is not None  # no stage that asks for them is trained on tokens
        return images

    def report(self) -> dict[str, float]:
        """Epochs done, and bad samples so far by cause.

        Raises ValueError, on all ranks, where a larger share than `reader.max_bad` was bad of
        late.
        """
        dropped = {f"dropped/{cause}": float(n) for cause, n in self._all_dropped().items()}
        seen = self._judged.total()
        bad = self._judged - Counter({GOOD: seen, DAMAGED: seen})
        if seen >= samples_of_share(self.index):
            r = self.config.reader
            if bad.total() > r.max_bad * seen:
                raise too_many_bad(self.index, r.caption_key, r.max_bad, bad)
            self._judged = Counter({name: n // 2 for name, n in self._judged.items()})
        return {"epoch": self._epoch, **dropped}

    def _all_dropped(self) -> Counter[str]:
        means = mean_over_ranks({cause: float(self._noticed[cause]) for cause in CAUSES})
        noticed = Counter({cause: round(x * ranks()) for cause, x in means.items()})
        self._dropped += noticed
        self._judged += noticed + Counter({GOOD: self._done * self.config.batch_size})
        self._done = 0
        self._noticed.clear()
        return self._dropped


def _few(count: int) -> int:
    """Streams for a batch that is read once: each begins in a shard of its own."""
    return max(streams for streams in range(1, 17) if count % streams == 0)
