"""CLIP: how well an image fits a caption (Radford et al. 2021)."""

from dalle1.clip.config import CLIPConfig
from dalle1.clip.model import CLIP
from dalle1.clip.released import load_released, published_shape, read_published
from dalle1.clip.tokenizer import CLIPTokenizer

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CLIPTokenizer",
    "load_released",
    "published_shape",
    "read_published",
]
