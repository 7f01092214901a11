"""Draws image tokens one position at a time, with cached keys and values (paper section 2.6).

The caption is run once (`transformer.kv_cache` says what is held of it). Each image position then
costs one row of every layer and reads only the positions that the layer's pattern allows.

Candidate i of a caption uses uniform numbers that depend on (seed, caption, i) alone, so batches
of any size draw the same pictures (up to the rounding of matrix products of another size).

Dimensions: c captions, b candidates of each, t text positions, m image positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from torch import Tensor

from dalle1.generation.options import Options, candidate_uniforms, choose
from dalle1.transformer.kv_cache import Cache, cache_bytes
from dalle1.transformer.model import Transformer
from dalle1.transformer.sequence import END_OF_CAPTION, padding_id

__all__ = ["Decoder", "Options", "cache_bytes", "candidate_uniforms", "choose", "draw", "draw_text"]


class Decoder:
    """Draws the images of c captions, b candidates of each, position by position.

    Made once for a transformer, its memory is used again by every `draw`. On CUDA the step is
    recorded once as a graph and replayed, without a word from the host.
    """

    @torch.inference_mode()
    def __init__(
        self,
        transformer: Transformer,
        captions: int = 1,
        candidates: int = 1,
        options: Options | None = None,
        recorded: bool | None = None,
    ) -> None:
        """recorded: whether positions are tensors and shapes never change, so that the step can be
        recorded; None: on CUDA."""
        self.transformer, self.options = transformer, options or Options()
        self.captions, self.candidates = captions, candidates
        c, weight = transformer.config, transformer.start_of_image
        self.device = weight.device
        cuda = self.device.type == "cuda"
        self.recorded = cuda if recorded is None else recorded
        # With guidance, the captions and then as many empty ones.
        self.passes = 1 if self.options.guidance == 1 else 2
        self.cache = Cache(transformer, self.passes * captions, candidates, self.recorded)
        rows, length = captions * candidates, c.stream.image_length
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        self.uniforms = torch.zeros(rows, length, dtype=torch.float64, device=self.device)
        self.fed = weight.new_zeros(rows, c.width)  # embedding of the token before
        self.positions = transformer.grid_positions()
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.graph = self._record() if cuda and self.recorded else None

    def _on_device(self) -> AbstractContextManager[object]:
        """Events and graphs belong to the current device, which need not be the model's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def draw(
        self,
        text_tokens: Tensor,
        uniforms: Tensor,
        prefix: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Image tokens: int64 [c, b, grid^2], on the CPU.

        text_tokens: int64 [c, t], padded; uniforms: [c, b, grid^2] in [0, 1), see
        `candidate_uniforms`; prefix: int64 [p] image tokens that every candidate begins with.
        on_step is called whenever a row of the grid is done, with the number of positions done
        and the tokens [c, b, grid^2], of which so many are drawn.
        """
        t = self.transformer
        given = 0 if prefix is None else len(prefix)
        text_tokens = text_tokens.to(self.device)
        if self.passes == 2:
            empty = [padding_id(t.config.text_vocab, p) for p in range(t.config.text_length)]
            none = torch.tensor(empty, device=self.device).expand(self.captions, -1)
            text_tokens = torch.cat([text_tokens, none])
        self.uniforms.copy_(rearrange(uniforms, "c b m -> (c b) m"))
        self.fed.copy_(t.start_of_image.expand_as(self.fed))
        self.position.fill_(given)
        if prefix is not None and given:
            prefix = prefix.to(self.device)
            self.tokens[:, :given] = prefix
            self.fed.copy_(t.image_embedding(prefix[-1]).expand_as(self.fed))
        self.cache.read(text_tokens, prefix)
        with self._on_device():
            return self._all_positions(given, on_step)

    def _all_positions(self, given: int, on_step: Callable[[int, Tensor], None] | None) -> Tensor:
        c = self.transformer.config
        shaped = rearrange(self.tokens, "(c b) m -> c b m", c=self.captions)
        done_before: torch.cuda.Event | None = None
        for p in range(given, c.stream.image_length):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step(self.position if self.recorded else p)
            if (p + 1) % c.grid:
                continue
            if self.device.type == "cuda":
                # The host is a row ahead of the device at most: Ctrl-C is heard, the progress is
                # nearly true, and the device never waits.
                event = torch.cuda.Event()
                event.record()
                if done_before is not None:
                    done_before.synchronize()
                done_before = event
            if on_step:
                on_step(p + 1, shaped)
        return shaped.to("cpu", copy=True)  # the next draw writes over its own

    def _step(self, position: int | Tensor) -> None:
        """Draws the token of one position for every row, and feeds it."""
        x = self.fed + self.positions[position]
        logits = self.cache.step(x.repeat(self.passes, 1), position)
        if self.passes == 2:
            conditional, free = logits.chunk(2)
            logits = free + self.options.guidance * (conditional - free)
        if isinstance(position, int):
            tokens = choose(logits, self.uniforms[:, position], self.options)
            self.tokens[:, position] = tokens
        else:
            uniforms = self.uniforms.index_select(1, position)[:, 0]
            tokens = choose(logits, uniforms, self.options)
            self.tokens.index_copy_(1, position, tokens[:, None])
            self.position += 1
        self.fed.copy_(self.transformer.image_embedding(tokens))

    def _record(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; what its trial runs leave in the caches is written over."""
        with self._on_device():
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # kernels choose their plans and workspaces
                    self.position.zero_()
                    self._step(self.position)
                self.position.zero_()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step(self.position)
            torch.cuda.current_stream().wait_stream(stream)
        return graph


def draw(
    transformer: Transformer,
    text_tokens: Tensor,
    uniforms: Tensor,
    options: Options | None = None,
    prefix: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draws b candidates of one caption: int64 [b, grid^2].

    text_tokens: int64 [t]; uniforms: [b, grid^2]; the rest as for `Decoder.draw`.
    """
    decoder = Decoder(transformer, 1, len(uniforms), options)
    return decoder.draw(text_tokens[None], uniforms[None], prefix, on_step)[0]


@torch.inference_mode()
def draw_text(
    transformer: Transformer, given: list[int], uniforms: Tensor, options: Options | None = None
) -> list[int]:
    """Goes on with a caption: token ids from the first given to the last before its end.

    given: the caption's first tokens; uniforms: [text_length] in [0, 1). Each position's number
    draws its token, so the result does not depend on how much is given. Text is short: every step
    runs all positions so far anew.
    """
    options = options or Options()
    if options.guidance != 1:
        raise ValueError("guidance: captions have no condition to be guided by; leave it at 1")
    c = transformer.config
    device = transformer.start_of_text.device
    ids = list(given)
    while len(ids) < c.text_length:
        # The last token is a target only, so any will do there.
        x = transformer.embed_text(torch.tensor([[*ids, END_OF_CAPTION]], device=device))
        for layer in transformer.layers:
            x = layer(x)
        logits = transformer.text_head(transformer.norm(x[:, -1])).float()
        token = int(choose(logits, uniforms[len(ids), None].to(device), options))
        if token == END_OF_CAPTION:
            break
        ids.append(token)
    return ids
