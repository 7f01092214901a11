"""Dual encoders of the package open_clip as rankers: CLIP, SigLIP, CoCa and others.

A name is MODEL/PRETRAINED, as open_clip lists them: `ViT-H-14/laion2b_s32b_b79k`. PRETRAINED may
be a weights file: `ViT-B-32/weights.safetensors`, or `ViT-B-32//home/me/weights.pt`, whose path
begins behind the first slash. Models that bring their own settings are named
`hf-hub:OWNER/NAME` or `local-dir:FOLDER`.

Dimensions: b images, c captions, e shared embedding, H W image height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from pydantic import Field
from torch import Tensor, nn

from dalle1.clip.config import RankerConfig
from dalle1.clip.ranker import PackagedEncoder
from dalle1.common.extras import import_extra, one_line
from dalle1.common.files import expand_home
from dalle1.common.fitting import Fit, Preprocessing
from dvae.calls import isolated
from dvae.pickles import read_tensors
from dvae.storage import Kind
from dvae.weights import unwrapped

OWN_SETTINGS = ("hf-hub:", "local-dir:")  # models whose names need no PRETRAINED
RANDOM_WEIGHTS = "initialized randomly"  # what open_clip warns of before we read a file
# What open_clip's CLIPs have no use for in OpenAI's files.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")


class OpenCLIPConfig(RankerConfig):
    """Which model of open_clip, and which weights."""

    model: str = Field(description="name of the architecture, or hf-hub:NAME, or local-dir:FOLDER")
    pretrained: str | None = Field(
        None, description="name of the weights, or their file; null where the model names them"
    )

    @property
    def name(self) -> str:
        """As `from_name` reads it."""
        return self.model if self.pretrained is None else f"{self.model}/{self.pretrained}"

    @classmethod
    def from_name(cls, name: str) -> OpenCLIPConfig:
        """MODEL/PRETRAINED, or one of `OWN_SETTINGS`; ValueError where a part is missing.

        A file or folder is kept by its full path, so that a model folder can name it.
        """
        if name.startswith(OWN_SETTINGS[1]):
            folder = Path(expand_home(name.removeprefix(OWN_SETTINGS[1])))
            return cls(model=f"{OWN_SETTINGS[1]}{folder.absolute()}")
        if name.startswith(OWN_SETTINGS):
            return cls(model=name)
        model, _, pretrained = name.partition("/")
        if not model or not pretrained:
            raise ValueError(
                "ranker: expected open_clip:MODEL/PRETRAINED, such as "
                f"open_clip:ViT-B-32/laion2b_s34b_b79k or open_clip:ViT-B-32/FILE, got "
                f"'open_clip:{name}'"
            )
        path = Path(expand_home(pretrained))
        return cls(model=model, pretrained=str(path.absolute()) if path.is_file() else pretrained)


class OpenCLIPRanker(PackagedEncoder):
    """A model of open_clip with its own tokenizer and preprocessing.

    A model folder keeps its name and not its weights: they are gigabytes that lie in open_clip's
    cache already, and without the package that made them nobody can run them.
    """

    @isolated()
    def __init__(self, config: OpenCLIPConfig) -> None:
        """Makes the model; downloads the weights where the name is that of some of open_clip's
        which are not in its cache yet.

        Raises ValueError where the package is not installed, or the model or its weights are not
        known, not there or not to be had.
        """
        super().__init__()
        self.config = config
        open_clip = import_extra("open_clip", "open_clip", "ranker")
        path = Path(config.pretrained) if config.pretrained else None
        local = path is not None and path.is_file()
        _check_known(open_clip, config, local)
        try:
            with _unlogged(RANDOM_WEIGHTS) if local else nullcontext():
                self.encoder = open_clip.create_model(
                    config.model,
                    pretrained=None if local else config.pretrained,
                    precision="fp32",
                    device="cpu",
                    # Weights that were trained with it make wrong scores without it.
                    force_quick_gelu=_has_quick_gelu(open_clip, config),
                    pretrained_image=False,  # parts of the model that are not its own
                    pretrained_text=False,
                    require_pretrained=not local,  # no random weights where a download fails
                )
            if local:
                assert path is not None
                _load_file(self.encoder, path)
            self._tokenize: Any = open_clip.get_tokenizer(config.model)
            settings = dict(open_clip.get_model_preprocess_cfg(self.encoder))
        except Exception as error:  # its own, those of downloads, of files, of torch
            raise ValueError(f"ranker: {config.name}: {one_line(error)}") from error
        self.eval().requires_grad_(False)
        self.preprocessing = _preprocessing(settings)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.encoder.encode_image(pixels))

    def _text_features(self, captions: list[str]) -> Tensor:
        return cast(
            Tensor, self.encoder.encode_text(self._tokenize(captions).to(self._weight.device))
        )

    def scale(self) -> Tensor:
        """The factor [] on the cosines. A bias, as SigLIP has one, changes no order."""
        return cast(Tensor, self.encoder.logit_scale).detach().reshape(-1)[0].exp()


@contextmanager
def _unlogged(part: str) -> Iterator[None]:
    """In this block the root logger, which open_clip uses, leaves out messages with this part."""

    def keeps(record: logging.LogRecord) -> bool:
        return part not in record.getMessage()

    logger = logging.getLogger()
    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


def _check_known(open_clip: Any, config: OpenCLIPConfig, local: bool) -> None:
    """ValueError, before anything is made, for names that open_clip does not list."""
    if config.model.startswith(OWN_SETTINGS):
        return
    if config.model not in open_clip.list_models():
        raise ValueError(
            f"ranker: expected a model of open_clip.list_models(), got {config.model!r}"
        )
    known = open_clip.list_pretrained_tags_by_model(config.model)
    if not local and config.pretrained not in known:
        raise ValueError(
            f"ranker: expected a file of weights or one of {', '.join(known) or 'none'} for "
            f"{config.model}, got {config.pretrained!r}"
        )


def _has_quick_gelu(open_clip: Any, config: OpenCLIPConfig) -> bool:
    """Whether open_clip says of the weights that their activation is QuickGELU."""
    known = open_clip.get_pretrained_cfg(config.model, config.pretrained or "")
    return bool(known.get("quick_gelu", False))


def _load_file(encoder: nn.Module, path: Path) -> None:
    """Fills a model from a file; nothing in it is executed."""
    tensors, _ = read_tensors(path, lambda module, name: module.startswith("__torch__"))
    weights = unwrapped(tensors, path, encoder.state_dict())
    expected = encoder.state_dict()
    for name in _NUMBERS:
        weights.pop(name, None)
    for name in ("logit_scale", "logit_bias"):
        if name in weights and name in expected:
            weights[name] = weights[name].reshape(expected[name].shape)
    encoder.load_state_dict(weights)


def _preprocessing(settings: dict[str, Any]) -> Preprocessing:
    size = settings.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    fit: Fit = settings.get("resize_mode") or "shortest"
    return Preprocessing(
        (int(height), int(width)),
        tuple(settings["mean"]),
        tuple(settings["std"]),
        "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic",
        fit,
    )


KIND: Kind = Kind("ranker", "open_clip", OpenCLIPConfig, OpenCLIPRanker, None)
