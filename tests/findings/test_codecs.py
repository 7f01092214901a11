"""What is measured of a dVAE, against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dvae
from dalle1.findings.codecs import bounds, measure_codec
from dalle1.findings.relaxation_kernel import KernelDVAE
from tests.fakes import PaletteCodec, PaletteConfig

TINY = dvae.DVAEConfig(width=8, groups=2, blocks_per_group=1, codebook_size=6, bottleneck=4)


class TwoCodes(nn.Module):
    """A token of two codes for each 2x2 image, with logits that are set, and a decoder whose means
    are the share of code 1 and whose ln b is 0."""

    vocab_size = 2

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.set = torch.tensor([first, second])

    def logits(self, images: Tensor) -> Tensor:
        return self.set[None, :, None, None].expand(len(images), -1, 1, 1)

    def decoder(self, z: Tensor) -> Tensor:
        mean = z[:, 1:].expand(-1, 3, 2, 2)
        return torch.cat([mean, torch.zeros_like(mean)], 1)


def minus_log_p(mean: float) -> float:
    """Of a subpixel of 0.5, which is mapped to itself; its logit is 0."""
    return mean + math.log(2 * 0.25)


def test_bounds_of_codes_that_are_certain() -> None:
    """A KL that is left out, of the wrong sign, or averaged over another number than the
    likelihood."""
    found = bounds(TwoCodes(-60.0, 60.0), torch.full((3, 3, 2, 2), 0.5), 1.0)  # type: ignore[arg-type]
    expected = math.log(2) / 12 + minus_log_p(1.0)
    for value in (found.relaxed, found.true, found.likeliest):
        assert value == pytest.approx(expected, rel=1e-5)
    assert found.gap == pytest.approx(0, abs=1e-6) and found.entropy == pytest.approx(0, abs=1e-6)


def test_bounds_of_codes_that_are_open() -> None:
    """A true bound that takes the likeliest code, or other noise than the relaxed one."""
    images = torch.full((4000, 3, 2, 2), 0.5)
    codec = TwoCodes(0.0, 0.0)
    soft, hard = (bounds(codec, images, t) for t in (5.0, 0.01))  # type: ignore[arg-type]
    assert soft.entropy == pytest.approx(math.log(2))
    # Whatever the temperature, codes 0 and 1 are drawn alike; the argmax of equal logits is code 0.
    assert soft.true == hard.true == pytest.approx(minus_log_p(0.5), abs=0.03)
    assert soft.likeliest == pytest.approx(minus_log_p(0.0), rel=1e-6)
    assert hard.gap == pytest.approx(0, abs=5e-3)  # a cold draw is a code
    # The mean of relaxed draws is 1/2 as well: this decoder, linear in z, has no gap.
    assert soft.gap == pytest.approx(0, abs=0.03)


def test_copies_and_codes_in_use() -> None:
    """A PSNR that is a mean over images, or codes that are counted once an image."""
    codec = PaletteCodec(PaletteConfig(stride=2))
    images = torch.zeros(40, 3, 4, 4)
    images[0] += 0.1  # black, 0.1 off
    images[1, 0] = 1.0  # red
    images[2, 0, :2] = 1.0  # half red
    codec.out_stride = 2
    found = measure_codec(codec, images)  # type: ignore[arg-type]
    assert found.psnr == pytest.approx(-10 * math.log10(0.01 / 40), rel=1e-5)
    red = 6 / 160
    entropy = -red * math.log(red) - (1 - red) * math.log(1 - red)
    assert (found.codes, found.perplexity) == (2, pytest.approx(math.exp(entropy)))


def test_a_kernel_of_one_is_the_plain_codec() -> None:
    """Two convolutions that are swapped or started otherwise, and a comparison of two networks."""
    torch.manual_seed(0)
    plain, variant = dvae.DVAE(TINY), KernelDVAE(TINY, 1)
    assert {n: p.shape for n, p in plain.named_parameters()} == {
        n: p.shape for n, p in variant.named_parameters()
    }
    variant.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 8, 8)
    tokens = plain.encode(images)
    assert variant.encode(images).equal(tokens)
    torch.testing.assert_close(variant.decode(tokens), plain.decode(tokens))
    std = KernelDVAE(TINY, 3).encoder.blocks.output.conv.w.std()  # type: ignore[union-attr]
    assert std.item() == pytest.approx(1 / math.sqrt(16 * 9), rel=0.1)


def test_a_kernel_of_three_sees_its_neighbors() -> None:
    """A variant that decodes by rows of its weights, as if its kernel were 1."""
    torch.manual_seed(0)
    codec = KernelDVAE(TINY, 3)
    tokens = torch.zeros(1, 4, 4, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 0, 0] = 1
    one_hot = np.eye(6, dtype=np.float32)[changed.numpy()].transpose(0, 3, 1, 2)
    mean = codec.decoder(torch.from_numpy(one_hot))[:, :3].sigmoid()
    expected = ((mean - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(codec.decode(changed), expected)
    # The token's own square is 2 pixels; kernels of 1 in the decoder's first map would leave the
    # third token's pixels to convolutions behind it alone.
    first = codec.decoder.blocks.input
    a, b = (first(nn.functional.one_hot(t, 6).movedim(-1, 1).float()) for t in (tokens, changed))  # type: ignore[operator]
    assert (a != b).any(1)[0].nonzero().amax(0).tolist() == [1, 1]
