"""DALL-E 1: captions to images (Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation").

A name is imported when it is first asked for, so that `import dalle1` takes no time and
`dalle1 --help` does not wait for torch. Type checkers read the imports below.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dalle1.version import __version__ as __version__

if TYPE_CHECKING:
    from dalle1 import clip, published
    from dalle1.clip import CLIP, CLIPConfig
    from dalle1.generation import decoding
    from dalle1.generation.defaults import SamplingDefaults
    from dalle1.generation.options import SamplingOptions
    from dalle1.generation.previews import Preview
    from dalle1.generation.result import Result
    from dalle1.model import Model, load
    from dalle1.sampling import rank, sample
    from dalle1.seq2seq.config import Seq2SeqConfig
    from dalle1.seq2seq.model import Seq2Seq
    from dalle1.tokenizer import Tokenizer
    from dalle1.transformer import masks as attention
    from dalle1.transformer.config import TransformerConfig
    from dalle1.transformer.model import Transformer

__all__ = [
    "CLIP",
    "CLIPConfig",
    "Model",
    "Preview",
    "Result",
    "SamplingDefaults",
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
_MODULES = {"attention": "transformer.masks", "decoding": "generation.decoding"}
_OWNERS = {
    "CLIP": "clip",
    "CLIPConfig": "clip",
    "Model": "model",
    "Preview": "generation.previews",
    "Result": "generation.result",
    "SamplingDefaults": "generation.defaults",
    "SamplingOptions": "generation.options",
    "Seq2Seq": "seq2seq.model",
    "Seq2SeqConfig": "seq2seq.config",
    "Tokenizer": "tokenizer",
    "Transformer": "transformer.model",
    "TransformerConfig": "transformer.config",
    "load": "model",
    "rank": "sampling",
    "sample": "sampling",
}

if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> object:
        """A public name, or a module of this package."""
        if name in _OWNERS:
            found = getattr(import_module(f"dalle1.{_OWNERS[name]}"), name)
        elif name.startswith("_"):
            raise AttributeError(f"module 'dalle1' has no attribute {name!r}")
        else:
            module = f"dalle1.{_MODULES.get(name, name)}"
            try:
                found = import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:  # one that the module needs
                    raise
                raise AttributeError(f"module 'dalle1' has no attribute {name!r}") from None
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
