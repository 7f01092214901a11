"""A codec and a ranker of the built-in shapes that findings share, trained in a few minutes."""

from __future__ import annotations

from pathlib import Path

from dalle1.findings.base import Options, Settings
from dalle1.findings.training import run_settings, train_run
from dalle1.findings.workspace import Workspace
from dalle1.training.run_folder import EXPORTED

CODES = 256
SEED = 0  # of parts that all seeds of a finding share


def codec_settings(options: Options) -> Settings:
    """Settings of a small dVAE for the built-in shapes, with the warm start of docs/dvae.md."""
    warm, relaxed = options.scaled(500, 2), options.scaled(600, 2)
    overrides = [
        f"steps={warm + relaxed}",
        f"dvae_training.warm_start_steps={warm}",
        f"dvae_training.temperature_steps={relaxed * 2 // 3}",
        f"dvae_training.warm_start_images={options.fewer(1024, 64)}",
        f"dvae.codebook_size={CODES}",
        "dvae.width=32",
        f"reader.shapes_count={options.fewer(20_000, 256)}",
        "contact_sheet_every=null",
        "save_every=500",
    ]
    return run_settings("shapes/dvae", overrides, SEED)


def clip_settings(options: Options) -> Settings:
    """Settings of a small CLIP for the built-in shapes; its run learns the tokenizer, too."""
    overrides = [
        f"steps={options.scaled(350, 2)}",
        f"batch_size={options.fewer(96, 8)}",
        f"reader.shapes_count={options.fewer(20_000, 256)}",
        "contact_sheet_every=null",
        "save_every=500",
    ]
    if options.scale < 1:  # few captions give few tokens
        overrides += ["clip.text_vocab=302", "tokenizer.captions=256", "clip.text_length=64"]
    return run_settings("shapes/clip", overrides, SEED)


def codec_of(settings: Settings, workspace: Workspace) -> Path:
    """The folder of a codec's model, trained by the first run that needs it."""
    return _part("shapes-codec", settings, workspace) / EXPORTED


def clip_of(settings: Settings, workspace: Workspace) -> Path:
    """The folder of CLIP's run, which holds a tokenizer and, in `model`, the ranker."""
    return _part("shapes-clip", settings, workspace)


def _part(name: str, settings: Settings, workspace: Workspace) -> Path:
    def make(folder: Path) -> None:
        train_run(settings, folder / "run", workspace)

    return workspace.shared(name, settings, make) / "run"
