"""VQGANs: their sizes, their arithmetic, what they refuse, their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dvae
from dvae import VQGAN, VQGANConfig
from dvae.vqgan.layers import AttentionBlock
from tests.parity import published_vqgan as published

TINY: dict[str, Any] = {
    "width": 32,
    "multipliers": (1, 1, 2),
    "attention_levels": (2,),
    "latent_channels": 12,
    "embedding_dim": 12,
    "codebook_size": 40,
}  # stride 4
F8: dict[str, Any] = {"multipliers": (1, 1, 2, 4), "attention_levels": (3,)}
LDM: dict[str, Any] = {"multipliers": (1, 2, 2, 4), "attention_levels": (3,)}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(config: dict[str, Any], **others: Any) -> tuple[VQGAN, dict[str, torch.Tensor]]:
    """A codec of random weights, and these by their published names."""
    settings = VQGANConfig(**{**config, **others})
    weights = published.random_weights(
        published.shapes(
            settings.width,
            settings.multipliers,
            settings.attention_levels,
            settings.latent_channels,
            settings.embedding_dim,
            settings.codebook_size,
            settings.quantizer == "gumbel",
            settings.out_channels,
        )
    )
    codec = VQGAN(settings).eval()
    codec.load_state_dict(
        {name.replace("embed.", "embedding."): weight for name, weight in weights.items()}
    )
    return codec, weights


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "total"),
    [
        ({"codebook_size": 1024}, 29_298_176, 42_449_795, 72_141_699),
        ({}, 29_298_176, 42_449_795, 76_073_859),
        (
            {**F8, "codebook_size": 8192, "quantizer": "gumbel"},
            26_345_728,
            38_316_163,
            68_995_971,
        ),
        ({"encoder": False}, None, 42_449_795, 46_709_891),
    ],
    ids=["f16-1024", "f16-16384", "gumbel-f8", "detokenizer"],
)
def test_published_sizes(
    config: dict[str, Any], encoder: int | None, decoder: int, total: int
) -> None:
    """A block, a level's width or an attention too many or too few."""
    with torch.device("meta"):
        codec = VQGAN(VQGANConfig(**config))
    if encoder is not None:
        assert parameters(codec.encoder) == encoder
    assert parameters(codec.decoder) == decoder
    assert parameters(codec) == total


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({"codebook_size": 1024}, (128, (1, 1, 2, 2, 4), (4,), 256, 256, 1024)),
        (
            {**F8, "codebook_size": 8192, "quantizer": "gumbel"},
            (128, (1, 1, 2, 4), (3,), 256, 256, 8192, True),
        ),
        (
            {**F8, "codebook_size": 8192, "quantizer": "gumbel", "output": "haar"},
            (128, (1, 1, 2, 4), (3,), 256, 256, 8192, True, 12),
        ),
        (
            {**LDM, "latent_channels": 4, "embedding_dim": 4},
            (128, (1, 2, 2, 4), (3,), 4, 4, 16384),
        ),
        (
            {**LDM, "latent_channels": 4, "embedding_dim": 4, "codebook_size": 256},
            (128, (1, 2, 2, 4), (3,), 4, 4, 256),
        ),
        (
            {
                "multipliers": (1, 2, 4),
                "attention_levels": (),
                "latent_channels": 3,
                "embedding_dim": 3,
                "codebook_size": 8192,
            },
            (128, (1, 2, 4), (), 3, 3, 8192),
        ),
        ({"embedding_dim": 8}, (128, (1, 1, 2, 2, 4), (4,), 256, 8, 16384)),
        ({**LDM, "embedding_dim": 8}, (128, (1, 2, 2, 4), (3,), 256, 8, 16384)),
    ],
    ids=["f16", "gumbel-f8", "haar", "ldm-f8", "ldm-f8-n256", "ldm-f4", "vq-16", "vq-8"],
)
def test_published_names_and_shapes(config: dict[str, Any], places: tuple[Any, ...]) -> None:
    """A weight that a published file has under another name, in another shape, or not at all."""
    with torch.device("meta"):
        codec = VQGAN(VQGANConfig(**config))
    held = {name: tuple(weight.shape) for name, weight in codec.state_dict().items()}
    expected = published.shapes(*places)
    assert held == {name.replace("embed.", "embedding."): n for name, n in expected.items()}


