"""The kinds of tokenizer, codec, prior and ranker by the "kind" in a model folder's config.json.

This is the only place that a new kind is added to: an entry here, or `register` from a package of
one's own. Such a package may name a module that registers its kinds as an entry point of the group
`dalle1.kinds`; it is then imported when a folder asks for a kind that is not known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import dalle1.clip.from_open_clip
import dalle1.clip.from_transformers
import dalle1.clip.model
import dalle1.clip.ruclip
import dalle1.generation.likelihood
import dalle1.seq2seq.model
import dalle1.transformer.model
from dalle1 import models
from dalle1.text.kinds import TOKENIZERS as TOKENIZERS
from dalle1.text.kinds import kind_of_file
from dvae.codec import CODECS
from dvae.storage import Kind, expand_home, has_part, load_part, read_config

ENTRY_POINTS = "dalle1.kinds"
PRIORS: dict[str, Kind] = {
    kind.name: kind for kind in (dalle1.transformer.model.KIND, dalle1.seq2seq.model.KIND)
}
RANKERS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        dalle1.clip.model.KIND,
        dalle1.clip.ruclip.KIND,
        dalle1.clip.from_open_clip.KIND,
        dalle1.clip.from_transformers.KIND,
        dalle1.generation.likelihood.KIND,
    )
}
KINDS = {"codec": CODECS, "prior": PRIORS, "ranker": RANKERS}
# Rankers by what stands in front of the colon of their names, and how the rest becomes a config.
NAMED_RANKERS: dict[str, tuple[Kind, Callable[[str], BaseModel]]] = {
    "open_clip": (
        dalle1.clip.from_open_clip.KIND,
        dalle1.clip.from_open_clip.OpenCLIPConfig.from_name,
    ),
    "hf": (
        dalle1.clip.from_transformers.KIND,
        dalle1.clip.from_transformers.HuggingFaceConfig.from_name,
    ),
}
# A ranker and what a nat of the model's log-likelihood adds to its scores.
SUM = re.compile(
    r"(?P<ranker>.+?)\+(?P<weight>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\*likelihood", re.IGNORECASE
)
# Rankers that need no more than a word.
MEASURES = {"likelihood": "log_prob", "perplexity": "perplexity"}


def register(kind: Kind) -> None:
    """Makes a kind of codec, prior or ranker known to `dalle1.load` and `Model.save`.

    Raises ValueError for a role that there is not, or a name that is taken by another class.
    """
    if kind.role not in KINDS:
        raise ValueError(f"role: expected one of {', '.join(KINDS)}, got {kind.role!r}")
    held = KINDS[kind.role].get(kind.name)
    if held is not None and held.module is not kind.module:
        raise ValueError(f"{kind.role}.kind: {kind.name!r} is {held.module.__name__} already")
    KINDS[kind.role][kind.name] = kind


def register_tokenizer(name: str, tokenizer: Any) -> None:
    """The same for a class of tokenizers, which has `save(path)` and `load(path)`."""
    if TOKENIZERS.get(name, tokenizer) is not tokenizer:
        raise ValueError(f"tokenizer.kind: {name!r} is {TOKENIZERS[name].__name__} already")
    TOKENIZERS[name] = tokenizer


def kind_of(role: str, part: object) -> Kind:
    """The kind that a part is of; ValueError where its class is not registered."""
    for kind in KINDS[role].values():
        if type(part) is kind.module:
            return kind
    raise ValueError(
        f"{role}: {type(part).__name__} is no registered kind, so a folder could not be opened "
        "again; see dalle1.registry.register"
    )


def tokenizer_kind(tokenizer: object) -> str:
    """The kind of a tokenizer; ValueError where its class is not registered."""
    for name, known in TOKENIZERS.items():
        if type(tokenizer) is known:
            return name
    raise ValueError(
        f"tokenizer: {type(tokenizer).__name__} is no registered kind, so a folder could not be "
        "opened again; see dalle1.registry.register_tokenizer"
    )


def find_kind(role: str, name: str, where: str | Path) -> Kind:
    """The kind of a role and a name; where: it is named, for the message of the ValueError."""
    if name not in KINDS[role]:
        _import_entry_points()
    if name not in KINDS[role]:
        known = ", ".join(KINDS[role])
        raise ValueError(f"{where}: {role}.kind: expected one of {known}, got {name!r}")
    return KINDS[role][name]


def files_of_parts() -> set[str]:
    """Names of all files that parts of a model folder may have."""
    return {name for known in KINDS.values() for kind in known.values() for name in kind.files}


def load(role: str, folder: str | Path) -> Any:
    """A codec, prior or ranker of a model, in eval mode; ValueError as `load_part`.

    folder: the model's, or the name of a model that comes with the library.
    """
    folder = models.find(folder)
    section = read_config(folder).get(role) or {}
    if section.get("kind") not in KINDS[role]:
        _import_entry_points()
    return load_part(role, KINDS[role], folder)


def open_ranker(name: str | Path) -> Any:
    """A ranker by its name, in eval mode, on the CPU.

    Args:
        name: a folder of ours that holds a ranker, or the name of a model that comes with the
            library; `open_clip:MODEL/PRETRAINED`; `hf:NAME`, a folder or repository of Hugging
            Face's; `likelihood` or `perplexity`, by the model that it ranks for; or one of the
            first three with `+WEIGHT*likelihood`, which sets `likelihood_weight` of its config.

    Raises:
        ValueError: it is none of these, or it cannot be opened.
    """
    text = str(name)
    # Also what is nearly a sum, whose error says how one is written.
    if text.rstrip().endswith("likelihood") and "*" in text:
        return _open_sum(text)
    if text in MEASURES:
        kind = dalle1.generation.likelihood.KIND
        return kind.module(kind.config(measure=MEASURES[text]))
    scheme, colon, rest = text.partition(":")
    if colon and scheme in NAMED_RANKERS:
        kind, config_of = NAMED_RANKERS[scheme]
        return kind.module(config_of(rest))
    folder = models.find(expand_home(text))
    if not folder.is_dir():
        raise ValueError(
            "ranker: expected a folder, open_clip:MODEL/PRETRAINED, hf:NAME, one of these with "
            f"+WEIGHT*likelihood, likelihood or perplexity, got {text!r}"
        )
    if not has_part("ranker", folder):
        raise ValueError(f"ranker: expected a folder that holds a ranker, got {text!r}")
    return load("ranker", folder)


def adds_likelihood(name: str | Path) -> bool:
    """Whether a ranker's name asks for the model's likelihood, too."""
    found = SUM.fullmatch(str(name))
    return found is not None and float(found["weight"]) > 0


def _open_sum(name: str) -> Any:
    """A ranker with the `likelihood_weight` that its name says."""
    found = SUM.fullmatch(name)
    if found is None or "*likelihood" in found["ranker"]:
        raise ValueError(
            f"ranker: expected RANKER+WEIGHT*likelihood with a weight of at least 0, got {name!r}"
        )
    ranker = open_ranker(found["ranker"])
    config: BaseModel | None = getattr(ranker, "config", None)
    if config is None or "likelihood_weight" not in type(config).model_fields:
        raise ValueError(
            f"ranker: {name!r} adds a likelihood to {type(ranker).__name__}, whose config has no "
            "likelihood_weight; take a CLIP or another dual encoder"
        )
    ranker.config = config.model_copy(update={"likelihood_weight": float(found["weight"])})
    return ranker


def ranker_name(kind: Kind, config: Any) -> str | None:
    """The name, for `open_ranker`, of a ranker whose weights its own package keeps; None for one
    whose weights lie in the model folder."""
    for scheme, (known, _) in NAMED_RANKERS.items():
        if kind is known:
            weight = config.likelihood_weight
            return f"{scheme}:{config.name}" + (f"+{weight!r}*likelihood" if weight else "")
    return None


def load_tokenizer(path: str | Path, kind: str | None = None) -> Any:
    """A tokenizer's file; ValueError where the kind is not known or the file is not of it.

    kind: None for what the file, or the model folder around it, says; or else `dalle1.Tokenizer`'s.
    """
    if kind is None:
        kind = kind_of_file(Path(expand_home(path))) or "bpe"
    if kind not in TOKENIZERS:
        _import_entry_points()
    if kind not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ValueError(f"{path}: tokenizer.kind: expected one of {known}, got {kind!r}")
    return TOKENIZERS[kind].load(path)


def _import_entry_points() -> None:
    """Imports what installed packages offer; each module registers its kinds."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
