"""The dVAE that was published with the paper: its encoder and decoder files -> DVAE.

The files are pickled module trees of the package `dall_e`; see `dvae.pickles` for how they are
read without running them. Keys and shapes are those of `dvae.model`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dvae.calls import isolated
from dvae.loading import fill
from dvae.model import DVAE, DVAEConfig
from dvae.pickles import read_tensors
from dvae.weights import check_fits, unwrapped

MAX_GROUPS = 8  # the published have 4

# The classes of the two published trees.
_CLASSES = {
    "dall_e.encoder": {"Encoder", "EncoderBlock"},
    "dall_e.decoder": {"Decoder", "DecoderBlock"},
    "dall_e.utils": {"Conv2d"},
    "torch.nn.modules.container": {"Sequential"},
    "torch.nn.modules.activation": {"ReLU"},
    "torch.nn.modules.pooling": {"MaxPool2d"},
    "torch.nn.modules.upsampling": {"Upsample"},
    "torch.nn.modules.linear": {"Identity"},
}


@isolated()
def load_released(encoder: str | Path, decoder: str | Path) -> DVAE:
    """The published dVAE, in eval mode, from its two files; see `read_released`."""
    config, weights = read_released(encoder, decoder)
    codec: DVAE = fill(lambda: DVAE(config), weights, Path(encoder), "a released dVAE")
    return codec.eval()


@isolated()
def read_released(encoder: str | Path, decoder: str | Path) -> tuple[DVAEConfig, dict[str, Tensor]]:
    """The shape and the weights, by our names, of the published dVAE's two files.

    Each is the published pickle, or a state dictionary of that part (torch.save or safetensors).
    Nothing in the files is executed. The size is read off the weights.

    Raises:
        ValueError: a file is missing, cut short, foreign, holds anything but tensors and the
            published module classes, or the two do not belong together.
    """
    parts = {"encoder": _read(encoder, "encoder"), "decoder": _read(decoder, "decoder")}
    config = _config(parts, encoder, decoder)
    with torch.device("meta"):
        frame = DVAE(config)
    check_fits(frame.encoder.state_dict(), parts["encoder"], encoder, "a released encoder")
    check_fits(frame.decoder.state_dict(), parts["decoder"], decoder, "a released decoder")
    return config, {
        f"{part}.{name}": weight for part, held in parts.items() for name, weight in held.items()
    }


def _allows(module: str, name: str) -> bool:
    return name in _CLASSES.get(module, set())


def _read(path: str | Path, part: str) -> dict[str, Tensor]:
    tensors, root = read_tensors(path, _allows)
    if root not in ("", f"dall_e.{part}.{part.capitalize()}"):
        raise ValueError(f"{path}: expected the released {part}, got a {root}")
    tensors = unwrapped(tensors, path)
    for key in ("blocks.input.w", "blocks.output.conv.w"):
        if key not in tensors or tensors[key].ndim != 4:
            raise ValueError(f"{path}: has no weight {key!r} of a released {part}")
    return tensors


def _config(
    parts: dict[str, dict[str, Tensor]], encoder: str | Path, decoder: str | Path
) -> DVAEConfig:
    """The shape of both parts, from the ends of the encoder and of the decoder."""
    first, last = (parts["encoder"][f"blocks.{end}.w"] for end in ("input", "output.conv"))
    start = parts["decoder"]["blocks.input.w"]
    if first.shape[2] == 1 or start.shape[2] != 1:
        raise ValueError(
            f"expected the encoder's file, then the decoder's; got {encoder} and {decoder}"
        )
    if start.shape[1] != last.shape[0]:
        raise ValueError(
            f"{decoder} reads {start.shape[1]} tokens, but {encoder} writes {last.shape[0]}"
        )
    blocks = {tuple(key.split(".")[1:3]) for key in parts["encoder"] if ".block_" in key}
    groups = max(1, len({group for group, _ in blocks}))
    if groups > MAX_GROUPS:
        raise ValueError(f"{encoder}: {groups} groups, of which each doubles the width")
    return DVAEConfig(
        channels=first.shape[1],
        width=first.shape[0],
        bottleneck=start.shape[0],
        groups=groups,
        blocks_per_group=max(1, len(blocks) // groups),
        codebook_size=last.shape[0],
    )
