"""From the encoder's vectors to tokens and the codes' vectors: nearest code, or Gumbel.

Dimensions: b batch, d numbers of a vector, h w token grid, k codebook size, n positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dvae.objective import Generators, gumbel_softmax
from dvae.vqgan.config import VQGANConfig
from dvae.vqgan.layers import Conv2d

LARGEST_TABLE = 2**24  # distances or logits that are held at once: 64 MiB
LOG_FLOOR = 1e-10  # under the logarithm of a probability, as taming has it


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of latent vectors in training.

    Attributes:
        vectors: float [b, d, h, w], what the decoder is fed; gradients reach the encoder.
        tokens: int64 [b, h, w].
        losses: scalars by name, not weighted: "codebook" and "commitment", or "kl".
    """

    vectors: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


def _in_parts(choose: Callable[[Tensor], Tensor], z: Tensor, codes: int) -> Tensor:
    """Tokens [b, h, w] of latent vectors [b, d, h, w], some positions at a time: a table of all
    positions and codes may not fit in memory.

    choose: int64 [n] of vectors, float32 [n, d]. It runs without autocast: numbers of 8 bits do
        not tell codes apart that are near one another.
    """
    parts = rearrange(z.float(), "b d h w -> (b h w) d").split(max(1, LARGEST_TABLE // codes))
    with torch.autocast(z.device.type, enabled=False):
        return torch.cat([choose(part) for part in parts]).reshape(len(z), *z.shape[2:])


class NearestQuantizer(nn.Module):
    """A token is the code of the least squared distance; the first one of several."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        k = config.codebook_size
        self.embedding = nn.Embedding(k, config.embedding_dim)
        self.normalized = config.normalized_codes
        nn.init.uniform_(self.embedding.weight, -1 / k, 1 / k)

    def codes(self) -> Tensor:
        """The codes' vectors, [k, d]; of length 1 where the config says so."""
        weight: Tensor = self.embedding.weight
        return F.normalize(weight, dim=1) if self.normalized else weight

    def tokens(self, z: Tensor) -> Tensor:
        """Int64 [b, h, w] of latent vectors [b, d, h, w]; distances are in 32 bits."""
        z = F.normalize(z.float(), dim=1) if self.normalized else z.float()
        codes = self.codes().float()
        squares = codes.square().sum(dim=1)

        def nearest(rows: Tensor) -> Tensor:
            # taming's order of operations, which decides between codes that are almost as near.
            distances = rows.square().sum(dim=1, keepdim=True) + squares - 2 * (rows @ codes.t())
            return distances.argmin(dim=1)

        return _in_parts(nearest, z, len(codes))

    def vectors(self, tokens: Tensor) -> Tensor:
        """The codes' vectors, [b, d, h, w], of tokens, int64 [b, h, w]."""
        found = F.embedding(tokens, self.embedding.weight)
        found = F.normalize(found, dim=-1) if self.normalized else found
        return rearrange(found, "b h w d -> b d h w")

    def forward(self, z: Tensor) -> Quantized:
        """Latent vectors [b, d, h, w] to codes, whose gradient passes straight through to z.

        The losses are mean squares in 32 bits: "codebook" draws the codes to the vectors,
        "commitment" the vectors to the codes. See `codebook_loss`.
        """
        with torch.no_grad():
            tokens = self.tokens(z)
        vectors = self.vectors(tokens).float()
        z = F.normalize(z.float(), dim=1) if self.normalized else z.float()
        losses = {
            "codebook": F.mse_loss(vectors, z.detach()),
            "commitment": F.mse_loss(z, vectors.detach()),
        }
        return Quantized(z + (vectors - z).detach(), tokens, losses)


def codebook_loss(quantized: Quantized, beta: float = 0.25, legacy: bool = False) -> Tensor:
    """The codebook's and the commitment's loss, of which beta is the weight of the commitment.

    legacy: beta weighs the codebook's in its place, as it did in the published models' training.
    """
    codebook, commitment = quantized.losses["codebook"], quantized.losses["commitment"]
    return beta * codebook + commitment if legacy else codebook + beta * commitment


class GumbelQuantizer(nn.Module):
    """A token is the largest of k logits, which a 1x1 convolution makes of a latent vector."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.proj = Conv2d(config.embedding_dim, config.codebook_size, 1)
        self.embedding = nn.Embedding(config.codebook_size, config.embedding_dim)

    def codes(self) -> Tensor:
        """The codes' vectors, [k, d]."""
        weight: Tensor = self.embedding.weight
        return weight

    def tokens(self, z: Tensor) -> Tensor:
        """Int64 [b, h, w] of latent vectors [b, d, h, w]; without the noise that taming's code adds
        here too. Logits are in 32 bits."""
        assert self.proj.bias is not None
        weight, bias = self.proj.weight[:, :, 0, 0].float(), self.proj.bias.float()
        return _in_parts(lambda rows: F.linear(rows, weight, bias).argmax(dim=1), z, len(weight))

    def vectors(self, tokens: Tensor) -> Tensor:
        """The codes' vectors, [b, d, h, w], of tokens, int64 [b, h, w]."""
        return rearrange(F.embedding(tokens, self.embedding.weight), "b h w d -> b d h w")

    def forward(
        self,
        z: Tensor,
        temperature: float = 1.0,
        hard: bool = True,
        generator: Generators | None = None,
    ) -> Quantized:
        """Latent vectors [b, d, h, w] to a draw of codes, or to a mixture of them.

        Args:
            z: latent vectors.
            temperature: of the relaxation.
            hard: one code a position, with the mixture's gradient; else the mixture.
            generator: as of `gumbel_softmax`.

        Its loss "kl" is the divergence from the uniform distribution in nats, a position's mean.
        """
        logits = self.proj(z)
        relaxed = gumbel_softmax(logits, temperature, generator)
        tokens = relaxed.argmax(dim=1)
        weights = relaxed
        if hard:
            chosen = torch.zeros_like(relaxed).scatter_(1, tokens.unsqueeze(1), 1.0)
            weights = chosen + (relaxed - relaxed.detach())
        vectors = torch.einsum("bkhw,kd->bdhw", weights, self.codes().to(weights.dtype))
        shares = F.softmax(logits.float(), dim=1)
        kl = shares * (shares * logits.shape[1] + LOG_FLOOR).log()
        return Quantized(vectors, tokens, {"kl": kl.sum(dim=1).mean()})
