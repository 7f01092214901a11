"""Shape of the encoder-decoder."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Seq2SeqConfig(BaseModel):
    """Shape of the encoder-decoder; the defaults are DALL-E mini's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int = Field(1024, ge=1, description="model width, a multiple of heads")
    heads: int = Field(16, ge=1, description="attention heads of a layer")
    encoder_layers: int = Field(12, ge=1, description="layers over the caption")
    decoder_layers: int = Field(12, ge=1, description="layers over the image tokens")
    ffn_width: int = Field(2730, ge=1, description="width inside the gated feed-forward blocks")
    text_vocab: int = Field(50264, ge=2, description="text tokens, as the tokenizer counts them")
    text_length: int = Field(64, ge=2, description="text positions")
    padding: int | None = Field(
        1,
        ge=0,
        description="id of padding; null: ids from text_vocab on are, as with our tokenizers",
    )
    empty_caption: tuple[int, ...] = Field(
        (0, 2),
        min_length=1,
        description="text tokens of no caption, which guidance compares with and caption_dropout "
        "puts in; padding follows",
    )
    image_vocab: int = Field(16384, ge=2, description="the codec's codebook size")
    image_rows: int | None = Field(
        None,
        ge=3,
        description="rows of the image embedding and of the head: image tokens, the start and "
        "others that are never drawn; null: image_vocab + 1",
    )
    start: int | None = Field(
        None, ge=0, description="row that stands before the first image token; null: image_vocab"
    )
    grid: int = Field(16, ge=1, description="rows and columns of the image's token grid")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _check(self) -> Seq2SeqConfig:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        if self.padding is not None and self.padding >= self.text_vocab:
            raise ValueError(
                f"padding must be below text_vocab {self.text_vocab}, got {self.padding}; null if "
                "ids from there on are padding"
            )
        if self.image_embeddings < self.image_vocab:
            raise ValueError(
                f"image_rows must be at least image_vocab {self.image_vocab}, got {self.image_rows}"
            )
        if self.start_row >= self.image_embeddings:
            raise ValueError(
                f"start must be a row of the image embedding, below {self.image_embeddings}, got "
                f"{self.start_row}"
            )
        wrong = [i for i in self.empty_caption if not 0 <= i < self.text_vocab or i == self.padding]
        if wrong or len(self.empty_caption) > self.text_length:
            raise ValueError(
                f"empty_caption must be at most {self.text_length} tokens of the text vocabulary, "
                f"without padding, got {self.empty_caption}"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads

    @property
    def image_length(self) -> int:
        """Image positions."""
        return self.grid**2

    @property
    def sequence_length(self) -> int:
        """Text and image positions together."""
        return self.text_length + self.image_length

    @property
    def image_embeddings(self) -> int:
        """Rows of the image embedding and of the head."""
        return self.image_rows or self.image_vocab + 1

    @property
    def start_row(self) -> int:
        """Row of the image embedding that stands before the first image token."""
        return self.image_vocab if self.start is None else self.start
