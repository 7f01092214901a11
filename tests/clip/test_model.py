"""CLIP: names, loss, pooling, causality, pictures of any size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle1 import CLIP, CLIPConfig, Model
from dalle1.clip import ranker as clip_ranker
from dalle1.clip.vit import SelfAttention
from tests.conftest import randomize

TINY: dict[str, Any] = {
    "embedding": 8,
    "image_size": 8,
    "patch_size": 4,
    "vision_width": 12,
    "vision_layers": 2,
    "vision_heads": 3,
    "text_vocab": 20,
    "text_length": 7,
    "text_width": 8,
    "text_layers": 2,
    "text_heads": 2,
}
CAPTIONS = torch.tensor([[18, 3, 4, 19, 0, 0, 0], [18, 5, 6, 7, 8, 19, 0], [18, 1, 19, 0, 0, 0, 0]])


@pytest.fixture
def clip() -> CLIP:
    clip = CLIP(CLIPConfig(**TINY))
    scale = clip.logit_scale.detach().clone()
    randomize(clip, 0)
    with torch.no_grad():
        clip.logit_scale.copy_(scale)
    return clip.eval()


def test_names_and_counts() -> None:
    """A name or shape that differs from the published ViT-B/32, which could not be loaded."""
    with torch.device("meta"):
        clip = CLIP()
    shapes = {key: tuple(w.shape) for key, w in clip.state_dict().items() if key != "logit_scale"}
    expected: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (50, 768),
        "visual.proj": (768, 512),
        "visual.conv1.weight": (768, 3, 32, 32),
        "positional_embedding": (77, 512),
        "text_projection": (512, 512),
        "token_embedding.weight": (49408, 512),
    }
    norms = {"visual.ln_pre": 768, "visual.ln_post": 768, "ln_final": 512}
    for tower, w in (("visual.transformer", 768), ("transformer", 512)):
        for i in range(12):
            block = f"{tower}.resblocks.{i}"
            norms[f"{block}.ln_1"] = norms[f"{block}.ln_2"] = w
            expected |= {
                f"{block}.attn.in_proj_weight": (3 * w, w),
                f"{block}.attn.in_proj_bias": (3 * w,),
                f"{block}.attn.out_proj.weight": (w, w),
                f"{block}.attn.out_proj.bias": (w,),
                f"{block}.mlp.c_fc.weight": (4 * w, w),
                f"{block}.mlp.c_fc.bias": (4 * w,),
                f"{block}.mlp.c_proj.weight": (w, 4 * w),
                f"{block}.mlp.c_proj.bias": (w,),
            }
    for name, w in norms.items():
        expected |= {f"{name}.weight": (w,), f"{name}.bias": (w,)}
    assert shapes == expected
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313


@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_torch(causal: bool) -> None:
    """Projections split in another order than the published weights were trained for."""
    ours, torchs = SelfAttention(12, 3, causal), nn.MultiheadAttention(12, 3, batch_first=True)
    randomize(torchs, 0)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 5, 12)
    mask = torch.ones(5, 5).triu(1).bool() if causal else None
    expected, _ = torchs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_image_encoder_against_restatement(clip: CLIP) -> None:
    """Post-norm, patches in another order, the class token last, GELU for QuickGELU."""
    v = clip.visual
    pixels = torch.randn(2, 3, 8, 8)
    patches = [pixels[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)]
    x = torch.stack(patches, dim=1) @ v.conv1.weight.flatten(1).t()
    x = torch.cat([v.class_embedding.expand(2, 1, 12), x], dim=1) + v.positional_embedding
    x = v.ln_pre(x)
    for block in v.transformer.resblocks:
        x = x + block.attn(block.ln_1(x))
        y = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(y / (1 + torch.exp(-1.702 * y)))
    expected = v.ln_post(x[:, 0]) @ v.proj
    torch.testing.assert_close(v(pixels), expected, rtol=1e-4, atol=1e-5)


def test_loss_by_hand(clip: CLIP) -> None:
    """One direction alone, embeddings that are not normalized, a scale that is not exp'd."""
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        loss = clip.loss(images, CAPTIONS).item()
        a = clip.visual(clip.preprocess(images)).double().numpy()
        b = clip.encode_text(CAPTIONS).double().numpy()
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, rtol=1e-6)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    logits = a @ b.T / 0.07

    def cross_entropy(rows: np.ndarray) -> float:
        return float(np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(rows)]))

    expected = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    assert loss == pytest.approx(expected, rel=1e-4)


