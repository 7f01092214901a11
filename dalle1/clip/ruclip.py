"""ruCLIP: a CLIP for Russian captions, by which ruDALL-E's images are chosen (ai-forever).

The network is CLIP's with a ViT. Four things differ: captions are read by a `bpe.model` of
YouTokenToMe; the text's feature is read at the id 3; a caption's embedding is the mean over six
sentences that it is put into, before it is normalized; of an image that is not square, the largest
square in the center is resized, bilinearly.

Dimensions: b batch, c captions, n templates, t text positions, e shared embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from dalle1.clip.config import CLIPConfig
from dalle1.clip.model import CLIP
from dalle1.common.arguments import as_captions
from dalle1.common.fitting import Preprocessing
from dalle1.protocols import TextTokenizer
from dalle1.text.yttm import YTTMTokenizer
from dvae.calls import isolated
from dvae.storage import Kind

RUCLIP_TOKENIZER = "ruclip_tokenizer.json"  # in a model folder
# What a caption is put into; "a photo that shows ...", "an image with ..." and so on.
TEMPLATES = (
    "{}",
    "фото, на котором изображено {}",
    "изображение с {}",  # noqa: RUF001
    "картинка с {}",  # noqa: RUF001
    "фото с {}",  # noqa: RUF001
    "на фото видно {}",
)


class RuCLIPConfig(CLIPConfig):
    """Shape of a ruCLIP, and how it reads captions."""

    end_id: int = Field(3, ge=0, description="id of the end of text, where the feature is read")
    templates: tuple[str, ...] = Field(
        TEMPLATES, min_length=1, description="sentences with {} in the caption's place"
    )

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"expected a sentence with one {{}}, got {template!r}")
        return templates


class RuCLIP(CLIP):
    """CLIP with ruCLIP's captions and images."""

    config: RuCLIPConfig
    tokenizer: YTTMTokenizer | None

    def __init__(self, config: RuCLIPConfig | None = None) -> None:
        super().__init__(config or RuCLIPConfig())

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are fitted and normalized.

        The published code asks for a random square of the whole area, which only fits into an image
        that is square or nearly so; for all others its library takes the largest square in the
        center. Here it is always the center's.
        """
        c = self.config
        return Preprocessing((c.image_size, c.image_size), c.mean, c.std, "bilinear", "square")

    def ids(self, captions: str | Sequence[str]) -> Tensor:
        """Captions as `encode_text` reads them: int64 [b, text_length], on the weights' device.

        Raises ValueError when the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "ranker: ruCLIP reads captions by its own bpe.model, got none; import it from a "
                "folder that has one, or set its tokenizer"
            )
        ids = self.tokenizer.encode_plain(captions, self.config.text_length)
        return ids.to(self.logit_scale.device)

    def text_ends(self, tokens: Tensor) -> Tensor:
        """Where each text ends, int64 [b]: at its first `end_id`, of ids int64 [b, t]."""
        return (tokens == self.config.end_id).int().argmax(dim=1)

    @isolated()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings [c, e]: of each caption the mean of its n sentences, then normalized."""
        texts, _ = as_captions(captions)
        return torch.stack([self._embed(text) for text in texts])

    def _embed(self, caption: str) -> Tensor:
        caption = caption.lower().strip()
        sentences = [template.replace("{}", caption) for template in self.config.templates]
        mean = self.text_features(self.ids(sentences)).mean(dim=0)  # of [n, e]
        return F.normalize(mean, dim=0)

    def adopt_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """A model's tokenizer is of no use: ValueError where there is none of its own."""
        if self.tokenizer is None:
            self.ids("")

    def save_assets(self, folder: Path) -> None:
        """Writes the tokenizer, where there is one, into a model folder."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder / RUCLIP_TOKENIZER)
        else:
            (folder / RUCLIP_TOKENIZER).unlink(missing_ok=True)

    def load_assets(self, folder: Path) -> None:
        """Reads the tokenizer of a model folder, where it holds one."""
        path = folder / RUCLIP_TOKENIZER
        self.tokenizer = YTTMTokenizer.load(path) if path.exists() else None


KIND: Kind = Kind(
    "ranker", "ruclip", RuCLIPConfig, RuCLIP, "ruclip.safetensors", assets=(RUCLIP_TOKENIZER,)
)
