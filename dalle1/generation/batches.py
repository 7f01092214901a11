"""Which candidates are drawn at once, and how many the memory holds.

Dimensions: c captions, b candidates of each, m image positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import psutil
import torch
from torch import Tensor

from dalle1.generation.generator import Decoder, cache_bytes
from dalle1.generation.options import Options, candidate_uniforms
from dalle1.model import Model
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.prepacked_linear import packed_bytes

# Rows drawn at once at most. On CPUs more than this are slower: they leave the processor's cache.
LARGEST_BATCH = 512
LARGEST_CPU_BATCH = 128


@dataclass(frozen=True)
class Part:
    """Candidates of some captions that were, or are being, drawn at once."""

    captions: range  # indices
    candidates: range
    tokens: Tensor  # int64 [c, b, m]


def draw_parts(
    model: Model,
    captions: Sequence[str],
    candidates: int,
    seed: int = 0,
    batch_size: int | None = None,
    options: Options | None = None,
    prefix: Tensor | None = None,
    on_row: Callable[[Part, int], None] | None = None,
    start: int = 0,
) -> Iterator[Part]:
    """Draws candidates start ... candidates - 1 of every caption, part after part, in order.

    Few candidates of several captions are drawn together. batch_size: candidates at once, None: as
    many as the memory is expected to hold, half as many each time it does not. prefix: see
    `Decoder.draw`. on_row is called when a row of the grid is drawn, with the part, its tokens
    being those so far, and the number of positions done.
    """
    options = options or Options()
    text = torch.cat([model.tokenizer.encode(caption) for caption in captions])
    length = model.transformer.config.stream.image_length
    each = candidates - start
    limit = batch_size or fitting_batch(model, each, len(captions), options)
    decoder: Decoder | None = None
    caption, first = 0, start
    while caption < len(captions):
        c, b = _shape(len(captions), each, limit)
        part = Part(
            range(caption, min(caption + c, len(captions))),
            range(first, min(first + b, candidates)),
            torch.empty(0),
        )
        # Short parts at the end are filled up: the shapes of a recorded step never change.
        rows = [part.captions[min(i, len(part.captions) - 1)] for i in range(c)]
        numbers = [candidate_uniforms(seed, captions[i], first, b, length) for i in rows]

        def report(done: int, tokens: Tensor, part: Part = part) -> None:
            if on_row:
                on_row(_cut(part, tokens), done)

        try:
            if decoder is None:
                decoder = Decoder(model.transformer, c, b, options)
            tokens = decoder.draw(text[rows], torch.stack(numbers), prefix, report)
        except (RuntimeError, MemoryError) as error:
            if batch_size is not None or c * b == 1 or not _out_of_memory(error):
                raise
            decoder = None  # before another is made
            limit = c * b // 2
            continue
        yield _cut(part, tokens)
        first = part.candidates.stop
        if first == candidates:
            caption, first = part.captions.stop, start


def draw_captions(
    model: Model, captions: Sequence[str], candidates: int, seed: int = 0
) -> Iterator[Tensor]:
    """Image tokens of each caption's candidates, caption after caption: int64 [b, m]."""
    drawn: list[Tensor] = []
    for part in draw_parts(model, captions, candidates, seed):
        for tokens in part.tokens:
            drawn.append(tokens)
            if part.candidates.stop == candidates:
                yield torch.cat(drawn)
                drawn.clear()


def _shape(captions: int, candidates: int, limit: int) -> tuple[int, int]:
    """Captions and candidates of a part, at most `limit` in all, parts as even as can be."""
    if candidates > limit:
        return 1, ceil(candidates / ceil(candidates / limit))
    most = limit // candidates
    return ceil(captions / ceil(captions / most)), candidates


def _cut(part: Part, tokens: Tensor) -> Part:
    """The part with its tokens, out of those that filled it up."""
    return Part(
        part.captions, part.candidates, tokens[: len(part.captions), : len(part.candidates)]
    )


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


def fitting_batch(model: Model, candidates: int, captions: int, options: Options) -> int:
    """How many candidates can be drawn at once: their caches, and what a step works with, in the
    free memory."""
    config, weight = model.transformer.config, model.transformer.start_of_image
    if weight.device.type == "cuda":
        free, largest = int(0.9 * free_memory(weight.device)), LARGEST_BATCH
    else:  # others need some too
        free, largest = free_memory(weight.device) // 2, LARGEST_CPU_BATCH
    free -= pictures_at_once(model) * picture_bytes(model)  # decoded while the caches are held
    free -= packed_bytes(model.transformer)
    passes = 1 if options.guidance == 1 else 2
    shared = passes * cache_bytes(config, 0, weight.dtype)  # of a caption
    each = passes * (cache_bytes(config, 1, weight.dtype) + working_bytes(config, weight.dtype))
    each -= shared
    if candidates <= largest and free >= shared + candidates * each:  # whole captions
        whole = free // (shared + candidates * each) * candidates
        return min(largest, captions * candidates, whole)
    return max(1, min(largest, candidates, (free - shared) // each))


def free_memory(device: torch.device) -> int:
    """Bytes that could still be taken, what the device's allocator holds without need included."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return int(psutil.virtual_memory().available)


def working_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """About what one candidate's step works with: scores and their sums over the vocabulary, of
    the layers the hidden states, the queries of every head on whole states, the keys gathered."""
    gathered = (config.conv_kernel // 2 + 1) * config.conv_kernel
    states = 16 + 6 * config.heads + 2 * gathered
    return 32 * config.image_vocab + states * config.width * dtype.itemsize


def pictures_at_once(model: Model) -> int:
    """Pictures that the dVAE decodes at once: on CUDA 16 of 256x256 pixels or about as many pixels,
    on CPUs 16 of 32x32; larger maps leave the processor's cache."""
    pixels = 2**20 if model.device.type == "cuda" else 2**14
    return min(LARGEST_BATCH, max(1, pixels // model.image_size**2))


def picture_bytes(model: Model) -> int:
    """About what decoding one picture takes: a few maps of the dVAE's width at full size."""
    return 4 * 4 * model.dvae.config.width * model.image_size**2
