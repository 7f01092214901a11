"""How fast samples are read, as images and as tokens, against a loop by hand.

All ways of reading take turns, round by round, so that noise hits all of them.
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import dvae
from dalle1.common.files import add_file
from dalle1.common.hardware import default_device
from dalle1.data.precompute.encode import TokenizeSettings, tokenize
from dalle1.data.shards.index import raw_samples
from dalle1.data.shards.loader import Batch, Batches
from dalle1.data.shards.token_shard import TokenSettings, write_token_shard
from dalle1.data.transforms import augment_dalle
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer
from dvae.calls import trusted

WIDTH, HEIGHT, SIDE, GRID = 500, 375, 256, 32
CODEBOOK = 8192
DIFFERENT = 64  # photographs that are made; more samples repeat them
BATCH = 32
STEP_BATCH = 4  # of training steps
BY_HAND = "decode and resize, by hand"
CODEC = dvae.DVAEConfig(width=8, codebook_size=CODEBOOK, blocks_per_group=1)
TRANSFORMER = TransformerConfig(
    width=128, heads=2, head_size=64, layers=2, text_length=64, text_vocab=512
)


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of 500 x 375 with large shapes, edges and noise, of about a photograph's size."""
    coarse = rng.normal(size=(9, 12, 3)).cumsum(0).cumsum(1)
    coarse = 255 * (coarse - coarse.min()) / np.ptp(coarse)
    small = Image.fromarray(coarse.astype(np.uint8))
    pixels = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float64)
    for _ in range(12):  # rectangles of one brightness more or less
        y, x, h, w = rng.integers([0, 0, 20, 20], [HEIGHT, WIDTH, 150, 150])
        pixels[y : y + h, x : x + w] += rng.normal(0, 30)
    pixels += rng.normal(0, 6, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_photographs(folder: Path, samples: int, shards: int = 4) -> None:
    """Tars of photographs with captions, in img2dataset's layout."""
    rng = np.random.default_rng(0)
    images = [photograph(rng) for _ in range(min(DIFFERENT, samples))]
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, samples, shards):
                caption = f"a photograph with the number {i}"
                files = {
                    "jpg": images[i % len(images)],
                    "txt": caption.encode(),
                    "json": json.dumps({"caption": caption, "key": f"{i:09d}"}).encode(),
                }
                for extension, data in files.items():
                    add_file(tar, f"{i:09d}.{extension}", data)


