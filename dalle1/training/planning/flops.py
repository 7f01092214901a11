"""What one pass over a micro-batch costs: bytes kept for the backward pass, and FLOPs.

Products are counted on the real modules, which are built without memory on torch's meta device.
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
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dalle1.clip.model import CLIP
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import Seq2Seq
from dalle1.training.config import RunConfig
from dalle1.training.stages.base import freeze_all_but
from dalle1.transformer.attention import SPARSE_FROM
from dalle1.transformer.config import Execution, TransformerConfig
from dalle1.transformer.loss import CHUNK
from dalle1.transformer.masks import allowed
from dalle1.transformer.model import Transformer
from dvae import DVAE, VQGAN
from dvae.calls import trusted
from dvae.objective import relaxed_elb
from dvae.vqgan.discriminator import PatchDiscriminator
from dvae.vqgan.objective import Adversary, Reconstruction, adversarial_losses
from dvae.vqgan.perceptual import LPIPS
from dvae.warm_start import ContinuousBottleneck

FLOAT_BYTES = 4  # of a float32
PRECISION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class StepCost:
    """One pass of a rank over a micro-batch: bytes of each kind, as in `Memory`, and FLOPs."""

    activations: int
    block: int
    copies: int
    logits: int
    flops: float  # of the forward and the backward pass
    recomputed_flops: float = 0.0  # of the forward pass that checkpointing does a second time


def build_module(config: RunConfig) -> nn.Module:
    """The module that a run trains, on the meta device: shapes without memory or values.

    What `train_only` leaves out is frozen. Raises ValueError for a name that the module lacks.
    """
    with torch.device("meta"):
        module = _model(config)
        freeze_all_but(module, config.train_only)
        if isinstance(module, VQGAN):
            return _vqgan_with_discriminator(module, config)
        if config.dvae_training is not None and config.dvae_training.warm_start_steps:
            size = config.dvae_training.warm_start_bottleneck
            assert isinstance(module, DVAE)
            module.add_module("bottleneck", ContinuousBottleneck(module, size))
        return module


def _model(config: RunConfig) -> nn.Module:
    if config.stage == "dalle":
        # Compilation changes no parameter, and nothing here is run.
        execution = (config.execution or Execution()).model_copy(update={"compile": False})
        if config.seq2seq is not None:
            return Seq2Seq(config.seq2seq, execution)
        return Transformer(config.transformer, execution)
    if config.stage == "clip":
        return CLIP(config.clip)
    return VQGAN(config.vqgan) if config.stage == "vqgan" else DVAE(config.dvae)


def _vqgan_with_discriminator(codec: VQGAN, config: RunConfig) -> VQGAN:
    assert config.vqgan_training is not None
    d = config.vqgan_training.discriminator
    if d is not None:
        discriminator = PatchDiscriminator(codec.config.channels, d.layers, d.width)
        codec.add_module("discriminator", discriminator)
    return codec


def parameter_count(module: nn.Module) -> int:
    """How many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def trained_count(module: nn.Module) -> int:
    """How many of them are trained, which alone have gradients and moments."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def training_flops(c: TransformerConfig) -> float:
    """FLOPs of the model in the forward and backward pass of one sample.

    6 for each weight of a matrix and each position that it is multiplied by, and 12 w for each
    (query, key) pair that a layer's pattern allows. Nothing is counted for recomputation, or for
    pairs that a mask forbids.
    """
    p = _products(c)
    return 6.0 * (p.blocks * c.sequence.length + p.heads + p.attention)


@dataclass(frozen=True)
class _Products:
    """What is multiplied in one sample's forward pass."""

    blocks: int  # weights of the blocks' matrices, each used once a position
    heads: int  # multiplications by the heads' matrices
    attention: int  # multiplications of queries by keys and of probabilities by values


@lru_cache(maxsize=8)
def _products(c: TransformerConfig) -> _Products:
    with torch.device("meta"):
        modules = Transformer(c).named_modules()
    weights = {name: m.weight.numel() for name, m in modules if isinstance(m, nn.Linear)}
    text, image = weights.pop("text_head"), weights.pop("image_head")
    pairs = {p: int(allowed(p, c.text_length, c.grid, c.conv_kernel).sum()) for p in c.patterns}
    return _Products(
        blocks=sum(weights.values()),
        heads=text * (c.text_length - c.shift) + image * c.sequence.image_length,
        attention=2 * c.width * sum(pairs[p] for p in c.patterns),
    )


