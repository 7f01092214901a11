"""What a caption must be to be trained on: the paper's filters of captions (appendix C).

The paper names the filters and gives neither numbers nor its list of formats; those here are ours.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from importlib import import_module
from typing import Any

# A character of a script that puts no spaces between words counts as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+(?:['\u2019-][^\W_]+)*")

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)(?![^\W\d_])\.?"
)
_WEEKDAY = (
    r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?(?![^\W\d_])\.?,?\s{0,2})?"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?(?!\d)"
_DAYS = rf"{_DAY}(?:\s?(?:[-\u2013\u2014&/]|to|and)\s?{_DAY})?"
_YEAR = r"(?:(?:1[5-9]|20)\d\d(?!\d)|['\u2019]\d\d(?!\d))"
_GAP = r"[\s.,/_-]{0,3}"
_NAME = r"(?-i:[A-Z][\w.'\u2019-]{0,29})"
_NAMES = rf"{_NAME}(?:[\s/&,]{{1,3}}{_NAME}){{0,5}}"
_ENDINGS = "jpe?g|jpe|png|gif|tiff?|webp|bmp|heic|svg|psd|cr2|nef|arw|dng|raw|mov|mp4|avi|pdf"

# Repeats are bounded: a caption may be as long as a book.
_BOILERPLATE = re.compile(
    "|".join(
        (
            r"(?:https?://|www\.)\S+",
            rf"(?<!\w)\w[\w.()+%~-]{{0,79}}\.(?:{_ENDINGS})\b",
            # What cameras, telephones and scanners call their pictures.
            r"(?<![^\W_])(?:_?dsc[nf]?|img[ep]?|pict|pxl|mvi|vid|gopr|sam|cimg|hpim|dji|imag|wp|scan)"
            r"[_-]?\d{3,}[\w~-]{0,40}",
            r"(?<![^\W_])p\d{6,8}(?!\w)",
            r"(?<![^\W_])(?:image|photo|picture|pic|scan|file|slide|untitled|unnamed)"
            r"[\s_#-]{0,2}\d{2,6}(?![\w:./-])",
            # The date in words: 12th of May, 2010; Saturday 12-14 May; May 12th '10; May 2010.
            rf"(?<![^\W_]){_WEEKDAY}{_DAYS}{_GAP}(?:(?:day\s)?of\s)?{_MONTH}"
            rf"(?:{_GAP}(?:of\s)?{_YEAR})?(?!\d)",
            rf"(?<![^\W_]){_WEEKDAY}{_MONTH}{_GAP}{_DAYS}(?:{_GAP}{_YEAR})?(?!\d)",
            rf"(?<![^\W_])(?:{_MONTH}|spring|summer|autumn|fall|winter){_GAP}(?:of\s)?{_YEAR}",
            # In figures: 2010-05-12 and 2010:05:12 as cameras write it; 12/05/2010, 5.12.10;
            # 20100512_143300; 2010年5月12日.
            r"(?<!\d)(?:1[5-9]|20)\d\d(?:[-/.:_]\d{1,2}){2}(?=T?\b|\D)",
            r"(?<!\d)\d{1,2}([-/.])\d{1,2}\1(?:\d{4}|\d\d)(?!\d)",
            r"(?<!\d)(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])(?:[T_-]?\d{4,6})?(?!\d)",
            r"(?:1[5-9]|20)\d\d年(?:\d{1,2}月(?:\d{1,2}日)?)?",
            # Times: 14:33, T14:33:05.2Z, 14:33 +02:00, 2.33 p.m., 14h33, 14.33.05, 2 pm.
            r"(?<![^\W_])T?\d{1,2}(?::\d\d(?::\d\d(?:\.\d{1,6})?)?|h\d\d|\.\d\d\.\d\d)"
            r"(?:\s?[ap]\.?\s?m\b\.?)?(?:\s?(?:Z|UTC|GMT|CES?T|BST|[ECMP][SD]T)\b|\s?[+-]\d\d:?\d\d)?"
            r"(?!\d)",
            r"(?<!\d)\d{1,2}(?:\.\d\d)?\s?[ap]\.?\s?m\b\.?",
            # Credits.
            r"\b(?:photo(?:graph)?|image|picture|pic|illustration)s?\s{0,2}"
            rf"(?:credits?|courtesy(?:\sof)?|by|copyright|©|\(c\))\s{{0,2}}:?\s{{0,2}}{_NAMES}",
            rf"(?:©|\(c\)|\bcopyright\b)(?:\s?by\b)?[\s:]{{0,3}}(?:{_YEAR}[\s,]{{0,3}})?(?:{_NAMES})?",
            r"\b(?:getty\simages|shutterstock|istock(?:photo)?|alamy|dreamstime|depositphotos"
            r"|adobe\sstock)\b",
            # Stock phrases, and what cameras write as the description of every picture.
            r"\b(?:stock|royalty[\s-]free|file)\s(?:photo(?:graph(?:y)?)?|image|picture|footage"
            r"|illustration|vector|clip\s?art)s?\b",
            r"\b(?:royalty[\s-]free|(?:all\s)?rights\sreserved|free\sdownload|image\smay\scontain)\b",
            r"\bno\s(?:caption|description|title|alt\stext)(?:\s(?:available|provided))?\b",
            r"\bclick\s(?:here|(?:on\s)?(?:the\s)?(?:image|photo|picture)|to\s(?:enlarge|zoom|view))\b",
            r"\b(?:untitled|unnamed|screen\s?shots?)\b",
            r"\b(?:olympus|konica\sminolta|minolta|kodak|nikon|ricoh|vivitar|hp|fuji(?:film)?)\s"
            r"digital\s(?:still\s)?camera\b",
            r"\b(?:sony\sdsc|samsung\scamera\spictures|exif[_\s]jpeg[_\s]picture"
            r"|created\swith\s(?:the\s)?gimp)\b",
        )
    ),
    re.IGNORECASE,
)
# Words that say nothing of what is to be seen.
_WORDS = """
a an the this that these those my our your his her its their me i we it is was were been are
and or of on at in by from to for with via using during circa ca until since between around
photo photos photograph photographs photographed photographer photography picture pictures
pictured image images img pic pics shot shots snap snapshot snapped scan scanned file filename
date dated time taken took captured uploaded upload posted created published updated recorded
filmed added modified camera digital original credit courtesy copyright copy edited whatsapp
monday tuesday wednesday thursday friday saturday sunday am pm th st nd rd no nr
"""
_EMPTY = frozenset(_WORDS.split())


def too_short(caption: str, words: int) -> bool:
    """Whether a caption has fewer words than that."""
    return len(WORD.findall(caption)) < words


def without_boilerplate(caption: str) -> str:
    """A caption without dates, times, file names, links, credits and stock phrases."""
    return _BOILERPLATE.sub(" ", caption)


def boilerplate(caption: str, words: int) -> bool:
    """Whether a caption is mostly boilerplate, such as "photographed on 12 May 2010".

    That is one that holds a date, time, file name, link, credit or stock phrase, and besides
    fewer than so many words that may tell what is to be seen: words that begin with a letter and
    are neither articles, prepositions and the like nor about taking pictures (photo, taken ...).
    """
    rest, found = _BOILERPLATE.subn(" ", caption)
    return found > 0 and sum(map(_telling, WORD.findall(rest))) < words


def _telling(word: str) -> bool:
    return (
        word[0].isalpha() and (len(word) > 1 or not word.isascii()) and word.lower() not in _EMPTY
    )


def other_script(caption: str) -> bool:
    """Whether more than half of a caption's letters are of other scripts than the Latin one."""
    if caption.isascii():
        return False
    # NFKC: Latin letters of full width, or dressed up as mathematical ones, are Latin all the same.
    letters = [c for c in unicodedata.normalize("NFKC", caption) if c.isalpha()]
    return 2 * sum(map(_latin, letters)) < len(letters)


@lru_cache(maxsize=4096)
def _latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("LATIN")


def english(caption: str) -> float:
    """The probability that a caption is English, by py3langid; boilerplate is not looked at.

    Of a short caption with names in it even a right guess is hardly more likely than ten others, so
    a low threshold on this is better than asking for the likeliest language.
    """
    rest = without_boilerplate(caption)
    return float(dict(identifier().rank(rest)).get("en", 0.0))


@lru_cache(maxsize=1)
def identifier() -> Any:
    """What `english` asks; ValueError where it is not installed."""
    try:
        langid: Any = import_module("py3langid.langid")
        return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    except (ImportError, AttributeError) as error:  # AttributeError: one before 0.4
        raise ValueError(
            "english: 'language' needs py3langid: pip install 'dalle1[filter]'"
        ) from error
