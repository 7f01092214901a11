"""Emoji as they are published: names, codes, packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle1.data.emoji import STYLES, read_emoji
from dalle1.data.emoji.sources import normal_code, plain_name

from .packages import BASES, TONES, write_packages


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("red apple", "red apple"),
        ("waving hand: medium-light skin tone", "waving hand with medium-light skin"),
        ("flag: Côte d\u2019Ivoire", "flag of côte d'ivoire"),
        ("flag: Japan", "flag of japan"),
        ("flag: Netherlands", "flag of the netherlands"),
        ("flag: Cook Islands", "flag of the cook islands"),
        ("keycap: 10", "keycap 10"),
        ("woman: red hair", "woman with red hair"),
        ("man: bald", "man with bald head"),
        ("man: dark skin tone, bald", "man with bald head and dark skin"),
        ("kiss: woman, man", "kiss of a woman and a man"),
        ("family: adult, child", "family of an adult and a child"),
        ("family: man, woman, boy", "family of a man, a woman and a boy"),
        (
            "couple with heart: man, man, light skin tone, dark skin tone",
            "couple with heart, a man and a man with light and dark skin",
        ),
        ("person walking: facing right", "person walking, facing right"),
        ("Japanese \u201chere\u201d button", "japanese here button"),
    ],
)
def test_names_are_words_that_a_sentence_takes(label: str, name: str) -> None:
    """Colons and lists of modifiers in captions, which nobody types."""
    assert plain_name(label) == name


def test_codes_have_one_spelling() -> None:
    """A picture that is not found since one package writes the presentation selector and another
    does not; or a name that is no code taken for one."""
    assert normal_code("0023-FE0F-20E3") == normal_code("23-20e3") == "23-20e3"
    for wrong in ("", "apple", "1f34e.png", "1f34e-", "../1f34e"):
        with pytest.raises(ValueError, match="code: expected code points"):
            normal_code(wrong)


def test_emoji_have_the_pictures_of_their_styles(tmp_path: Path) -> None:
    """A picture of one emoji under another's name, a style left out, tones without a name."""
    packages, names = write_packages(tmp_path)
    emoji = {e.code: e for e in read_emoji(packages, names)}
    assert len(emoji) == len(BASES) + 2 * len(BASES[::5])
    for code, e in emoji.items():
        number = BASES.index(code.split("-")[0])
        tone = {"": "", TONES[0]: " with light skin", TONES[1]: " with dark skin"}
        assert e.name == f"thing {number}{tone[code.partition('-')[2]]}"
        assert list(e.pictures) == [s for s in STYLES if s != "fluent" or number % 7 != 3]
        assert all(path.stem == code and style in path.parts for style, path in e.pictures.items())
        assert e.keywords == ("object", f"tag {number}") and e.group == number % 9


def test_a_package_that_is_none_is_named(tmp_path: Path) -> None:
    """A folder that was unpacked wrongly, and an error somewhere behind it."""
    packages, names = write_packages(tmp_path)
    (tmp_path / "empty" / "img" / "google" / "64").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"noto: .*empty.* holds no pictures that end in .png"):
        read_emoji(packages | {"noto": tmp_path / "empty"}, names)
    with pytest.raises(ValueError, match=r"fluent: .* has no folder 'assets'; unpack @lobehub"):
        read_emoji(packages | {"fluent": tmp_path / "noto"}, names)
    with pytest.raises(ValueError, match=r"packages: expected at least 2 styles of noto, .*apple"):
        read_emoji(packages | {"apple": tmp_path}, names)
    with pytest.raises(ValueError, match="got noto"):
        read_emoji({"noto": packages["noto"]}, names)
    with pytest.raises(ValueError, match=r"names: .*data.json is missing; unpack emojibase-data"):
        read_emoji(packages, tmp_path / "noto")


@pytest.mark.parametrize("content", ["", "{", "{}", "[3]", "[" * 20000, "[]", '[{"hexcode": 5}]'])
def test_names_that_cannot_be_read_are_named(tmp_path: Path, content: str) -> None:
    """A traceback for a file that was cut short, or an empty data set."""
    packages, names = write_packages(tmp_path)
    (names / "en" / "data.json").write_text(content)
    with pytest.raises(ValueError, match="names: "):
        read_emoji(packages, names)


def test_names_of_others_are_left_out(tmp_path: Path) -> None:
    """Letters that are no emoji in captions, or a label of a page's length."""
    packages, names = write_packages(tmp_path)
    path = names / "en" / "data.json"
    entries = json.loads(path.read_text())
    entries += [{"label": "x" * 1000, "hexcode": BASES[0], "group": 1}]
    entries += [{"label": "regional indicator F", "hexcode": "1F1EB"}]  # of no group
    entries += [{"label": "dark skin tone", "hexcode": BASES[1], "group": 2}]
    path.write_text(json.dumps(entries[::-1]))  # of several of one code, the first counts
    assert all("skin tone" not in e.name for e in read_emoji(packages, names))
    assert all(len(e.name) < 50 for e in read_emoji(packages, names))