def test_loss_with_drawings_by_hand(clip: CLIP) -> None:
    """Drawings that a text does not see, that have a text of their own, or of one rank alone."""
    images, drawings = torch.rand(3, 3, 8, 8), torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        a = clip.encode_image(images).double().numpy()
        d = clip.encode_image(drawings).double().numpy()
        b = clip.encode_text(CAPTIONS).double().numpy()
    of_texts = b @ np.concatenate([a, d]).T / 0.07
    of_images = a @ b.T / 0.07

    def cross_entropies(rows: np.ndarray) -> np.ndarray:
        return np.array([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(rows)])

    expected = (cross_entropies(of_images) + cross_entropies(of_texts)) / 2
    with torch.no_grad():
        loss = clip.loss(images, CAPTIONS, drawings=drawings).item()
        everything = [torch.from_numpy(rows).float() for rows in (a, b, d)]

        def near(some: Tensor, others: Tensor) -> bool:
            return bool((some - others).abs().max() < 1e-5)

        def runs(rows: Tensor, length: int) -> list[Tensor]:
            return [rows[i : i + length] for i in range(len(rows) - length + 1)]

        def gather(rows: Tensor) -> Tensor:
            """All ranks' rows of what these rows are a part of."""
            return next(e for e in everything if any(near(rows, r) for r in runs(e, len(rows))))

        shares = [
            clip.loss(images[i:j], CAPTIONS[i:j], gather, i, drawings[k:n]).item()
            for i, j, k, n in ((0, 1, 0, 2), (1, 3, 2, 5))
        ]
    assert loss == pytest.approx(expected.mean(), rel=1e-4)
    assert shares[0] == pytest.approx(expected[:1].mean(), rel=1e-4)
    assert shares[1] == pytest.approx(expected[1:].mean(), rel=1e-4)


def test_logit_scale_is_clipped(clip: CLIP) -> None:
    """A logit scale beyond 100, which made the authors' training unstable."""
    assert clip.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(100))
        at_limit = clip.loss(images, CAPTIONS).item()
        clip.logit_scale.fill_(math.log(5000))
        assert clip.scale().item() == pytest.approx(100)
        assert clip.loss(images, CAPTIONS).item() == pytest.approx(at_limit, rel=1e-5)


@pytest.mark.parametrize("scale", [99.0, 100.0, 100.001, 120.0, 5000.0])
def test_logit_scale_above_its_limit_still_learns(clip: CLIP, scale: float) -> None:
    """A scale that is cut off in the forward pass: its gradient is 0, and it never comes back."""
    images = torch.rand(3, 3, 8, 8)
    gradients = []
    for value in (min(scale, 100.0), scale):
        with torch.no_grad():
            clip.logit_scale.fill_(math.log(value))
        clip.zero_grad()
        clip.loss(images, CAPTIONS).backward()
        assert clip.logit_scale.grad is not None
        gradients.append(clip.logit_scale.grad.item())
    assert gradients[0] != 0 and gradients[1] == pytest.approx(gradients[0], rel=1e-3)


