"""Safetensors files that are written tensor by tensor."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvae.safetensors_writer import DTYPES, byte_count, check_space, write_safetensors


def of_each_type() -> dict[str, Tensor]:
    """Tensors of all types, empty ones, one without dimensions, names that JSON escapes."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2, (3, 5), generator=generator)
    tensors = {f"layers.{i}.w": numbers.to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        'a "name" \\ é': torch.randn(4, generator=generator),
    }


def test_the_file_is_that_of_the_package(tmp_path: Path) -> None:
    """An offset, an order, a padding or an escape that another reader takes otherwise."""
    tensors = of_each_type()
    for count in range(1, len(tensors) + 1):  # headers of all lengths, so of all paddings
        chosen = dict(list(tensors.items())[-count:])
        save_file(chosen, tmp_path / "theirs")
        write_safetensors(tmp_path / "ours", chosen, chosen.__getitem__)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_size > byte_count(tensors)


def test_tensors_in_any_layout(tmp_path: Path) -> None:
    """Numbers in the order of memory and not in that of the rows; a view written in full."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": base.t(), "part": base[1:3, ::2], "repeated": base[0].expand(3, 6)}
    write_safetensors(tmp_path / "x", tensors, tensors.__getitem__)
    held = load_file(tmp_path / "x")
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())


def test_one_tensor_is_there_at_a_time(tmp_path: Path) -> None:
    """Tensors that are kept until the file is done: an import of twice the memory."""
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        gc.collect()
        assert all(reference() is None for reference in alive), name
        tensor = torch.full((10,), float(len(alive)))
        alive.append(weakref.ref(tensor))
        return tensor

    seen: list[int] = []
    expected = {f"w{i}": torch.empty(10, device="meta") for i in range(5)}
    write_safetensors(tmp_path / "x", expected, read, seen.append)
    assert len(alive) == 5 and sum(seen) == byte_count(expected) == 200
    assert load_file(tmp_path / "x")["w3"].tolist() == [3.0] * 10


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3), r"'w': expected shape \[2\] of torch.float32, got \[3\]"),
        (torch.zeros(2, dtype=torch.float16), "got .* of torch.float16"),
    ],
)
def test_a_tensor_that_is_not_as_announced(tmp_path: Path, tensor: Tensor, message: str) -> None:
    """A header that lies about what follows it."""
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x", {"w": torch.zeros(2)}, lambda name: tensor)


def test_a_type_that_the_format_lacks(tmp_path: Path) -> None:
    """A KeyError, or numbers of another type."""
    tensor = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(
        ValueError, match=r"'w': safetensors holds no numbers of type torch\.complex"
    ):
        write_safetensors(tmp_path / "x", {"w": tensor}, lambda name: tensor)


def test_space_is_checked_before(tmp_path: Path) -> None:
    """Hours of writing that end in a full disk."""
    check_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(ValueError, match=r"expected 10,000,.* bytes free, got .*; free "):
        check_space(tmp_path / "not" / "there", 10**19)
