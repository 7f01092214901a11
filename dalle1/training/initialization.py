"""A new run from the weights of a model that is there: `init: FOLDER` (docs/finetuning.md).

A name stands for a model that comes with the library. The folder also gives what the settings leave
out: the shape of what is trained and, in stage two, codec, ranker and tokenizer. What they do say
must fit it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from dalle1 import models, registry
from dalle1.common.origins import TRAINED_FURTHER, Origin, read_origins
from dalle1.common.weights import fingerprint
from dalle1.generation.defaults import SamplingDefaults, read_sampling
from dalle1.training.config import RunConfig
from dalle1.training.stages.text_tokenizer import open_tokenizer, read_alike
from dvae.storage import Kind, has_part, read_config, read_shape, read_weights

# Of each stage: the part that it trains, and the kinds of it with their sections of the settings.
PARTS = {
    "dvae": ("codec", {"dvae": "dvae"}),
    "vqgan": ("codec", {"vqgan": "vqgan"}),
    "clip": ("ranker", {"clip": "clip"}),
    "dalle": ("prior", {"sparse_transformer": "transformer", "seq2seq": "seq2seq"}),
}
# Settings of a part that its weights do not depend on.
FREE = {
    "init_std",
    "init_gain",
    "likelihood_weight",
    "text_loss_weight",
    "variant.embedding_gradient",
    "variant.first_token_as_text",
}


def with_initial_parts(config: RunConfig) -> RunConfig:
    """The settings of a run with what they leave to `init` filled in; as they are without it.

    Raises:
        ValueError: the folder has no such part, or the settings differ from it; names them all.
    """
    if config.init is None:
        return config
    folder = models.find(config.init)
    config = config.model_copy(update={"init": str(folder)})
    if config.stage == "dalle" and config.sampling is None:
        _check_sampling(folder)
    section = PARTS[config.stage][1][_kind(config, folder).name]
    shape = _shape(config, folder)
    given = getattr(config, section)
    update: dict[str, Any] = {}
    if given is None:
        update[section] = shape
    else:
        _check_shape(config, section, _flat(given), _flat(shape))
    _weights(config, folder, shape)  # refuses those of another model before one is built
    if config.stage not in ("dvae", "vqgan"):
        update |= _tokenizer(config, folder)
    if config.stage == "dalle":
        update |= _other_parts(config, folder)
    _check_no_warm_start(config)
    return config.model_copy(update=update)


def _check_no_warm_start(config: RunConfig) -> None:
    """A codec's warm start makes new weights, and `init` brings trained ones."""
    codebook = config.vqgan_training.codebook if config.vqgan_training is not None else None
    for name, section in (
        ("dvae_training", config.dvae_training),
        ("vqgan_training.codebook", codebook),
    ):
        if section is not None and section.warm_start_steps:
            raise ValueError(
                f"{name}.warm_start_steps {section.warm_start_steps}: a warm start makes new "
                "weights, and init brings trained ones; set it to 0"
            )


class InitialWeights(Mapping[str, Tensor]):
    """Weights of the part that a stage trains, each read when it is asked for.

    Their names have a prefix in front, as the stage's parameters do. Raises ValueError for a file
    that cannot be read or does not fit, or a weight that is not finite.
    """

    def __init__(self, config: RunConfig, prefix: str) -> None:
        assert config.init is not None
        self._folder = Path(config.init)
        read = _weights(config, self._folder, _shape(config, self._folder))
        self._weights = {prefix + name: weight for name, weight in read.items()}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if not bool(weight.isfinite().all()):
            raise ValueError(f"init: the weight {name} of {self._folder} is not finite")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _weights(config: RunConfig, folder: Path, shape: Any) -> dict[str, Tensor]:
    """The weights of the folder's part, mapped; ValueError where they are not of its shape."""
    try:
        return read_weights(_kind(config, folder), shape, folder)
    except ValueError as error:
        raise ValueError(f"init: {error}") from error


def _check_sampling(folder: Path) -> None:
    """ValueError for a mistake in what the folder says of sampling, which would be lost."""
    try:
        read_sampling(folder)
    except ValueError as error:
        raise ValueError(f"init: {error}") from error


