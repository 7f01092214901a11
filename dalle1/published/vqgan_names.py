"""Names of a VQGAN's weights in other people's files, and ours for each of them.

    taming       encoder.down.0.block.0.conv1.weight    ours; Gumbel codes are quantize.embed
    sber_haar    model.decoder.decoder.conv_out.weight  taming's, the decoder in a wrapper
    llamagen     encoder.conv_blocks.0.res.0.conv1.weight
    flax         encoder.down_0.block_0.conv1.kernel    kernels have another order of axes
    detokenizer  embedding.weight                       taming's decoder, and no encoder

Which layout a file has is told by its names alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Literal

Layout = Literal["taming", "sber_haar", "llamagen", "flax", "detokenizer"]

# What may stand in front of a codec's names: in the file of a transformer or diffusion model of
# which it is the first stage, in a wrapper's, in Flax' own.
PREFIXES = ("first_stage_model.", "model.", "params.", "")
# The rest of a file is losses, running averages, optimizers: no image passes through it.
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.", "embedding.")
REMAP = "quantize.used"  # codes that a model of taming's was restricted to
FILTERS = "decoder.idwt."  # of the inverse Haar transform
_MIDDLE = ("block_1", "attn_1", "block_2")


def own_names(names: Collection[str]) -> dict[str, str]:
    """The names of a codec's weights without what is in front, by the file's names; what is beside
    the codec is left out."""
    for prefix in PREFIXES:
        own = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if any(name.startswith("decoder.") for name in own.values()):
            return {name: short for name, short in own.items() if short.startswith(PARTS)}
    return {}


def layout_of(names: Collection[str]) -> Layout | None:
    """The layout of `own_names`; None where they are no VQGAN's."""
    if any(name.startswith("decoder.decoder.") for name in names):
        return "sber_haar"
    if any(name.startswith("decoder.conv_blocks.") for name in names):
        return "llamagen"
    if any(name.startswith("decoder.") and name.endswith(".kernel") for name in names):
        return "flax"
    if any(name.startswith("quantize.") for name in names):
        return "taming"
    return "detokenizer" if "embedding.weight" in names else None


def our_name(name: str, layout: Layout, levels: int) -> str | None:
    """Our name of a weight of `own_names`; None where we have no use for it.

    levels: of the decoder, which some count from the lowest.
    """
    return _RENAMES[layout](name, levels)


def level_count(names: Collection[str], layout: Layout) -> int:
    """Levels of the decoder."""
    marks = {"sber_haar": r"decoder\.decoder\.up\.", "llamagen": r"decoder\.conv_blocks\."}
    mark = marks.get(layout, r"decoder\.up[._]")
    return len({m[1] for name in names if (m := re.match(mark + r"(\d+)\.", name))})


def _taming(name: str, levels: int) -> str:
    return name.replace("quantize.embed.", "quantize.embedding.", 1)


def _sber_haar(name: str, levels: int) -> str | None:
    # The decoder brings a convolution of its own; the one beside it is never run.
    if name.startswith(("post_quant_conv.", FILTERS)):
        return None
    for wrapped in ("decoder.decoder.", "decoder.post_quant_conv."):
        if name.startswith(wrapped):
            return name.removeprefix("decoder.")
    return _taming(name, levels)


def _llamagen(name: str, levels: int) -> str | None:
    if name == "quantize.codebook_used":  # counts of training
        return None
    if match := re.fullmatch(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(.+)", name):
        coder, place, rest = match[1], int(match[2]), match[3].replace("res.", "block.", 1)
        if coder == "encoder":
            return f"encoder.down.{place}.{rest}"
        return f"decoder.up.{levels - 1 - place}.{rest}"  # theirs run from the lowest
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.([012])\.(.+)", name):
        return f"{match[1]}.mid.{_MIDDLE[int(match[2])]}.{match[3]}"
    return name


def _flax(name: str, levels: int) -> str:
    name = re.sub(r"(?<!mid\.)\b(down|up|block|attn)_(\d+)\b", r"\1.\2", name)
    return re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)


def _detokenizer(name: str, levels: int) -> str:
    return f"quantize.{name}" if name.startswith("embedding.") else name


_RENAMES: dict[Layout, Callable[[str, int], str | None]] = {
    "taming": _taming,
    "sber_haar": _sber_haar,
    "llamagen": _llamagen,
    "flax": _flax,
    "detokenizer": _detokenizer,
}
