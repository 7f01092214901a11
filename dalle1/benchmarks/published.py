"""How fast the published models of the family draw, at their full size, with random weights.

How long a step takes does not depend on what the weights are, apart from windows of tokens, which
random weights make as short as can be.

Dimensions: t text positions, m image positions, b candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dalle1.common.hardware import DTYPES, peak_memory
from dalle1.generation.generator import draw
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.published import mindalle, rudalle
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import Seq2Seq
from dalle1.transformer.model import Transformer

PADDING = 1  # of minDALL-E's captions; the published number is not known
GUIDANCE = {"dalle_mini": 10.0}  # as its authors draw


PRIORS: dict[str, Callable[[], nn.Module]] = {
    "malevich": lambda: Transformer(rudalle.published_config(), seed=0),
    "mindalle": lambda: Transformer(mindalle.published_config(PADDING), seed=0),
    "dalle_mini": lambda: Seq2Seq(Seq2SeqConfig()),
}


def random_prior(name: str, dtype: torch.dtype) -> Any:
    """A published model's prior with random weights of a type, which are made in it.

    Raises ValueError for a name that is not known.
    """
    if name not in PRIORS:
        raise ValueError(f"published: expected one of {', '.join(PRIORS)}, got {name!r}")
    with torch.device("meta"):
        prior = PRIORS[name]().to(dtype)
    prior.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in prior.named_parameters():
            if "norm" in key:
                weight.fill_(float(key.endswith("weight")))
            else:
                weight.normal_(0, 0.02, generator=generator)
    return prior.eval()


def report_published(
    names: Sequence[str] | None, dtype: str, device: torch.device, candidates: Sequence[int]
) -> dict[str, Any]:
    """Prints, and returns for a JSON file, seconds of the image tokens of one caption.

    names: of `PRIORS`; None: all.
    """
    report: dict[str, Any] = {}
    for name in names or PRIORS:
        prior = random_prior(name, DTYPES[dtype]).to(device)
        count = sum(p.numel() for p in prior.parameters())
        rows, columns = prior.grid
        print(
            f"{name}: {count:,} parameters in {dtype}, {rows * columns:,} tokens an image, "
            f"guidance {GUIDANCE.get(name, 1.0)}"
        )
        text = torch.arange(1, prior.text_length + 1)
        options = SamplingOptions(guidance=GUIDANCE.get(name, 1.0))
        report[name] = {}
        for b in candidates:
            uniforms = candidate_uniforms(0, name, 0, b, rows * columns)
            start = time.perf_counter()
            draw(prior, text.to(device), uniforms, options)
            seconds = time.perf_counter() - start
            memory = peak_memory(device) / 1e9
            print(
                f"  {b:4} candidates {seconds:8.1f} s, {seconds / b:7.2f} s an image, peak memory "
                f"{memory:.1f} GB"
            )
            report[name][b] = {"seconds": seconds, "peak_memory_gb": memory}
        del prior
    return report