def _section(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What the folder's config.json says of the part that the stage trains."""
    try:
        return dict(read_config(folder).get(PARTS[config.stage][0]) or {})
    except ValueError as error:
        raise ValueError(f"init: {error}") from error


def _kind(config: RunConfig, folder: Path) -> Kind:
    """The kind of the folder's part; ValueError where the stage, or its section, is of another."""
    role, kinds = PARTS[config.stage]
    given = [kind for kind, section in kinds.items() if getattr(config, section) is not None]
    found = _section(config, folder).get("kind")
    if not isinstance(found, str) or found not in (given or kinds):
        holds = f"a {role} of kind {found!r}" if found else f"no {role}"
        names = " or ".join(map(repr, given or kinds))
        raise ValueError(
            f"init: {folder} holds {holds}, and stage {config.stage!r} trains a {role} of kind "
            f"{names}"
        )
    return registry.KINDS[role][found]


def _shape(config: RunConfig, folder: Path) -> Any:
    """The settings of the folder's part."""
    section = _section(config, folder)
    section.pop("kind", None)
    try:
        return read_shape(_kind(config, folder), section, folder)
    except ValueError as error:
        raise ValueError(f"init: {error}") from error


def _flat(shape: BaseModel, prefix: str = "") -> dict[str, Any]:
    """The settings of a part by name, those of its sections with the section's name in front."""
    result: dict[str, Any] = {}
    for name, value in shape:
        if isinstance(value, BaseModel):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def _check_shape(
    config: RunConfig, section: str, given: Mapping[str, Any], shape: Mapping[str, Any]
) -> None:
    differing = [
        f"{section}.{name} is {shape[name]!r} there and {given[name]!r} here"
        for name in shape
        if name not in FREE and shape[name] != given[name]
    ]
    if differing:
        raise ValueError(
            f"init: the model of {config.init} is another one: {'; '.join(differing)}. Take the "
            f"section {section} out, and the model's own is used"
        )


def _tokenizer(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The tokenizer that the weights were trained with; with another, tokens mean other things."""
    if config.tokenizer is None:
        return {"tokenizer": str(folder)}
    if not isinstance(config.tokenizer, str):
        raise ValueError(
            "tokenizer: a new one would give the tokens other meanings than the weights of init "
            "were trained with; take the section out"
        )
    if not read_alike(open_tokenizer(config.tokenizer), open_tokenizer(folder)):
        raise ValueError(
            f"tokenizer: {config.tokenizer} reads captions otherwise than the tokenizer of init "
            f"{folder}; take the setting out"
        )
    return {}


def passed_on(config: RunConfig, exported: Path) -> dict[str, Origin]:
    """Whose the parts of a run's model are, by role: of the folders that it began with or reads.

    exported: the run's own model, of an earlier save, which still says it when a folder is gone.
    """
    trained = PARTS[config.stage][0]
    found = _origins_of(exported)
    if config.init is not None and (origin := _origins_of(Path(config.init)).get(trained)):
        notes = dict.fromkeys((*origin.notes, TRAINED_FURTHER))
        found[trained] = replace(origin, notes=tuple(notes))
    for role in ("codec", "ranker"):
        folder = getattr(config, role)
        if folder is not None and (origin := _origins_of(Path(folder)).get(role)):
            found[role] = origin
    return found


def sampling_passed_on(config: RunConfig, exported: Path) -> SamplingDefaults:
    """What a run's model is drawn with where nobody says: as the settings have it, or its own
    folder, of an earlier save, or the model that it began with."""
    if config.sampling is not None:
        return config.sampling
    for folder in (exported, *([Path(config.init)] if config.init else [])):
        with suppress(ValueError):  # gone, or nothing is there yet
            return read_sampling(folder)
    return SamplingDefaults()


def _origins_of(folder: Path) -> dict[str, Origin]:
    try:
        return read_origins(folder)
    except ValueError:
        return {}  # gone, or nothing is there yet


def _other_parts(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Codec and ranker of a full model's folder, where the settings name none."""
    update: dict[str, Any] = {}
    if config.codec is None:
        update["codec"] = str(folder)
    elif has_part("codec", folder):
        theirs, ours = (fingerprint(registry.load("codec", f)) for f in (folder, config.codec))
        if theirs != ours:
            # Not refused: only the decoder may have been trained further.
            warnings.warn(
                f"codec: {config.codec} is not the codec of init {folder} (fingerprints {ours} and "
                f"{theirs}); the weights read its tokens as if they were the former's",
                stacklevel=2,
            )
    if config.ranker is None and has_part("ranker", folder):
        update["ranker"] = str(folder)
    return update
