"""The inverse Haar transform."""

from __future__ import annotations

import torch

from dvae.vqgan.haar import inverse_haar
from tests.parity import published_vqgan as published


def test_as_published() -> None:
    """Bands exchanged, of the wrong sign, or of another color."""
    maps = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(inverse_haar(maps), published.from_bands(maps), rtol=0, atol=1e-15)


def test_undoes_the_transform() -> None:
    """A factor that makes images darker or lighter: the transform keeps lengths."""
    images = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    # Mean and difference of neighbors, over sqrt(2): first of rows, then of columns.
    upper, lower = images[:, :, 0::2], images[:, :, 1::2]
    bands = []
    for rows in ((upper + lower) / 2**0.5, (upper - lower) / 2**0.5):
        left, right = rows[..., 0::2], rows[..., 1::2]
        bands += [(left + right) / 2**0.5, (left - right) / 2**0.5]
    ll, hl, lh, hh = bands
    details = torch.stack([lh, hl, hh], dim=2).flatten(1, 2)
    maps = torch.cat([ll, details], dim=1)
    torch.testing.assert_close(inverse_haar(maps), images, rtol=0, atol=1e-14)
    torch.testing.assert_close(maps.norm(), images.norm())
