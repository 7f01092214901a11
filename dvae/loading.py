"""Parts filled with weights that are there, without memory for weights that nobody asked for.

A part is built twice. First on the meta device, where tensors have shapes and no numbers: what it
asks for is compared with what the file holds. Then on the CPU, where each parameter is let go of as
soon as it is made, and so whatever else a module makes (buffers that are not saved, tables) is as
its class has it. The weights' tensors then take the parameters' places.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from dvae.calls import isolated
from dvae.weights import check_fits, in_types_of, narrow_type, unwrapped

# How much more than its file holds a part may make while it is built: some make and throw away.
SLACK = 2
SPARE_PARAMETERS, SPARE_NUMBERS, SPARE_MODULES = 64, 2**20, 1000
MODULES = 32  # for each parameter
# Of a file that is not here yet: bytes that its header takes for each weight, and most weights. The
# paper's 12 billion numbers are about a thousand weights.
SHORTEST_ENTRY, MAX_WEIGHTS = 50, 5_000
LONGEST = 300  # letters of another's message


class _Misfit(Exception):
    """A part cannot be built as above: its class reads its parameters, or knows them by names that
    they would lose."""


class _TooLargeError(Exception):
    """A part makes far more than its file holds."""


@isolated()
def fill(make: Callable[[], Any], weights: Mapping[str, Tensor], path: Path, what: str) -> Any:
    """A part that holds these weights: the tensors themselves, where type and layout stay.

    Whatever types, devices and modes the caller has set for torch, the part is on the CPU and
    trains.

    Args:
        make: makes the part, with any weights.
        weights: by name; names of modules around the model are taken out (`weights.unwrapped`).
        path: of the file, for messages.
        what: the part is, for messages.

    Raises:
        ValueError: the part asks for other weights, or for far more than there are.
    """
    try:
        fitting = _fit(make, weights, path, what)
        with _limit(weights), _dropping_parameters():
            part = _tried(make)
        _assign(part, fitting)
        _narrow(part, fitting)
        return part
    except _Misfit:
        pass  # copied below
    except _TooLargeError as error:
        raise _too_large(weights, path, what) from error
    return _fill_by_copies(make, weights, path, what)


@isolated()
def fit(
    make: Callable[[], Any], weights: Mapping[str, Tensor], path: Path, what: str
) -> dict[str, Tensor]:
    """The weights under the names and in the types that a part holds them in; as `fill`."""
    try:
        return _fit(make, weights, path, what)
    except _Misfit as error:
        raise ValueError(f"{path}: {what} cannot be built: {_line(error)}") from error
    except _TooLargeError as error:
        raise _too_large(weights, path, what) from error


def _fit(
    make: Callable[[], Any], weights: Mapping[str, Tensor], path: Path, what: str
) -> dict[str, Tensor]:
    with torch.device("meta"), _limit(weights):
        frame = _tried(make)
    expected = frame.state_dict()
    weights = unwrapped(weights, path, expected)
    try:
        # The class decides, as it may rename weights or add some that older files lack.
        frame.load_state_dict({n: w.to("meta") for n, w in weights.items()}, assign=True)
    except RuntimeError as error:
        check_fits(expected, weights, path, what)
        raise ValueError(f"{path}: {_line(error)}") from error
    except Exception as error:
        raise _Misfit(error) from error
    known = weights.keys() & expected.keys()
    check_fits(_only(known, expected), _only(known, weights), path, what)
    return _apart(in_types_of(expected, weights))


@isolated()
def shapes(make: Callable[[], Any], size: int, path: Path, what: str) -> dict[str, Tensor] | None:
    """The weights that a part asks for, on the meta device: shapes and types without numbers.

    Args:
        make: makes the part, with any weights.
        size: bytes of the file that is said to hold them.
        path, what: for messages, as for `fill`.

    Returns:
        By name; None for a part that cannot be built without numbers.

    Raises:
        ValueError: the part asks for far more than such a file can hold.
    """
    try:
        with torch.device("meta"), _limited(min(size // SHORTEST_ENTRY, MAX_WEIGHTS), size):
            return dict(_tried(make).state_dict())
    except _Misfit:
        return None
    except _TooLargeError as error:
        raise ValueError(
            f"{path}: has {size:,} bytes, expected many more for {what} of such a size; its config "
            "is of another model"
        ) from error


def _only(names: Iterable[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name in names}


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that lie in memory as parameters do: row by row, each in a place of its own."""
    result: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, weight in weights.items():
        weight = weight.contiguous()
        shares = weight.numel() > 0 and weight.data_ptr() in places
        result[name] = weight.clone() if shares else weight
        places.add(weight.data_ptr())
    return result


