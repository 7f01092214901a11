"""Emoji as they are published: packages with a picture for each, and their names in English.

A package is a folder, unpacked by the user. Nothing is fetched here. Pictures are found by the code
points in their file names; names come from CLDR's annotations as `emojibase-data` packs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle1.common.files import expand_home

NAMES_PACKAGE, NAMES_VERSION = "emojibase-data", "17.0.0"
NAMES_FILE = "en/data.json"
NAMES_LICENSE = "MIT; the names are CLDR's, under the Unicode License"
NAMES_ATTRIBUTION = "emojibase-data, Miles Johnson; CLDR, Unicode, Inc."
NAMES_LICENSE_TEXT = "https://www.unicode.org/license.txt"
LARGEST_NAMES = 64 * 2**20  # bytes; the published file has 1 MB
LONGEST_NAME = 100  # letters
PRESENTATION = "fe0f"  # says only that a picture is meant, and is left out here and there
LEAST = 2  # styles that an emoji must be there in
LEAST_SHARE = 0.5  # of the emoji that a style must have; those published have 89 % and more
_CODE = re.compile(r"[0-9a-f]{1,6}(-[0-9a-f]{1,6})*$")
_TONE = re.compile(r"(.+) skin tone$")
# Places that English gives an article.
_THE_PLACE = re.compile(
    r"islands|republic|territor|^(united|european|isle|netherlands|philippines|bahamas|gambia"
    r"|maldives|comoros)"
)
_OF_PEOPLE = {"family": " of ", "kiss": " of ", "couple with heart": ", "}
_HAIR = re.compile(r"(.+ hair|bald|beard)$")


@dataclass(frozen=True)
class Style:
    """A set of pictures in one artist's hand.

    Attributes:
        name: as captions call it.
        package: of the public registry of JavaScript packages.
        version: of the package, that was tried.
        folders: where the package keeps its pictures; the first that exists.
        suffix: of a picture's file name.
        license: of the pictures.
        license_text: its address.
        attribution: whose pictures they are, as the license asks to be said.
    """

    name: str
    package: str
    version: str
    folders: tuple[str, ...]
    suffix: str
    license: str
    license_text: str
    attribution: str


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style(
            "noto",
            "emoji-datasource-google",
            "16.0.0",
            ("img/google/64",),
            ".png",
            "Apache-2.0",
            "https://www.apache.org/licenses/LICENSE-2.0",
            "Noto Emoji, copyright Google LLC",
        ),
        Style(
            "twemoji",
            "emoji-datasource-twitter",
            "16.0.0",
            ("img/twitter/64",),
            ".png",
            "CC-BY 4.0",
            "https://creativecommons.org/licenses/by/4.0/",
            "Twemoji, copyright Twitter, Inc. and other contributors",
        ),
        Style(
            "fluent",
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            ("assets",),
            ".webp",
            "MIT",
            "https://opensource.org/license/mit",
            "Fluent Emoji, copyright Microsoft Corporation",
        ),
    )
}


@dataclass(frozen=True)
class Emoji:
    """One emoji: what it shows, and its picture in each style that has it.

    Attributes:
        code: code points in lower-case hexadecimal, without the presentation selector.
        name: in plain lower-case English.
        keywords: other words that CLDR gives it.
        group: number of its group in CLDR (faces, people, animals, food ...).
        pictures: files, by style.
    """

    code: str
    name: str
    keywords: tuple[str, ...]
    group: int
    pictures: Mapping[str, Path]


def read_emoji(
    packages: Mapping[str, str | Path], names: str | Path, least: int = LEAST
) -> list[Emoji]:
    """All emoji with a name and pictures in enough styles, in the order of their codes.

    Args:
        packages: the unpacked package of each style, by the names of `STYLES`.
        names: the unpacked package `emojibase-data`.
        least: number of styles that an emoji must be there in.

    Raises:
        ValueError: a style that is not known, fewer than two, a package without its pictures or
            names, or with few of them.
    """
    unknown = sorted(packages.keys() - STYLES.keys())
    if unknown or len(packages) < LEAST:
        raise ValueError(
            f"packages: expected at least {LEAST} styles of {', '.join(STYLES)}, got "
            f"{', '.join(unknown or sorted(packages)) or 'none'}"
        )
    pictures = {
        name: _pictures(STYLES[name], Path(expand_home(packages[name])))
        for name in STYLES
        if name in packages
    }
    found: dict[str, Emoji] = {}
    for code, name, keywords, group in _named(Path(expand_home(names))):
        of_styles = {style: files[code] for style, files in pictures.items() if code in files}
        if of_styles and code not in found:
            found[code] = Emoji(code, name, keywords, group, of_styles)
    for style in pictures:
        count = sum(style in e.pictures for e in found.values())
        if count < LEAST_SHARE * len(found):
            raise ValueError(
                f"{style}: {packages[style]} has pictures of {count:,} of the {len(found):,} emoji "
                f"of these packages, expected half of them or more; unpack all of "
                f"{STYLES[style].package}, or leave out this style"
            )
    enough = [found[code] for code in sorted(found) if len(found[code].pictures) >= least]
    if not enough:
        raise ValueError(f"names: {names} names none of the pictures in {least} packages or more")
    return enough


def normal_code(text: str) -> str:
    """A sequence of code points as one spelling: "0023-FE0F-20E3" is "23-20e3".

    Raises ValueError for anything else than hexadecimal numbers with "-" between them.
    """
    lower = text.strip().lower().replace("_", "-")
    if not _CODE.match(lower):
        raise ValueError(f"code: expected code points such as 1f34e, got {text!r}")
    return "-".join(part.lstrip("0") or "0" for part in lower.split("-") if part != PRESENTATION)


def plain_name(label: str) -> str:
    """A label of CLDR as words that a sentence can take: "waving hand: light skin tone" is
    "waving hand with light skin", "flag: Japan" is "flag of japan"."""
    plain = label.lower().translate({0x201C: None, 0x201D: None, 0x2019: "'"})  # as people type
    stem, _, details = plain.partition(":")
    parts = [part.strip() for part in details.split(",") if part.strip()]
    if stem == "flag":
        place = ", ".join(parts)
        return f"flag of {'the ' if _THE_PLACE.search(place) else ''}{place}"
    if stem == "keycap":
        return f"keycap {', '.join(parts)}"
    tones = [match[1] for part in parts if (match := _TONE.match(part))]
    hair = [part for part in parts if _HAIR.match(part)]
    rest = [part for part in parts if not _TONE.match(part) and part not in hair]
    name = stem.strip()
    if rest:
        if stem in _OF_PEOPLE:
            name += _OF_PEOPLE[stem] + _listed([f"{_article(r)} {r}" for r in rest])
        else:
            name += ", " + ", ".join(rest)
    extras = [f"{h} head" if h == "bald" else h for h in hair]
    extras += [f"{_listed(tones)} skin"] if tones else []
    return f"{name} with {' and '.join(extras)}" if extras else name


def _article(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _pictures(style: Style, package: Path) -> dict[str, Path]:
    """The files of a package by code; ValueError where there are none."""
    folder = next((package / f for f in style.folders if (package / f).is_dir()), None)
    if folder is None:
        raise ValueError(
            f"{style.name}: {package} has no folder {style.folders[0]!r}; unpack "
            f"{style.package} there, its folder 'package'"
        )
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == style.suffix and _CODE.match(path.stem.lower()):
            files.setdefault(normal_code(path.stem), path)
    if not files:
        raise ValueError(f"{style.name}: {folder} holds no pictures that end in {style.suffix}")
    return files


def _named(package: Path) -> Iterator[tuple[str, str, tuple[str, ...], int]]:
    """Code, name, keywords and group of each emoji that is named, variants of skin included."""
    path = package / NAMES_FILE
    if not path.is_file():
        raise ValueError(
            f"names: {path} is missing; unpack {NAMES_PACKAGE} there, its folder 'package'"
        )
    if path.stat().st_size > LARGEST_NAMES:
        raise ValueError(f"names: {path} is far too large to be {NAMES_PACKAGE}'s")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"names: {path} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"names: {path}: expected a list of emoji, got {type(entries).__name__}")
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"names: {path}: expected objects, got {str(entry)[:50]!r}")
        skins = entry.get("skins") or []
        for one in (entry, *(s for s in skins if isinstance(s, dict))):
            yield from _entry(one, entry)


def _entry(one: dict[str, Any], parent: dict[str, Any]) -> Iterator[Any]:
    """What `_named` gives of an entry; nothing of those that are not for pictures."""
    code, label, group = one.get("hexcode"), one.get("label"), parent.get("group")
    if not (isinstance(code, str) and isinstance(label, str) and isinstance(group, int)):
        return
    if _TONE.match(label) and ":" not in label:
        return  # a patch of skin
    if 0 < len(label) <= LONGEST_NAME and _CODE.match(code.lower()):
        tags = parent.get("tags") or []
        keywords = tuple(t.lower() for t in tags if isinstance(t, str) and len(t) <= LONGEST_NAME)
        yield normal_code(code), plain_name(label), keywords, group
