"""Whole images of one caption, with random weights: our generator, a plain cache, no cache.

Random weights are sure of no token, so that windows of tokens are at their worst here; see
`dalle1.benchmarks.windows` for a trained model.

Dimensions: b candidates, t text positions, m image positions, s heads, d head size.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.benchmarks.timing import Measured, bandwidth, matmul_rate, timed
from dalle1.common.hardware import DTYPES, peak_memory
from dalle1.common.weights import device_of
from dalle1.generation.batches import free_memory
from dalle1.generation.generator import Generator
from dalle1.generation.options import SamplingOptions, candidate_uniforms, sample_token
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.kv_cache import cache_bytes, holds_states
from dalle1.transformer.layers import Layer
from dalle1.transformer.masks import allowed, step_keys
from dalle1.transformer.model import Transformer

ROOFLINE = (
    "roofline = the longer of (weights that a step reads + cached values that the patterns allow) /"
    " measured copying speed and FLOPs / measured rate of a large matrix product; FLOPs of a"
    " candidate = 2 (12 w^2 L + w V_image) + 4 w sum over layers of keys read"
)


@dataclass
class Run:
    """One way to draw an image."""

    steps: Measured  # seconds a step, mean of each row of the grid; memory: of the cache
    whole: float  # seconds of the whole image, the caption included
    peak: int  # bytes, of the device or of this process so far
    tokens: Tensor  # int64 [b, m]


class DenseCache:
    """The usual cache, for comparison: whole images in every layer, the caption once for each
    candidate, and all keys so far read under a mask."""

    def __init__(self, transformer: Transformer, text: Tensor, candidates: int) -> None:
        c = transformer.config
        self.transformer = transformer
        made = {p: allowed(p, c.text_length, c.grid, c.conv_kernel) for p in set(c.patterns)}
        self.masks = [made[p].to(text.device) for p in c.patterns]
        x = transformer.embed_text(text.expand(candidates, -1))
        self.held = x.new_empty(self.shape(c, candidates))
        for i, layer in enumerate(transformer.layers):
            assert isinstance(layer, Layer)
            q, k, v = layer.attention.project(x)
            self.held[i, 0, :, :, : c.text_length] = k
            self.held[i, 1, :, :, : c.text_length] = v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer.attention.merge(y)
            x = x + layer.mlp(x)
        # Which are the first token's where no start stands before the image.
        self.text_logits = transformer.image_head(transformer.final_norm(x[:, -1])).float()
        self.text_length = c.text_length

    @staticmethod
    def shape(c: TransformerConfig, candidates: int) -> tuple[int, ...]:
        """Of the keys and values."""
        return (c.layers, 2, candidates, c.heads, c.sequence.length, c.head_size)

    def step(self, x: Tensor, position: int) -> Tensor:
        """As `KVCache.step`, and the logits."""
        x, n = x[:, None], self.text_length + position
        for i, layer in enumerate(self.transformer.layers):
            assert isinstance(layer, Layer)
            q, k, v = layer.attention.project(x)
            self.held[i, 0, :, :, n] = k[:, :, 0]
            self.held[i, 1, :, :, n] = v[:, :, 0]
            k, v = self.held[i, :, :, :, : n + 1]
            mask = self.masks[i][n, None, : n + 1]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + layer.attention.merge(y)
            x = x + layer.mlp(x)
        logits: Tensor = self.transformer.image_head(self.transformer.final_norm(x[:, 0]))
        return logits.float()


class _Rows:
    """Notes the time whenever a row of the grid is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times = [time.perf_counter()]

    def __call__(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def run(self, grid: int, memory: int, tokens: Tensor) -> Run:
        steps = [(b - a) / grid for a, b in zip(self.times, self.times[1:], strict=False)]
        whole = self.times[-1] - self.times[0]
        return Run(Measured(steps, memory), whole, peak_memory(self.device), tokens)


def draw_ours(
    transformer: Transformer,
    text: Tensor,
    uniforms: Tensor,
    batch: int,
    window: int | None = 1,
) -> Run:
    """By `Generator`, `batch` candidates at a time; what is done once for many images, such as
    packing and recording, is not counted. window: see `SamplingOptions`."""
    device, grid = device_of(transformer), transformer.config.grid
    generator = Generator(transformer, 1, batch, SamplingOptions(window=window))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    held = cache_bytes(transformer.config, batch, transformer.image_embedding.weight.dtype)
    if generator.window > 1:
        held = batch * transformer.window_bytes(generator.window)
    tokens, rows = [], _Rows(device)
    for part in uniforms.split(batch):
        rest = uniforms[: batch - len(part)]  # shapes never change
        drawn = generator.draw(text[None], torch.cat([part, rest])[None], on_step=rows)
        rows.times[-1] = time.perf_counter()  # the last row is known when it is here
        tokens.append(drawn[0, : len(part)])
    return rows.run(grid, held, torch.cat(tokens))


@torch.inference_mode()
def draw_plain(transformer: Transformer, text: Tensor, uniforms: Tensor) -> Run:
    """By `DenseCache`."""
    c, device = transformer.config, device_of(transformer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    uniforms = uniforms.to(device)
    tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=device)
    positions = transformer.image_positions()
    fed = transformer.image_start(text.to(device)[None])
    rows = _Rows(device)
    cache = DenseCache(transformer, text.to(device)[None], len(uniforms))
    for p in range(c.sequence.image_length):
        place = p - c.shift
        logits = cache.step(fed + positions[place], place) if place >= 0 else cache.text_logits
        tokens[:, p] = sample_token(logits, uniforms[:, p], SamplingOptions())
        fed = transformer.image_embedding(tokens[:, p])
        if (p + 1) % c.grid == 0:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rows()
    return rows.run(c.grid, cache.held.numel() * cache.held.element_size(), tokens.cpu())


@torch.inference_mode()
def recomputed_seconds(transformer: Transformer, candidates: int) -> float:
    """Seconds of an image if every step ran the whole stream so far: from a few lengths and at
    most 2 candidates, summed over the lengths and multiplied."""
    c, device = transformer.config, device_of(transformer)
    few = min(2, candidates)
    text = torch.ones(few, c.text_length, dtype=torch.int64, device=device)
    image = torch.zeros(few, c.sequence.image_length, dtype=torch.int64, device=device)
    lengths = [1 + (c.sequence.image_length - 1) * i // 4 for i in range(5)]
    points = []
    for length in lengths:
        runs = [timed(lambda n=length: transformer.states(text, image[:, :n]), device)  # type: ignore[misc]
                for _ in range(2)]  # fmt: skip
        points.append(min(runs))
    gaps = zip(lengths, lengths[1:], points, points[1:], strict=False)
    return candidates / few * sum((b - a) * (s + t) / 2 for a, b, s, t in gaps)


def read_bytes(c: TransformerConfig, candidates: int, dtype: torch.dtype) -> float:
    """Bytes that a step of one caption's candidates has to read, mean over the positions."""
    weights = 12 * c.width**2 * c.layers + c.width * c.image_vocab
    values = 0.0
    for pattern, keys in zip(c.patterns, _keys(c), strict=True):
        values += (1 if holds_states(pattern) else 2) * c.width * keys
    text = 2 * c.width * c.text_length * c.layers
    return (weights + text + candidates * values) * dtype.itemsize


def decoding_flops(c: TransformerConfig, candidates: int) -> float:
    """FLOPs that a step of one caption's candidates needs, mean over the positions."""
    weights = 12 * c.width**2 * c.layers + c.width * c.image_vocab
    keys = sum(c.text_length + keys for keys in _keys(c))
    return candidates * (2.0 * weights + 4.0 * c.width * keys)


def even_batch(transformer: Transformer, candidates: int) -> int:
    """Candidates at once, in as few and as even batches as the device's memory allows."""
    shared, each = transformer.decoding_bytes()
    free = int(0.9 * free_memory(device_of(transformer)))
    most = max(1, (free - shared) // each)
    return -(-candidates // -(-candidates // most))


def _keys(c: TransformerConfig) -> list[float]:
    """Image keys that a step of each layer reads, mean over the positions."""
    counts = {
        p: sum(map(len, step_keys(p, c.grid, c.conv_kernel))) / c.sequence.image_length
        for p in set(c.patterns)
    }
    return [counts[p] for p in c.patterns]


def report_sample(
    c: TransformerConfig, dtype: str, device: torch.device, candidates: Sequence[int]
) -> dict[str, Any]:
    """Prints, and returns, the figures of each number of candidates."""
    torch.manual_seed(0)
    with device:
        transformer = Transformer(c).to(DTYPES[dtype]).eval()
    m = c.sequence.image_length
    copying, rate = bandwidth(device), matmul_rate(device, DTYPES[dtype])
    print(
        f"sampling one caption: {c.layers} layers of width {c.width}, {c.text_length} + "
        f"{c.grid}x{c.grid} positions, {dtype}; a step is one token of every candidate"
    )
    print(
        f"  measured: copying {copying / 1e9:,.1f} GB/s, matrix product {rate / 1e12:.3f} TFLOP/s"
    )
    text = torch.randint(1, c.text_vocab, (c.text_length,))
    report: dict[str, Any] = {"bandwidth": copying, "matmul_rate": rate}
    for b in candidates:
        uniforms = candidate_uniforms(0, "benchmark", 0, b, m)
        batch = even_batch(transformer, b)
        ours = draw_ours(transformer, text, uniforms, batch)
        least = -(-b // batch) * max(
            read_bytes(c, batch, DTYPES[dtype]) / copying, decoding_flops(c, batch) / rate
        )
        runs = {"ours": ours}
        if device.type == "cpu" and transformer.best_window(batch) > 1:
            runs["windows"] = draw_ours(transformer, text, uniforms, batch, None)
        if dtype != "float32" and device.type == "cpu":  # on a GPU there may be no room for both
            float32_copy = copy.deepcopy(transformer).float()
            runs["ours, fp32"] = draw_ours(float32_copy, text, uniforms, batch)
            del float32_copy
        at_once = "" if batch == b else f", {batch} at once"
        print(f"  {b} candidates{at_once}")
        needed = math.prod(DenseCache.shape(c, b)) * DTYPES[dtype].itemsize
        if needed < 0.8 * free_memory(device):
            runs["plain cache"] = draw_plain(transformer, text, uniforms)
        else:
            print(f"    plain cache  does not fit: {needed / 2**20:,.0f} MB")
        slow = recomputed_seconds(transformer, b)
        for name, run in runs.items():
            print(
                f"    {name:12} {run.steps.text()} of cache, peak {run.peak / 2**20:,.0f} MB, an "
                f"image {run.whole:.2f} s, {b * m / run.whole:,.0f} tokens/s, "
                f"{b / run.whole:.3f} images/s"
            )
        share = m * least / ours.whole
        print(
            f"    recomputed   {1e3 * slow / m:9,.2f} ms a step, an image {slow:,.0f} s, "
            f"{b * m / slow:,.1f} tokens/s, {b / slow:.5f} images/s (extrapolated)"
        )
        print(
            f"    ours is {slow / ours.whole:,.0f} times as fast as recomputing and runs at "
            f"{share:.0%} of the roofline",
            flush=True,
        )
        report[str(b)] = {
            **{name: _figures(run) for name, run in runs.items()},
            "recomputed, extrapolated": slow,
            "roofline": share,
        }
        if in_float32 := runs.get("ours, fp32"):
            print(f"    ours is {in_float32.whole / ours.whole:.2f} times as fast as in float32")
        if plain := runs.get("plain cache"):
            assert plain.steps.memory and ours.steps.memory
            agree = float((ours.tokens == plain.tokens).float().mean())
            print(
                f"    ours is {plain.whole / ours.whole:.1f} times as fast as the plain cache, "
                f"whose memory is {plain.steps.memory / ours.steps.memory:.1f} times ours; "
                f"{agree:.1%} of the tokens are equal",
                flush=True,
            )
    print(f"  {ROOFLINE}")
    return report


def _figures(run: Run) -> dict[str, Any]:
    return {**asdict(run.steps), "whole": run.whole, "peak": run.peak}
