"""What the library offers as `dalle1.decoding`: the public names of generation in one place."""

from dalle1.generation.generator import Generator, complete_text, draw
from dalle1.generation.options import SamplingOptions, candidate_uniforms, sample_token
from dalle1.transformer.kv_cache import cache_bytes

__all__ = [
    "Generator",
    "SamplingOptions",
    "cache_bytes",
    "candidate_uniforms",
    "complete_text",
    "draw",
    "sample_token",
]
