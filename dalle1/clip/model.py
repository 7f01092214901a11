"""CLIP: how well a image fits a caption (Radford et al. 2021; DALL-E paper section 2.6).

Dimensions: b batch, p patches, t text positions, w width of an encoder, e shared embedding.
The default config is ViT-B/32; parameter names are those of the published weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from einops import rearrange
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle1.clip.tokenizer import CLIP_TOKENIZER, load_clip_tokenizer
from dalle1.common.arguments import as_captions
from dalle1.common.attention import attend_widened
from dalle1.common.image_inputs import ImageLike, read_images
from dalle1.common.images import to_tensor
from dalle1.protocols import TextTokenizer
from dvae.calls import isolated
from dvae.images import check_images
from dvae.storage import Kind

MAX_LOGIT_SCALE = math.log(100)  # training clips the logit scale here after each update
SCORED = 256  # images whose scores are computed at once


class CLIPConfig(BaseModel):
    """Shape of a CLIP with a ViT; the defaults are ViT-B/32."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    embedding: int = Field(512, ge=1, description="width of the shared embedding")
    image_size: int = Field(224, ge=1, description="side of the images, in pixels")
    patch_size: int = Field(
        32, ge=1, description="side of a patch, in pixels; it divides image_size"
    )
    vision_width: int = Field(768, ge=1, description="width of the image's transformer")
    vision_layers: int = Field(12, ge=1, description="layers of the image's transformer")
    vision_heads: int = Field(
        12, ge=1, description="attention heads of a layer; they divide vision_width"
    )
    text_vocab: int = Field(
        49408, ge=3, description="text tokens; start and end of text are the last two"
    )
    text_length: int = Field(77, ge=3, description="text positions, start and end of text included")
    text_width: int = Field(512, ge=1, description="width of the text's transformer")
    text_layers: int = Field(12, ge=1, description="layers of the text's transformer")
    text_heads: int = Field(
        8, ge=1, description="attention heads of a layer; they divide text_width"
    )
    activation: Literal["quick_gelu", "gelu"] = Field(
        "quick_gelu", description="OpenAI's is quick_gelu; most models trained since have gelu"
    )
    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073),
        description="subtracted from red, green and blue in [0, 1]",
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711),
        description="divides red, green and blue after that",
    )

    @model_validator(mode="after")
    def _check(self) -> CLIPConfig:
        if min(self.std) <= 0:
            raise ValueError(f"std: expected more than 0 for each color, got {self.std}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        for name in ("vision", "text"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if width % heads:
                raise ValueError(f"{name}_width {width} must be a multiple of {name}_heads {heads}")
        return self


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the published models' activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # x sigmoid(1.702 x), by a function that torch has whole


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class CaptionEncoder(Protocol):
    """What turns captions into a CLIP's ids: `dalle1.Tokenizer` or `CLIPTokenizer`."""

    def encode_for_clip(self, captions: str | Sequence[str], length: int) -> Tensor:
        """int64 [b, length]: start, tokens, end, zeros."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes one file."""
        ...


class SelfAttention(nn.Module):
    """Multi-head self-attention with the published parameter names."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b n (three s d) -> three b s n d", three=3, s=self.heads)
        y = attend_widened(self._attend, q, k, v)
        out: Tensor = self.out_proj(rearrange(y, "b s n d -> b n (s d)"))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP of both encoders."""

    def __init__(self, width: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, w] -> [b, n, w]
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class Stack(nn.Module):
    """The blocks of an encoder, one after the other."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, causal, activation) for _ in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.resblocks(x)
        return y


class VisionTransformer(nn.Module):
    """Patches and a class token to one embedding."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        patches = (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Stack(
            width, config.vision_layers, config.vision_heads, False, config.activation
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embedding))

    def forward(self, x: Tensor) -> Tensor:  # [b, 3, H, W] -> [b, e]
        x = rearrange(self.conv1(x), "b w rows columns -> b (rows columns) w")
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        y: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return y