def write_tokens(folder: Path, samples: int, shards: int = 4) -> None:
    """Token shards of the paper's size with random tokens."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    settings = TokenSettings(CODEBOOK, GRID, 1, False, "random")
    for shard in range(shards):
        keys = [f"{i:09d}" for i in range(shard, samples, shards)]
        tokens = rng.integers(0, CODEBOOK, (len(keys), 1, GRID**2))
        captions = [[f"a photograph with the number {key}"] for key in keys]
        write_token_shard(folder / f"{shard:05d}.safetensors", keys, captions, tokens, settings)


def read_by_hand(data: bytes, rng: np.random.Generator) -> Tensor:
    """Listing 2 as one writes it in a few lines of PIL: uint8 [3, SIDE, SIDE]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    w, h = image.size
    s = min(w, h)
    left, top = (round((length - s) * rng.uniform(3 / 8, 5 / 8)) for length in (w, h))
    target = int(rng.integers(min(s, SIDE), min(s, SIDE * 9 // 8) + 1))
    box = (left, top, left + s, top + s)
    image = image.resize((target, target), Image.Resampling.BOX, box=box)
    x, y = rng.integers(0, target - SIDE + 1, size=2)
    image = image.crop((int(x), int(y), int(x) + SIDE, int(y) + SIDE))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass
class Rates:
    """Samples a second in each round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle one of the rounds."""
        return statistics.median(self.rounds)

    def text(self) -> str:
        """The median and the extremes, for a table."""
        low, high = min(self.rounds), max(self.rounds)
        return f"{self.median:12,.0f} samples/s  ({low:,.0f} to {high:,.0f})"


class _ByHand:
    """The loop by hand over images in memory: as many bytes as the reader takes from files."""

    def __init__(self, data: Path, samples: int) -> None:
        self._images = [raw["jpg"] for raw in raw_samples(str(data))]
        self._samples = samples
        self._rng = np.random.default_rng(0)

    def prepare(self) -> None:
        """Nothing has to be done before a round."""

    def round(self) -> int:
        """Reads all samples; how many there were."""
        for i in range(self._samples):
            read_by_hand(self._images[i % len(self._images)], self._rng)
        return self._samples


class _ByReader:
    """Batches of the reader that training uses."""

    def __init__(self, data: Path, samples: int, workers: int) -> None:
        self._data, self._batches_a_round, self._workers = data, samples // BATCH, workers
        self._batches = self._reader().loader(workers)

    def prepare(self) -> None:
        """Empties the workers' queues. Without workers a round begins with a new reader, which
        reads the shards' headers and the first windows of the streams again."""
        if self._workers:
            self._take(2 * self._workers)
        else:
            self._batches = self._reader().loader()

    def round(self) -> int:
        """Reads all full batches; how many samples they hold."""
        self._take(self._batches_a_round)
        return self._batches_a_round * BATCH

    def _reader(self) -> Batches:
        return Batches(str(self._data), BATCH, SIDE, augment_dalle, seed=0)

    def _take(self, count: int) -> None:
        for _ in range(count):
            next(self._batches)


def measure_reading(
    folder: Path, samples: int, workers: list[int], repeats: int
) -> dict[str, Rates]:
    """Rates of the loop by hand, of images and of token shards, by the number of workers."""
    photographs, tokens = folder / "photographs", folder / "tokens"
    write_photographs(photographs, samples)
    write_tokens(tokens, max(20_000, samples))
    ways: dict[str, _ByHand | _ByReader] = {BY_HAND: _ByHand(photographs, samples)}
    for count in workers:
        ways[_images_by(count)] = _ByReader(photographs, samples, count)
    for count in workers:
        ways[_tokens_by(count)] = _ByReader(tokens, 20 * samples, count)
    rates = {name: Rates() for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            way.prepare()
            start = time.perf_counter()
            done = way.round()
            if turn:  # the first fills caches
                rates[name].rounds.append(done / (time.perf_counter() - start))
    return rates


def _images_by(workers: int) -> str:
    return f"images, {workers} workers"


def _tokens_by(workers: int) -> str:
    return f"token shards, {workers} workers"


def measure_tokenizing(
    folder: Path, codec: dvae.DVAE, samples: int, workers: list[int], repeats: int
) -> dict[str, Rates]:
    """Rates of launch/tokenize.py, by the number of workers.

    Its start and its end are left out: a run of three times the samples is measured too, and the
    rate is that of the difference.
    """
    codec.save(folder / "codec")
    few, many = folder / "few", folder / "many"
    write_photographs(few, samples, shards=2)
    write_photographs(many, 3 * samples, shards=2)
    rates = {f"tokenizing, {count} workers": Rates() for count in workers}
    for repeat in range(repeats):
        for count in workers:
            seconds = []
            for data in (few, many):
                settings = TokenizeSettings(
                    data=str(data),
                    out=str(folder / f"tokens-of-{data.name}-{repeat}-{count}"),
                    codec=str(folder / "codec"),
                    grid=GRID,
                    batch_size=BATCH,
                    workers=count,
                )
                start = time.perf_counter()
                tokenize(settings, device=default_device())
                seconds.append(time.perf_counter() - start)
            spent = max(seconds[1] - seconds[0], 1e-9)
            rates[f"tokenizing, {count} workers"].rounds.append(2 * samples / spent)
    return rates


def measure_waiting(
    folder: Path, codec: dvae.DVAE, workers: list[int], steps: int
) -> dict[str, dict[str, float]]:
    """Training steps of a small transformer, by kind of data and number of workers.

    Returns the seconds of a step, and the share of them that waits for data.
    """
    device = default_device()
    found = {}
    model = Transformer(TRANSFORMER).to(device)
    codec = codec.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for kind in ("photographs", "tokens"):
        for count in workers:
            data = str(folder / kind)
            batches = Batches(data, STEP_BATCH, SIDE, augment_dalle, seed=0).loader(count)
            waited, start = 0.0, 0.0
            for step in range(steps + 2):
                if step == 2:  # the first ones start the workers
                    waited, start = 0.0, time.perf_counter()
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                _train_step(model, codec, optimizer, batch)
            spent = time.perf_counter() - start
            found[f"{kind}, {count} workers"] = {
                "seconds_per_step": spent / steps,
                "waits": waited / spent,
            }
    return found


@trusted()
def _train_step(
    model: Transformer, codec: dvae.DVAE, optimizer: torch.optim.Optimizer, batch: Batch
) -> None:
    """One update; images are encoded first."""
    device = next(model.parameters()).device
    if batch.tokens is not None:
        tokens = batch.tokens.to(device, torch.int64)
    else:
        assert batch.images is not None
        tokens = rearrange(codec.encode(batch.images.to(device) / 255), "b r c -> b (r c)")
    text = torch.ones(len(tokens), TRANSFORMER.text_length, dtype=torch.int64, device=device)
    model.loss(text, tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report_dataloading(samples: int, workers: list[int], repeats: int) -> dict[str, Any]:
    """Measures reading, tokenizing and waiting; prints, and returns for a JSON file, the figures.

    Raises ValueError for a number of workers below 0 or fewer samples than a batch.
    """
    if min(workers) < 0 or samples < BATCH:
        raise ValueError(f"--workers must be 0 or more, --samples {BATCH} or more")
    torch.manual_seed(0)
    codec = dvae.DVAE(CODEC).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = measure_reading(folder, samples, workers, repeats)
        by_hand = rates[BY_HAND].median
        for way, found in rates.items():
            ratio = found.median / by_hand
            print(f"  {way:<28}{found.text()}  {ratio:8.2f} x by hand", flush=True)
        made = measure_tokenizing(folder, codec, BATCH, workers, min(repeats, 3))
        for way, found in made.items():
            print(f"  {way:<28}{found.text()}", flush=True)
        waits = measure_waiting(folder, codec, workers, steps=6)
        _print_waiting(waits)
    tokens_to_images = {
        f"token shards / images, {count} workers": rates[_tokens_by(count)].median
        / rates[_images_by(count)].median
        for count in workers
    }
    for way, ratio in tokens_to_images.items():
        print(f"  {way}: {ratio:.0f}")
    to_hand = {
        f"{way} / {BY_HAND}": found.median / by_hand
        for way, found in rates.items()
        if way != BY_HAND
    }
    return {
        "samples_per_second": {way: found.rounds for way, found in (rates | made).items()},
        "ratios": to_hand | tokens_to_images,
        "waiting": waits,
    }


def _print_waiting(waits: dict[str, dict[str, float]]) -> None:
    print(f"  training steps of {STEP_BATCH} samples, width {TRANSFORMER.width}:")
    for way, values in waits.items():
        print(
            f"  {way:<28}{1e3 * values['seconds_per_step']:12,.0f} ms, "
            f"{values['waits']:.1%} of it waiting for data",
            flush=True,
        )
