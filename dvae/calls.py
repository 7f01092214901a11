"""Calls from outside and from our own code: what a caller has set in torch, what is known already.

A caller may have turned on autocast, or changed torch's default type or device. What encodes,
draws, ranks or loads must give the same tokens, scores and weights all the same (`isolated`). Our
own training and tokenization set autocast on purpose, and know that their images are in [0, 1]
(`trusted`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
_TRUSTED = ContextVar("trusted", default=False)


@contextmanager
def trusted() -> Iterator[None]:
    """In this block the caller is our own code: autocast counts, and `check_images` reads no
    values, which would make the host wait for the device in every update."""
    token = _TRUSTED.set(True)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """Whether the caller is in a block of `trusted`."""
    return _TRUSTED.get()


@contextmanager
def isolated() -> Iterator[None]:
    """In this block torch is as it is by default, whatever the caller has set.

    Autocast is off, new tensors are float32 and on the CPU where nothing else is said, and they are
    no inference tensors: weights and masks that are made here are kept, and may be trained with.
    """
    default_dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if not is_trusted():
            for device in AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving inference mode turns gradients on
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if default_dtype != torch.float32:
            stack.callback(torch.set_default_dtype, default_dtype)
            torch.set_default_dtype(torch.float32)
        yield
