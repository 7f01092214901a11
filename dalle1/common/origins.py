"""Whose the parts of a model are: kept in its folder and its card, and when it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dalle1.common.files import read_text, write_text
from dvae.storage import read_config, write_section

SECTION = "origins"  # of config.json
CARD = "README.md"
TRAINED_FURTHER = "trained further with dalle1"  # a note
TITLE = "## Origin and license"  # of the card's last section


@dataclass(frozen=True)
class Origin:
    """Where a part comes from that somebody else has trained.

    Attributes:
        title: as its authors call it.
        source: who they are, and where its files are published.
        license: of the weights, as they state it.
        notes: what else a reader of the card should know.
    """

    title: str
    source: str
    license: str
    notes: tuple[str, ...] = ()


def read_origins(folder: str | Path) -> dict[str, Origin]:
    """The origins of a folder's parts by role; none where all are ours, or nothing is said."""
    found: dict[str, Origin] = {}
    for role, entry in read_config(folder).get(SECTION, {}).items():
        if isinstance(entry, Mapping):
            text = {name: str(entry.get(name, "")) for name in ("title", "source", "license")}
            notes = entry.get("notes")
            lines = notes if isinstance(notes, list) else []
            found[str(role)] = Origin(**text, notes=tuple(map(str, lines)))
    return found


def write_origins(folder: Path, origins: Mapping[str, Origin]) -> None:
    """Puts them into the folder's `config.json`, or takes the section out where there are none."""
    entries = {role: asdict(origin) for role, origin in origins.items()}
    if entries or SECTION in read_config(folder):
        write_section(folder, SECTION, entries or None)


def add_origins(folder: Path, origins: Mapping[str, Origin]) -> None:
    """Puts them into the `config.json` and the card of a folder that holds its parts already."""
    write_origins(folder, origins)
    card = folder / CARD
    if not origins and not card.is_file():
        return
    text = read_text(card) if card.is_file() else "# A part of a DALL-E model of dalle1\n"
    before = text.partition(f"\n{TITLE}\n")[0]
    write_text(card, before + origins_text(origins))


def origins_text(origins: Mapping[str, Origin]) -> str:
    """The end of a model card; empty where there are no origins."""
    if not origins:
        return ""
    lines = ["", TITLE, ""]
    for role, origin in origins.items():
        lines.append(f"- {role}: {origin.title}")
        lines.append(f"  - from {origin.source}")
        lines.append(f"  - license of the weights: {origin.license}")
        lines += [f"  - {note}" for note in origin.notes]
    lines += ["", "What is trained further from these weights stays under their licenses.", ""]
    return "\n".join(lines)