def transformer_cost(
    c: TransformerConfig, execution: Execution, micro_batch: int, precision: str = "fp32"
) -> StepCost:
    """Of a transformer, by formula. Below, a row is w numbers for each position, w the width.

    An attention block keeps its float32 input and, in the precision's bytes, 5 rows: the normed
    input, q, k, v and the heads' output. An MLP block keeps its input and 9 rows: the normed input,
    four before and four behind the GELU. Both keep two float32 a position of the norm; a sandwich's
    second norm keeps a row, its input, and two more. Attention keeps one float32 a head and
    position of the softmax, and a mask of n x n where it is dense.
    Autocast keeps the matrices that it has cast. With checkpointing only the inputs are kept.
    Behind the last layer come the final norm's input, and the gradients of the states, which the
    loss makes of the logits.

    torch.compile may keep less. FLOPs are those of the matrix products, see `training_flops`.
    """
    products = _products(c)
    n, layers = c.sequence.length, c.layers
    positions, value = micro_batch * n, PRECISION_BYTES[precision]
    rows = positions * c.width

    inputs = 2 * layers * FLOAT_BYTES * rows
    dense = execution.attention == "dense" or (execution.attention == "auto" and n < SPARSE_FROM)
    attention = value * 5 * rows + FLOAT_BYTES * positions * (2 + c.heads) + dense * value * n * n
    mlp = value * 9 * rows + FLOAT_BYTES * positions * 2
    norm = FLOAT_BYTES * (rows + 2 * positions)
    ends = norm + FLOAT_BYTES * rows
    if c.variant.norms == "sandwich":
        behind = value * rows + FLOAT_BYTES * positions * 2
        attention, mlp, ends = attention + behind, mlp + behind, ends + norm
    # The gradients of the 4 rows before and the 4 behind the GELU, and of the residual state.
    block = (8 * value + FLOAT_BYTES) * rows
    copied = products.blocks if value < FLOAT_BYTES else 0
    if execution.checkpointing:
        activations = inputs + ends
        block += max(attention, mlp)
        copied = copied * 8 // (12 * layers)  # those of one MLP
    else:
        activations = inputs + ends + layers * (attention + mlp)
    chunk = max(
        min(CHUNK, micro_batch * c.text_length) * c.text_classes,
        min(CHUNK, micro_batch * c.sequence.image_length) * c.image_vocab,
    )
    # Twice a chunk: logsumexp makes exponentials of it.
    heads = (c.text_classes + c.image_vocab) * (c.width + c.variant.head_bias)
    logits = FLOAT_BYTES * (2 * chunk + heads)
    forward = 2.0 * (products.blocks * n + products.attention)  # of the blocks
    return StepCost(
        activations,
        block,
        copied * value,
        logits,
        flops=training_flops(c) * micro_batch,
        recomputed_flops=forward * micro_batch if execution.checkpointing else 0.0,
    )


