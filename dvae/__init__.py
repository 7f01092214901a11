"""The discrete VAE of DALL·E (paper section 2.1, appendix A): images to tokens and back."""

from dvae.model import DVAE, Decoder, DVAEConfig, Encoder
from dvae.released import load_released
from dvae.storage import load

__all__ = ["DVAE", "DVAEConfig", "Decoder", "Encoder", "load", "load_released"]
