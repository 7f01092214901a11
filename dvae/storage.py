"""A codec as a folder: `config.json` with a `dvae` section and `dvae.safetensors`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dvae.model import DVAE, DVAEConfig

CONFIG = "config.json"
WEIGHTS = "dvae.safetensors"


def save(codec: DVAE, folder: str | Path) -> None:
    """Writes weights, then the config; each beside its place and then renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / CONFIG
    config = json.loads(config_path.read_text()) if config_path.exists() else {}
    config["dvae"] = codec.config.model_dump()
    weights = {name: tensor.detach().contiguous() for name, tensor in codec.state_dict().items()}
    beside = folder / (WEIGHTS + ".tmp")
    save_file(weights, beside)
    os.replace(beside, folder / WEIGHTS)
    beside = folder / (CONFIG + ".tmp")
    beside.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(beside, config_path)


def load(folder: str | Path) -> DVAE:
    """The codec of a folder that `DVAE.save` (or a whole model's `save`) wrote, in eval mode.

    Raises ValueError when a file is missing, truncated or does not fit the config.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing; a saved codec has {CONFIG}, {WEIGHTS}")
    try:
        section = json.loads((folder / CONFIG).read_text())["dvae"]
        codec = DVAE(DVAEConfig(**section))
        codec.load_state_dict(load_file(folder / WEIGHTS))
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{folder / CONFIG}: not a codec's config: {error}") from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS}: truncated or of another shape: {error}") from error
    return codec.eval()