class CLIP(nn.Module):
    """Image and text encoders into one space; the cosine there is the score.

    A `protocols.Ranker`, and an `EmbeddingRanker`.
    """

    def __init__(self, config: CLIPConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or CLIPConfig()
        self.tokenizer: CaptionEncoder | None = None  # see `adopt_tokenizer`
        self.visual = VisionTransformer(c)
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
        for stack in (self.visual.transformer, self.transformer):
            residual = stack.width**-0.5 * (2 * stack.layers) ** -0.5
            for block in stack.resblocks:
                assert isinstance(block, ResidualAttentionBlock)
                nn.init.normal_(block.attn.in_proj_weight, std=stack.width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=residual)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * stack.width) ** -0.5)  # type: ignore[union-attr, arg-type]
                nn.init.normal_(block.mlp.c_proj.weight, std=residual)  # type: ignore[union-attr, arg-type]

    def preprocess(self, images: Tensor | Iterable[ImageLike]) -> Tensor:
        """Images as the image encoder reads them: [b, 3, image_size, image_size], normalized.

        images: pixels [b, 3, H, W] in [0, 1]; or a list of PIL images of any mode and size, or of
        what else `read_images` takes. As published: bicubic to the shorter side, center crop, mean
        and standard deviation of the config.
        """
        weight = self.visual.conv1.weight
        if isinstance(images, Tensor):
            check_images(images)
            pixels = self._fitted(images)
        else:
            images = [] if isinstance(images, Image.Image) else list(images)
            if not images:
                raise ValueError("images: expected a list of at least one image, or a tensor")
            pixels = torch.cat([self._fitted(x) for x in read_images(images)])
            pixels = pixels.to(weight.device)
        mean, std = (
            _by_channel(values, str(pixels.device), pixels.dtype)
            for values in (self.config.mean, self.config.std)
        )
        return ((pixels - mean) / std).to(weight.dtype)

    def _fitted(self, image: Tensor | Image.Image) -> Tensor:
        """Resized and cut: [b, 3, H, W] -> [b, 3, image_size, image_size]; of one image b is 1."""
        size = self.config.image_size
        if isinstance(image, Image.Image):
            height, width = _resized(image.height, image.width, size)
            scaled = image.resize((width, height), Image.Resampling.BICUBIC)
            return _center(to_tensor(scaled)[None], size)
        pixels = image if image.ndim == 4 else image[None]
        if 0 in pixels.shape[2:]:
            raise ValueError(f"images: expected at least one pixel, got {list(image.shape)}")
        # At least 32 bits: pixels of 16 bits would be rounded at every step.
        dtype = torch.promote_types(self.visual.conv1.weight.dtype, torch.float32)
        pixels = pixels.to(dtype)
        height, width = _resized(pixels.shape[2], pixels.shape[3], size)
        if (height, width) != tuple(pixels.shape[2:]):
            shape = [height, width]
            pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)
        return _center(pixels, size)

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
        """Unit embeddings [b, e] of ids, int64 [b, t] with t <= text_length.

        The feature is read at the end of text, the highest id.
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
        if tokens.device.type == "cpu" and tokens.numel():
            # Behind the captions' ends nothing is read: attention is causal.
            tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        end = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
        return F.normalize((end @ self.text_projection).float(), dim=-1)

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
    @torch.no_grad()
    def score(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """Cosine similarities, float32 [captions, b] on the CPU, of images, floats [b, 3, H, W] in
        [0, 1]."""
        check_images(images)
        text, device = self.embed_captions(captions), self.logit_scale.device
        parts = [text @ self.embed_images(part.to(device)).t() for part in images.split(SCORED)]
        return torch.cat(parts, dim=1).float().cpu()

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
    ) -> Tensor:
        """Symmetric cross-entropy over the batch: pair i is right for row and column i.

        With the batch spread over ranks, `gather` makes this rank's rows [b, e] those of all ranks,
        among which its own begin at `first`; the mean of the ranks' losses is the batch's loss.
        """
        image, text = self.encode_image(images), self.encode_text(tokens)
        with torch.autocast(image.device.type, enabled=False):  # 8 bits of cosine do not rank
            of_images = self.scale() * image @ gather(text).t()
            of_texts = self.scale() * text @ gather(image).t()
            target = torch.arange(first, first + len(image), device=image.device)
            return (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2


@lru_cache(maxsize=32)
@isolated()  # kept on the device: a copy at every call would wait for it
def _by_channel(values: tuple[float, ...], device: str, dtype: torch.dtype) -> Tensor:
    """Numbers of the channels, [c, 1, 1]."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width whose shorter one is `size`, the other cut to whole pixels."""
    short = min(height, width)
    return height * size // short, width * size // short


def _center(images: Tensor, size: int) -> Tensor:
    top, left = round((images.shape[2] - size) / 2), round((images.shape[3] - size) / 2)
    return images[:, :, top : top + size, left : left + size]


KIND: Kind = Kind("ranker", "clip", CLIPConfig, CLIP, "clip.safetensors", assets=(CLIP_TOKENIZER,))
