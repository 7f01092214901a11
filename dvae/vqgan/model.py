"""VQGAN: a codec of a convolutional encoder, a codebook and a decoder (Esser et al., 2020).

Dimensions: b batch, c color channels, H W image height and width, h w token grid, d numbers of a
code's vector. Parameter names are taming-transformers', but for `quantize.embedding` of the Gumbel
quantizer, which is `quantize.embed` there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dvae.calls import isolated
from dvae.convolutions import for_convolutions
from dvae.images import check_images
from dvae.storage import Kind, save_part
from dvae.tokens import check_tokens
from dvae.vqgan.config import VQGANConfig
from dvae.vqgan.haar import inverse_haar
from dvae.vqgan.layers import Conv2d, Decoder, Encoder
from dvae.vqgan.quantizers import GumbelQuantizer, NearestQuantizer


class VQGAN(nn.Module):
    """Images to tokens and back: `encode` has no noise, with a Gumbel quantizer neither.

    A `dvae.codec.Codec`.
    """

    # Attention and group norms see all of an image.
    decodes_rows = False

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config or VQGANConfig()
        z, d = self.config.latent_channels, self.config.embedding_dim
        if self.config.encoder:
            self.encoder = Encoder(self.config)
            self.quant_conv = Conv2d(z, d, 1)
        self.quantize: NearestQuantizer | GumbelQuantizer
        if self.config.quantizer == "nearest":
            self.quantize = NearestQuantizer(self.config)
        else:
            self.quantize = GumbelQuantizer(self.config)
        self.post_quant_conv = Conv2d(d, z, 1)
        self.decoder = Decoder(self.config)

    @property
    def vocab_size(self) -> int:
        """Number of image tokens: the codebook's size."""
        return self.config.codebook_size

    @property
    def stride(self) -> int:
        """Pixels of a token's side in the images that are read."""
        return self.config.stride

    @property
    def out_stride(self) -> int:
        """The same in the images that are written; twice `stride` with Haar bands."""
        return self.config.out_stride

    def map_pixels(self, images: Tensor) -> Tensor:
        """Pixels from [0, 1] into the range that the nets see."""
        return 2 * images - 1 if self.config.signed_pixels else images

    def unmap_pixels(self, pixels: Tensor) -> Tensor:
        """Inverse of `map_pixels`, clipped to [0, 1]."""
        return ((pixels + 1) / 2 if self.config.signed_pixels else pixels).clamp(0, 1)

    def latents(self, images: Tensor) -> Tensor:
        """What the quantizer reads, float [b, d, h, w], of images [b, c, H, W] in [0, 1].

        Raises ValueError when the shape or the values do not fit, or where there is no encoder.
        """
        if not self.config.encoder:
            raise ValueError(
                "images: this codec can only decode, as it was published without an encoder; "
                "import the VQGAN that it was taken from to encode images"
            )
        check_images(images, self.config.channels, stride=self.stride)
        pixels = self.map_pixels(images).to(self.quant_conv.weight.dtype)
        latents: Tensor = self.quant_conv(self.encoder(for_convolutions(pixels)))
        return latents

    def pixels(self, vectors: Tensor) -> Tensor:
        """What the decoder writes, float [b, c, H, W] in the nets' range and not clipped, of codes'
        vectors [b, d, h, w]."""
        maps: Tensor = self.decoder(self.post_quant_conv(for_convolutions(vectors)))
        return inverse_haar(maps) if self.config.output == "haar" else maps

    @isolated()
    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Image tokens, int64 [b, H/stride, W/stride], of images, float [b, c, H, W] in [0, 1]."""
        return self.quantize.tokens(self.latents(images))

    @isolated()
    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images, float [b, c, h * out_stride, w * out_stride] in [0, 1], of int64 [b, h, w].

        Computed in 32 bits, whichever type the weights are held in. Raises ValueError for tokens
        outside the codebook or of another type or rank.
        """
        check_tokens(tokens, self.vocab_size)
        return self.unmap_pixels(self.pixels(self.quantize.vectors(tokens).float()))

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `vqgan.safetensors` into `folder`; `dvae.load` opens it."""
        save_part(KIND, self, folder)


KIND: Kind = Kind("codec", "vqgan", VQGANConfig, VQGAN, "vqgan.safetensors")
