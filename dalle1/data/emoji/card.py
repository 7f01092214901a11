"""The README of an emoji data set: where its pictures come from and what must be said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dalle1.data.emoji.packages import NAMES, FoundPackage
from dalle1.data.emoji.sources import (
    NAMES_ATTRIBUTION,
    NAMES_LICENSE,
    NAMES_LICENSE_TEXT,
    STYLES,
)

SHOWN = {
    "train": "one emoji, two in a relation, one in two styles; without what is held out",
    "test": "the same kinds, other draws",
    "heldout_emoji": "emoji that no other split shows",
    "heldout_styles": "emoji in a style that no other split shows them in",
    "heldout_pairs": "two emoji side by side that no other split shows side by side",
    "contrasts": "as train; each second one is the one before with one thing changed",
}


def card(found: Mapping[str, FoundPackage], record: Mapping[str, Any]) -> str:
    """The README as Markdown.

    Args:
        found: the packages that the data set is made of.
        record: what `emoji.json` says.
    """
    styles = [STYLES[use] for use in found if use != NAMES]
    tones = "" if record["skin_tones"] else " without skin tones"
    lines = [
        "# Emoji with captions",
        "",
        f"Scenes of {record['emoji']:,} emoji{tones} with English captions, as WebDataset shards, "
        "composed by dalle1 (`dalle1 data emoji`) from the packages below.",
        "",
        "| style | pictures | package | license |",
        "|---|---|---|---|",
        *(
            f"| {s.name} | {s.attribution} | {_told(found[s.name])} "
            f"| [{s.license}]({s.license_text}) |"
            for s in styles
        ),
        f"| names and keywords | {NAMES_ATTRIBUTION} | {_told(found[NAMES])} "
        f"| [{NAMES_LICENSE}]({NAMES_LICENSE_TEXT}) |",
        "",
        "## What must be said",
        "",
        "Whoever hands on these images, or images made of them, keeps this page or says:",
        "",
        *(f"> {s.attribution}, licensed under {s.license} ({s.license_text})." for s in styles),
        "> The pictures were scaled, placed on plain backgrounds and combined.",
        "",
        "Licenses of the packages themselves are in the packages. This page is no legal advice.",
        "",
        "## Splits",
        "",
        "| split | samples | seed | side | what it shows |",
        "|---|---|---|---|---|",
        *(
            f"| {split} | {s['count']:,} | {s['seed']} | {s['side']} | {SHOWN[split]} |"
            for split, s in record["splits"].items()
        ),
        "",
        "Each sample has a png, a txt (the caption) and a json (the scene: which emoji, in which "
        "style, where).",
        f"Fingerprint of names and pictures: `{record['digest']}`.",
        "",
    ]
    return "\n".join(lines)


def _told(found: FoundPackage) -> str:
    unknown = f"version unknown; {found.package.version} was tried"
    return f"{found.package.name} {found.version if found.version != 'unknown' else f'({unknown})'}"
