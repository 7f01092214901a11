"""Images that a codec is given: in [0, 1], or refused with the range that they have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dvae import DVAE, DVAEConfig
from dvae.calls import trusted
from dvae.images import check_images
from dvae.objective import relaxed_elb

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def spoiled(value: float) -> Tensor:
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    return images


@pytest.fixture
def codec() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(width=8, bottleneck=6, groups=2, blocks_per_group=1, codebook_size=7))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (spoiled(math.nan), "got NaN"),
        (spoiled(math.inf), r"got values in \[.*, inf\]"),
        (spoiled(-math.inf), r"got values in \[-inf, "),
        (spoiled(-0.01), r"got values in \[-0.01, "),
        (spoiled(1.01), r"got values in \[.*, 1.01\]"),
        (2 * IMAGES - 1, r"from \[-1, 1\] it is \(images \+ 1\) / 2"),
        (255 * IMAGES, r"from \[0, 255\] it is images / 255"),
        ((IMAGES - 0.45) / 0.27, "before they are normalized"),
        ((IMAGES / 255 - 0.45) / 0.27, "before they are normalized"),
        (255 * IMAGES.half(), r"from \[0, 255\]"),
        ((255 * IMAGES).to(torch.uint8), r"got torch.uint8 .*; divide by 255"),
        ((255 * IMAGES).long(), "got torch.int64"),
        (IMAGES.to_sparse(), r"got torch.sparse_coo; use images.to_dense\(\)"),
    ],
)
def test_images_of_another_range_are_refused(codec: DVAE, images: Tensor, message: str) -> None:
    """Images in [-1, 1], in [0, 255], normalized, or NaN, whose tokens are senseless."""
    for method in (codec.encode, codec.logits):
        with pytest.raises(ValueError, match=f"images: expected floats.*{message}"):
            method(images)


@pytest.mark.parametrize("images", [IMAGES.numpy(), [IMAGES], "x.png", None], ids=type)
def test_what_is_no_tensor_is_refused(codec: DVAE, images: Any) -> None:
    """An array or a path that ends in an AttributeError."""
    kind = type(images).__name__
    with pytest.raises(ValueError, match=rf"images: expected floats.* got {kind}"):
        codec.encode(images)
    with pytest.raises(ValueError, match=rf"tokens: expected int64 .* got {kind}"):
        codec.decode(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_beyond_the_range_is_no_mistake(codec: DVAE, dtype: torch.dtype) -> None:
    """Resized images that are refused for the last digit of a 1, or for their type."""
    images = (spoiled(1 + 5e-4) - 4e-4).to(dtype)
    assert codec.encode(images).shape == (2, 4, 4)
    assert codec.logits(images).dtype == torch.float32
    assert codec.encode(IMAGES[:0]).shape == (0, 4, 4)
    edges = torch.tensor([0.0, 1.0]).repeat(96).reshape(1, 3, 8, 8).to(dtype)
    assert codec.encode(edges).shape == (1, 4, 4)


def test_half_a_codec_takes_the_same_images(codec: DVAE) -> None:
    """A codec in 16 bits that takes no image of 32."""
    assert codec.bfloat16().encode(IMAGES).shape == (2, 4, 4)


class ReadsNothing(TorchDispatchMode):
    """Fails where a number is read from a tensor, for which the host waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read"
        return func(*args, **(kwargs or {}))


def test_training_does_not_wait_for_the_device(codec: DVAE) -> None:
    """A check of every batch that makes the host wait in each update."""
    with trusted(), ReadsNothing():
        relaxed_elb(codec, IMAGES, 1.0, 1.0).loss.backward()
        codec.encode(IMAGES)
        codec.encode(2 * IMAGES)
    with ReadsNothing(), pytest.raises(AssertionError, match="a number is read"):
        codec.encode(IMAGES)


def test_images_without_values() -> None:
    """A plan on the meta device that reads what is not there."""
    check_images(torch.empty(2, 3, 8, 8, device="meta"))


def test_sides_of_our_own_images_are_checked() -> None:
    """A check of the sides behind that of the values, which our own code leaves out."""
    with trusted(), pytest.raises(ValueError, match=r"multiples of 8, got \[8, 12\]"):
        check_images(torch.rand(1, 3, 8, 12), stride=8)
