"""What the findings about a model of emoji share: `dalle1 evaluate` on a third of the captions.

The model is trained once. Seeds are other captions and other draws, so that an interval over seeds
tells how far the figures of this model depend on which captions were asked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle1.common.files import read_text
from dalle1.data.emoji.export import read_record
from dalle1.evaluation.benchmark import RESULT
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.emoji_data import SINGLE
from dalle1.evaluation.judged import Prompt
from dalle1.evaluation.run import prepare, run
from dalle1.findings.base import (
    Arm,
    Curve,
    Finding,
    Measure,
    Measurements,
    Options,
    Prediction,
    Settings,
)
from dalle1.findings.workspace import Workspace
from dvae.storage import CONFIG

PARTS = 3  # of the captions: seed 3 asks for those of seed 0 again, with other draws
SHEET = "sheet.png"
SEEN, HELD_OUT = "test", "heldout_styles"  # the splits
KINDS = (SINGLE, None)  # of scenes, by which a completion has none

MEASURES = (
    Measure("top1", "emoji right, single draw, %", 1),
    Measure("style", "style right, single draw, %", 1),
    Measure("all", "all right, single draw, %", 1),
    Measure("best_top1", "emoji right, CLIP's first, %", 1),
    Measure("best_all", "all right, CLIP's first, %", 1),
)
CURVES = (Curve("all", "all right, %", x="N, of which CLIP takes the first", log_x=True),)


def emoji_finding(
    completion: bool, seen: str, held_out: str, *, name: str, claim: str, paper: str, setting: str
) -> Finding:
    """A finding of section 3.3 that compares styles which training shows with those it does not.

    Args:
        completion: whether the upper half is given, see `RankSettings.completion`.
        seen, held_out: what the two arms are, in words.
        name, claim, paper, setting: as of a `Finding`.
    """

    def settings(arm: Arm, seed: int, options: Options) -> Settings:
        return benchmark_settings(arm.settings["split"], completion, seed, options)

    return Finding(
        name=name,
        claim=claim,
        section="section 3.3",
        paper=paper,
        setting=setting,
        minutes=12,
        arms=(Arm("seen", seen, {"split": SEEN}), Arm("held out", held_out, {"split": HELD_OUT})),
        measures=MEASURES,
        curves=CURVES,
        predictions=(Prediction("all", "seen", "held out"),),
        settings=settings,
        run=measure_emoji,
        needs=missing,
    )


def missing(options: Options) -> str | None:
    """What the user has to name, or None."""
    model, emoji = options.model, options.emoji
    if model is None or not (model / CONFIG).is_file():
        got = None if model is None else str(model)
        return (
            f"--model: expected the folder of a model trained on emoji, got {got!r}; train one "
            "with configs/emoji"
        )
    if emoji is None:
        return "--emoji: expected a folder that `dalle1 data emoji` wrote, got none; name it"
    try:
        record = read_record(emoji, "--emoji")
    except ValueError as error:
        return str(error)
    lacking = [split for split in (SEEN, HELD_OUT) if split not in record["splits"]]
    if lacking:
        return f"--emoji: {emoji} lacks the split {lacking[0]}; write it with `dalle1 data emoji`"
    return None


def benchmark_settings(split: str, completion: bool, seed: int, options: Options) -> Settings:
    """What a run depends on.

    Args:
        split: whose captions are drawn.
        completion: whether the upper half is given, and the captions are those of two styles.
        seed: of the draws; it chooses the captions too.
        options: of the user.
    """
    assert options.model is not None and options.emoji is not None  # see `missing`
    record = read_record(options.emoji)
    return {
        "model": digest_of(options.model),
        "data": {"digest": record["digest"], "split": record["splits"][split]},
        "captions": options.fewer(70, 2),
        "benchmark": {
            "splits": [split],
            "completion": completion,
            "candidates": 16 if options.scale >= 1 else 2,
            "seed": seed,
        },
    }


def measure_emoji(settings: Settings, workspace: Workspace) -> Measurements:
    """Draws, ranks and judges: `MEASURES` and `CURVES`. A contact sheet stays."""
    w, count = workspace, settings["captions"]
    folder = w.folder / "ranking"
    ranking = RankSettings(
        model=str(w.model),
        data=str(w.emoji),
        packages=None if w.packages is None else str(w.packages),
        judge="emoji",
        run=str(folder),
        captions=4 * PARTS * count,  # of all kinds; some have two emoji
        blur=[0],
        reference_images=16,  # FID is not what is asked here
        inception_splits=1,
        **settings["benchmark"],
    )
    prepared = prepare(ranking)
    prepared.prompts = prompts_of(settings["seed"], prepared.prompts, count)
    run(prepared, ranking)
    shutil.copyfile(folder / SHEET, w.picture("sheet"))
    (group,) = json.loads(read_text(folder / RESULT))["groups"].values()
    return read_group(group)


def prompts_of(seed: int, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """A third of the captions of one emoji, or of one in two styles.

    Raises ValueError where there are fewer than `count`.
    """
    usable = [prompt for prompt in prompts if prompt.kind in KINDS]
    chosen = usable[seed % PARTS :: PARTS][:count]
    if len(chosen) < count:
        raise ValueError(
            f"--emoji: expected {PARTS * count} captions of a split, got {len(usable)}; write "
            "more with `dalle1 data emoji`"
        )
    return chosen


def read_group(group: dict[str, Any]) -> Measurements:
    """The measures of a group of ranking.json."""
    curves = group["curves"]
    right, attributes = curves["accuracy"], curves["attributes"]
    last = max(right, key=int)

    def percent(curve: dict[str, Any], n: str) -> float:
        return 100 * float(curve[n]["mean"])

    return Measurements(
        {
            "top1": percent(attributes["top-1"], "1"),
            "style": percent(attributes["style"], "1"),
            "all": percent(right, "1"),
            "best_top1": percent(attributes["top-1"], last),
            "best_all": percent(right, last),
        },
        {"all": [(float(n), percent(right, n)) for n in sorted(right, key=int)]},
    )


def digest_of(model: Path) -> str:
    """16 hexadecimal digits of all files of a model folder that decide what it draws."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")) + sorted(model.glob("*.json")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()[:16]
