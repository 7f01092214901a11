"""What one pass over a micro-batch takes: bytes that wait for the backward pass, FLOPs.

Of the real modules, built without memory on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dalle1.clip.model import CLIP
from dalle1.training.config import RunConfig
from dalle1.transformer.attention import SPARSE_FROM
from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.loss import CHUNK
from dalle1.transformer.masks import allowed
from dalle1.transformer.model import Transformer
from dvae import DVAE
from dvae.objective import relaxed_elb
from dvae.warm_start import ContinuousBottleneck

FLOAT = 4  # bytes
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes


@dataclass(frozen=True)
class Work:
    """One pass of a rank over a micro-batch: bytes as in `Memory`, FLOPs."""

    activations: int
    block: int
    copies: int
    logits: int
    flops: float  # forward and backward
    flops_again: float = 0.0  # forward, for the second time


def build(config: RunConfig) -> nn.Module:
    """What the run trains, without memory or values."""
    with torch.device("meta"):
        if config.stage == "dalle":
            # Compilation changes no parameter, and nothing here is run.
            execution = config.execution or Execution()
            return Transformer(config.transformer, execution.model_copy(update={"compile": False}))
        if config.stage == "clip":
            return CLIP(config.clip)
        assert config.dvae_training is not None
        codec = DVAE(config.dvae)
        if config.dvae_training.warm_start_steps:
            size = config.dvae_training.warm_start_bottleneck
            codec.add_module("bottleneck", ContinuousBottleneck(codec, size))
        return codec


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def transformer_work(
    c: TransformerConfig, execution: Execution, micro_batch: int, precision: str = "fp32"
) -> Work:
    """Of a transformer, by formula; w width, in units of a micro-batch's rows of w numbers.

    An attention block keeps its float32 input and, in the precision's width, the normed input, q, k
    and v and the heads' output (5); an MLP block its input and the normed input, four times before
    and four times behind the GELU (9). Both keep two float32 a position of the norm, attention one
    a head, of the softmax, and a mask of n x n where it is dense. Autocast keeps the matrices that
    it has cast. With checkpointing only the inputs are kept. Behind the last layer: the final
    norm's input, and what the loss has made of logits, the states' gradients.

    torch.compile may keep less. FLOPs: those of the matrix products, 6 for each weight
    and position; attention is counted by the pairs that its pattern allows.
    """
    blocks, heads, scores = _products(c)
    n, layers = c.sequence.length, c.layers
    positions, value = micro_batch * n, WIDTHS[precision]
    rows = positions * c.width

    inputs = 2 * layers * FLOAT * rows
    dense = execution.attention == "dense" or (execution.attention == "auto" and n < SPARSE_FROM)
    attention = value * 5 * rows + FLOAT * positions * (2 + c.heads) + dense * value * n * n
    mlp = value * 9 * rows + FLOAT * positions * 2
    ends = FLOAT * (rows + 2 * positions) + FLOAT * rows
    # The gradients of 4 w before and 4 w behind the GELU, and of the residual state.
    block = (8 * value + FLOAT) * rows
    copied = blocks if value < FLOAT else 0
    if execution.checkpointing:
        activations = inputs + ends
        block += max(attention, mlp)
        copied = copied * 8 // (12 * layers)  # those of the MLP at work
    else:
        activations = inputs + ends + layers * (attention + mlp)
    chunk = max(
        min(CHUNK, micro_batch * c.text_length) * c.text_vocab,
        min(CHUNK, micro_batch * c.sequence.image_length) * c.image_vocab,
    )
    # Twice a chunk: logsumexp makes exponentials of it.
    logits = FLOAT * (2 * chunk + (c.text_vocab + c.image_vocab) * (c.width + 1))
    body = blocks * n + scores
    return Work(
        activations,
        block,
        copied * value,
        logits,
        flops=6.0 * (body + heads) * micro_batch,
        flops_again=2.0 * body * micro_batch if execution.checkpointing else 0.0,
    )


@lru_cache(maxsize=8)
def _products(c: TransformerConfig) -> tuple[int, int, int]:
    """Weights of the blocks' matrices; multiplications of one sample by the heads' matrices, and of
    queries by keys and probabilities by values."""
    with torch.device("meta"):
        modules = Transformer(c).named_modules()
    weights = {name: m.weight.numel() for name, m in modules if isinstance(m, nn.Linear)}
    text, image = weights.pop("text_head"), weights.pop("image_head")
    t, kinds = c.text_length, set(c.patterns)
    pairs = {p: int(allowed(p, t, c.grid, c.conv_kernel).sum()) for p in kinds}
    heads = text * t + image * c.sequence.image_length
    return sum(weights.values()), heads, 2 * c.width * sum(pairs[p] for p in c.patterns)


def saved_bytes(parameters: Iterable[Tensor], run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps of `run`, each storage once, parameters apart; and its result."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    held: dict[int, Any] = {}  # the storages themselves, lest one's address is given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
        return sum(storage.nbytes() for storage in held.values()), result


def measured_work(config: RunConfig, micro_batch: int, ranks: int) -> Work:
    """Of the dVAE or CLIP: a pass over tensors without values, by the CPU's kernels.

    FLOPs are those of matrix products and convolutions, without attention's scores.
    """
    side, value = config.reader.image_size, WIDTHS[config.parallel.precision]
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=value < FLOAT)
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), mixed, counter:
        images = torch.empty(micro_batch, 3, side, side)
        module: CLIP | DVAE
        if config.stage == "dvae":
            module = codec = DVAE(config.dvae)

            def run() -> Tensor:
                x = images.contiguous(memory_format=torch.channels_last)
                loss: Tensor = relaxed_elb(codec, x, 1.0, 1.0).loss
                return loss

            logits, products = 0, 0.0  # among the rest
        else:
            module = clip = CLIP(config.clip)
            c = clip.config
            ids = torch.zeros(micro_batch, c.text_length, dtype=torch.int64)

            def run() -> Tensor:  # encode_text itself looks at the ids' values
                image = clip.visual(images[:, :, : c.image_size, : c.image_size])
                text = clip.transformer(clip.token_embedding(ids) + clip.positional_embedding)
                whole: Tensor = (
                    image.sum() + (clip.ln_final(text) @ clip.text_projection)[:, 0].sum()
                )
                return whole

            pairs = micro_batch * micro_batch * ranks
            # Of images and of texts: scaled cosines, their log-softmax, its gradient.
            logits, products = 2 * 3 * FLOAT * pairs, 2 * 6.0 * pairs * c.embedding
        activations, loss = saved_bytes(module.parameters(), run)
        loss.backward()
    return Work(activations, 0, 0, logits, flops=counter.get_total_flops() + products)


def pass_work(config: RunConfig, micro_batch: int, ranks: int) -> Work:
    if config.stage != "dalle":
        return measured_work(config, micro_batch, ranks)
    assert config.transformer is not None
    execution = config.execution or Execution()
    return transformer_work(config.transformer, execution, micro_batch, config.parallel.precision)
