"""How fast data arrive: pictures, tokens made of them, token shards; against a loop by hand.

The ways take turns, round by round, so that noise hits all of them.
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
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
from dalle1.data.precompute.encode import TokenizeSettings, tokenize
from dalle1.data.shards.index import raw_samples
from dalle1.data.shards.loader import Batch, Batches
from dalle1.data.shards.token_shard import TokenSettings, write_token_shard
from dalle1.data.transforms import augment_dalle
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer

WIDTH, HEIGHT, SIDE, GRID = 500, 375, 256, 32
CODEBOOK = 8192
DIFFERENT = 64  # photographs; more samples repeat them
BATCH = 32
STEP_BATCH = 4  # of training steps
BARE = "decode and resize, by hand"
CODEC = dvae.DVAEConfig(width=8, codebook_size=CODEBOOK, blocks_per_group=1)
TRANSFORMER = TransformerConfig(
    width=128, heads=2, head_size=64, layers=2, text_length=64, text_vocab=512
)


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of 500 x 375 with large shapes, edges and grain: about as many bytes as a photograph
    of that size."""
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
    pictures = [photograph(rng) for _ in range(min(DIFFERENT, samples))]
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, samples, shards):
                caption = f"a photograph with the number {i}"
                files = {
                    "jpg": pictures[i % len(pictures)],
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


def bare(data: bytes, rng: np.random.Generator) -> Tensor:
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
        return statistics.median(self.rounds)

    def text(self) -> str:
        low, high = min(self.rounds), max(self.rounds)
        return f"{self.median:12,.0f} samples/s  ({low:,.0f} to {high:,.0f})"


def _reader(data: Path) -> Batches:
    return Batches(str(data), BATCH, SIDE, augment_dalle, seed=0)


def _by_hand(data: Path, samples: int) -> Callable[[], int]:
    # All of them in memory: as many bytes as the reader takes from files.
    pictures = [raw["jpg"] for raw in raw_samples(str(data))]
    rng = np.random.default_rng(0)

    def round_() -> int:
        for i in range(samples):
            bare(pictures[i % len(pictures)], rng)
        return samples

    return round_


def _by_reader(
    data: Path, samples: int, workers: int
) -> tuple[Callable[[], int], Callable[[], None]]:
    """A round, and what comes before it: workers' queues are emptied; without workers a round
    begins anew, with the headers of the shards and the first windows of the streams."""
    batches = _reader(data).loader(workers)

    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    def round_() -> int:
        take(samples // BATCH)
        return samples // BATCH * BATCH

    def prepare() -> None:
        nonlocal batches
        if workers:
            take(2 * workers)
        else:
            batches = _reader(data).loader()

    return round_, prepare


def measure_reading(
    folder: Path, samples: int, workers: list[int], repeats: int
) -> dict[str, Rates]:
    """Rates of the loop by hand, of pictures and of token shards, by the number of workers."""
    photographs, tokens = folder / "photographs", folder / "tokens"
    write_photographs(photographs, samples)
    write_tokens(tokens, max(20_000, samples))
    ways: dict[str, tuple[Callable[[], int], Callable[[], None]]] = {
        BARE: (_by_hand(photographs, samples), lambda: None)
    }
    for count in workers:
        ways[f"pictures, {count} workers"] = _by_reader(photographs, samples, count)
    for count in workers:
        ways[f"token shards, {count} workers"] = _by_reader(tokens, 20 * samples, count)
    rates = {name: Rates() for name in ways}
    for turn in range(repeats + 1):
        for name, (round_, prepare) in ways.items():
            prepare()
            start = time.perf_counter()
            done = round_()
            if turn:  # the first fills caches
                rates[name].rounds.append(done / (time.perf_counter() - start))
    return rates


def measure_tokenizing(
    folder: Path, codec: dvae.DVAE, samples: int, workers: list[int], repeats: int
) -> dict[str, Rates]:
    """Rates of launch/tokenize.py, its start and its end left out by measuring a longer run too."""
    codec.save(folder / "codec")
    few, many = folder / "few", folder / "many"
    write_photographs(few, samples, shards=2)
    write_photographs(many, 3 * samples, shards=2)
    rates = {f"tokenizing, {count} workers": Rates() for count in workers}
    number = 0
    for _ in range(repeats):
        for count in workers:
            seconds = []
            for data in (few, many):
                number += 1
                settings = TokenizeSettings(
                    data=str(data),
                    out=str(folder / f"made-{number}"),
                    dvae_model=str(folder / "codec"),
                    grid=GRID,
                    batch_size=BATCH,
                    workers=count,
                )
                start = time.perf_counter()
                tokenize(settings, device=_device())
                seconds.append(time.perf_counter() - start)
            spent = max(seconds[1] - seconds[0], 1e-9)
            rates[f"tokenizing, {count} workers"].rounds.append(2 * samples / spent)
    return rates


def measure_waiting(
    folder: Path, codec: dvae.DVAE, workers: list[int], steps: int
) -> dict[str, Any]:
    """Of training steps of a small transformer: seconds, and the share that waits for data."""
    device = _device()
    found: dict[str, Any] = {}
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


def _train_step(
    model: Transformer, codec: dvae.DVAE, optimizer: torch.optim.Optimizer, batch: Batch
) -> None:
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


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def report_data(samples: int, workers: list[int], repeats: int) -> dict[str, Any]:
    """Measures and prints all; the figures."""
    if min(workers) < 0 or samples < BATCH:
        raise ValueError(f"--workers must be 0 or more, --samples {BATCH} or more")
    torch.manual_seed(0)
    codec = dvae.DVAE(CODEC).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = measure_reading(folder, samples, workers, repeats)
        hand = rates[BARE].median
        for way, found in rates.items():
            print(f"  {way:<28}{found.text()}  {found.median / hand:8.2f} x by hand", flush=True)
        made = measure_tokenizing(folder, codec, BATCH, workers, min(repeats, 3))
        for way, found in made.items():
            print(f"  {way:<28}{found.text()}", flush=True)
        waits = measure_waiting(folder, codec, workers, steps=6)
        print(f"  training steps of {STEP_BATCH} samples, width {TRANSFORMER.width}:")
        for way, values in waits.items():
            print(
                f"  {way:<28}{1e3 * values['seconds_per_step']:12,.0f} ms, "
                f"{values['waits']:.1%} of it waiting for data",
                flush=True,
            )
    ratios = {f"{way} / {BARE}": found.median / hand for way, found in rates.items() if way != BARE}
    ratios |= {
        f"token shards / pictures, {count} workers": rates[f"token shards, {count} workers"].median
        / rates[f"pictures, {count} workers"].median
        for count in workers
    }
    for way in list(ratios)[-len(workers) :]:
        print(f"  {way}: {ratios[way]:.0f}")
    every = rates | made
    return {
        "samples_per_second": {way: found.rounds for way, found in every.items()},
        "ratios": ratios,
        "waiting": waits,
    }
