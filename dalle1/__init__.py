"""DALL-E 1: captions to images (Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation")."""

from dalle1 import clip, published
from dalle1.clip import CLIP, CLIPConfig
from dalle1.generation import decoding
from dalle1.generation.options import SamplingOptions
from dalle1.model import Model, load
from dalle1.sampling import Preview, Result, rank, sample
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import Seq2Seq
from dalle1.tokenizer import Tokenizer
from dalle1.transformer import masks as attention
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import Transformer

__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "CLIPConfig",
    "Model",
    "Preview",
    "Result",
    "SamplingOptions",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Tokenizer",
    "Transformer",
    "TransformerConfig",
    "attention",
    "clip",
    "decoding",
    "load",
    "published",
    "rank",
    "sample",
]
