"""VQGANs as they are published: taming-transformers', latent diffusion's, Sber's, LlamaGen's,
DALL·E mini's, min-dalle's.

All become codecs of one kind. The shape is read off the weights; a file of settings beside them is
compared with it. The files are checkpoints of PyTorch Lightning, state dictionaries, safetensors or
Flax' msgpack. Nothing in them is executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from dalle1.published.beginnings import beginning
from dalle1.published.msgpack import read_msgpack
from dalle1.published.parts import Family, Files, LazyWeight, PublishedModel, PublishedPart
from dalle1.published.settings import mistake
from dalle1.published.vqgan_names import (
    FILTERS,
    REMAP,
    Layout,
    layout_of,
    level_count,
    our_name,
    own_names,
)
from dalle1.published.vqgan_settings import check_settings
from dvae.loading import fit
from dvae.pickles import is_beside_weights, read_tensors
from dvae.vqgan.config import MAX_LEVELS, VQGANConfig
from dvae.vqgan.model import KIND, VQGAN
from dvae.weights import unwrapped

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".msgpack")
FOLDERS = (".", "ckpts", "checkpoints")  # where checkpoints lie in a published folder
LAST, FORMER = "last.ckpt", "epoch="  # how Lightning calls the newest and the others
HAAR = 2**-0.5  # all four taps of the two filters, but for one sign
WHAT = "a VQGAN"
# Of what the files do not tell: theirs normalize, compute and scale so.
TOLD: dict[Layout, dict[str, object]] = {
    "sber_haar": {"output": "haar"},
    "llamagen": {"normalized_codes": True},
    "detokenizer": {"encoder": False, "signed_pixels": False, "norm_eps": 1e-5},
}


WANTED = Files(
    needed=(
        (
            LAST,
            *(
                f"{below}*{suffix}"
                for below in ("", "ckpts/", "checkpoints/")
                for suffix in SUFFIXES
            ),
        ),
    ),
    beside=(("*.yaml",), ("*.yml",), ("configs/model.yaml", "configs/model.yml")),
)


def read_codec_part(
    path: Path, signed_pixels: bool | None = None, norm_groups: int = 32
) -> PublishedPart:
    """The codec of a file, or of a folder that holds one.

    Args:
        path: of one of the layouts of `vqgan_names`.
        signed_pixels: whether its nets see pixels in [-1, 1]; None: as the layout's authors do it,
            in [0, 1] for Flax files (DALL·E mini) and min-dalle's, else in [-1, 1].
        norm_groups: of its group norms; all published have 32.

    Raises:
        ValueError: it is missing, cut short, no VQGAN's, of several models, restricts its codes, or
            names what weights have no use for.
    """
    path = find_weights(path)
    if path.suffix == ".msgpack":
        return codec_part(read_msgpack(path), path, signed_pixels, norm_groups)
    tensors = unwrapped(read_tensors(path, ignores=is_beside_weights)[0], path)
    weights = {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
    return codec_part(weights, path, signed_pixels, norm_groups)


def codec_part(
    held: Mapping[str, LazyWeight],
    path: Path,
    signed_pixels: bool | None = None,
    norm_groups: int = 32,
) -> PublishedPart:
    """The codec of weights that are held by their published names; as `read_codec_part`.

    path: of their file, for messages, and beside which settings are looked for.
    """
    names = own_names(held)
    layout = layout_of(names.values())
    if layout is None:
        raise ValueError(
            f"{path}: expected {WHAT}, got weights without a codebook and a decoder; an "
            "autoencoder with continuous latents has no tokens"
        )
    if REMAP in names.values():
        raise ValueError(
            f"{path}: {REMAP!r}: expected all codes, got a model that is restricted to some and "
            "draws others by chance; take the file of the unrestricted model"
        )
    levels = level_count(names.values(), layout)
    weights: dict[str, LazyWeight] = {}
    for name, own in names.items():
        ours = our_name(own, layout, levels)
        if ours is not None:
            weights[ours] = partial(_torch_order, held[name]) if layout == "flax" else held[name]
        elif own.startswith(FILTERS):
            _check_filter(held[name](), own, path)
    shapes = {name: weight().to("meta") for name, weight in weights.items()}
    told = {"norm_groups": norm_groups, "signed_pixels": layout != "flax", **TOLD.get(layout, {})}
    if signed_pixels is not None:
        told["signed_pixels"] = signed_pixels
    config = _config(shapes, levels, told, path)
    fit(lambda: VQGAN(config), shapes, path, WHAT)
    check_settings(config, path)
    return PublishedPart(KIND, config, weights, path)


def _torch_order(weight: LazyWeight) -> Tensor:
    """A kernel [height, width, in, out] of Flax as torch's [out, in, height, width]."""
    tensor = weight()
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor


