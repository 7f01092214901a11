"""A device that is not there: real numbers in the CPU's memory, in tensors that say that they lie
on "cuda" or "mps" and refuse to meet those of the CPU.

Torch's own fake tensors have no numbers, so nothing that reads some can run with them (decoding
does), and in a build of torch for CPUs they have no backward pass on "cuda". Here every operator
runs as usual on the CPU, forward and backward, so that results can be compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dalle1.common import fitting
from dalle1.generation.generator import Generator
from dalle1.transformer import attention

KINDS = ("cuda", "mps")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
# The host reads the result, or its shape.
READS = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class DeviceTensor(Tensor):
    """A tensor of the device. To torch's own code it is one of the meta device, which every build
    knows and for which a backward pass needs no driver; Python sees the device that is pretended.
    """

    held: Tensor  # the numbers, on the CPU
    pretended: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> DeviceTensor:
        with torch.inference_mode(False):
            like = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            made: DeviceTensor = Tensor._make_subclass(cls, like, device_for_backend_keys=device)
        made.held, made.pretended = held, device
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise RuntimeError(f"{func}: the device is there inside of `pretended` alone")

    device = property(lambda self: self.pretended)  # type: ignore[assignment]
    is_cuda = property(lambda self: self.pretended.type == "cuda")  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]
        # Torch's own gives no numbers to one of the meta device.
        return torch.tensor(data, dtype=self.dtype, device=self.device)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.device}"


class DeviceGenerator(torch.Generator):
    """A random generator that knows for which device it was made; its numbers are the CPU's."""

    devices: ClassVar[dict[int, tuple[torch.device, torch.Generator]]] = {}  # by torch's own object

    def __new__(cls, device: str | torch.device = "cpu") -> DeviceGenerator:
        made = super().__new__(cls)
        cls.devices[made._cdata] = torch.device(device), made  # kept, so that no other takes its id
        return made


class PretendedDevice(TorchDispatchMode):
    """In this context there is the device. Every operator runs on the CPU's memory.

    Raises RuntimeError for an operator that mixes tensors of both, be they only indices or masks.
    Numbers of the CPU without dimensions may be read, as by a GPU.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self.waits: list[str] = []
        """Operators for which host and device have waited for each other: copies from one to the
        other, and what the host has read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # in inference mode operators that consist of others come here
            with self:
                return func.decompose(*args, **kwargs)
        given: list[Tensor] = []
        inside = _of_each(args, lambda x: _taken(x, given))
        named = {name: _of_each(x, lambda x: _taken(x, given)) for name, x in kwargs.items()}
        there = [x for x in given if isinstance(x, DeviceTensor)]
        on_device = bool(there)
        if kwargs.get("device") is not None:
            on_device = kwargs["device"].type in (self.device.type, "meta")
            named["device"] = torch.device("cpu")
        if func is aten.copy_.default:
            on_device = isinstance(args[0], DeviceTensor)
        elif there and len(there) < len(given):
            self._check_mixed(func, args, kwargs, given)
        self._check_generator(func, kwargs.get("generator"), on_device)
        if self._waits(func, args, given, there, on_device):
            self.waits.append(str(func))
        result = func(*inside, **named)
        if not on_device:
            return result
        known = {id(x.held): x for x in there}  # what is changed in place stays what it is
        return _of_each(
            result, lambda x: known[id(x)] if id(x) in known else DeviceTensor(x, self.device)
        )

    def _check_mixed(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        declared = func._schema.arguments
        named = dict(zip((argument.name for argument in declared), args, strict=False)) | kwargs
        written = [named.get(a.name) for a in declared if a.alias_info and a.alias_info.is_write]
        here = [x for x in given if not isinstance(x, DeviceTensor)]
        if any(x.ndim for x in here) or any(x is y for x in here for y in written):
            places = [f"{x.device.type} {list(x.shape)}" for x in given]
            raise RuntimeError(f"{func}: expected one device, got {', '.join(places)}")

    def _check_generator(self, func: Any, generator: Any, on_device: bool) -> None:
        if generator is None:
            return
        device, _ = DeviceGenerator.devices.get(generator._cdata, (torch.device("cpu"), None))
        if (device.type != "cpu") != on_device:
            raise RuntimeError(f"{func}: expected another generator than one of {device}")

    def _waits(
        self,
        func: Any,
        args: tuple[Any, ...],
        given: list[Tensor],
        there: list[DeviceTensor],
        on_device: bool,
    ) -> bool:
        if func in COPIES:  # what is written counts as given too
            return len(there) not in (0, len(given)) or on_device != bool(there)
        if func in INDEXED and there:  # of a mask the places are looked up first
            return any(x is not None and x.dtype == torch.bool for x in args[1])
        return bool(there) and func in READS


def _of_each(values: Any, of: Callable[[Tensor], Any]) -> Any:
    """An operator's arguments or results, `of` each tensor among them."""
    if isinstance(values, Tensor):
        return of(values)
    if isinstance(values, list | tuple):
        return type(values)([_of_each(value, of) for value in values])
    return values


def _taken(x: Tensor, given: list[Tensor]) -> Tensor:
    given.append(x)
    return x.held if isinstance(x, DeviceTensor) else x


@contextmanager
def pretended(kind: str) -> Iterator[PretendedDevice]:
    """The device in this context. On "cuda" a captured step is run each time anew, streams and
    events do nothing, and FlexAttention, which would be compiled, is a mask made of its blocks."""
    device = PretendedDevice(kind)
    kept = (attention._mask, attention._block_mask, fitting._by_channel)
    only_lift = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", DeviceGenerator)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "device", _Current)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
        patch.setattr(Generator, "_capture", lambda generator: _Graph(generator, device))
        patch.setattr(attention, "has_triton", lambda: True)
        patch.setattr(attention, "_compiled", lambda pattern: _flex_attention)
        for function in kept:
            function.cache_clear()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes by here
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # nn.Module.to
        try:
            with device:
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(only_lift)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
            DeviceGenerator.devices.clear()
            for function in kept:
                function.cache_clear()


class _Current(nullcontext[None]):
    """The current device, of which there is one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class _Graph:
    """A captured step: what it records must not wait."""

    def __init__(self, generator: Generator, device: PretendedDevice) -> None:
        self.generator, self.device = generator, device

    def replay(self) -> None:
        before = len(self.device.waits)
        self.generator._step(self.generator.position)
        assert self.device.waits[before:] == [], "a graph cannot be captured of this"


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    position = torch.arange(q.shape[2], device=q.device)
    none = position.new_zeros(())
    mask = block_mask.mask_mod(none, none, position[:, None], position[None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def held(x: Any) -> Any:
    """What tensors of the device hold, as plain tensors, in whatever is given."""
    return tree_map_only(DeviceTensor, lambda x: x.held, x)
