"""A whole DALL-E as one folder: tokenizer, transformer, dVAE and CLIP.

    config.json  tokenizer.json  transformer.safetensors  dvae.safetensors  clip.safetensors
    clip_tokenizer.json (of a published CLIP alone)  README.md (the model card)

Nothing in it is a pickle. Each file is written beside its place and then renamed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from einops import rearrange
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dvae
from dalle1.clip.model import CLIP, CLIPConfig
from dalle1.clip.tokenizer import CLIPTokenizer
from dalle1.common.files import replacing, write_text
from dalle1.generation.generator import draw_text
from dalle1.generation.options import Options, candidate_uniforms
from dalle1.tokenizer import Tokenizer
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer
from dvae.storage import CONFIG

if TYPE_CHECKING:
    from PIL.Image import Image

C = TypeVar("C", bound=BaseModel)
TOKENIZER = "tokenizer.json"
CLIP_TOKENIZER = "clip_tokenizer.json"  # of a published CLIP alone
CARD = "README.md"


class Model:
    """Tokenizer, transformer, dVAE and, for ranking, CLIP; see the attributes of those names.

    Raises ValueError when the parts do not fit each other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer,
        codec: dvae.DVAE,
        clip: CLIP | None = None,
    ) -> None:
        c = transformer.config
        checks = [
            ("tokenizer's vocabulary", tokenizer.vocab_size, "text_vocab", c.text_vocab),
            ("tokenizer's text_length", tokenizer.text_length, "text_length", c.text_length),
            ("codec's codebook_size", codec.config.codebook_size, "image_vocab", c.image_vocab),
        ]
        # A published CLIP has a vocabulary of its own.
        if clip is not None and not isinstance(clip.tokenizer, CLIPTokenizer):
            known = clip.config.text_vocab - 2  # start and end of text are CLIP's own
            checks.append(("CLIP's text_vocab less 2", known, "text_vocab", c.text_vocab))
        for name, value, setting, expected in checks:
            if value != expected:
                raise ValueError(
                    f"the {name} is {value}, but the transformer's {setting} is {expected}: "
                    "the parts come from different runs"
                )
        self.tokenizer = tokenizer
        self.transformer = transformer.eval()
        self.dvae = codec.eval()
        self.clip = clip.eval() if clip is not None else None
        if clip is not None and clip.tokenizer is None:
            clip.tokenizer = tokenizer

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.transformer.config.grid * self.dvae.config.stride

    @property
    def device(self) -> torch.device:
        """Where the transformer's weights are."""
        return self.transformer.start_of_image.device

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Model:
        """Moves all parts; returns the model itself.

        dtype: of the transformer's weights and caches, such as torch.bfloat16. dVAE and CLIP stay
        in 32 bits: they cost little, and pictures and scores should not change.
        """
        self.transformer.to(device=device, dtype=dtype)
        for part in (self.dvae, self.clip):
            if part is not None:
                part.to(device)
        return self

    def check_finite(self) -> None:
        """Raises ValueError that names the part and the weight when one is NaN or infinite."""
        parts = {"transformer": self.transformer, "dvae": self.dvae, "clip": self.clip}
        for part, module in parts.items():
            for name, weight in module.named_parameters() if module is not None else ():
                if not bool(weight.isfinite().all()):
                    raise ValueError(
                        f"{part}: the weight {name} is not finite; take an earlier checkpoint, the "
                        "training has diverged"
                    )

    @torch.inference_mode()
    def log_prob(self, caption: str, image_tokens: Tensor) -> Tensor:
        """ln p(image tokens | caption) in nats, float32: [] of [rows, columns], [b] of [b, ...].

        image_tokens: int64, a whole grid. Raises ValueError when shape or values do not fit.
        """
        grid = self.transformer.config.grid
        if image_tokens.ndim not in (2, 3) or image_tokens.shape[-2:] != (grid, grid):
            raise ValueError(
                f"image_tokens: expected int64 [{grid}, {grid}] or [b, {grid}, {grid}], got "
                f"{list(image_tokens.shape)}"
            )
        flat = rearrange(image_tokens, "... r c -> ... (r c)").reshape(-1, grid * grid)
        text = self.tokenizer.encode(caption).expand(len(flat), -1)
        self.transformer.check_tokens(text, flat.cpu())  # a device would not name the mistake
        _, logits = self.transformer(text.to(self.device), flat.to(self.device))
        log_probs = logits.log_softmax(dim=-1)
        chosen = log_probs.gather(-1, flat.to(self.device)[..., None])[..., 0]
        total: Tensor = chosen.sum(dim=-1).cpu()
        return total[0] if image_tokens.ndim == 2 else total

    def complete_caption(
        self,
        text: str = "",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """A caption that begins with the text, drawn from the text side (section 2.2).

        Lower case, as the transformer reads captions; an empty text is a caption from nothing.
        Depends on (seed, text) alone. Raises ValueError when the text fills the text positions.
        """
        ids = self.tokenizer.tokens(text) if text else []
        length = self.transformer.config.text_length
        if len(ids) >= length - 1:
            raise ValueError(
                f"text: {len(ids)} tokens leave no room in the {length} text positions: {text!r}"
            )
        uniforms = candidate_uniforms(seed, text, 0, 1, length)[0]
        drawn = draw_text(self.transformer, ids, uniforms, Options(temperature, top_k, top_p))
        return self.tokenizer.decode(drawn)

    def rank(self, caption: str, images: Sequence[Image] | Tensor) -> Tensor:
        """CLIP's cosine similarities of the caption with pictures; see `dalle1.rank`."""
        from dalle1.sampling import rank  # here, because sampling builds on models

        return rank(caption, images, model=self)

    def save(self, folder: str | Path) -> None:
        """Writes the model's folder; `dalle1.load` opens it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / TOKENIZER)
        self.dvae.save(folder)
        config: dict[str, Any] = {"dvae": self.dvae.config.model_dump()}
        for name, part in (("transformer", self.transformer), ("clip", self.clip)):
            if part is not None:
                save_weights(part, folder / f"{name}.safetensors")
                config[name] = part.config.model_dump()
            else:
                (folder / f"{name}.safetensors").unlink(missing_ok=True)
        _save_clip_tokenizer(self.clip, folder)
        write_text(folder / CARD, self._card())
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")

    def _card(self) -> str:
        c = self.transformer.config
        count = sum(p.numel() for p in self.transformer.parameters())
        return (
            "# A DALL-E model of dalle1\n\n"
            f"Draws {self.image_size}x{self.image_size} pictures from captions of up to "
            f"{c.text_length - 1} tokens.\n\n"
            f"- transformer: {count:,} parameters, {c.layers} layers, width {c.width}, "
            f"{c.grid}x{c.grid} image tokens\n"
            f"- dVAE: {c.image_vocab:,} codes\n"
            f"- CLIP for ranking: {'yes' if self.clip is not None else 'no'}\n\n"
            '```python\nimport dalle1\n\nmodel = dalle1.load("this folder")\n'
            'result = dalle1.sample("a caption", model=model, candidates=64, keep=4)\n'
            'result.save("out")\n```\n'
        )


def load(folder: str | Path) -> Model:
    """Opens a model folder that `Model.save` or training wrote; on the CPU, in eval mode.

    Raises ValueError that names the file when one is missing, truncated or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model: {folder} is no folder; training writes one as RUN/model")
    config = read_config(folder)
    if "transformer" not in config:
        raise ValueError(f"{folder / CONFIG}: has no 'transformer' section")
    transformer = Transformer(parse_section(folder, config, "transformer", TransformerConfig))
    load_weights(transformer, folder / "transformer.safetensors")
    clip = load_clip(folder)[0] if "clip" in config else None
    return Model(Tokenizer.load(folder / TOKENIZER), transformer, dvae.load(folder), clip)


def save_clip(clip: CLIP, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a CLIP and its tokenizer: `config.json`, `clip.safetensors`, `tokenizer.json`."""
    folder = Path(folder)
    tokenizer.save(folder / TOKENIZER)
    save_weights(clip, folder / "clip.safetensors")
    _save_clip_tokenizer(clip, folder)
    write_text(folder / CONFIG, json.dumps({"clip": clip.config.model_dump()}, indent=2) + "\n")


def load_clip(folder: str | Path) -> tuple[CLIP, Tokenizer]:
    """The CLIP, in eval mode, and tokenizer of a folder that `save_clip` or `Model.save` wrote."""
    folder = Path(folder)
    config = read_config(folder)
    if "clip" not in config:
        raise ValueError(f"{folder / CONFIG}: has no 'clip' section")
    clip = CLIP(parse_section(folder, config, "clip", CLIPConfig))
    load_weights(clip, folder / "clip.safetensors")
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    own = folder / CLIP_TOKENIZER
    clip.tokenizer = CLIPTokenizer.load(own) if own.exists() else tokenizer
    return clip.eval(), tokenizer


def _save_clip_tokenizer(clip: CLIP | None, folder: Path) -> None:
    """A published CLIP's own vocabulary; the others share the transformer's."""
    if clip is not None and isinstance(clip.tokenizer, CLIPTokenizer):
        clip.tokenizer.save(folder / CLIP_TOKENIZER)
    else:
        (folder / CLIP_TOKENIZER).unlink(missing_ok=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; ValueError when it is missing or no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: {CONFIG} is missing; is this a model folder?")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: truncated or not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object with a section for each part")
    return config


def parse_section(folder: Path, config: dict[str, Any], name: str, kind: type[C]) -> C:
    """A section of config.json as its config class; ValueError when it does not fit."""
    try:
        return kind(**config[name])
    except (TypeError, ValidationError) as error:
        raise ValueError(f"{folder / CONFIG}, section {name!r}: {error}") from error


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's weights as safetensors, beside and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with replacing(path) as beside:
        save_file(weights, beside)


def load_weights(module: nn.Module, path: Path) -> None:
    """Reads weights into a module; ValueError when missing, truncated or of another shape."""
    if not path.is_file():
        raise ValueError(f"{path}: missing from the model folder")
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: truncated or of another shape: {error}") from error