def _assign(part: nn.Module, weights: Mapping[str, Tensor]) -> None:
    names = part.named_parameters(remove_duplicate=False)
    if sum(1 for _ in names) > sum(1 for _ in part.parameters()):
        raise _Misfit("parameters of two names")  # which would become two parameters
    try:
        part.load_state_dict(dict(weights), assign=True)
    except Exception as error:
        raise _Misfit(error) from error
    if any(tensor.is_meta for tensor in _tensors(part)):
        raise _Misfit("a tensor that is made of a parameter, or is a parameter, beside it")


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    """All that modules hold: parameters, buffers and plain attributes."""
    yield from chain(part.parameters(), part.buffers())
    for module in part.modules():
        for value in vars(module).values():
            several = value.values() if isinstance(value, dict) else value
            for tensor in several if isinstance(value, dict | list | tuple | set) else (value,):
                if isinstance(tensor, Tensor):
                    yield tensor


def _fill_by_copies(
    make: Callable[[], Any], weights: Mapping[str, Tensor], path: Path, what: str
) -> Any:
    """As torch does it: a part with numbers of its own, which the weights are written over."""
    try:
        with _limit(weights):
            part = make()
    except _TooLargeError as error:
        raise _too_large(weights, path, what) from error
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {what} cannot be built: {_line(error)}") from error
    expected = part.state_dict()
    weights = unwrapped(weights, path, expected)
    try:
        part.load_state_dict(weights)
    except RuntimeError as error:
        check_fits(expected, weights, path, what)
        raise ValueError(f"{path}: {_line(error)}") from error
    _narrow(part, weights)
    return part


def _narrow(part: Any, weights: Mapping[str, Tensor]) -> None:
    """Puts what is not saved into the type of 16 bits that all weights are in, if they are."""
    dtype = narrow_type(weights)
    if dtype is not None and isinstance(part, nn.Module):
        part.to(dtype)


def _tried(make: Callable[[], Any]) -> nn.Module:
    try:
        part = make()
    except _TooLargeError:
        raise
    except Exception as error:
        raise _Misfit(error) from error
    if not isinstance(part, nn.Module):
        raise _Misfit("no module")
    return part


def _line(error: BaseException) -> str:
    """What an error says, in one line; torch's may go on with a trace of its own code."""
    return " ".join(re.split(r"\n?Exception raised from", str(error))[0].split())[:LONGEST]


def _too_large(weights: Mapping[str, Tensor], path: Path, what: str) -> ValueError:
    numbers = sum(weight.numel() for weight in weights.values())
    return ValueError(
        f"{path}: holds {len(weights):,} weights of {numbers:,} numbers, expected many more for "
        f"{what} of such a size; its config is of another model"
    )


def _limit(weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Ends, by a `_TooLargeError`, the making of modules that have far more than these weights."""
    return _limited(len(weights), sum(w.numel() for w in weights.values()))


@contextmanager
def _limited(weights: int, numbers: int) -> Iterator[None]:
    """The same for so many weights of so many numbers in all."""
    largest = {
        "parameters": SLACK * weights + SPARE_PARAMETERS,
        "numbers": SLACK * numbers + SPARE_NUMBERS,
        "modules": MODULES * weights + SPARE_MODULES,
    }
    made = dict.fromkeys(largest, 0)
    thread = threading.get_ident()

    def count(**more: int) -> None:
        if threading.get_ident() != thread:
            return  # hooks are the whole process'
        for name, number in more.items():
            made[name] += number
            if made[name] > largest[name]:
                raise _TooLargeError(name)

    def parameter_made(module: nn.Module, name: str, parameter: Any) -> None:
        count(parameters=1, numbers=0 if is_lazy(parameter) else parameter.numel())

    def module_made(module: nn.Module, name: str, submodule: Any) -> None:
        count(modules=1)

    hooks = (
        register_module_parameter_registration_hook(parameter_made),
        register_module_module_registration_hook(module_made),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _dropping_parameters() -> Iterator[None]:
    """Parameters that are made lose their numbers at once; only plain ones do."""
    thread = threading.get_ident()

    def drop(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter:
            return None
        if parameter.is_meta:
            return None
        empty = torch.empty_like(parameter.detach(), device="meta")
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(drop)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()
