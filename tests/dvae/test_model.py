"""The dVAE: its shape, its names, its arithmetic, its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dvae
from dvae import DVAE, DVAEConfig
from dvae.objective import map_pixels, unmap_pixels

TINY: dict[str, Any] = {
    "width": 8,
    "bottleneck": 6,
    "groups": 3,
    "blocks_per_group": 2,
    "codebook_size": 12,
}  # stride 4


@pytest.fixture
def codec() -> DVAE:
    torch.manual_seed(0)
    codec = DVAE(DVAEConfig(**TINY, residual_gain=0.5))
    with torch.no_grad():
        for parameter in codec.parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.3)  # biases that are left out must show
    return codec.eval()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def expected_shapes(
    widths: list[int], first: tuple[int, int, int], last: int, kernels: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Appendix A.1 re-stated: the key and shape of each weight, two blocks in each group."""
    n_in, n_first, kernel = first
    shapes: dict[str, tuple[int, ...]] = {"blocks.input.w": (n_first, n_in, kernel, kernel)}
    before = n_first
    for g, width in enumerate(widths, 1):
        for i in (1, 2):
            block = f"blocks.group_{g}.block_{i}"
            if before != width:
                shapes[f"{block}.id_path.w"] = (width, before, 1, 1)
            sides = [before, width // 4, width // 4, width // 4, width]
            for j, k in enumerate(kernels, 1):
                shapes[f"{block}.res_path.conv_{j}.w"] = (sides[j], sides[j - 1], k, k)
            before = width
    shapes["blocks.output.conv.w"] = (last, before, 1, 1)
    biases = {key[:-1] + "b": shape[:1] for key, shape in shapes.items()}
    return {**shapes, **biases}


def test_default_shapes_and_counts() -> None:
    """A width, kernel, identity path or name that differs from the released weights."""
    with torch.device("meta"):
        codec = DVAE()
    assert parameters(codec.encoder) == 53_786_240
    assert parameters(codec.decoder) == 43_829_766
    encoder = {key: tuple(w.shape) for key, w in codec.encoder.state_dict().items()}
    decoder = {key: tuple(w.shape) for key, w in codec.decoder.state_dict().items()}
    assert encoder == expected_shapes([256, 512, 1024, 2048], (3, 256, 7), 8192, (3, 3, 3, 1))
    assert decoder == expected_shapes([2048, 1024, 512, 256], (8192, 128, 1), 6, (1, 3, 3, 3))
    assert codec.config.stride == 8


def test_initial_weights() -> None:
    """A fan-in that forgets the kernel's area, biases that are not 0, a gain applied twice."""
    config = {"width": 64, "bottleneck": 32, "groups": 2, "codebook_size": 128}
    torch.manual_seed(0)
    plain = DVAE(DVAEConfig(**config))
    torch.manual_seed(0)
    scaled = DVAE(DVAEConfig(**config, init_gain=1.5))
    for (name, w), v in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        if w.ndim == 1:
            assert not w.any(), name
            continue
        _, n_in, k, _ = w.shape
        std, n = 1 / math.sqrt(n_in * k * k), w.numel()
        w = w.detach()
        assert abs(float(w.mean())) < 5 * std / math.sqrt(n), name
        assert abs(float(w.std()) - std) < 5 * std / math.sqrt(2 * n), name
        assert torch.equal(v, 1.5 * w), name


def test_post_gain() -> None:
    """A residual gain of 1, or 1 / blocks without the square."""
    with torch.device("meta"):
        assert DVAE().encoder.blocks.group_3.block_2.post_gain == 1 / 64
        assert DVAE().decoder.blocks.group_1.block_1.post_gain == 1 / 64
    assert DVAEConfig(groups=3, blocks_per_group=1).post_gain == pytest.approx(1 / 9)
    assert DVAEConfig(residual_gain=0.25).post_gain == 0.25


def restated(module: nn.Module, x: Tensor, config: DVAEConfig, encoder: bool) -> Tensor:
    """The network of appendix A.1 from the state dictionary alone, in float64."""
    w = {key: value.double() for key, value in module.state_dict().items()}

    def conv(x: Tensor, name: str) -> Tensor:
        kernel = w[f"{name}.w"]
        return F.conv2d(x, kernel, w[f"{name}.b"], padding=(kernel.shape[-1] - 1) // 2)

    x = conv(x.double(), "blocks.input")
    for g in range(1, config.groups + 1):
        for i in range(1, config.blocks_per_group + 1):
            block = f"blocks.group_{g}.block_{i}"
            y = x
            for j in range(1, 5):
                y = conv(y.clamp(min=0), f"{block}.res_path.conv_{j}")
            identity = conv(x, f"{block}.id_path") if f"{block}.id_path.w" in w else x
            x = identity + config.post_gain * y
        if g < config.groups:
            b, c, h, v = x.shape
            if encoder:
                x = x.reshape(b, c, h // 2, 2, v // 2, 2).amax(dim=(3, 5))
            else:
                x = x[:, :, torch.arange(2 * h) // 2][..., torch.arange(2 * v) // 2]
    return conv(x.clamp(min=0), "blocks.output.conv")


def test_forward_against_restatement(codec: DVAE) -> None:
    """A ReLU behind its convolution, average pooling, a gain on the identity path."""
    images = torch.rand(2, 3, 8, 12)
    expected = restated(codec.encoder, 0.8 * images + 0.1, codec.config, encoder=True)
    logits = codec.logits(images)
    assert logits.shape == (2, 12, 2, 3)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    relaxed = torch.rand(2, 12, 2, 3).softmax(dim=1)
    maps = codec.decoder(relaxed)
    assert maps.shape == (2, 6, 8, 12)
    expected = restated(codec.decoder, relaxed, codec.config, encoder=False)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)


def test_encoder_window() -> None:
    """Windows that see each other, or that are put back in another place or order."""
    codec = DVAE(DVAEConfig(**TINY, residual_gain=0.5, encoder_window=2))
    images = torch.rand(2, 3, 16, 24)  # windows of 8 x 8 pixels
    logits = codec.logits(images)
    assert logits.shape == (2, 12, 4, 6)
    for r in (0, 1):
        for c in (0, 1, 2):
            part = images[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
            expected = restated(codec.encoder, map_pixels(part), codec.config, encoder=True)
            window = logits[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            torch.testing.assert_close(window.double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"multiples of 8.*\[12, 8\]"):
        codec.encode(torch.rand(1, 3, 12, 8))


def test_equal_windows_have_the_tokens_of_their_logits() -> None:
    """Windows that are encoded once and put back in another's place."""
    torch.manual_seed(0)
    codec = DVAE(DVAEConfig(**TINY, residual_gain=0.5, init_gain=2.0, encoder_window=2))
    parts = torch.rand(5, 3, 8, 8)
    which = torch.randint(5, (3, 2, 4))
    images = torch.stack(
        [torch.cat([torch.cat([*parts[row]], dim=2) for row in image], dim=1) for image in which]
    )
    tokens = codec.encode(images)
    assert tokens.shape == (3, 4, 8) and len(tokens.unique()) > 2
    assert torch.equal(tokens, codec.logits(images).argmax(dim=1))
    assert torch.equal(tokens, torch.cat([codec.encode(image[None]) for image in images]))


def test_encode_is_argmax(codec: DVAE) -> None:
    """Noise in encode, an argmax over another dimension, rows and columns exchanged."""
    images = torch.rand(2, 3, 8, 12)
    tokens = codec.encode(images)
    assert tokens.shape == (2, 2, 3) and tokens.dtype == torch.int64
    assert torch.equal(tokens, codec.encode(images))
    expected = restated(codec.encoder, map_pixels(images), codec.config, encoder=True)
    assert torch.equal(tokens, expected.argmax(dim=1))


def test_decode_by_look_up_is_one_hot(codec: DVAE) -> None:
    """A look-up that forgets the bias or transposes the grid; ln b taken for the mean."""
    tokens = torch.randint(12, (3, 2, 3))
    one_hot = F.one_hot(tokens, 12).movedim(-1, 1).float()
    expected = unmap_pixels(torch.sigmoid(codec.decoder(one_hot)[:, :3]))
    images = codec.decode(tokens)
    assert images.shape == (3, 3, 8, 12) and images.dtype == torch.float32
    assert bool(((images >= 0) & (images <= 1)).all())
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_mixed_precision_keeps_the_relaxation_in_32_bits(codec: DVAE) -> None:
    """Convolutions next to the relaxation run in 16 bits under autocast (appendix A.2)."""
    images, relaxed = torch.rand(1, 3, 8, 8), torch.rand(1, 12, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert codec.logits(images).dtype == torch.float32
        assert codec.decoder.blocks.input(relaxed).dtype == torch.float32
        assert codec.decoder(relaxed).dtype == torch.bfloat16


def test_save_and_load(codec: DVAE, tmp_path: Path) -> None:
    """Weights cast or left out, a config that is not kept, other sections overwritten."""
    folder = tmp_path / "deep" / "codec"
    folder.mkdir(parents=True)
    other = {"kind": "clip", "width": 3}
    (folder / "config.json").write_text(json.dumps({"format": 2, "ranker": other}))
    codec.save(folder)
    again = dvae.load(folder)
    assert not again.training
    assert again.config == codec.config
    weights, expected = again.state_dict(), codec.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert json.loads((folder / "config.json").read_text())["ranker"] == other
    assert {p.name for p in folder.iterdir()} == {"config.json", "dvae.safetensors"}
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(again.decode(again.encode(images)), codec.decode(codec.encode(images)))


@pytest.mark.parametrize("name", ["config.json", "dvae.safetensors"])
@pytest.mark.parametrize("kept", [None, 0, 20])
def test_damaged_folder(codec: DVAE, tmp_path: Path, name: str, kept: int | None) -> None:
    """A missing or cut file that loads as something else or raises without naming it."""
    codec.save(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=name):
        dvae.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"dvae": 3}', '{"dvae": {"wdith": 8}}', '{"dvae": {"width": 16}}'],
)
def test_config_that_does_not_fit(codec: DVAE, tmp_path: Path, content: str) -> None:
    """A config of another shape, or with an unknown key, that is taken or raises no ValueError."""
    codec.save(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json|safetensors"):
        dvae.load(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 1, 8, 8), r"\[b, 3, H, W\].*\[1, 1, 8, 8\]"),
        (torch.rand(3, 8, 8), r"\[3, 8, 8\]"),
        (torch.rand(1, 3, 8, 10), r"multiples of 4.*\[8, 10\]"),
        (torch.rand(1, 3, 0, 8), r"multiples of 4.*\[0, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ],
)
def test_images_that_do_not_fit(codec: DVAE, images: Tensor, message: str) -> None:
    """A picture of another shape or type that is encoded all the same."""
    with pytest.raises(ValueError, match=message):
        codec.encode(images)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[[0, 12]]]), r"\[0, 11\].*\[0, 12\]"),
        (torch.tensor([[[-1, 3]]]), r"\[0, 11\].*\[-1, 3\]"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\[2, 2\]"),
        (torch.zeros(1, 2, 2, dtype=torch.int32), "int32"),
        (torch.zeros(1, 2, 2), "float32"),
    ],
)
def test_tokens_that_do_not_fit(codec: DVAE, tokens: Tensor, message: str) -> None:
    """A token -1 that wraps around to the last code, or a grid without its batch."""
    with pytest.raises(ValueError, match=message):
        codec.decode(tokens)


def test_unknown_setting() -> None:
    """A misspelled setting that is silently swallowed."""
    with pytest.raises(ValueError, match="codebook"):
        DVAEConfig(codebook=12)  # type: ignore[call-arg]
