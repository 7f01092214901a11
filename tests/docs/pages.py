"""The pages of README and docs, and the fenced blocks in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"))
)
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+)(?P<language>\S*).*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int  # of its fence, from 1
    language: str  # "" where the fence names none
    text: str

    @property
    def place(self) -> str:
        """What an error calls it."""
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page, of these languages or of all, in order."""
    found = blocks_of(read(page), page)
    return [block for block in found if not languages or block.language in languages]


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a text; an indented one, as in a list, is given without its indent."""
    found: list[Block] = []
    opened: tuple[int, re.Match[str], list[str]] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None:
            opened = (number, fence, []) if fence else None
            continue
        first, start, lines = opened
        if fence and fence["fence"] == start["fence"] and not fence["language"]:
            found.append(Block(page, first, start["language"], "".join(lines)))
            opened = None
        else:
            lines.append(line.removeprefix(start["indent"]) + "\n")
    assert opened is None, f"{page}: a block is not closed"
    return found


def without_blocks(text: str) -> str:
    """The text without its fenced blocks, with as many lines."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = FENCE.match(line)
        lines.append("" if inside or fence else line)
        inside ^= fence is not None
    return "\n".join(lines)


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, each as its words; what the shell itself reads is left out."""
    text = block.text.replace("\\\n", " ")
    found: list[list[str]] = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("&|;"):
                found.append(words)
                words = []
            else:
                words.append(word)
        found.append(words)
    return [words for words in found if words]