@pytest.mark.parametrize("sides", [(16, 16), (16, 24)])
@pytest.mark.parametrize(
    "others",
    [{}, {"quantizer": "gumbel"}, {"normalized_codes": True}, {"signed_pixels": False}],
    ids=["nearest", "gumbel", "normalized", "unsigned"],
)
def test_encoding_as_published(others: dict[str, Any], sides: tuple[int, int]) -> None:
    """Padding on both sides, attention with another scale, a norm's eps, pixels of another range,
    noise in the tokens."""
    codec, weights = build(TINY, **others)
    images = torch.rand(2, 3, *sides)
    pixels = images if codec.config.signed_pixels is False else 2 * images - 1
    latents = published.conv(published.encoder(pixels, weights), weights, "quant_conv")
    with torch.no_grad():
        torch.testing.assert_close(codec.latents(images).double(), latents, rtol=1e-5, atol=1e-5)
    if codec.config.quantizer == "gumbel":
        tokens = published.largest_logit(latents, weights)
    else:
        codes = weights["quantize.embedding.weight"]
        tokens = published.nearest(latents, codes, codec.config.normalized_codes)
    assert torch.equal(codec.encode(images), tokens)
    assert tokens.unique().numel() > 3  # not one token everywhere


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"quantizer": "gumbel"},
        {"normalized_codes": True},
        {"signed_pixels": False},
        {"output": "haar"},
        {"norm_eps": 0.1},
        {"attention_levels": (0, 2)},
    ],
    ids=["nearest", "gumbel", "normalized", "unsigned", "haar", "eps", "attention"],
)
def test_decoding_as_published(others: dict[str, Any]) -> None:
    """Levels in the wrong order, a convolution before the upsampling, pixels of another range."""
    codec, weights = build(TINY, **others)
    tokens = torch.randint(40, (2, 3, 4))
    codes = next(w for name, w in weights.items() if "quantize.embed" in name).double()
    if codec.config.normalized_codes:
        codes = codes / codes.norm(dim=1, keepdim=True)
    vectors = codes[tokens].movedim(-1, 1)
    latents = published.conv(vectors, weights, "post_quant_conv")
    maps = published.decoder(latents, weights, codec.config.norm_eps)
    if codec.config.output == "haar":
        maps = published.from_bands(maps)
    with torch.no_grad():
        own = codec.pixels(codec.quantize.vectors(tokens))
    torch.testing.assert_close(own.double(), maps, rtol=1e-5, atol=1e-5)
    images = maps if codec.config.signed_pixels is False else (maps + 1) / 2
    decoded = codec.decode(tokens)
    assert decoded.shape[2] == 3 * codec.out_stride
    torch.testing.assert_close(decoded.double(), images.clamp(0, 1), rtol=1e-5, atol=1e-5)
    assert decoded.min() == 0 and decoded.max() == 1  # clipped


def test_attention_is_of_one_head_over_all_positions() -> None:
    """Attention within rows, or a scale of another width."""
    config = VQGANConfig(**TINY)
    attention = AttentionBlock(64, config).eval()
    x = torch.randn(2, 64, 3, 5)
    with torch.no_grad():
        y = attention.norm(x)
        q, k, v = (part(y).flatten(2) for part in (attention.q, attention.k, attention.v))
        shares = ((q.transpose(1, 2) @ k) / 8).softmax(dim=-1)
        mixed = (v @ shares.transpose(1, 2)).view_as(x)
        torch.testing.assert_close(attention(x), x + attention.proj_out(mixed))


def test_tokens_do_not_depend_on_the_batch() -> None:
    """Norms, attention or a search for codes that mix images."""
    codec, _ = build(TINY)
    images = torch.rand(3, 3, 16, 16)
    together = codec.encode(images)
    assert torch.equal(together, torch.cat([codec.encode(image[None]) for image in images]))
    alone = torch.cat([codec.decode(tokens[None]) for tokens in together])
    torch.testing.assert_close(codec.decode(together), alone, rtol=0, atol=1e-5)


