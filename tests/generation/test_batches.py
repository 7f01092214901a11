"""What is drawn at once: how many fit, how parts are cut, what happens when memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1 import Model
from dalle1.generation import batches as batching
from dalle1.generation.batches import draw_captions, draw_parts, fitting_batch
from dalle1.generation.generator import Generator, draw
from dalle1.generation.images import decode
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.transformer.kv_cache import cache_bytes, working_bytes

CAPTIONS = ["a red cat", "a blue dog", "the blue cat", "one small mat", "a red dog"]


def alone(model: Model, caption: str, candidates: int) -> Tensor:
    text = model.tokenizer.encode(caption)[0]
    return draw(model.transformer, text, candidate_uniforms(3, caption, 0, candidates, 16))


@pytest.mark.parametrize(
    ("candidates", "batch_size", "sizes"),
    [
        (7, 3, [(1, 3), (1, 3), (1, 1)] * 5),  # a caption's parts as even as can be
        (7, 4, [(1, 4), (1, 3)] * 5),
        (8, 6, [(1, 4), (1, 4)] * 5),
        (2, 4, [(2, 2), (2, 2), (1, 2)]),  # several captions at once
        (2, 7, [(3, 2), (2, 2)]),
        (1, None, [(5, 1)]),
        (3, 1, [(1, 1)] * 15),
    ],
)
def test_parts(
    model: Model, candidates: int, batch_size: int | None, sizes: list[tuple[int, int]]
) -> None:
    """Candidates left out, drawn twice or given to another caption; a part larger than asked."""
    rows: list[int] = []
    parts = list(
        draw_parts(
            model, CAPTIONS, candidates, 3, batch_size,
            on_row=lambda part, done: rows.append(part.tokens.shape[0] * done),
        )
    )  # fmt: skip
    assert [p.tokens.shape[:2] for p in parts] == sizes
    assert rows == [c * done for c, _ in sizes for done in (4, 8, 12, 16)]
    drawn: list[list[Tensor]] = [[] for _ in CAPTIONS]
    for part in parts:
        assert part.tokens.shape[:2] == (len(part.captions), len(part.candidates))
        for i, tokens in zip(part.captions, part.tokens, strict=True):
            assert part.candidates.start == sum(map(len, drawn[i]))
            drawn[i].append(tokens)
    for caption, tokens in zip(CAPTIONS, drawn, strict=True):
        assert torch.equal(torch.cat(tokens), alone(model, caption, candidates))
    complete = draw_captions(model, CAPTIONS, candidates, 3)
    for caption, found in zip(CAPTIONS, complete, strict=True):
        assert torch.equal(found.tokens, alone(model, caption, candidates))
        assert torch.equal(found.images, decode(model.codec, found.tokens, (4, 4)))


@pytest.mark.parametrize("candidates", [1, 3, 100])
def test_batch_fits_the_memory(
    model: Model, monkeypatch: pytest.MonkeyPatch, candidates: int
) -> None:
    """A batch whose caches exceed the free memory, guidance's second pass included."""
    config = model.transformer.config
    largest = batching._largest_cpu_batch(model.prior)
    monkeypatch.setattr(batching, "decoding_images_bytes", lambda *_: 0)
    monkeypatch.setattr(batching, "prepacked_bytes", lambda _: 0)
    found = []
    for free in (0, 10**5, 10**6, 10**7, 10**12):
        for guidance in (1.0, 2.0):
            monkeypatch.setattr(batching, "available_memory", lambda free=free: free)
            batch = fitting_batch(model, candidates, 40, SamplingOptions(guidance=guidance))
            c, b = batching._part_shape(40, candidates, batch)
            taken = c * (1 if guidance == 1 else 2) * cache_bytes(config, b)
            assert 1 <= c * b <= batch <= largest
            assert taken <= free / 2 or batch == 1
            # Nor less than fits: one caption more would not.
            step = candidates * working_bytes(config, torch.float32)
            one = (1 if guidance == 1 else 2) * (cache_bytes(config, candidates) + step)
            if 1 < batch < min(40 * candidates, largest) and one < free / 2:
                assert (batch // candidates + 1) * one > free / 2
            found.append(batch)
    assert found[::2] == sorted(found[::2]) and found[1::2] == sorted(found[1::2])
    assert found[0] == 1 and found[-1] == min(40 * candidates, largest)


@pytest.mark.parametrize(("held", "expected"), [(10**4, 512), (2**21, 256), (6 * 10**6, 128)])
def test_small_models_draw_more_at_once_on_cpus(
    model: Model, monkeypatch: pytest.MonkeyPatch, held: int, expected: int
) -> None:
    """Steps of the demo's model, which are shorter than what starts them, or rows of a large model
    that leave the processor's cache."""
    monkeypatch.setattr(type(model.prior), "decoding_bytes", lambda _: (10**6, held))
    assert batching._largest_cpu_batch(model.prior) == expected


def test_windows_take_their_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows whose caches exceed the free memory, or a window longer than the image that is
    counted as if it were not cut."""
    monkeypatch.setattr(batching, "decoding_images_bytes", lambda *_: 0)
    monkeypatch.setattr(batching, "prepacked_bytes", lambda _: 0)
    each = model.prior.window_bytes(16)  # the grid has 16 positions
    monkeypatch.setattr(batching, "available_memory", lambda: 2 * 10 * each)
    for window in (16, 10**6):
        assert fitting_batch(model, 100, 1, SamplingOptions(window=window)) == 10


def test_windows_that_do_not_fit_are_left_out(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image that fits by steps of one position, and is given up since a window does not."""
    expected = alone(model, CAPTIONS[0], 1)
    windows: list[int] = []
    draw = batching.Generator.draw

    def short_of_memory(self: Any, *arguments: Any) -> Any:
        windows.append(self.window)
        if self.window > 1:
            raise MemoryError
        return draw(self, *arguments)

    monkeypatch.setattr(batching.Generator, "draw", short_of_memory)
    (part,) = batching.draw_parts(model, CAPTIONS[:1], 1, 3)
    assert windows[0] > 1 and windows[1:] == [1]
    assert torch.equal(part.tokens[0], expected)
    with pytest.raises(MemoryError):
        list(batching.draw_parts(model, CAPTIONS[:1], 1, 3, options=SamplingOptions(window=4)))


def test_images_take_their_share(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that leave no room to decode the images."""
    monkeypatch.setattr(batching, "available_memory", lambda: 8 * 10**5)
    monkeypatch.setattr(batching, "decoding_images_bytes", lambda *_: 0)
    monkeypatch.setattr(batching, "prepacked_bytes", lambda _: 0)
    roomy = fitting_batch(model, 100, 1, SamplingOptions())
    monkeypatch.setattr(batching, "decoding_images_bytes", lambda *_: 10**5)
    assert 1 < fitting_batch(model, 100, 1, SamplingOptions()) < roomy
    monkeypatch.setattr(batching, "decoding_images_bytes", lambda *_: 0)
    # A second copy of the weights.
    monkeypatch.setattr(batching, "prepacked_bytes", lambda _: 10**5)
    assert 1 < fitting_batch(model, 100, 1, SamplingOptions()) < roomy


def test_out_of_memory_halves_the_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies of a batch too large, draws other images, or halves the user's own size.

    A few images are tried again by steps of one position first.
    """
    plain, sizes = Generator.draw, []
    expected = [alone(model, caption, 7) for caption in CAPTIONS[:2]]

    def narrow(self: Generator, text: Any, uniforms: Tensor, *rest: Any) -> Tensor:
        sizes.append(tuple(uniforms.shape[:2]))
        if self.captions * self.candidates > 2:
            raise torch.OutOfMemoryError("no memory")
        return plain(self, text, uniforms, *rest)

    monkeypatch.setattr(Generator, "draw", narrow)
    (found,) = draw_captions(model, CAPTIONS[:1], 7, 3)
    assert torch.equal(found.tokens, expected[0])
    assert sizes == [(1, 7), (1, 3), (1, 3), *[(1, 1)] * 7]
    sizes.clear()
    both = draw_captions(model, CAPTIONS[:2], 2, 3)
    for seven, found in zip(expected, both, strict=True):
        assert torch.equal(found.tokens, seven[:2])
    assert sizes == [(2, 2), (2, 2), (1, 2), (1, 2)]
    with pytest.raises(torch.OutOfMemoryError):
        list(draw_parts(model, CAPTIONS[:1], 7, batch_size=7))


def test_memory_errors_are_known() -> None:
    """An allocation that failed under another name, and ends the run."""
    for text in (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
    ):
        assert batching.out_of_memory(RuntimeError(text))
    try:
        try:
            raise torch.OutOfMemoryError("no memory")
        finally:
            raise RuntimeError("capture was interrupted")
    except RuntimeError as error:
        assert batching.out_of_memory(error)
    assert not batching.out_of_memory(RuntimeError("shapes do not fit"))


def test_other_errors_are_not_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that is answered with ever smaller batches."""

    def fail(*_: object) -> Tensor:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Generator, "draw", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(draw_parts(model, CAPTIONS[:1], 7))
