"""Which candidates are drawn at once, and how many the memory holds.

Dimensions: c captions, b candidates of each, m image positions, H W image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import psutil
import torch
from torch import Tensor, nn

from dalle1.common.weights import device_of
from dalle1.generation.generator import Generator
from dalle1.generation.images import decode, decoding_images_bytes
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.protocols import TokenModel
from dalle1.transformer.prepacked_linear import prepacked_bytes

# Rows drawn at once at most. On CPUs more than this are slower: they leave the processor's cache.
LARGEST_BATCH = 512
LARGEST_CPU_BATCH = 128


@dataclass(frozen=True)
class Part:
    """Candidates of some captions that were, or are being, drawn at once.

    captions, candidates: their numbers; tokens: int64 [c, b, m].
    """

    captions: range
    candidates: range
    tokens: Tensor


@dataclass(frozen=True)
class CaptionImages:
    """All candidates of one caption: tokens int64 [b, m], images float32 [b, 3, H, W] in [0, 1]."""

    tokens: Tensor
    images: Tensor


def draw_parts(
    model: TokenModel,
    captions: Sequence[str],
    candidates: int,
    seed: int = 0,
    batch_size: int | None = None,
    options: SamplingOptions | None = None,
    prefix: Tensor | None = None,
    on_row: Callable[[Part, int], None] | None = None,
    start: int = 0,
) -> Iterator[Part]:
    """Draws candidates start ... candidates - 1 of every caption, part after part, in order.

    Few candidates of several captions are drawn together.

    Args:
        batch_size: candidates at once; None: as many as the memory is expected to hold, half as
            many each time it does not.
        prefix: see `Generator.draw`.
        on_row: called when a row of the grid is drawn, with the part, its tokens being those so
            far, and the number of positions done.
    """
    options, prior = options or SamplingOptions(), model.prior
    text = torch.cat([model.tokenizer.encode(caption) for caption in captions])
    length = prior.grid[0] * prior.grid[1]
    each = candidates - start
    limit = batch_size or fitting_batch(model, each, len(captions), options)
    generator: Generator | None = None
    caption, first = 0, start
    while caption < len(captions):
        c, b = _shape(len(captions), each, limit)
        part = Part(
            range(caption, min(caption + c, len(captions))),
            range(first, min(first + b, candidates)),
            torch.empty(0),
        )
        # Short parts at the end are filled up: the shapes of a static step never change.
        rows = [part.captions[min(i, len(part.captions) - 1)] for i in range(c)]
        numbers = [candidate_uniforms(seed, captions[i], first, b, length) for i in rows]

        def report(done: int, tokens: Tensor, part: Part = part) -> None:
            if on_row:
                on_row(_cut(part, tokens), done)

        try:
            if generator is None:
                generator = Generator(prior, c, b, options)
            tokens = generator.draw(text[rows], torch.stack(numbers), prefix, report)
        except (RuntimeError, MemoryError) as error:
            if batch_size is not None or c * b == 1 or not _out_of_memory(error):
                raise
            generator = None  # before another is made
            limit = c * b // 2
            continue
        yield _cut(part, tokens)
        first = part.candidates.stop
        if first == candidates:
            caption, first = part.captions.stop, start


def draw_captions(
    model: TokenModel,
    captions: Sequence[str],
    candidates: int,
    seed: int = 0,
    batch_size: int | None = None,
    options: SamplingOptions | None = None,
    start: int = 0,
) -> Iterator[CaptionImages]:
    """Candidates start ... candidates - 1 of each caption, caption after caption."""
    drawn = CaptionParts(model)
    for part in draw_parts(model, captions, candidates, seed, batch_size, options, start=start):
        yield from drawn.add(part, candidates)


class CaptionParts:
    """Puts the parts of a caption together and decodes them.

    Only then, so that what is decoded at once does not depend on what was drawn at once.
    """

    def __init__(self, model: TokenModel) -> None:
        self._model = model
        self._tokens: list[Tensor] = []

    def __len__(self) -> int:
        """Candidates so far of the caption that is not complete."""
        return sum(map(len, self._tokens))

    def add(self, part: Part, candidates: int) -> Iterator[CaptionImages]:
        """Takes a part in; captions that are complete with it, in order."""
        for tokens in part.tokens:
            self._tokens.append(tokens)
            if part.candidates.stop == candidates:
                yield self.take()

    def take(self) -> CaptionImages:
        """What there is of the caption; the next one begins."""
        tokens = torch.cat(self._tokens)
        self._tokens = []  # first: what Ctrl-C finds here must not be taken for the next caption's
        return CaptionImages(tokens, decode(self._model.codec, tokens, self._model.prior.grid))


def _shape(captions: int, candidates: int, limit: int) -> tuple[int, int]:
    """Captions and candidates of a part, at most `limit` in all, parts as even as can be."""
    if candidates > limit:
        return 1, ceil(candidates / ceil(candidates / limit))
    most = limit // candidates
    return ceil(captions / ceil(captions / most)), candidates


def _cut(part: Part, tokens: Tensor) -> Part:
    """The part with its tokens, out of those that filled it up."""
    return replace(part, tokens=tokens[: len(part.captions), : len(part.candidates)])


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was what failed, perhaps behind an error that it led to."""
    # Neither the CPU's allocator nor CUDA's libraries raise torch's own class.
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if any(sign in str(error) for sign in signs):
            return True
        error = error.__context__
    return False


def fitting_batch(
    model: TokenModel, candidates: int, captions: int, options: SamplingOptions
) -> int:
    """How many candidates can be drawn at once: their caches, and what a step works with, in the
    free memory."""
    prior, device = model.prior, device_of(model.prior)
    if device.type == "cuda":
        free, largest = int(0.9 * free_memory(device)), LARGEST_BATCH
    else:  # others need some too
        free, largest = free_memory(device) // 2, LARGEST_CPU_BATCH
    free -= decoding_images_bytes(model.codec, prior.grid)  # while the caches are held
    if isinstance(prior, nn.Module):
        free -= prepacked_bytes(prior)
    passes = 1 if options.guidance == 1 else 2
    shared, each = (passes * count for count in prior.decoding_bytes())  # of a caption, of a row
    if candidates <= largest and free >= shared + candidates * each:  # whole captions
        fitting = free // (shared + candidates * each) * candidates
        return min(largest, captions * candidates, fitting)
    return max(1, min(largest, candidates, (free - shared) // max(1, each)))


def free_memory(device: torch.device) -> int:
    """Bytes that could still be taken, what the device's allocator holds without need included."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return int(psutil.virtual_memory().available)
