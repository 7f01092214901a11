"""Splits the candidates of many captions into batches that the memory holds.

Dimensions: c captions, b candidates of each, m image positions, H W image height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor, nn

from dalle1.common.hardware import available_memory
from dalle1.common.weights import device_of
from dalle1.generation.generator import Generator
from dalle1.generation.images import decode, decoding_images_bytes
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.protocols import Prior, TokenModel, WindowPrior
from dalle1.transformer.prepacked_linear import prepacked_bytes

# Candidates drawn at once at most. On CPUs it depends on the model, so that what a step reads stays
# near the processor's cache: of 512 x 8 layers 128 are fastest, of the demo's 96 x 4 layers 512.
LARGEST_BATCH = 512
LARGEST_CPU_BATCH = 128
CPU_BATCH_BYTES = 2**29


@dataclass(frozen=True)
class Part:
    """Candidates that are drawn at once, the same ones of each of some captions."""

    captions: range  # their indices
    candidates: range  # their numbers
    tokens: Tensor  # int64 [c, b, m]


@dataclass(frozen=True)
class CaptionImages:
    """Candidates of one caption."""

    tokens: Tensor  # int64 [b, m]
    images: Tensor  # float32 [b, 3, H, W] in [0, 1], on the CPU


class PartDrawer:
    """Draws parts, with one `Generator` for as long as their shape stays the same."""

    def __init__(self, prior: Prior, options: SamplingOptions) -> None:
        self.prior, self.options = prior, options
        self._generator: Generator | None = None

    def draw(
        self,
        text: Tensor,
        uniforms: Tensor,
        prefix: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """As `Generator.draw`, for any numbers of captions and candidates.

        Where memory runs out with windows of positions, they are given up for steps of one
        position. After any error the generator's memory is free.
        """
        shape = (uniforms.shape[0], uniforms.shape[1])
        generator, self._generator = self._generator, None
        try:
            if generator is None or (generator.captions, generator.candidates) != shape:
                generator = None  # frees its memory before the next one takes some
                generator = Generator(self.prior, *shape, self.options)
            tokens = generator.draw(text, uniforms, prefix, on_step)
        except (RuntimeError, MemoryError) as error:
            chosen = self.options.window is None and generator is not None and generator.window > 1
            if not (chosen and out_of_memory(error)):
                raise
            generator = None
        else:
            self._generator = generator
            return tokens
        self.options = replace(self.options, window=1)  # which takes the least
        return self.draw(text, uniforms, prefix, on_step)


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

    A part has some of one caption's candidates or, where the batch is larger, all of several
    captions.

    Args:
        batch_size: candidates at once; None: as many as the memory is expected to hold, and half
            as many each time it runs out.
        prefix: see `Generator.draw`.
        on_row: called when a row of the grid is drawn, with the part, whose tokens are those
            drawn so far, and the number of positions done.
        start: the first candidate's number.
    """
    options, prior = options or SamplingOptions(), model.prior
    text = torch.cat([model.tokenizer.encode(caption) for caption in captions])
    length = prior.grid[0] * prior.grid[1]
    each = candidates - start
    limit = batch_size or fitting_batch(model, each, len(captions), options)
    drawer = PartDrawer(prior, options)
    caption, first = 0, start
    while caption < len(captions):
        c, b = _part_shape(len(captions), each, limit)
        part = Part(
            range(caption, min(caption + c, len(captions))),
            range(first, min(first + b, candidates)),
            torch.empty(0),
        )
        # A short last part is padded with its last caption: the shapes of a static step never
        # change.
        padded = [part.captions[min(i, len(part.captions) - 1)] for i in range(c)]
        uniforms = [candidate_uniforms(seed, captions[i], first, b, length) for i in padded]

        def report(done: int, tokens: Tensor, part: Part = part) -> None:
            if on_row:
                on_row(_without_padding(part, tokens), done)

        try:
            tokens = drawer.draw(text[padded], torch.stack(uniforms), prefix, report)
        except (RuntimeError, MemoryError) as error:
            if batch_size is not None or c * b == 1 or not out_of_memory(error):
                raise
            limit = c * b // 2
            continue
        yield _without_padding(part, tokens)
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
    prefix: Tensor | None = None,
) -> Iterator[CaptionImages]:
    """Tokens and images of candidates start ... candidates - 1 of each caption, in order.

    The arguments are those of `draw_parts`.
    """
    unfinished = CaptionParts(model)
    for part in draw_parts(
        model, captions, candidates, seed, batch_size, options, prefix, start=start
    ):
        yield from unfinished.add(part, candidates)


