"""CLIP: how well an image fits a caption (Radford et al. 2021; DALL-E paper section 2.6).

Dimensions: b batch, t text positions, w width of an encoder, e shared embedding.
The default config is ViT-B/32; parameter names are those of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.clip.config import CLIPConfig
from dalle1.clip.ranker import DualEncoder
from dalle1.clip.resnet import ModifiedResNet
from dalle1.clip.tokenizer import CLIP_TOKENIZER, load_clip_tokenizer
from dalle1.clip.vit import Stack, VisionTransformer
from dalle1.common.arguments import as_captions
from dalle1.common.fitting import Preprocessing
from dalle1.common.image_inputs import ImageLike
from dalle1.protocols import TextTokenizer
from dvae.calls import isolated
from dvae.storage import Kind

MAX_LOGIT_SCALE = math.log(100)  # training clips the logit scale here after each update
RESNET_SHARE = 8  # a ResNet's maps take about so many times the memory of a ViT's states


class CaptionEncoder(Protocol):
    """What turns captions into a CLIP's ids: `dalle1.Tokenizer` or `CLIPTokenizer`."""

    def encode_for_clip(self, captions: str | Sequence[str], length: int) -> Tensor:
        """int64 [b, length]: start, tokens, end, zeros."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes one file."""
        ...