def test_feature_is_read_at_the_end(clip: CLIP) -> None:
    """A text that sees what is behind its end, or whose feature is read somewhere else."""
    with torch.no_grad():
        whole = clip.encode_text(CAPTIONS)
        for row, caption, feature in zip(range(3), CAPTIONS, whole, strict=True):
            end = caption.tolist().index(19)
            cut = clip.encode_text(caption[None, : end + 1])[0]
            torch.testing.assert_close(cut, feature, rtol=1e-4, atol=1e-6)
            for p in range(7):
                other = caption.clone()
                other[p] = 2 if p != end else 18
                if p == 0 or (p < end and caption[p] != 2):
                    moved = clip.encode_text(other[None])[0]
                    assert not torch.allclose(moved, feature, atol=1e-4), (row, p)
                elif p > end:
                    moved = clip.encode_text(other[None])[0]
                    torch.testing.assert_close(moved, feature, rtol=1e-4, atol=1e-6)


def test_preprocess_of_the_right_size(clip: CLIP) -> None:
    """Means and deviations exchanged, or pixels that are normalized twice."""
    images = torch.rand(2, 3, 8, 8)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = (images.double().numpy() - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(clip.preprocess(images).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (24, 37), (40, 16), (5, 7), (8, 13)])
def test_preprocess_against_pillow(clip: CLIP, height: int, width: int) -> None:
    """Pictures that are stretched, cropped at a corner, or resized without antialiasing."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    # As published: the longer side cut to whole pixels, the crop's corner rounded.
    size = (8 * width // min(height, width), 8 * height // min(height, width))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 8) / 2), round((size[1] - 8) / 2)
    crop = np.asarray(small.crop((left, top, left + 8, top + 8)), dtype=np.float32) / 255
    config = clip.config
    got = clip.preprocess(images)[0].permute(1, 2, 0) * torch.tensor(config.std)
    got = got + torch.tensor(config.mean)
    assert got.shape == (8, 8, 3)
    assert float((got - torch.from_numpy(crop)).abs().max()) < 0.02


def test_every_parameter_learns(clip: CLIP) -> None:
    """A parameter that the loss does not reach, such as the logit scale."""
    clip.loss(torch.rand(3, 3, 8, 8), CAPTIONS).backward()
    for name, parameter in clip.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "image_size 9 must be a multiple of patch_size 4"),
        ({"vision_heads": 5}, "vision_width 12 must be a multiple of vision_heads 5"),
        ({"text_heads": 3}, "text_width 8 must be a multiple of text_heads 3"),
        ({"embeding": 3}, "embeding"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    """A config that does not fit, or an unknown setting that is swallowed."""
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), r"\[3, 8, 8\]"),
        (torch.rand(1, 1, 8, 8), r"\[1, 1, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ],
)
def test_image_errors(clip: CLIP, images: Tensor, message: str) -> None:
    """8-bit pixels taken for [0, 1], or a grey picture that is broadcast."""
    with pytest.raises(ValueError, match=message):
        clip.encode_image(images)


@pytest.mark.parametrize("tokens", [CAPTIONS[0], torch.ones(1, 8, dtype=torch.int64)])
def test_text_errors(clip: CLIP, tokens: Tensor) -> None:
    """A text longer than the positions, or without its batch."""
    with pytest.raises(ValueError, match="at most 7"):
        clip.encode_text(tokens)


def test_scores_are_cosines_whatever_is_scored_at_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores scaled by the logit scale, not cosines; parts or captions in another order."""
    clip = model.ranker
    assert isinstance(clip, CLIP)
    images, captions = torch.rand(5, 3, 8, 8), ["a red cat", "one small mat"]
    with torch.no_grad():
        expected = torch.stack([clip(images, clip.ids(caption))[:, 0] for caption in captions])
        a, b = clip.encode_image(images), clip.encode_text(clip.ids(captions[0]))
    torch.testing.assert_close(expected[0], torch.cosine_similarity(a, b, dim=1))
    for count in (1, 2, 256):
        monkeypatch.setattr(clip_ranker, "SCORED", count)
        got = clip.score(captions, images)
        assert got.shape == (2, 5) and got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
