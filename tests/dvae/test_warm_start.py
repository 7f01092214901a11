"""The warm start: k-means and the exact transplant of its centers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dvae import DVAE, DVAEConfig
from dvae.warm_start import ContinuousBottleneck, k_means


@pytest.fixture
def codec() -> DVAE:
    torch.manual_seed(0)
    config = DVAEConfig(width=8, bottleneck=6, groups=2, codebook_size=9, residual_gain=0.5)
    return DVAE(config).eval()


@pytest.fixture
def bottleneck(codec: DVAE) -> ContinuousBottleneck:
    torch.manual_seed(1)
    return ContinuousBottleneck(codec, size=4)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_clusters(seed: int) -> None:
    """Centers that die or start in one cluster; rounds that do not take the mean."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [30.0, 30.0], [-20.0, 5.0]])
    sizes = (500, 20, 20, 3, 60)  # most of it background, as in pictures
    member = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    samples = corners[member] + 0.1 * torch.randn(len(member), 2, generator=generator)
    order = torch.randperm(len(member), generator=generator)
    centers = k_means(samples[order], 5, 20, generator)
    means = torch.stack([samples[member == j].mean(dim=0) for j in range(5)])
    gap, nearest = torch.cdist(means, centers).min(dim=1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
    assert float(gap.max()) < 1e-2


def test_k_means_of_k_points_is_the_points() -> None:
    """Two starting centers on one sample while another has none."""
    samples = torch.arange(6.0)[:, None] ** 2
    centers = k_means(samples, 6, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centers.sort(dim=0).values, samples)


def test_k_means_of_too_few() -> None:
    """Fewer samples than centers that end in an index error or in copies."""
    with pytest.raises(ValueError, match=r"3 samples.*k = 4"):
        k_means(torch.rand(3, 2), 4)


def test_install_is_exact(codec: DVAE, bottleneck: ContinuousBottleneck) -> None:
    """A forgotten bias, factor 2 or |c|^2: another center than the nearest is chosen."""
    images = torch.rand(4, 3, 8, 8)
    z = bottleneck.features(codec, images).detach()  # [4, 4, 4, 4]
    flat = z.movedim(1, -1).reshape(-1, 4)
    centers = k_means(flat, 9, 5, torch.Generator().manual_seed(0))
    bottleneck.install(codec, centers, logit_scale=3.0)
    rows = flat.double()[:, None] - centers.double()[None]
    nearest = rows.square().sum(dim=-1).argmin(dim=1)
    assert len(nearest.unique()) > 4
    assert torch.equal(codec.encode(images).flatten(), nearest)
    one_hot = torch.eye(9).reshape(9, 9, 1, 1)
    first = codec.decoder.blocks.input(one_hot)
    torch.testing.assert_close(first, bottleneck.up(centers[:, :, None, None]), rtol=0, atol=1e-4)


def test_logit_scale_is_in_units_of_the_spacing(
    codec: DVAE, bottleneck: ContinuousBottleneck
) -> None:
    """A scale that depends on the size of the features: the first noise is too much or none."""
    centers = torch.tensor([[3.0 * i, 0.0, 0.0, 0.0] for i in range(9)])  # spacing 3
    images = torch.rand(1, 3, 8, 8)
    z = bottleneck.features(codec, images).detach().double()  # [1, 4, h, w]
    bottleneck.install(codec, centers, logit_scale=2.0)
    distance = (z[:, None] - centers.double()[None, :, :, None, None]).square().sum(dim=2)
    gap = codec.logits(images).double() + 2.0 / 9 * distance  # alike for all centers
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap), rtol=0, atol=1e-3)


def test_install_centers_sets_the_scales(codec: DVAE, bottleneck: ContinuousBottleneck) -> None:
    """A ln b that is not the best constant: ln of the mean absolute error of the logits."""
    images = torch.rand(70, 3, 8, 8)  # more than one part of 64
    images[:, 1] *= 0.2  # channels that differ
    generator = torch.Generator().manual_seed(0)
    bottleneck.install_centers(codec, images, 3.0, generator)
    one_hot = F.one_hot(codec.encode(images), 9).movedim(-1, 1).float()
    mean, ln_b = codec.decoder(one_hot).detach().double().split(3, dim=1)
    x = 0.8 * images.double() + 0.1
    b = (torch.log(x / (1 - x)) - mean).abs().mean(dim=(0, 2, 3))
    expected = b.log()[None, :, None, None].expand_as(ln_b)
    torch.testing.assert_close(ln_b, expected, rtol=0, atol=1e-4)
    assert bool(mean.std(dim=(0, 2, 3)).gt(0).all())  # the means were left as they were


def test_loss_reads_the_means_only(codec: DVAE, bottleneck: ContinuousBottleneck) -> None:
    """A warm start that trains ln b, or compares pixels that were not mapped."""
    images = torch.rand(2, 3, 8, 8)
    loss = bottleneck.loss(codec, images)
    maps = codec.decoder.blocks[1:](bottleneck.up(bottleneck.features(codec, images)))
    mean = torch.sigmoid(maps[:, :3])
    torch.testing.assert_close(loss, ((mean - (0.8 * images + 0.1)) ** 2).mean())
    loss.backward()
    output = codec.decoder.blocks.output.conv.w.grad
    assert bool(output[:3].any()) and not bool(output[3:].any())
