"""The filters of captions: what is boilerplate, too short, or not English."""

from __future__ import annotations

import sys
import time

import pytest

from dalle1.data.curation import caption_filters as captions
from dalle1.data.curation.caption_filters import (
    boilerplate,
    other_script,
    too_short,
    without_boilerplate,
)

DATES = """
12 May 2010
12th May 2010
12th of May, 2010
the 12th day of May 2010
12-May-2010
12May2010
12. May 2010
May 12, 2010
May 12th '10
MAY 2010
May of 2010
Sept. 3, 1999
Saturday, May 12, 2010
Sat 12 May 2010
12-14 May 2010
12 \u2013 14 May 2010
May 12 to May 14, 2010
summer 2010
2010-05-12
2010/05/12
2010.05.12
2010:05:12
20100512
12/05/2010
5/12/10
12.05.2010
12-05-2010
2010年5月12日
2010-05-12 14:33
2010-05-12T14:33:05Z
2010-05-12T14:33:05.123+02:00
2010-05-12 14:33:05 +0200
12/05/2010 at 2:33 pm
12/05/2010, 2.33 p.m.
12 May 2010, 14h33
12 May 2010 14:33:05 GMT
""".strip().splitlines()
OTHERS = """
DSC_0012.jpg
IMG_1234 (2).JPG
holiday-in-spain.jpeg
IMG_20100512_143305
P1010012
DSCN1234
Photo 0012
Image_001
scan0001.tif
Untitled-1.psd
untitled
Image 12/05/2010 14:33
WhatsApp Image 2020-05-12 at 14.33.05
Screenshot 2020-05-12 at 14.33.05.png
Screen Shot 2020-05-12 at 2.33.05 PM
OLYMPUS DIGITAL CAMERA
SONY DSC
SAMSUNG CAMERA PICTURES
Photo by John Smith/Getty Images
\u00a9 2010 John Smith. All rights reserved.
Stock Photo
https://example.com/pictures/12
sunset, photographed on 12 May 2010
""".strip().splitlines()
TELLING = """
a newspaper of 12 May 2010 on a table
the parade through Berlin on May 12th, 2010
a clock that shows 14:33 on a brick wall
Eiffel Tower, Paris, 12 May 2010
portrait of an old man, photo taken 2010-05-12
monkeys at play, 12 May 2010
soldiers march 12 miles in the rain
may 12 people sit at a table
sunrise over the sea at 6 am
IMG_1234 a dog on a sofa
a dog plays fetch, photo by John Smith
stock photo of a woman with an umbrella
a photo of a dog
a photo of a dog on the beach
photographed on the beach at sunset
deer shot by a hunter
Ford Mustang 1965
an old car from the 1960s
1/2 cup of sugar in a bowl
a red circle
海滩上的一只狗
""".strip().splitlines()


@pytest.mark.parametrize("date", DATES)
@pytest.mark.parametrize("phrase", ["{}", "photographed on {}", "Photo taken on {}", "Image: {}"])
def test_dates_are_boilerplate(phrase: str, date: str) -> None:
    """A format of dates that is not known, so that its captions are learned by heart."""
    assert boilerplate(phrase.format(date), 2)


@pytest.mark.parametrize("caption", OTHERS)
def test_other_boilerplate(caption: str) -> None:
    """File names, camera names, credits and stock phrases that pass for descriptions."""
    assert boilerplate(caption, 2)


@pytest.mark.parametrize("caption", TELLING)
def test_what_tells_something_is_kept(caption: str) -> None:
    """A filter that drops whatever mentions a date, a number or the word photo."""
    assert not boilerplate(caption, 2)


def test_the_number_of_words_decides() -> None:
    """A bound that is not read, or off by one."""
    caption = "black cat sleeping, photographed on 12 May 2010"
    assert [boilerplate(caption, words) for words in (3, 4)] == [False, True]
    assert not boilerplate("12 May 2010", 0)
    assert not boilerplate("cat", 9)  # nothing in it is boilerplate


def test_words_around_boilerplate_stay_apart() -> None:
    """Words glued together, or eaten, where a date between them is taken out."""
    rest = without_boilerplate("Wedding on 12 May 2010 in Rome, DSC_0012.jpg, cake").split()
    assert rest == ["Wedding", "on", "in", "Rome,", ",", "cake"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a red circle", 3),
        ("  a -- red, circle! ", 3),
        ("red_circle", 2),
        ("a well-kept man's hat", 4),
        ("3 dogs", 2),
        ("...", 0),
        ("", 0),
        ("一只狗", 3),
        ("собака на пляже", 3),
    ],
)
def test_words_are_counted(caption: str, words: int) -> None:
    """Punctuation counted as words, or scripts without spaces taken for a single one."""
    assert not too_short(caption, words) and too_short(caption, words + 1)


@pytest.mark.parametrize(
    ("caption", "other"),
    [
        ("a dog on the beach", False),
        ("café à la crème, smørrebrød", False),
        ("a bowl of ramen (ラーメン) on a table", False),
        ("\uff41 \uff57\uff49\uff44\uff45 \uff44\uff4f\uff47", False),  # full width
        ("12 / 05 ★", False),  # no letters, nothing to say
        ("собака на пляже", True),
        ("海滩上的一只狗", True),
        ("犬 dog の写真です", True),
        ("صورة كلب على الشاطئ", True),
        ("כלב על החוף", True),
        ("μια φωτογραφία", True),
        ("समुद्र तट पर कुत्ता", True),
        ("강아지 사진", True),
    ],
)
def test_other_scripts(caption: str, other: bool) -> None:
    """A script that is not noticed, or English dropped for an accent or a foreign word."""
    assert other_script(caption) is other


@pytest.mark.parametrize(
    "text",
    ["1", "1:", "a-", "A ", "A.b", "may ", "12 May ", "photo by A ", "(", "www.", "12" + " " * 9],
)
def test_long_captions_take_no_time(text: str) -> None:
    """A pattern that goes back and forth over a caption of a whole page: hours in place of
    milliseconds."""
    start = time.perf_counter()
    for caption in (text * 5000, text * 5000 + "!", text * 5000 + ".jpgx"):
        boilerplate(caption, 2)
        too_short(caption, 3)
        other_script(caption)
    assert time.perf_counter() - start < 5


def test_the_language_is_judged_without_boilerplate() -> None:
    """Captions of other languages that stay, or English ones that go for a date or a short
    sentence."""
    pytest.importorskip("py3langid")
    for caption in ("a dog on the beach", "sunset over the sea", "red car", "a bowl of soup"):
        assert captions.english(caption) >= 0.02
        assert captions.english(f"{caption}, IMG_1234.jpg 2010-05-12T14:33") >= 0.02
    for caption in (
        "ein Hund am Strand",
        "une photo de la tour Eiffel la nuit",
        "gato durmiendo en el sofá",
        "een hond op het strand",
        "pies na plaży",
        "cachorro na praia",
        "фотография собаки",
    ):
        assert captions.english(caption) < 0.02


def test_a_missing_identifier_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, or no filter at all, where the package is not installed."""
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.delitem(sys.modules, "py3langid.langid", raising=False)
    captions.identifier.cache_clear()
    with pytest.raises(ValueError, match=r"py3langid: pip install 'dalle1\[filter\]'"):
        captions.english("a dog")
