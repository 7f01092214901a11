"""The stages by name."""

from __future__ import annotations

from collections.abc import Callable

from dalle1.training.config import RunConfig
from dalle1.training.stages.base import Sharding, Stage
from dalle1.training.stages.clip import CLIPStage
from dalle1.training.stages.dvae import DVAEStage
from dalle1.training.stages.prior import PriorStage
from dalle1.training.stages.vqgan import VQGANStage

STAGES: dict[str, type[Stage]] = {
    "dvae": DVAEStage,
    "vqgan": VQGANStage,
    "clip": CLIPStage,
    "dalle": PriorStage,
}

MakeStage = Callable[[RunConfig, Sharding | None], Stage]


def make_stage(config: RunConfig, sharding: Sharding | None = None) -> Stage:
    """The stage that a config names. Priors alone are large enough to be made sharded."""
    if config.stage == "dalle":
        return PriorStage(config, sharding)
    return STAGES[config.stage](config)
