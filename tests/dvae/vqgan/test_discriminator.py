"""PatchGAN layer by layer, and its norms over several ranks' images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.vqgan.discriminator import BatchNorm2d, PatchDiscriminator, smallest_side


@pytest.mark.parametrize(("layers", "parameters"), [(3, 2_765_633), (2, 663_361)])
def test_parameters_are_the_published(layers: int, parameters: int) -> None:
    """A bias in front of a norm, a width that grows further, or a layer too many."""
    discriminator = PatchDiscriminator(layers=layers)
    assert sum(p.numel() for p in discriminator.parameters()) == parameters
    names = set(discriminator.state_dict())
    assert f"main.{3 * layers + 2}.bias" in names and "main.3.num_batches_tracked" in names
    assert {n for n in names if n.startswith("main.2.")} == {"main.2.weight"}


def restated(state: dict[str, Tensor], x: Tensor, layers: int) -> Tensor:
    """The net by its weights' names (published.md, section 1.8), each norm written out."""
    x = F.conv2d(x, state["main.0.weight"], state["main.0.bias"], stride=2, padding=1)
    for i in range(layers):
        x = torch.where(x > 0, x, 0.2 * x)
        stride = 2 if i < layers - 1 else 1
        x = F.conv2d(x, state[f"main.{3 * i + 2}.weight"], stride=stride, padding=1)
        columns = x.transpose(0, 1).flatten(1)  # all of a channel's numbers
        mean = columns.mean(1)[:, None, None]
        deviation = (columns.var(1, correction=0)[:, None, None] + 1e-5).sqrt()
        gain, bias = (state[f"main.{3 * i + 3}.{n}"][:, None, None] for n in ("weight", "bias"))
        x = (x - mean) / deviation * gain + bias
    last = f"main.{3 * layers + 2}"
    return F.conv2d(
        torch.where(x > 0, x, 0.2 * x), state[f"{last}.weight"], state[f"{last}.bias"], padding=1
    )


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_logits_layer_by_layer(layers: int) -> None:
    """A slope, a stride, a padding or a norm in the wrong place."""
    torch.manual_seed(layers)
    discriminator = PatchDiscriminator(layers=layers, width=4)
    state = {name: value.double() for name, value in discriminator.state_dict().items()}
    x = torch.randn(3, 3, 40, 48)
    logits = discriminator(x)
    torch.testing.assert_close(
        logits.double(), restated(state, x.double(), layers), rtol=1e-4, atol=1e-5
    )
    side = smallest_side(layers)
    assert discriminator(torch.randn(2, 3, side, side)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.randn(2, 3, side - 1, side - 1))


def test_initial_weights() -> None:
    """torch's own initial weights, with which the adversary is a hundred times as loud."""
    torch.manual_seed(0)
    for module in PatchDiscriminator().main:
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(module.weight.mean().item()) < 0.001
        elif isinstance(module, BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not bool(module.bias.any())


def test_norm_over_ranks_is_the_norm_over_all_images() -> None:
    """Statistics of each rank alone, or a mean of variances that forgets how means differ; running
    statistics that differ from torch's."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 4) * torch.rand(6, 1, 1, 1) + torch.randn(6, 5, 1, 1)
    whole, split = nn.BatchNorm2d(5), BatchNorm2d(5)
    with torch.no_grad():
        for norm in (whole, split):
            norm.weight.copy_(torch.arange(5) + 0.5)
            norm.bias.copy_(torch.arange(5) - 2.0)
    parts = []

    def gather(rows: Tensor) -> Tensor:
        """Rows of the first rank's images to those of all: the others' as they would send them."""
        others = x[2:]
        sent = [others.mean(dim=(2, 3)), others.var(dim=(2, 3), correction=0)]
        parts.append(rows)
        return torch.cat([rows, torch.cat(sent, dim=1)])

    split.gather = gather
    mine = x[:2].clone().requires_grad_()
    expected = whole(torch.cat([mine, x[2:]]))[:2]
    (wanted,) = torch.autograd.grad(expected.square().sum(), mine)
    found = split(mine)
    (got,) = torch.autograd.grad(found.square().sum(), mine)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, wanted)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name))
    split.eval(), whole.eval()
    torch.testing.assert_close(split(mine), whole(mine))
    assert len(parts) == 1  # evaluation asks no one
