"""Codecs, which turn images into tokens and back; the discrete VAE of DALL·E (section 2.1)."""

from dvae.codec import Codec, load
from dvae.model import DVAE, Decoder, DVAEConfig, Encoder
from dvae.released import load_released

__all__ = ["DVAE", "Codec", "DVAEConfig", "Decoder", "Encoder", "load", "load_released"]
