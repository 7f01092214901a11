"""The file of settings that is published beside a VQGAN's weights, compared with them.

The weights tell the shape; the file can only say that it, or they, are another model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle1.published.settings import read_yaml
from dvae.vqgan.config import VQGANConfig

SUFFIXES = (".yaml", ".yml")


def check_settings(config: VQGANConfig, weights: Path) -> Path | None:
    """The file of settings that belongs to a file of weights; None where there is none.

    Raises ValueError where it says another shape than the weights have, or cannot be read.
    """
    for path in _candidates(weights):
        settings = _read(path)
        if settings is None:
            continue
        for name, said, told in _compared(settings, config):
            if said != told:
                raise ValueError(
                    f"{path}: {name}: expected {told} as in {weights.name}, got {said}; take the "
                    "file that was published with the weights"
                )
        return path
    return None


def _candidates(weights: Path) -> Iterator[Path]:
    """Files that are called as the weights' settings are: by their authors, and by
    DALLE-pytorch."""
    stem = weights.name.removesuffix(weights.suffix)
    names = [stem.removesuffix(".model") + ".config", stem, "config", "model"]
    configs = weights.parent.parent / "configs"
    places = [weights.parent / name for name in names] + [configs / "model"]
    for place in places:
        for suffix in SUFFIXES:
            path = place.with_name(place.name + suffix)
            if path.is_file():
                yield path


def _read(path: Path) -> Mapping[str, Any] | None:
    """The settings of a codec's model, where the file has them."""
    settings = _below(read_yaml(path), "model", "params")
    # In the file of a transformer or a diffusion model, the codec is the first stage.
    for found in (_below(settings, "first_stage_config", "params"), settings):
        if isinstance(found.get("ddconfig"), Mapping):
            return found
    return None


def _below(content: Any, *names: str) -> Mapping[str, Any]:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content if isinstance(content, Mapping) else {}


def _compared(settings: Mapping[str, Any], config: VQGANConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings that are there: their names, what the file says, what the weights tell."""
    nets: Mapping[str, Any] = settings["ddconfig"]
    told = {
        "n_embed": (settings, config.codebook_size),
        "embed_dim": (settings, config.embedding_dim),
        "ddconfig.ch": (nets, config.width),
        "ddconfig.ch_mult": (nets, list(config.multipliers)),
        "ddconfig.num_res_blocks": (nets, config.blocks_per_level),
        "ddconfig.z_channels": (nets, config.latent_channels),
        "ddconfig.in_channels": (nets, config.channels),
        "ddconfig.double_z": (nets, False),
    }
    for name, (section, value) in told.items():
        key = name.rpartition(".")[2]
        if key in section:
            yield name, section[key], value
    sides, resolution = nets.get("attn_resolutions"), nets.get("resolution")
    if isinstance(sides, list) and isinstance(resolution, int):
        levels = range(len(config.multipliers))
        said = [level for level in levels if resolution >> level in sides]
        yield "ddconfig.attn_resolutions, as levels", said, list(config.attention_levels)
