"""What a model is drawn with where the caller does not say.

A model that was trained briefly draws better at a lower temperature and with some guidance. Its
folder can say so, and then everybody who opens it gets what its makers have seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle1.generation.options import SamplingOptions
from dvae.storage import CONFIG, read_config, write_section

SECTION = "sampling"  # of config.json
# For "as the model has it". None is no number, and is refused as before there was this word.
OWN: Literal["own"] = "own"


class SamplingDefaults(BaseModel):
    """What a model is drawn with where the caller says nothing; the defaults are the paper's.

    A model's folder may name others, in the section "sampling" of its `config.json`. `top_k` and
    `top_p` are not among them: None means all tokens there, so a caller could not take them back.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(1.0, ge=0, description="see `SamplingOptions`")
    guidance: float = Field(1.0, ge=0, description="see `SamplingOptions`")

    def options(
        self,
        temperature: float | Literal["own"] = OWN,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | Literal["own"] = OWN,
        window: int | None = None,
    ) -> SamplingOptions:
        """A caller's options; "own": as the model has it.

        Raises ValueError where one of them does not fit.
        """
        return SamplingOptions(
            _chosen(temperature, self.temperature),
            top_k,
            top_p,
            _chosen(guidance, self.guidance),
            window,
        )


def _chosen(value: float | Literal["own"], own: float) -> float:
    """What a caller gives, or the model's own; any other text is left for `SamplingOptions`."""
    # A text first: an array's comparison has several answers.
    return own if isinstance(value, str) and value == OWN else value


def read_sampling(folder: str | Path) -> SamplingDefaults:
    """Those of a folder; the paper's where it names none.

    Raises ValueError that names a setting that there is not, or a value out of its range.
    """
    section = read_config(folder).get(SECTION, {})
    try:
        return SamplingDefaults.model_validate(section)
    except ValidationError as error:
        mistake = error.errors()[0]
        name = ".".join(map(str, (SECTION, *mistake["loc"])))
        raise ValueError(
            f"{Path(folder) / CONFIG}: {name}: {mistake['msg']}, got {mistake['input']!r:.100}; "
            "correct it or take it out"
        ) from error


def write_sampling(folder: Path, sampling: SamplingDefaults) -> None:
    """Puts them into the folder's `config.json`, or takes the section out where they are the
    paper's."""
    entries = sampling.model_dump(exclude_defaults=True)
    if entries or SECTION in read_config(folder):
        write_section(folder, SECTION, entries or None)