class CLIP(DualEncoder):
    """Image and text encoders into one space; the cosine there is the score.

    A `protocols.Ranker`, and an `EmbeddingRanker`.
    """

    def __init__(self, config: CLIPConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or CLIPConfig()
        self.tokenizer: CaptionEncoder | None = None  # see `adopt_tokenizer`
        self.visual = ModifiedResNet(c) if c.is_resnet else VisionTransformer(c)
        self.transformer = Stack(c.text_width, c.text_layers, c.text_heads, True, c.activation)
        self.token_embedding = nn.Embedding(c.text_vocab, c.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(c.text_length, c.text_width))
        self.ln_final = nn.LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.empty(c.text_width, c.embedding))
        # One number, as a vector: DeepSpeed 0.19 cannot train a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self._initialize()

    def _initialize(self) -> None:
        """The published initialization."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width**-0.5)
        self.visual.initialize()
        self.transformer.initialize()

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are fitted and normalized; as published."""
        c = self.config
        return Preprocessing((c.image_size, c.image_size), c.mean, c.std, "bicubic", "shortest")

    @property
    def image_side(self) -> int:
        """Side of the images that are read, in pixels."""
        return self.config.image_size

    @property
    def images_at_once(self) -> int:
        """Images that are embedded at once."""
        share = RESNET_SHARE if self.config.is_resnet else 1
        return max(1, super().images_at_once // share)

    def preprocess(self, images: Tensor | Iterable[ImageLike]) -> Tensor:
        """Images as the image encoder reads them: [b, 3, image_size, image_size], normalized.

        images: pixels [b, 3, H, W] in [0, 1]; or a list of PIL images of any mode and size, or of
        what else `read_images` takes. As published: bicubic to the shorter side, center crop, mean
        and standard deviation of the config.
        """
        weight = self.visual.conv1.weight
        return self.preprocessing(images, weight.device, weight.dtype)

    def ids(self, captions: str | Sequence[str]) -> Tensor:
        """Captions as `encode_text` reads them: int64 [b, text_length], on the weights' device.

        Raises ValueError when the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this CLIP has no tokenizer: give load_released the published vocabulary file, or "
                "set clip.tokenizer"
            )
        ids = self.tokenizer.encode_for_clip(captions, self.config.text_length)
        return ids.to(self.logit_scale.device)

    def encode_image(self, images: Tensor | Iterable[ImageLike]) -> Tensor:
        """Unit embeddings [b, e] of pixels [b, 3, H, W] in [0, 1], or of PIL images."""
        return F.normalize(self.visual(self.preprocess(images)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Unit embeddings [b, e] of ids, int64 [b, t] with t <= text_length."""
        return F.normalize(self.text_features(tokens), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Embeddings, float32 [b, e], of ids, int64 [b, t] with t <= text_length.

        The feature is read at the end of text, see `text_ends`.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.config.text_length:
            raise ValueError(
                f"text tokens: expected int64 [b, at most {self.config.text_length}], got "
                f"{list(tokens.shape)}"
            )
        if tokens.is_floating_point() or (
            tokens.device.type == "cpu"
            and tokens.numel()
            and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.text_vocab
        ):
            raise ValueError(
                f"text tokens: expected int64 in [0, {self.config.text_vocab - 1}], got "
                f"{tokens.dtype} in [{tokens.min()}, {tokens.max()}]"
            )
        ends = self.text_ends(tokens)
        if tokens.device.type == "cpu" and tokens.numel():
            # Behind the captions' ends nothing is read: attention is causal.
            tokens = tokens[:, : int(ends.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        end = x[torch.arange(len(x), device=x.device), ends]
        features: Tensor = (end @ self.text_projection).float()
        return features

    def text_ends(self, tokens: Tensor) -> Tensor:
        """Where each text ends, int64 [b]: at the highest id, of ids int64 [b, t]."""
        return tokens.argmax(dim=1)

    def forward(self, images: Tensor | Iterable[ImageLike], tokens: Tensor) -> Tensor:
        """Cosine similarities [images, texts]."""
        image, text = self.encode_image(images), self.encode_text(tokens)
        with torch.autocast(image.device.type, enabled=False):  # 8 bits of cosine do not rank
            return image @ text.t()

    @isolated()
    @torch.no_grad()
    def classify(
        self, images: Tensor | Iterable[ImageLike], prompts: Iterable[str] | Tensor
    ) -> Tensor:
        """Zero-shot classification: float32 [b, classes], each row a probability of each prompt.

        images: as for `preprocess`; prompts: a caption of each class, or its ids int64 [classes,
        t]. The likeliest class is the one with the nearest prompt (Radford et al. 2021, 3.1).
        """
        if isinstance(prompts, Tensor):
            tokens = prompts
        else:
            tokens = self.ids(as_captions(prompts, "prompts")[0])
        if len(tokens) == 0:
            raise ValueError("prompts: expected at least one")
        probabilities: Tensor = (self.scale() * self(images, tokens)).softmax(dim=1)
        return probabilities

    @isolated()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings [captions, e]; one caption after the other, each at its own length."""
        texts, _ = as_captions(captions)
        return torch.cat([self.encode_text(self.ids(text)) for text in texts])

    @isolated()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings [b, e] of pixels [b, 3, H, W] in [0, 1]."""
        return self.encode_image(images)

    def adopt_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Reads captions by a model's tokenizer, unless there is one already.

        Raises ValueError when the vocabularies do not fit or the tokenizer is not made for CLIP.
        """
        if self.tokenizer is not None:
            return
        known = self.config.text_vocab - 2  # start and end of text are CLIP's own
        if not hasattr(tokenizer, "encode_for_clip"):
            raise ValueError(
                "ranker: expected a CLIP with a tokenizer of its own, since the model's, "
                f"{type(tokenizer).__name__}, has no ids for it (encode_for_clip); got one without"
            )
        if tokenizer.vocab_size != known:
            raise ValueError(
                f"CLIP's text_vocab less 2 is {known}, but the tokenizer's vocabulary is "
                f"{tokenizer.vocab_size}: the parts come from different runs"
            )
        self.tokenizer = cast(CaptionEncoder, tokenizer)

    def save_assets(self, folder: Path) -> None:
        """Writes the tokenizer, where there is one, into a model folder."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder / CLIP_TOKENIZER)
        else:
            (folder / CLIP_TOKENIZER).unlink(missing_ok=True)

    def load_assets(self, folder: Path) -> None:
        """Reads the tokenizer of a model folder, where it holds one that fits."""
        self.tokenizer = load_clip_tokenizer(folder, self.config.text_vocab - 2)

    def scale(self) -> Tensor:
        """The factor [] on the cosines, at most 100.

        A larger one, as a file may hold, counts as 100. Its gradient is that at 100 and not 0,
        with which the parameter would stay where it is.
        """
        excess = (self.logit_scale - MAX_LOGIT_SCALE).clamp(min=0)
        return (self.logit_scale - excess.detach())[0].exp()

    def loss(
        self,
        images: Tensor,
        tokens: Tensor,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
        first: int = 0,
        drawings: Tensor | None = None,
    ) -> Tensor:
        """Symmetric cross-entropy over the batch: pair i is right for row and column i.

        With the batch spread over ranks, `gather` makes this rank's rows [b, e] those of all ranks,
        among which its own begin at `first`; the mean of the ranks' losses is the batch's loss.

        drawings: pixels [n, 3, H, W] of images that are right for no text. They stand beside the
        batch's images, among which each text finds its own. Where a model drew them for the same
        captions, the optimal logit is ln p(image | caption) of the true images less that of the
        drawings (and what depends on the caption alone): what tells the model from the truth.
        """
        image, text = self.encode_image(images), self.encode_text(tokens)
        others = [] if drawings is None else [gather(self.encode_image(drawings))]
        with torch.autocast(image.device.type, enabled=False):  # 8 bits of cosine do not rank
            of_images = self.scale() * image @ gather(text).t()
            of_texts = self.scale() * text @ torch.cat([gather(image), *others]).t()
            target = torch.arange(first, first + len(image), device=image.device)
            return (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2


KIND: Kind = Kind("ranker", "clip", CLIPConfig, CLIP, "clip.safetensors", assets=(CLIP_TOKENIZER,))