def test_a_token_changes_all_of_an_image() -> None:
    """A codec that says its upper rows can be decoded alone though they cannot."""
    codec, _ = build(TINY)
    tokens = torch.randint(40, (1, 4, 4))
    others = tokens.clone()
    others[0, 3, 3] = (tokens[0, 3, 3] + 1) % 40
    assert not codec.decodes_rows
    assert not torch.equal(codec.decode(tokens)[:, :, :4], codec.decode(others)[:, :, :4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(dtype: torch.dtype) -> None:
    """Images that are computed in 16 bits, or a type that two operands of an operation lack."""
    codec, _ = build(TINY)
    images = torch.rand(2, 3, 16, 16)
    tokens = codec.encode(images)
    codec.to(dtype)
    rounded, _ = build(TINY)
    rounded.load_state_dict({n: w.float() for n, w in codec.state_dict().items()})
    decoded = codec.decode(tokens)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, rounded.decode(tokens), rtol=0, atol=1e-5)
    assert codec.encode(images).shape == tokens.shape


def test_a_folder(tmp_path: Path) -> None:
    """A kind that is not registered, or a setting that is not saved."""
    codec, _ = build(TINY, quantizer="gumbel", output="haar", signed_pixels=False)
    codec.save(tmp_path)
    loaded = dvae.load(tmp_path)
    assert isinstance(loaded, VQGAN) and loaded.config == codec.config
    tokens = torch.randint(40, (1, 2, 2))
    assert torch.equal(loaded.decode(tokens), codec.decode(tokens))
    assert (loaded.vocab_size, loaded.stride, loaded.out_stride) == (40, 4, 8)


def test_a_decoder_alone() -> None:
    """An error about a missing attribute, deep in a run that completes images."""
    with torch.device("meta"):
        codec = VQGAN(VQGANConfig(**TINY, encoder=False))
    assert not any(name.startswith(("encoder", "quant_conv")) for name in codec.state_dict())
    with pytest.raises(ValueError, match="images: this codec can only decode"):
        codec.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.encode(torch.rand(1, 3, 16, 18)), "multiples of 4, got .16, 18."),
        (lambda c: c.encode(torch.rand(1, 3, 0, 16)), "multiples of 4"),
        (lambda c: c.encode(torch.rand(1, 1, 16, 16)), "images: expected .b, 3, H, W."),
        (lambda c: c.encode(2 * torch.rand(1, 3, 16, 16) - 1), "images: expected floats"),
        (lambda c: c.decode(torch.full((1, 2, 2), 40)), "tokens: expected values in .0, 39."),
        (lambda c: c.decode(torch.full((1, 2, 2), -1)), "tokens: expected values in .0, 39."),
        (lambda c: c.decode(torch.zeros(1, 4, dtype=torch.int64)), "tokens: expected int64"),
        (lambda c: c.decode(torch.zeros(1, 2, 2)), "tokens: expected int64"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    """Tokens or images that end in an index error, or in an image of something else."""
    codec, _ = build(TINY)
    with pytest.raises(ValueError, match=message):
        call(codec)


def test_an_empty_batch() -> None:
    """A stage that is given no images and fails on the last part of its data."""
    for quantizer in ("nearest", "gumbel"):
        codec, _ = build(TINY, quantizer=quantizer)
        tokens = codec.encode(torch.rand(0, 3, 16, 16))
        assert tokens.shape == (0, 4, 4) and tokens.dtype == torch.int64
        assert codec.decode(tokens).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_levels": (3,)}, "attention_levels: expected levels in .0, 2."),
        ({"width": 48}, "norm_groups: expected a divisor"),
        ({"quantizer": "gumbel", "normalized_codes": True}, "normalized_codes: expected false"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1,) * 9}, "multipliers"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    """A shape that fails where its first convolution runs."""
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**TINY, **settings})


def test_gradients_reach_all_weights() -> None:
    """A codec that can be loaded and not trained."""
    for quantizer in ("nearest", "gumbel"):
        codec, _ = build(TINY, quantizer=quantizer)
        images = torch.rand(2, 3, 16, 16)
        quantized = codec.quantize(codec.latents(images))
        loss = F.l1_loss(codec.pixels(quantized.vectors), codec.map_pixels(images))
        (loss + sum(quantized.losses.values())).backward()
        without = [name for name, p in codec.named_parameters() if p.grad is None]
        assert without == []
