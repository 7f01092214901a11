"""CLIPs as OpenAI, open_clip and Hugging Face publish them, as rankers.

Weights tell sizes. The rest is told by what lies beside them: `open_clip_config.json`, or Hugging
Face's `config.json` and `preprocessor_config.json`. OpenAI's own archives need neither. Captions
are read by the published merges, `bpe_simple_vocab_16e6.txt.gz` or Hugging Face's `merges.txt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor

from dalle1.clip.config import CLIPConfig
from dalle1.clip.model import CLIP, KIND
from dalle1.clip.released import published_shape, published_weights
from dalle1.clip.tokenizer import CLIPTokenizer
from dalle1.published.beginnings import beginning
from dalle1.published.parts import Family, Files, LazyWeight, PublishedModel, PublishedPart
from dalle1.published.settings import mistake, read_json
from dvae.loading import fit

FACE, FACE_IMAGES, OPEN_CLIP = "config.json", "preprocessor_config.json", "open_clip_config.json"
FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
VOCABULARIES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt")
OPENAI = ("ViT-*.pt", "RN*.pt")  # names of OpenAI's archives
# Names that stand at the beginning of a file of weights.
MARKS = (b"logit_scale", b"text_projection")
HEAD_SIZE = 64
# What weights do not tell and a CLIP does in one way here; read otherwise, its scores are wrong.
OPEN_CLIP_FIXED: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "pool_type": "tok",
        "global_average_pool": False,
        "final_ln_after_pool": False,
        "norm_kwargs": {},
        "act_kwargs": {},
    },
    "text_cfg": {
        "pool_type": "argmax",
        "no_causal_mask": False,
        "hf_tokenizer_name": "",
        "norm_kwargs": {},
        "act_kwargs": {},
    },
    "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "shortest"},
}
FACE_FIXED = {"layer_norm_eps": 1e-5}  # of both encoders
FACE_IMAGES_FIXED = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,  # PIL's number of bicubic
}


def recognizes(path: Path) -> bool:
    """Whether a file, or a folder's, is a CLIP's by its names."""
    if not path.is_dir():
        return path.match(OPENAI[0]) or path.match(OPENAI[1]) or _has_marks(path)
    try:
        if (path / OPEN_CLIP).is_file():
            return "model_cfg" in read_json(path / OPEN_CLIP)
        if (path / FACE).is_file():
            return read_json(path / FACE).get("model_type") == "clip"
    except ValueError:
        return False
    return any(path.glob(OPENAI[0])) or any(path.glob(OPENAI[1]))


def _has_marks(path: Path) -> bool:
    start = beginning(path)
    return all(mark in start for mark in MARKS)


def read(path: Path) -> PublishedModel:
    """The ranker of a file, or of the weights in a folder.

    Raises ValueError that names what is missing or does not fit.
    """
    file = _weights_file(path)
    folder = path if path.is_dir() else path.parent
    weights, root = published_weights(file)
    settings, notes = _told(folder, root, file)
    config = config_of(CLIPConfig, weights, settings, file)
    check_names(CLIP, config, weights, file)
    tokenizer = CLIPTokenizer.from_published(_vocabulary(folder), config.text_vocab)
    ranker = PublishedPart(KIND, config, weights, file, tokenizer)
    return PublishedModel(ranker=ranker, notes=(f"activation and heads: {notes}",))


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    found += sorted({*path.glob(OPENAI[0]), *path.glob(OPENAI[1])})
    if not found:
        raise ValueError(f"{path}: expected one of {', '.join(FILES)}, got none; name the file")
    return found[0]


def _vocabulary(folder: Path) -> Path:
    for name in VOCABULARIES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder}: expected {VOCABULARIES[0]} or {VOCABULARIES[-1]} beside the weights, which "
        "captions are read by, got neither"
    )


def _told(folder: Path, root: str, file: Path) -> tuple[dict[str, Any], str]:
    """Settings that the weights do not tell, and what has told them."""
    if root:  # whatever lies beside it
        return {"activation": "quick_gelu"}, "told by OpenAI's archive"
    config = folder / OPEN_CLIP
    if config.is_file():
        return _of_open_clip(read_json(config), config), f"told by {OPEN_CLIP}"
    config = folder / FACE
    if config.is_file():
        told = _of_face(read_json(config), config)
        images = folder / FACE_IMAGES
        if images.is_file():
            found = read_json(images)
            _check_fixed(found, FACE_IMAGES_FIXED, images, f"hf:{folder}")
            told |= _normalization(found, "image_mean", "image_std")
        return told, f"told by {FACE}"
    raise ValueError(
        f"{file}: expected {OPEN_CLIP} or {FACE} beside it, which tells its activation, got "
        "neither; dalle1.clip.load_released takes it as an argument"
    )


def _of_open_clip(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        model, images = settings["model_cfg"], settings.get("preprocess_cfg") or {}
        vision, text = model["vision_cfg"], model["text_cfg"]
        sections = {"vision_cfg": vision, "text_cfg": text, "preprocess_cfg": images}
        for name, section in sections.items():
            ranker = f"open_clip:local-dir:{path.parent}"
            _check_fixed(section, OPEN_CLIP_FIXED[name], path, ranker, f"{name}.")
        head, width = vision.get("head_width", HEAD_SIZE), vision["width"]
        resnet = isinstance(vision["layers"], list)
        told: dict[str, Any] = {
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "vision_heads": (32 * width if resnet else width) // head,
            "text_heads": text["heads"],
        }
        return told | _normalization(images, "mean", "std")
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not the settings of a CLIP: {error!r}") from error


def _check_fixed(
    settings: Mapping[str, Any],
    fixed: Mapping[str, Any],
    path: Path,
    ranker: str,
    section: str = "",
) -> None:
    """Raises ValueError for a setting of another value than the only one that is known here.

    ranker: by which name the package itself reads the folder.
    """
    for name, value in fixed.items():
        found = settings.get(name)
        if found is not None and found != value:
            raise ValueError(
                f"{path}: {section}{name}: expected {value!r}, got {found!r}, which is not read "
                f"here; rank with --ranker {ranker}, whose package reads it"
            )


def _normalization(settings: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    """What is said of the colors' mean and standard deviation."""
    named = {"mean": settings.get(mean), "std": settings.get(std)}
    return {name: value for name, value in named.items() if value is not None}