@lru_cache(maxsize=8)
def _seq2seq_products(c: Seq2SeqConfig) -> _Products:
    """Those of an encoder-decoder; `blocks` counts a sample's, not a position's."""
    with torch.device("meta"):
        modules = Seq2Seq(c).named_modules()
    weights = {name: m.weight.numel() for name, m in modules if isinstance(m, nn.Linear)}
    head = weights.pop("decoder.head")
    t, m = c.text_length, c.image_length
    on_text = sum(n for name, n in weights.items() if name.startswith("encoder.") or ".kv" in name)
    pairs = c.encoder_layers * t * t + c.decoder_layers * (m * (m + 1) // 2 + m * t)
    return _Products(
        blocks=on_text * t + (sum(weights.values()) - on_text) * m,
        heads=head * m,
        attention=2 * c.width * pairs,
    )


def seq2seq_cost(
    c: Seq2SeqConfig, checkpointing: bool, micro_batch: int, precision: str = "fp32"
) -> StepCost:
    """Of an encoder-decoder, by formula, as `transformer_cost`. A row is w numbers for each
    position, f the feed-forward width.

    Every block keeps its float32 input. A self-attention block keeps 6 rows in the precision's
    bytes: the normed input, q, k, v, the heads' output and that of the output map, which a norm
    reads. Attention to the caption keeps 4 rows of the image's positions and 3 of the text's. A
    feed-forward block keeps a row and 5 f a position: both maps' results, the GELU's, the product
    and its norm. Each norm keeps two float32 a position, attention one a head.
    """
    products = _seq2seq_products(c)
    w, f, value = c.width, c.ffn_width, PRECISION_BYTES[precision]
    text, image = micro_batch * c.text_length, micro_batch * c.image_length

    def attention(positions: int) -> int:
        return positions * (6 * value * w + FLOAT_BYTES * (4 + c.heads))

    def mlp(positions: int) -> int:
        return positions * (value * (w + 5 * f) + FLOAT_BYTES * 4)

    cross = image * (4 * value * w + FLOAT_BYTES * (4 + c.heads)) + text * 2 * value * w
    cross += text * value * w if value < FLOAT_BYTES else 0  # the text's states, cast
    kept = c.encoder_layers * (attention(text) + mlp(text))
    kept += c.decoder_layers * (attention(image) + cross + mlp(image))
    inputs = FLOAT_BYTES * w * (2 * c.encoder_layers * text + 3 * c.decoder_layers * image)
    # Of both stacks what the norms at their ends read; the text's states; the gradients of the
    # states that the head reads.
    ends = FLOAT_BYTES * (text + image) * (2 * w + 4) + FLOAT_BYTES * w * (text + image)
    block = image * (5 * f * value + FLOAT_BYTES * w)
    with torch.device("meta"):
        layers = Seq2Seq(c).residual_layers
    copied = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    if checkpointing:
        kept = 0
        block += max(attention(image), cross, mlp(image))
        copied = 3 * w * f
    logits = 2 * min(CHUNK, image) * c.image_embeddings + c.image_embeddings * w
    return StepCost(
        inputs + ends + kept,
        block,
        copied * value if value < FLOAT_BYTES else 0,
        FLOAT_BYTES * logits,
        flops=6.0 * (products.blocks + products.heads + products.attention) * micro_batch,
        recomputed_flops=2.0 * (products.blocks + products.attention) * micro_batch
        if checkpointing
        else 0.0,
    )


def saved_bytes(parameters: Iterable[Tensor], run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps of `run`, each storage once and without parameters; its result."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    held: dict[int, Any] = {}  # the storages themselves, or an address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            held[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
        return sum(storage.nbytes() for storage in held.values()), result


def measured_cost(config: RunConfig, micro_batch: int, world_size: int) -> StepCost:
    """Of a codec or CLIP, by a pass over tensors without values, with the CPU's kernels.

    FLOPs are those of matrix products and convolutions, without attention's scores.
    """
    side = config.reader.image_size
    narrow = PRECISION_BYTES[config.parallel.precision] < FLOAT_BYTES
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=narrow), counter:
        images = torch.empty(micro_batch, 3, side, side)
        # The dVAE's logits are among what autograd keeps.
        logits, products = 0, 0.0
        module: nn.Module
        if config.stage == "dvae":
            module = DVAE(config.dvae)
            run = _dvae_pass(module, images)
        elif config.stage == "vqgan":
            codec = VQGAN(config.vqgan)
            module = _vqgan_with_discriminator(codec, config)
            run = _vqgan_pass(codec, images, config)
        else:
            module = CLIP(config.clip)
            run = _clip_pass(module, images)
            pairs = micro_batch * micro_batch * world_size
            # Of images and of texts: scaled cosines, their log-softmax, its gradient.
            logits = 2 * 3 * FLOAT_BYTES * pairs
            products = 2 * 6.0 * pairs * module.config.embedding
        activations, loss = saved_bytes(module.parameters(), run)
        loss.backward()
    return StepCost(activations, 0, 0, logits, flops=counter.get_total_flops() + products)


def _dvae_pass(codec: DVAE, images: Tensor) -> Callable[[], Tensor]:
    @trusted()  # the images have no values
    def run() -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        loss: Tensor = relaxed_elb(codec, x, 1.0, 1.0).loss
        return loss

    return run


def _vqgan_pass(codec: VQGAN, images: Tensor, config: RunConfig) -> Callable[[], Tensor]:
    """Of both nets, as once the discriminator has begun."""
    assert config.vqgan_training is not None
    s, d = config.vqgan_training, config.vqgan_training.discriminator
    reconstruction = Reconstruction(s.pixel_error, LPIPS() if s.perceptual is not None else None)
    smaller = codec.out_stride // codec.stride

    @trusted()  # the images have no values
    def run() -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        quantized = codec.quantize.forward(codec.latents(F.avg_pool2d(x, smaller)))
        pixels = codec.pixels(quantized.vectors).float()
        loss = torch.stack(list(quantized.losses.values())).sum()
        if d is None:
            return loss + reconstruction(pixels, x)[0]
        last = codec.decoder.conv_out.weight if d.adaptive else None
        adversary = Adversary(codec.get_submodule("discriminator"), d.loss, d.weight, last)
        total, own, _ = adversarial_losses(pixels, x, reconstruction, adversary)
        return loss + total + own

    return run


def _clip_pass(clip: CLIP, images: Tensor) -> Callable[[], Tensor]:
    c = clip.config
    ids = torch.zeros(len(images), c.text_length, dtype=torch.int64)

    def run() -> Tensor:  # encode_text would read the ids' values, which do not exist
        image = clip.visual(images[:, :, : c.image_size, : c.image_size])
        text = clip.transformer(clip.token_embedding(ids) + clip.positional_embedding)
        total: Tensor = image.sum() + (clip.ln_final(text) @ clip.text_projection)[:, 0].sum()
        return total

    return run


def step_cost(config: RunConfig, micro_batch: int, world_size: int) -> StepCost:
    """Of the run's stage: by formula for priors, by a pass without values for others."""
    if config.stage != "dalle":
        return measured_cost(config, micro_batch, world_size)
    execution = config.execution or Execution()
    if config.seq2seq is not None:
        checkpointing, precision = execution.checkpointing, config.parallel.precision
        return seq2seq_cost(config.seq2seq, checkpointing, micro_batch, precision)
    assert config.transformer is not None
    return transformer_cost(config.transformer, execution, micro_batch, config.parallel.precision)
