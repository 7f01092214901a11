"""Dual encoders of Hugging Face's transformers as rankers: CLIP, SigLIP, SigLIP 2, ALIGN, AltCLIP.

A name is that of a folder or, where there is none, of a repository of the hub.

Dimensions: b images, c captions, e shared embedding, H W image height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from dalle1.clip.config import RankerConfig
from dalle1.clip.ranker import PackagedEncoder
from dalle1.common.extras import import_extra, one_line
from dalle1.common.files import expand_home
from dalle1.common.fitting import Fit, Interpolation, Preprocessing
from dvae.calls import isolated
from dvae.storage import Kind

# PIL's numbers of interpolations, which image processors keep.
BILINEAR, BICUBIC = 2, 3
LONGEST_CAPTION = 512  # positions; some tokenizers name an endless length


class HuggingFaceConfig(RankerConfig):
    """Which model."""

    name: str = Field(description="folder, or repository of the hub")

    @classmethod
    def from_name(cls, name: str) -> HuggingFaceConfig:
        """A folder is kept by its full path, so that a model folder can name it."""
        if not name:
            raise ValueError("ranker: expected hf:FOLDER or hf:OWNER/NAME, got 'hf:'")
        path = Path(expand_home(name))
        return cls(name=str(path.absolute()) if path.is_dir() else name)


class HuggingFaceRanker(PackagedEncoder):
    """A model of transformers that has `get_image_features` and `get_text_features`.

    A model folder keeps its name and not its weights, for the reasons of `OpenCLIPRanker`. Code
    that a repository brings along is never run.
    """

    @isolated()
    def __init__(self, config: HuggingFaceConfig) -> None:
        """Opens the folder; where there is none of this name, the hub is asked.

        Raises ValueError where the package is not installed, or the model is not there, not to be
        had or no dual encoder.
        """
        super().__init__()
        self.config = config
        transformers = import_extra("transformers", "hf", "ranker")
        local = Path(config.name).is_dir()
        if not local and Path(config.name).is_absolute():
            raise ValueError(f"ranker: hf: expected a folder, got {config.name!r}, which is none")
        options = {"local_files_only": local, "trust_remote_code": False}
        try:
            self.encoder = transformers.AutoModel.from_pretrained(
                config.name, dtype=torch.float32, **options
            )
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                config.name, **options
            )
            processor = transformers.AutoImageProcessor.from_pretrained(config.name, **options)
            settings: Mapping[str, Any] = processor.to_dict()
        except Exception as error:  # its own, those of the hub, of files, of torch
            raise ValueError(f"ranker: hf:{config.name}: {one_line(error)}") from error
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(self.encoder, method):
                kind = type(self.encoder).__name__
                raise ValueError(
                    f"ranker: hf:{config.name}: expected a dual encoder, got {kind}, which has no "
                    f"{method}"
                )
        self.eval().requires_grad_(False)
        self.preprocessing = _preprocessing(settings, config.name)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _features(self.encoder.get_image_features(pixel_values=pixels))

    def _text_features(self, captions: list[str]) -> Tensor:
        inputs = {name: x.to(self._weight.device) for name, x in self._encoded(captions).items()}
        return _features(self.encoder.get_text_features(**inputs))

    def _encoded(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder is given."""
        config = self.encoder.config
        text = getattr(config, "text_config", config)
        positions = getattr(text, "max_position_embeddings", LONGEST_CAPTION)
        length = min(positions, self._tokenizer.model_max_length, LONGEST_CAPTION)
        if not config.model_type.startswith("siglip"):
            return dict(
                self._tokenizer(
                    list(captions),
                    padding=True,
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                )
            )
        # SigLIP was trained on captions in lower case, padded to one length, the padding attended.
        encoded = self._tokenizer(
            [caption.lower() for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"]}

    def scale(self) -> Tensor:
        """The factor [] on the cosines, 1 where the model has none. A bias changes no order."""
        scale = getattr(self.encoder, "logit_scale", None)
        if scale is None:
            return torch.ones((), device=self._weight.device)
        return cast(Tensor, scale).detach().reshape(-1)[0].exp()


def _features(found: Any) -> Tensor:
    """Embeddings [b, e]; newer releases wrap them."""
    features = found if isinstance(found, Tensor) else found.pooler_output
    return cast(Tensor, features)


def _preprocessing(settings: Mapping[str, Any], name: str) -> Preprocessing:
    """What an image processor's settings say; ValueError for one that does something else."""
    size = dict(settings.get("size") or {})
    crop = dict(settings.get("crop_size") or {}) if settings.get("do_center_crop") else {}
    shortest = size.get("shortest_edge")
    fit: Fit = "shortest" if shortest else "squash"
    read = (crop or size) if not shortest else (crop or {"height": shortest, "width": shortest})
    height, width = read.get("height"), read.get("width")
    resized_to = {shortest} if shortest else {size.get("height"), size.get("width")}
    plain = settings.get("do_resize", True) and settings.get("do_rescale", True)
    if not plain or not height or not width or (crop and resized_to != {height, width}):
        raise ValueError(
            f"ranker: hf:{name}: expected images of one size, got an image processor with size "
            f"{size} and crop_size {crop}; take a model of a fixed resolution"
        )
    normalizes = settings.get("do_normalize", True)
    interpolation: Interpolation = (
        "bilinear" if int(settings.get("resample", BICUBIC)) == BILINEAR else "bicubic"
    )
    return Preprocessing(
        (int(height), int(width)),
        tuple(settings["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
        tuple(settings["image_std"]) if normalizes else (1.0, 1.0, 1.0),
        interpolation,
        fit,
    )


KIND: Kind = Kind("ranker", "hugging_face", HuggingFaceConfig, HuggingFaceRanker, None)