def _check_filter(taps: Tensor, name: str, path: Path) -> None:
    """Raises ValueError where a filter of the inverse transform is not Haar's."""
    signs = (1, -1) if name.rpartition(".")[2].startswith("g1") else (1, 1)
    expected = torch.tensor([sign * HAAR for sign in signs])
    if taps.numel() != 2 or not torch.allclose(taps.flatten().float(), expected, atol=1e-3):
        raise ValueError(
            f"{path}: {name}: expected the taps {expected.tolist()} of Haar's filter, got "
            f"{taps.flatten()[:4].tolist()}; no other wavelet is known"
        )


def _config(
    shapes: Mapping[str, Tensor], levels: int, told: Mapping[str, object], path: Path
) -> VQGANConfig:
    """The shape of a codec, from the weights of its decoder and codebook, and from what is told."""

    def shape(name: str, ndim: int = 4) -> torch.Size:
        if name not in shapes or shapes[name].ndim != ndim:
            raise ValueError(f"{path}: has no weight {name!r} of {WHAT}")
        return shapes[name].shape

    if not 0 < levels <= MAX_LEVELS:
        raise ValueError(f"{path}: expected 1 to {MAX_LEVELS} levels of a decoder, got {levels}")
    widths = [shape(f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    width = math.gcd(*widths)
    if told.get("encoder", True):
        width = shape("encoder.conv_in.weight")[0]
    blocks = sum(name.startswith("decoder.up.0.block.") for name in shapes if _ends(name))
    codes = shape("quantize.embedding.weight", 2)
    out = shape("decoder.conv_out.weight")[0]
    attends = [f"decoder.up.{level}.attn.0.q.weight" in shapes for level in range(levels)]
    if not width or any(n % width for n in widths):
        raise ValueError(
            f"{path}: expected levels of a multiple of {width} channels, got {widths}; the encoder "
            "and the decoder are of different models"
        )
    settings = {
        "channels": out // 4 if told.get("output") == "haar" else out,
        "width": width,
        "multipliers": tuple(n // width for n in widths),
        "blocks_per_level": blocks - 1,
        "attention_levels": tuple(level for level in range(levels) if attends[level]),
        "latent_channels": shape("post_quant_conv.weight")[0],
        "embedding_dim": codes[1],
        "codebook_size": codes[0],
        "quantizer": "gumbel" if "quantize.proj.weight" in shapes else "nearest",
    }
    try:
        return VQGANConfig.model_validate({**settings, **told})
    except ValidationError as error:
        raise ValueError(f"{path}: no shape of {WHAT}: {mistake(error)}") from error


def _ends(name: str) -> bool:
    """Whether a weight is one of those that each residual block has once."""
    return name.endswith(".conv1.weight")


def find_weights(path: Path) -> Path:
    """The file of a folder that holds a codec's weights; a file is itself.

    Raises ValueError where there is none, or where there are several.
    """
    if not path.is_dir():
        return path
    found = _weights_in(path)
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(file.relative_to(path)) for file in found[:5]) or "none"
    raise ValueError(
        f"{path}: expected one file of weights ({', '.join(SUFFIXES)}), got {names}; give the file "
        "itself"
    )


def _weights_in(folder: Path) -> list[Path]:
    files = [
        file
        for below in FOLDERS
        if (folder / below).is_dir()
        for file in sorted((folder / below).iterdir())
        if file.suffix in SUFFIXES and file.is_file()
    ]
    last = [file for file in files if not file.name.startswith(FORMER)]
    return last if len(last) == 1 and last[0].name == LAST else files


def _peek(path: Path) -> Layout | None:
    """The layout of a file by names in its beginning; opens nothing large and raises nothing."""
    if path.suffix not in SUFFIXES:
        return None
    if path.suffix == ".msgpack":
        try:
            names = own_names(read_msgpack(path)).values()
        except ValueError:
            return None
        # DALL-E mini's transformer lies in a file of the same name.
        return layout_of(names) if any("conv_in" in name for name in names) else None
    start = beginning(path)
    if b"decoder.decoder.conv_in.weight" in start:
        return "sber_haar"
    if b"decoder.conv_blocks.0." in start:
        return "llamagen"
    if b"decoder.conv_in.weight" not in start or b"post_quant_conv.weight" not in start:
        return None
    if b"quantize.embed" in start:
        return "taming"
    return "detokenizer" if b"embedding.weight" in start else None


def _recognizes(layouts: set[Layout], sber: bool, path: Path) -> bool:
    """Whether a file, or the only one of a folder, has one of the layouts; sber: whether its name
    is to be one of Sber's, whose first file has taming's layout."""
    try:
        files = _weights_in(path) if path.is_dir() else [path]
    except OSError:
        return False
    if len(files) != 1:
        return False
    layout = _peek(files[0])
    return layout in layouts and (layout != "taming" or ("sber" in files[0].name) == sber)


def _read(layouts: set[Layout], path: Path) -> PublishedModel:
    part = read_codec_part(path)
    found = _peek(part.path)
    if found is not None and found not in layouts:
        expected = " or ".join(sorted(layouts))
        raise ValueError(
            f"{part.path}: expected weights named as in the layout {expected}, got {found}; leave "
            "out KIND, or name that family"
        )
    config = part.config
    assert isinstance(config, VQGANConfig)
    pixels = "[-1, 1]" if config.signed_pixels else "[0, 1]"
    notes = [f"{config.codebook_size:,} codes of {config.stride} pixels a side, read in {pixels}"]
    if not config.encoder:
        notes.append("decodes tokens and cannot encode images: published without an encoder")
    return PublishedModel(codec=part, notes=tuple(notes))


def _family(
    name: str,
    title: str,
    origin: str,
    license: str,
    layouts: set[Layout],
    sber: bool = False,
) -> Family:
    recognizes: Callable[[Path], bool] = partial(_recognizes, layouts, sber)
    read: Callable[[Path], PublishedModel] = partial(_read, layouts)
    return Family(name, title, origin, license, recognizes, read, WANTED)


FAMILIES = (
    _family(
        "vqgan",
        "VQGAN of taming-transformers or latent diffusion",
        "CompVis/taming-transformers: heibox.uni-heidelberg.de (f16-1024 d/8088892a516d4e3baf92, "
        "f16-16384 d/a7530b09fed84f80a887, gumbel f8 d/2e5662443a6b4307b470); CompVis/"
        "latent-diffusion: ommer-lab.com/files/latent-diffusion (vq-f8, vq-f8-n256, vq-f4)",
        "MIT (code); not stated for the weights",
        {"taming"},
    ),
    _family(
        "sber_vqgan",
        "Sber's VQGAN f8 (ruDALL-E)",
        "ai-forever/ru-dalle: hub sberbank-ai/rudalle-utils (vqgan.gumbelf8-sber.model.ckpt, "
        "vqgan.gumbelf8-sber-dwt.model.ckpt)",
        "Apache-2.0 (code); not stated for the weights",
        {"taming", "sber_haar"},
        sber=True,
    ),
    _family(
        "llamagen_vqgan",
        "VQ-16 and VQ-8 of LlamaGen",
        "FoundationVision/LlamaGen: hub FoundationVision/LlamaGen (vq_ds16_c2i.pt, vq_ds8_c2i.pt)",
        "MIT (the hub's tag)",
        {"llamagen"},
    ),
    _family(
        "dalle_mini_vqgan",
        "VQGAN f16 of DALL·E mini",
        "borisdayma/dalle-mini: hub dalle-mini/vqgan_imagenet_f16_16384, converted from CompVis'",
        "Apache-2.0",
        {"flax"},
    ),
    _family(
        "min_dalle_detokenizer",
        "decoder of min-dalle",
        "kuprel/min-dalle: hub kuprel/min-dalle (detoker.pt)",
        "MIT (the hub's tag)",
        {"detokenizer"},
    ),
)