class CaptionParts:
    """Joins the parts of a caption and then decodes them.

    Parts are not decoded one by one, so that which images are decoded together does not depend on
    which were drawn together.
    """

    def __init__(self, model: TokenModel) -> None:
        self._model = model
        self._tokens: list[Tensor] = []

    def __len__(self) -> int:
        """Candidates so far of the caption in progress."""
        return sum(map(len, self._tokens))

    def add(self, part: Part, candidates: int) -> Iterator[CaptionImages]:
        """Adds a part; yields the captions that it completes, in order.

        candidates: the number after a caption's last candidate.
        """
        for tokens in part.tokens:
            self._tokens.append(tokens)
            if part.candidates.stop == candidates:
                yield self.take()

    def take(self) -> CaptionImages:
        """The candidates so far of the caption in progress; the next caption begins."""
        tokens = torch.cat(self._tokens)
        self._tokens = []  # before decoding: after Ctrl-C they must not count for the next caption
        return CaptionImages(tokens, decode(self._model.codec, tokens, self._model.prior.grid))


def _part_shape(captions: int, candidates: int, limit: int) -> tuple[int, int]:
    """Captions and candidates of a part, at most `limit` rows, all parts of about equal size."""
    if candidates > limit:
        return 1, ceil(candidates / ceil(candidates / limit))
    max_captions = limit // candidates
    return ceil(captions / ceil(captions / max_captions)), candidates


def _without_padding(part: Part, tokens: Tensor) -> Part:
    """The part with its tokens, those of the padding left out."""
    return replace(part, tokens=tokens[: len(part.captions), : len(part.candidates)])


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came after, says that memory ran out."""
    # The CPU's allocator and CUDA's libraries do not raise torch.OutOfMemoryError.
    messages = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if any(message in str(error) for message in messages):
            return True
        error = error.__context__
    return False


def fitting_batch(
    model: TokenModel, candidates: int, captions: int, options: SamplingOptions
) -> int:
    """Candidates that can be drawn at once: their caches and a step's memory must fit.

    Args:
        candidates: of each caption.
        captions: how many there are.
    """
    prior, device = model.prior, device_of(model.prior)
    if device.type == "cuda":
        free, largest = int(0.9 * free_memory(device)), LARGEST_BATCH
    else:  # other programs need some of it
        free, largest = free_memory(device) // 2, _largest_cpu_batch(prior)
    free -= decoding_images_bytes(model.codec, prior.grid)  # decoded while the caches are held
    if isinstance(prior, nn.Module):
        free -= prepacked_bytes(prior)
    passes = 1 if options.guidance == 1 else 2
    # Bytes of a caption, shared by its candidates, and of each candidate.
    shared, each = (passes * count for count in prior.decoding_bytes())
    if options.window not in (None, 1) and isinstance(prior, WindowPrior):
        window = min(options.window, prior.grid[0] * prior.grid[1])
        shared, each = 0, passes * prior.window_bytes(window)
    if candidates <= largest and free >= shared + candidates * each:  # all of a caption
        fitting = free // (shared + candidates * each) * candidates
        return min(largest, captions * candidates, fitting)
    return max(1, min(largest, candidates, (free - shared) // max(1, each)))


def _largest_cpu_batch(prior: Prior) -> int:
    """Candidates that a CPU draws fastest at once."""
    fitting = CPU_BATCH_BYTES // max(1, prior.decoding_bytes()[1])
    return min(LARGEST_BATCH, max(LARGEST_CPU_BATCH, fitting))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, those that torch's allocator caches included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_memory()
