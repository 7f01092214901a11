"""Small files in the layouts of published tokenizers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, CharBPETokenizer

from dalle1.text.bart import BARTTokenizer
from dalle1.text.base import PublishedTokenizer
from dalle1.text.char_bpe import CharBPETokenizer as OurCharBPE
from dalle1.text.yttm import YTTMTokenizer

MARK = "\u2581"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CORPUS = [
    "a red circle above a blue square",
    "A photo of a CAT, isn't it?",
    "the cat sat on the mat",
    "two cats; 3.14 hats (and 1/2 a dog)",
    "рыжий котик в шляпе",
]


@dataclass
class BPEModel:
    """A bpe.model: ids of letters, rules in order, and ids of unknown, padding, start and end."""

    letters: dict[str, int]
    rules: list[tuple[int, int, int]]
    marks: tuple[int, int, int, int] = (1, 0, 2, 3)

    def text(self) -> str:
        lines = [f"{len(self.letters)} {len(self.rules)}"]
        lines += [f"{ord(letter)} {i}" for letter, i in self.letters.items()]
        lines += [" ".join(map(str, rule)) for rule in self.rules]
        return "\n".join([*lines, " ".join(map(str, self.marks))]) + "\n"

    def write(self, path: Path) -> Path:
        path.write_text(self.text(), encoding="utf-8")
        return path


def small_model() -> BPEModel:
    """Letters a to z with their mark, and three rules."""
    letters = {letter: 4 + i for i, letter in enumerate(MARK + LETTERS)}
    c, a, t = (letters[x] for x in "cat")
    rules = [(a, t, 31), (c, 31, 32), (letters[MARK], 32, 33)]
    return BPEModel(letters, rules)


def random_model(rng: random.Random, letters: str, rules: int) -> BPEModel:
    """Rules that build on each other at random, with ids in no order."""
    signs = [MARK, *dict.fromkeys(letters)]
    ids = list(range(4, 4 + len(signs) + rules))
    rng.shuffle(ids)
    made, pairs = ids[: len(signs)], []
    for new in ids[len(signs) :]:
        pairs.append((rng.choice(made), rng.choice(made), new))
        made.append(new)
    return BPEModel(dict(zip(signs, ids, strict=False)), pairs)


def write_char_bpe(folder: Path, corpus: Sequence[str] = CORPUS, size: int = 120) -> list[Path]:
    """`bpe-16k-vocab.json` and `bpe-16k-merges.txt`, as minDALL-E has them."""
    bpe = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    special = ["[PAD]", "[UNK]"]
    bpe.train_from_iterator(corpus, size, special_tokens=special, show_progress=False)
    return [Path(path) for path in bpe.save_model(str(folder), "bpe-16k")]


def write_bart(folder: Path, corpus: Sequence[str] = CORPUS, size: int = 300) -> list[Path]:
    """`vocab.json` and `merges.txt`, as DALL-E mini has them."""
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    spaced = [f" {caption.lower()}" for caption in corpus]
    bpe.train_from_iterator(spaced, size, special_tokens=special, show_progress=False)
    return [Path(path) for path in bpe.save_model(str(folder))]


def published(
    kind: str, folder: Path, text_length: int = 16, normalize: bool = True
) -> PublishedTokenizer:
    """A tokenizer of a kind, of small files that are written into the folder."""
    if kind == "yttm":
        path = small_model().write(folder / "bpe.model")
        return YTTMTokenizer.from_published(path, text_length)
    if kind == "char_bpe":
        return OurCharBPE.from_published(*write_char_bpe(folder), text_length=text_length)
    files = write_bart(folder)
    return BARTTokenizer.from_published(*files, text_length=text_length, normalize=normalize)
