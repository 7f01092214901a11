"""A VQGAN's losses against closed forms, and the two nets' gradients against plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dvae.vqgan.discriminator import PatchDiscriminator, hinge_loss, vanilla_loss
from dvae.vqgan.objective import (
    Adversary,
    Reconstruction,
    adaptive_weight,
    adversarial_losses,
    with_gradient,
)

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.25, 1.0])


def test_hinge_loss_by_hand() -> None:
    """Margins of the wrong side or sign, or a sum in place of half of two means."""
    real, fake = (0 + 0.5 + 2) / 3, (0 + 1.25 + 2) / 3
    assert float(hinge_loss(REAL, FAKE)) == pytest.approx((real + fake) / 2)


def test_vanilla_loss_by_hand() -> None:
    """Cross-entropy with the two kinds exchanged."""
    real = sum(-math.log(1 / (1 + math.exp(-x))) for x in REAL.tolist()) / 3
    fake = sum(-math.log(1 - 1 / (1 + math.exp(-x))) for x in FAKE.tolist()) / 3
    assert float(vanilla_loss(REAL, FAKE)) == pytest.approx((real + fake) / 2)


@pytest.mark.parametrize(("error", "power"), [("absolute", 1), ("squared", 2)])
def test_reconstruction_by_hand(error: str, power: int) -> None:
    """A perceptual distance that is summed over pixels or without its weight; the wrong error."""
    images, targets = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    distance = torch.tensor([0.5, 1.5])
    reconstruction = Reconstruction(error, lambda x, y: distance, 0.7)  # type: ignore[arg-type]
    loss, parts = reconstruction(images, targets)
    pixel = (
        sum(
            abs(a - b) ** power
            for a, b in zip(images.flatten().tolist(), targets.flatten().tolist(), strict=True)
        )
        / images.numel()
    )
    assert float(loss) == pytest.approx(pixel + 0.7 * 1.0)
    assert float(parts["pixel"]) == pytest.approx(pixel) and float(parts["perceptual"]) == 1.0


def test_adaptive_weight_by_hand() -> None:
    """The quotient upside down, without its bounds, or with a gradient of its own."""
    a, b = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([[0.0, 2.0]])
    weight = adaptive_weight(a, b)
    assert float(weight) == pytest.approx(5 / (2 + 1e-4)) and not weight.requires_grad
    assert float(adaptive_weight(a, torch.zeros(3))) == 1e4  # 5 / 1e-4, cut
    assert float(adaptive_weight(torch.zeros(2), b)) == 0.0


def test_with_gradient() -> None:
    """A value that the surrogate changes, or a gradient that is not the one given."""
    x = torch.rand(2, 3, requires_grad=True)
    gradient = torch.rand(2, 3)
    scalar = with_gradient(torch.tensor(7.0), x, gradient)
    scalar.backward()
    assert float(scalar) == 7.0 and x.grad is not None and torch.equal(x.grad, gradient)


class Toy(nn.Module):
    """A generator of two convolutions, whose last is the one that the adaptive weight is of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.first(x)))
        return y


def toy() -> tuple[Toy, PatchDiscriminator, Tensor, Tensor]:
    torch.manual_seed(3)
    discriminator = PatchDiscriminator(3, layers=2, width=4).double()
    with torch.no_grad():
        for weight in discriminator.parameters():
            weight.mul_(8)  # far from the small initial ones, so that logits differ
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    return Toy().double(), discriminator, x, torch.tanh(torch.randn_like(x))


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]


@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_both_nets_get_the_gradients_of_alternating_passes(loss: str, adaptive: bool) -> None:
    """Gradients that differ from those of two passes, one for each net with the other's weights
    fixed, as they are written down in the paper; a weight that is not of the last convolution."""
    generator, discriminator, x, targets = toy()
    reconstruction = Reconstruction("absolute")
    last = generator.last.weight if adaptive else None
    adversary = Adversary(discriminator, loss, 0.8, last)  # type: ignore[arg-type]
    total, own, metrics = adversarial_losses(generator(x), targets, reconstruction, adversary)
    (total + own).backward()
    found = gradients(generator), gradients(discriminator)

    generator.zero_grad()
    discriminator.zero_grad()
    images = generator(x)
    nll, g = (images - targets).abs().mean(), -discriminator(images).mean()
    weight = 0.8
    if adaptive:
        by_nll, by_g = (
            torch.autograd.grad(part, generator.last.weight, retain_graph=True)[0]
            for part in (nll, g)
        )
        weight *= float(by_nll.norm() / (by_g.norm() + 1e-4))
    wanted = torch.autograd.grad(nll + weight * g, list(generator.parameters()))
    for one, other in zip(found[0], wanted, strict=True):
        torch.testing.assert_close(one, other)
    real, fake = discriminator(targets), discriminator(generator(x).detach())
    function = {"hinge": hinge_loss, "vanilla": vanilla_loss}[loss]
    wanted = torch.autograd.grad(function(real, fake), list(discriminator.parameters()))
    for one, other in zip(found[1], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert float(total) == pytest.approx(float(nll) + weight * float(g), rel=1e-5)
    assert float(metrics["adversarial_weight"]) == pytest.approx(weight, rel=1e-5)


def test_neither_loss_reaches_the_other_net() -> None:
    """A generator that is trained to make the discriminator's loss small, or the reverse."""
    for of_generator in (True, False):
        generator, discriminator, x, targets = toy()
        adversary = Adversary(discriminator, "hinge", 1.0, generator.last.weight)
        total, own, _ = adversarial_losses(generator(x), targets, Reconstruction(), adversary)
        (total if of_generator else own).backward()
        trained, other = generator, discriminator
        if not of_generator:
            trained, other = discriminator, generator  # type: ignore[assignment]
        assert all(p.grad is not None and bool(p.grad.any()) for p in trained.parameters())
        assert all(p.grad is None for p in other.parameters())


def test_evaluation_needs_no_gradients() -> None:
    """Held-out losses that fail, that change statistics, or in which the adversary has a weight."""
    generator, discriminator, x, targets = toy()
    discriminator.eval()
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    adversary = Adversary(discriminator, "hinge", 1.0, generator.last.weight)
    with torch.no_grad():
        images = generator(x)
        total, own, metrics = adversarial_losses(images, targets, Reconstruction(), adversary)
    assert float(total) == pytest.approx(float((images - targets).abs().mean()))
    assert float(metrics["adversarial_weight"]) == 0 and float(own) > 0
    assert all(torch.equal(before[n], value) for n, value in discriminator.state_dict().items())
