"""A trained model's images by windows of tokens, against one token after the other.

How many passes an image takes depends on how sure the model is of its tokens, so that random
weights tell nothing but the worst case (`benchmark sample`).

Dimensions: b candidates, m image positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from dalle1.benchmarks.generation import decoding_flops, read_bytes
from dalle1.benchmarks.timing import bandwidth, matmul_rate, timed
from dalle1.generation.generator import Generator
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.model import Model, load
from dalle1.transformer.model import Transformer

ROOFLINE = (
    "roofline = for each pass the longer of (weights + cached values that the patterns allow) / "
    "measured copying speed and FLOPs of the tokens that it makes final / measured rate of a large "
    "matrix product"
)


def report_windows(
    folder: str | Path,
    captions: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    candidates: Sequence[int],
    windows: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Prints, and returns for a JSON file, passes and seconds of the images of each caption.

    The ways take turns, so that noise hits all of them. All draw the same tokens.
    """
    model = load(folder).to(device)
    prior = model.prior
    if not isinstance(prior, Transformer):
        raise ValueError(
            f"windows: expected a model whose prior is our transformer, got a "
            f"{type(prior).__name__} in {folder}"
        )
    prior.to(dtype)
    m = prior.config.sequence.image_length
    copying, rate = bandwidth(device), matmul_rate(device, dtype)
    print(
        f"{len(captions)} captions, {m} tokens an image, {str(dtype).removeprefix('torch.')}; "
        f"passes and seconds are for all candidates of one caption"
    )
    print(
        f"  measured: copying {copying / 1e9:,.1f} GB/s, matrix product {rate / 1e12:.3f} TFLOP/s"
    )
    report: dict[str, Any] = {"bandwidth": copying, "matmul_rate": rate}
    for b in candidates:
        ways = {"one by one": 1, **{f"window {w}": w for w in windows}, "chosen": None}
        found = _measure(model, captions, b, ways, repeats)
        print(f"  {b} candidates")
        for name, way in found.items():
            seconds = [s for caption in way["seconds"] for s in caption]
            passes = mean(way["passes"])
            least = passes * max(
                read_bytes(prior.config, b, dtype) / copying,
                decoding_flops(prior.config, b) * m / passes / rate,
            )
            ratio = _ratio(found["one by one"]["seconds"], way["seconds"])
            way |= {"times as fast": ratio, "roofline": least / median(seconds)}
            print(
                f"    {name:12}{passes:8.1f} passes {median(seconds):8.3f} s "
                f"({min(seconds):.3f} to {max(seconds):.3f})  {ratio:.2f} times as fast, "
                f"{b / median(seconds):.2f} images/s, {least / median(seconds):.0%} of the "
                f"roofline, {way['equal']:.2%} of the tokens equal",
                flush=True,
            )
        report[str(b)] = found
    print(f"  {ROOFLINE}")
    return report


def _measure(
    model: Model, captions: Sequence[str], b: int, ways: dict[str, int | None], repeats: int
) -> dict[str, dict[str, Any]]:
    """Of each way: passes of each caption, seconds of each caption and repeat, and the share of
    tokens that are those drawn one by one."""
    prior, options = model.prior, SamplingOptions()
    device = next(prior.parameters()).device  # type: ignore[attr-defined]
    m = prior.grid[0] * prior.grid[1]
    generators = {
        name: Generator(prior, 1, b, replace(options, window=window))
        for name, window in ways.items()
    }
    found: dict[str, dict[str, Any]] = {
        name: {"passes": [], "seconds": [], "equal": 0.0} for name in ways
    }
    for caption in captions:
        text = model.tokenizer.encode([caption])
        uniforms = candidate_uniforms(0, caption, 0, b, m)[None]
        tokens: dict[str, Tensor] = {}

        def draw(name: str, text: Tensor = text, uniforms: Tensor = uniforms) -> Tensor:
            return generators[name].draw(text, uniforms)

        for name in ways:  # the first time is not counted
            tokens[name] = draw(name)
            found[name]["passes"].append(generators[name].steps)
            equal = (tokens[name] == tokens["one by one"]).float().mean()
            found[name]["equal"] += float(equal) / len(captions)
            found[name]["seconds"].append([])
        for _ in range(repeats):
            for name in ways:
                seconds = timed(lambda name=name: draw(name), device)  # type: ignore[misc]
                found[name]["seconds"][-1].append(seconds)
    return found


def _ratio(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> float:
    """Times as fast: of the sums over captions, of each the median."""
    return sum(map(median, slow)) / sum(map(median, fast))
