"""Draws image tokens one position at a time from a prior's `DecodingState` (paper section 2.6).

Candidate i of a caption uses uniform numbers that depend on (seed, caption, i) alone. So batches of
any size draw the same images, up to the rounding of matrix products of another size.

Dimensions: c captions, b candidates of each, t text positions, m image positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle1.common.weights import device_of
from dalle1.generation.options import (
    SamplingOptions,
    check_drawn,
    draw_token,
    sample_token,
    uniforms_for,
)
from dalle1.generation.windows import draw_windows
from dalle1.protocols import Prior, TextPrior, WindowPrior, end_of_caption
from dvae.calls import isolated


class Generator:
    """Draws the images of c captions, b candidates of each, position by position.

    Every `draw` uses the same memory again. On CUDA the step is captured once as a graph and then
    replayed, so the host launches no kernels one by one.
    """

    @isolated()
    @torch.inference_mode()
    def __init__(
        self,
        prior: Prior,
        captions: int = 1,
        candidates: int = 1,
        options: SamplingOptions | None = None,
        static: bool | None = None,
    ) -> None:
        """On CUDA, takes the memory of the caches and captures the step, unless windows of
        positions are drawn in one pass (`SamplingOptions.window`).

        Args:
            captions: c.
            candidates: b, of each caption.
            static: whether positions are tensors and shapes never change, which a CUDA graph
                needs; None: on CUDA.
        """
        self.prior, self.options = prior, options or SamplingOptions()
        self.captions, self.candidates = captions, candidates
        self.device = device_of(prior)
        cuda = self.device.type == "cuda"
        # With guidance, the captions and then as many empty ones.
        self.passes = 1 if self.options.guidance == 1 else 2
        rows, length = captions * candidates, prior.grid[0] * prior.grid[1]
        self.window = self._choose_window(static)
        self.static = self.window == 1 and (cuda if static is None else static)
        self.state = prior.start(self.passes * captions, candidates, self.static)
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=self.device)
        self.uniforms = uniforms_for(self.device, torch.zeros(rows, length))
        self.last_tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.drawn = torch.ones(1, dtype=torch.bool, device=self.device)  # whether all tokens were
        self.graph = self._capture() if cuda and self.static else None
        self.steps = 0  # of the prior, that the last image took

    def _choose_window(self, static: bool | None) -> int:
        """Positions of a pass: as asked for, else what the prior says pays for so many rows."""
        asked = self.options.window
        if asked is None:
            if static or self.device.type != "cpu" or not isinstance(self.prior, WindowPrior):
                return 1
            return self.prior.best_window(self.passes * self.captions * self.candidates)
        if asked > 1 and static:
            raise ValueError(
                f"window: expected 1 or None for a static step, which has one position, got {asked}"
            )
        if asked > 1 and not isinstance(self.prior, WindowPrior):
            raise ValueError(
                f"window: expected 1 or None for {type(self.prior).__name__}, which has no steps "
                f"of several positions (dalle1.protocols.WindowPrior), got {asked}"
            )
        return min(asked, self.prior.grid[0] * self.prior.grid[1])

    def _on_device(self) -> AbstractContextManager[object]:
        """Makes the model's device the current one, which events and graphs belong to."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @isolated()
    def draw(
        self,
        text_tokens: Tensor,
        uniforms: Tensor,
        prefix: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Image tokens: int64 [c, b, m], on the CPU.

        Args:
            text_tokens: int64 [c, t], padded.
            uniforms: [c, b, m] in [0, 1), see `candidate_uniforms`.
            prefix: int64 [p] image tokens that every candidate begins with.
            on_step: called whenever a row of the grid is done, with the number of positions done
                and the tokens [c, b, m], of which that many positions are drawn.

        Raises:
            ValueError: logits are not finite.
        """
        with torch.inference_mode():
            tokens = self._draw(text_tokens, uniforms, prefix, on_step)
        return tokens.clone()  # outside: a loss takes no tensor of the inference mode

    def _draw(
        self,
        text_tokens: Tensor,
        uniforms: Tensor,
        prefix: Tensor | None,
        on_step: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        given = 0 if prefix is None else len(prefix)
        text_tokens = text_tokens.to(self.device)
        if self.passes == 2:
            empty = self.prior.empty_caption().to(self.device).expand(self.captions, -1)
            text_tokens = torch.cat([text_tokens, empty])
        uniforms = uniforms_for(self.device, uniforms)
        self.uniforms.copy_(rearrange(uniforms, "c b m -> (c b) m"))
        self.last_tokens.fill_(self.prior.image_vocab)  # the start
        self.position.fill_(given)
        self.drawn.fill_(True)
        self.steps = 0
        if prefix is not None and given:
            prefix = prefix.to(self.device)
            self.tokens[:, :given] = prefix
            self.last_tokens.fill_(prefix[-1])
        self.state.prefill(text_tokens, prefix)
        with self._on_device():
            if self.window > 1:
                return self._all_windows(given, on_step)
            return self._all_positions(given, on_step)

    def _all_windows(self, given: int, on_step: Callable[[int, Tensor], None] | None) -> Tensor:
        """As `_all_positions`, several positions at a time; rows of the grid are told when they are
        done in all images."""
        shaped = rearrange(self.tokens, "(c b) m -> c b m", c=self.captions)
        columns, told = self.prior.grid[1], given // self.prior.grid[1]

        def on_pass(done: int, drawn: Tensor) -> None:
            nonlocal told
            self.steps += 1
            self.drawn &= drawn.all()
            self._check_drawn()
            for row in range(told + 1, done // columns + 1):
                if on_step:
                    on_step(row * columns, shaped)
            told = max(told, done // columns)

        draw_windows(
            self._logits,
            self.tokens,
            self.uniforms,
            self.options,
            given,
            self.window,
            columns,
            self.prior.image_vocab,
            on_pass,
        )
        return shaped.cpu()

    def _all_positions(self, given: int, on_step: Callable[[int, Tensor], None] | None) -> Tensor:
        """Draws the positions after the given ones: int64 [c, b, m]."""
        shaped = rearrange(self.tokens, "(c b) m -> c b m", c=self.captions)
        row_done: torch.cuda.Event | None = None  # of the previous row
        for p in range(given, self.tokens.shape[1]):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step(self.position if self.static else p)
            self.steps += 1
            if (p + 1) % self.prior.grid[1]:
                continue
            if self.device.type == "cuda":
                # The host is at most a row ahead of the device. So Ctrl-C works, the progress bar
                # is nearly right, and the device never waits.
                event = torch.cuda.Event()
                event.record()
                if row_done is not None:
                    row_done.synchronize()
                row_done = event
            else:
                self._check_drawn()
            if on_step:
                on_step(p + 1, shaped)
        self._check_drawn()
        return shaped.cpu()

    def _check_drawn(self) -> None:
        weights = self.prior.parameters() if isinstance(self.prior, nn.Module) else iter(())
        dtype = next((w.dtype for w in weights), torch.float32)
        check_drawn(self.drawn, self.options, dtype)

    def _logits(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """Guided logits [n, k, v] of a step; see `protocols.DecodingState`."""
        if self.passes == 1:
            return self.state.step(tokens, position)
        if isinstance(position, Tensor) and len(position) > 1:
            position = position.repeat(2)
        conditional, unconditional = self.state.step(tokens.repeat(2, 1), position).chunk(2)
        return unconditional + self.options.guidance * (conditional - unconditional)

    def _step(self, position: int | Tensor) -> None:
        """Draws the token of one position for every row."""
        logits = self._logits(self.last_tokens, position)[:, 0]
        if isinstance(position, int):
            tokens, drawn = draw_token(logits, self.uniforms[:, position], self.options)
            self.tokens[:, position] = tokens
        else:
            uniforms = self.uniforms.index_select(1, position)[:, 0]
            tokens, drawn = draw_token(logits, uniforms, self.options)
            self.tokens.index_copy_(1, position, tokens[:, None])
            self.position += 1
        self.last_tokens[:, 0] = tokens
        self.drawn &= drawn.all()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph; `draw` overwrites what its warmup leaves in the caches."""
        with self._on_device():
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # warmup: kernels choose their plans and workspaces
                    self.position.zero_()
                    self._step(self.position)
                self.position.zero_()
            # thread_local: other threads may use the device meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step(self.position)
            torch.cuda.current_stream().wait_stream(stream)
        return graph


def draw(
    prior: Prior,
    text_tokens: Tensor,
    uniforms: Tensor,
    options: SamplingOptions | None = None,
    prefix: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draws b candidates of one caption.

    Args:
        text_tokens: int64 [t], padded.
        uniforms: [b, m] in [0, 1), see `candidate_uniforms`.
        options, prefix, on_step: as for `Generator`.

    Returns:
        Image tokens, int64 [b, m], on the CPU.
    """
    generator = Generator(prior, 1, len(uniforms), options)
    return generator.draw(text_tokens[None], uniforms[None], prefix, on_step)[0]


@isolated()
@torch.inference_mode()
def complete_text(
    prior: TextPrior,
    given: Sequence[int],
    uniforms: Tensor,
    options: SamplingOptions | None = None,
) -> list[int]:
    """Continues a caption.

    Args:
        given: the caption's first tokens.
        uniforms: [text_length] in [0, 1), one for each position, whether it is given or drawn.

    Returns:
        The token ids, those given included, without the end of the caption.

    Raises:
        ValueError: the options ask for guidance.
    """
    options = options or SamplingOptions()
    if options.guidance != 1:
        raise ValueError("guidance: captions have no condition to be guided by; leave it at 1")
    ids, end = list(given), end_of_caption(prior)
    while len(ids) < len(uniforms):
        logits = prior.next_text_logits(ids)
        uniform = uniforms_for(logits.device, uniforms[len(ids), None])
        token = int(sample_token(logits[None], uniform, options))
        if token == end:
            break
        ids.append(token)
    return ids
