"""Codecs, which turn images into tokens and back: the paper's dVAE (section 2.1), and VQGANs."""

from dvae.codec import Codec, load
from dvae.model import DVAE, Decoder, DVAEConfig, Encoder
from dvae.released import load_released
from dvae.vqgan.config import VQGANConfig
from dvae.vqgan.model import VQGAN

__all__ = [
    "DVAE",
    "VQGAN",
    "Codec",
    "DVAEConfig",
    "Decoder",
    "Encoder",
    "VQGANConfig",
    "load",
    "load_released",
]