def _of_face(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What is left out of the file has Hugging Face's default: that of ViT-B/32."""
    if settings.get("model_type") != "clip":
        raise ValueError(
            f"{path}: model_type: expected 'clip', got {settings.get('model_type')!r}; other dual "
            "encoders are rankers by their name: hf:FOLDER"
        )
    try:
        vision, text = settings.get("vision_config") or {}, settings.get("text_config") or {}
        for name, part in (("vision_config", vision), ("text_config", text)):
            _check_fixed(part, FACE_FIXED, path, f"hf:{path.parent}", f"{name}.")
        activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
        if len(activations) > 1:
            raise ValueError(f"{path}: hidden_act: expected one for both encoders, got two")
        return {
            "activation": activations.pop(),
            "vision_heads": vision.get("num_attention_heads", 12),
            "text_heads": text.get("num_attention_heads", 8),
        }
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of a CLIP: {error!r}") from error


class _Made(Mapping[str, Tensor]):
    """Weights that are made where they are looked at."""

    def __init__(self, weights: Mapping[str, LazyWeight]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]()

    def __iter__(self) -> Any:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


Config = TypeVar("Config", bound=CLIPConfig)


def config_of(
    kind: type[Config],
    weights: Mapping[str, LazyWeight],
    settings: Mapping[str, Any],
    path: Path,
) -> Config:
    """The config that shapes and settings make; ValueError where they make none."""
    try:
        return kind(**{**published_shape(_Made(weights)), **settings})
    except ValidationError as error:
        raise ValueError(f"{path}: no such CLIP: {mistake(error)}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no CLIP: {error}") from error


def check_names(
    module: Callable[[Any], CLIP], config: CLIPConfig, weights: Mapping[str, LazyWeight], path: Path
) -> None:
    """Raises ValueError for a weight that is missing, not known, or of another shape."""
    shapes = {name: weight().to("meta") for name, weight in weights.items()}
    fit(lambda: module(config), shapes, path, "such a CLIP")


FAMILY = Family(
    name="clip",
    title="CLIP",
    origin="openai/CLIP; mlfoundations/open_clip; hub openai/clip-vit-*, laion/CLIP-*",
    license="MIT for OpenAI's code; of open_clip's weights see each repository",
    recognizes=recognizes,
    read=read,
    files=Files(
        needed=((*FILES, *OPENAI), (OPEN_CLIP, FACE, *VOCABULARIES)),
        beside=((OPEN_CLIP, FACE), (FACE_IMAGES,), VOCABULARIES),
    ),
)
