"""minDALL-E's and DALL-E mini's tokenizers, against the library's own and slow re-statements."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import CharBPETokenizer as Theirs

from dalle1.protocols import CaptionCut
from dalle1.text.bart import BARTTokenizer
from dalle1.text.char_bpe import CharBPETokenizer
from dalle1.text.merges import MergesTokenizer, read_merges

from .files import write_bart, write_char_bpe

SIGNS = "abcdefgh aeiou catsred.,!?'-_()0123&éЙж日本🐱 \u00a0\u2028\t\x00\x07"


def random_captions(seed: int, count: int, length: int = 80) -> list[str]:
    rng = random.Random(seed)
    texts = ("".join(rng.choices(SIGNS, k=rng.randrange(1, length))) for _ in range(count))
    return [text for text in texts if text.strip()]


@pytest.fixture(scope="module")
def char_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_char_bpe(tmp_path_factory.mktemp("char_bpe"))


@pytest.fixture(scope="module")
def bart_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def char(char_files: list[Path]) -> CharBPETokenizer:
    return CharBPETokenizer.from_published(*char_files)


@pytest.fixture(scope="module")
def bart(bart_files: list[Path]) -> BARTTokenizer:
    return BARTTokenizer.from_published(*bart_files, normalize=False)


def test_char_bpe_is_the_librarys(char: CharBPETokenizer, char_files: list[Path]) -> None:
    """Accents that are taken off, case that stays, words that are cut at spaces alone, a start, or
    padding with another id, as minDALL-E's own program has them."""
    vocab, merges = map(str, char_files)
    theirs = Theirs.from_file(vocab, merges, unk_token="[UNK]", lowercase=True)
    theirs.add_special_tokens(["[PAD]"])
    padding = theirs.token_to_id("[PAD]")
    theirs.enable_padding(length=64, pad_id=padding)
    theirs.enable_truncation(max_length=64)
    assert char.vocab_size == theirs.get_vocab_size() and char.padding == padding
    for caption in [*random_captions(0, 300), "Éa CAT, isn't it?", "猫cat", "a" * 70 + " b"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaptionCut)
            ids = char.encode(caption)[0].tolist()
        assert ids == theirs.encode(caption).ids, caption
        assert char.decode(ids) == theirs.decode(ids).strip()
    assert char.encode("a cat")[0, -1] == padding


def bytes_as_signs() -> dict[int, str]:
    """GPT-2's printable sign of each byte."""
    plain = {b for b in range(256) if chr(b).isprintable() and chr(b) != " " and b != 0xAD}
    others = iter(range(256, 512))
    return {b: chr(b) if b in plain else chr(next(others)) for b in range(256)}


def slow_bart(caption: str, files: list[Path]) -> list[int]:
    """Words as GPT-2 cuts them, their bytes, and merges one at a time, the earliest first."""
    vocab = json.loads(files[0].read_text())
    merges = [tuple(line.split(" ")) for line in files[1].read_text().split("\n")[1:-1]]
    letter, digit = r"[^\W\d_]", r"(?:\d|[²³¹½])"  # all that occur here
    other = rf"(?:(?!{letter})(?!{digit})\S)"
    short = "'s|'t|'re|'ve|'m|'ll|'d"
    words = re.findall(rf"{short}| ?{letter}+| ?{digit}+| ?{other}+|\s+(?!\S)|\s+", caption)
    assert "".join(words) == caption
    ids = []
    for word in words:
        parts = [bytes_as_signs()[b] for b in word.encode()]
        while pairs := [
            (merges.index(pair), i) for i, pair in enumerate(pairwise(parts)) if pair in merges
        ]:
            i = min(pairs)[1]
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        ids += [vocab[part] for part in parts]
    return ids


def test_bart_is_byte_level_bpe(bart: BARTTokenizer, bart_files: list[Path]) -> None:
    """A space in front that is not the caption's, marks with other ids or at other places, padding
    by position, an end that is lost with the rest of a long caption."""
    start, padding, end = 0, 1, 2
    for caption in [*random_captions(1, 150), " a cat", "a cat", "isn't  it? ", "x" * 62]:
        ids = slow_bart(caption, bart_files)
        expected = [start, *ids[:62], end, *[padding] * (62 - len(ids))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if len(ids) > 62 else "error", CaptionCut)
            assert bart.encode(caption).tolist() == [expected], caption
        if len(ids) <= 62:
            assert bart.decode(expected) == caption.strip()
    with pytest.warns(CaptionCut, match="64 positions"):
        assert bart.encode("x" * 63)[0, -1] == end


def test_a_tokenizer_json_is_read_alike(
    bart: BARTTokenizer, bart_files: list[Path], tmp_path: Path
) -> None:
    """Merges as lines or as pairs, marks that the vocabulary of the file does not hold."""
    vocab, merges = json.loads(bart_files[0].read_text()), read_merges(bart_files[1])
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    added = [{"id": vocab[mark], "content": mark, "special": True} for mark in marks]
    rest = {token: i for token, i in vocab.items() if token not in marks}
    for pairs in ([f"{a} {b}" for a, b in merges], [list(pair) for pair in merges]):
        model = {"type": "BPE", "vocab": rest, "merges": pairs}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
        assert BARTTokenizer.from_published(path, normalize=False).reads_like(bart)


def test_more_rows_than_tokens(bart_files: list[Path], char_files: list[Path]) -> None:
    """A prior whose embedding is larger than the vocabulary (50272 in DALL-E mega), refused."""
    bart = BARTTokenizer.from_published(*bart_files, vocab_size=50272)
    assert bart.vocab_size == 50272 and bart.encode("a cat")[0, -1] == 1
    for kind, files in ((BARTTokenizer, bart_files), (CharBPETokenizer, char_files)):
        with pytest.raises(ValueError, match=r"vocab.json: .*expected ids in \[0, 49\]"):
            kind.from_published(*files, vocab_size=50)


@pytest.mark.parametrize("kind", ["char", "bart"])
def test_dropout(kind: str, request: pytest.FixtureRequest) -> None:
    """Another cutting into words with dropout than without, merges that are dropped in use, or a
    share that is not the tokenizer's."""
    tokenizer: MergesTokenizer = request.getfixturevalue(kind)
    dropping = tokenizer.with_dropout(0.5)
    never = tokenizer.with_dropout(1e-12)
    for caption in random_captions(2, 100, 40):
        plain = tokenizer.encode(caption).tolist()
        assert never.encode(caption, random.Random(0)).tolist() == plain
        assert dropping.encode(caption).tolist() == plain
        assert tokenizer.encode(caption, random.Random(0)).tolist() == plain  # published: none
        dropped = dropping.encode(caption, random.Random(0))[0]
        assert dropping.decode(dropped) == tokenizer.decode(plain[0])
    # A word of two parts and a merge: parted as often as it is dropped.
    left, right = tokenizer._content.merges[0]
    two = "".join(left + right).replace("\u0120", " ")
    if kind == "bart":
        rng, n = random.Random(1), 2000
        seen = Counter(len(tokenizer.with_dropout(0.3)._ids(two, 9, rng)) for _ in range(n))
        assert abs(seen[2] / n - 0.3) < 4 * (0.21 / n) ** 0.5


def test_text_that_spells_marks(char: CharBPETokenizer, bart: BARTTokenizer) -> None:
    """A caption that ends itself, or becomes padding, by its letters."""
    assert bart.encode("a</s>b")[0].tolist().count(bart.end_id) == 1
    assert bart.decode(bart.encode("a</s>b")[0]) == "a</s>b"
    ids = char.encode("[PAD] a")[0].tolist()
    assert ids[0] != char.padding and ids[-1] == char.padding


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("{", None, r"vocab\.json: truncated or not JSON"),
        ("[" * 10**5, None, r"vocab\.json: truncated or not JSON"),
        ([1, 2], None, r"vocab\.json: expected a vocab\.json"),
        ({"a": "1"}, None, r"vocab\.json: expected a vocab\.json"),
        ({"a": True}, None, r"vocab\.json: expected a vocab\.json"),
        ({"a": -1}, None, r"vocab\.json: vocab\.a: expected greater than"),
        ({"a": 2**40}, None, r"vocab\.json: .*expected less than"),
        ({"a": 5, "b": 5}, "", "expected an id for each token"),
        ({"a": 0}, "", "expected '(<s>|\\[UNK\\])' among the tokens"),
        ({}, "", "expected '(<s>|\\[UNK\\])' among the tokens"),
        (None, "a\n", r"merges\.txt: expected merges of two tokens, got 'a'"),
        (None, "a b c\n", r"merges\.txt: expected merges of two tokens, got 'a b c'"),
        (None, "a \n", r"merges\.txt: expected merges of two tokens"),
        (None, "q z\n", "merges: expected parts and result of 'q' 'z' in the vocabulary"),
    ],
)
@pytest.mark.parametrize("kind", ["char", "bart"])
def test_damaged_files(
    kind: str,
    vocab: object,
    merges: str | None,
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Files of something else that are taken for a vocabulary, or an error without their name."""
    files: list[Path] = request.getfixturevalue(f"{kind}_files")
    mine = write(tmp_path / "vocab.json", vocab) if vocab is not None else files[0]
    others = write(tmp_path / "merges.txt", merges) if merges is not None else files[1]
    reader = CharBPETokenizer if kind == "char" else BARTTokenizer
    with pytest.raises(ValueError, match=message) as raised:
        reader.from_published(mine, others)
    assert str(mine.name) in str(raised.value) or "merges.txt" in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": {"vocab": 1}},
        {"model": {"vocab": {"a": 0}}},
        {"model": {"vocab": {"a": 0}, "merges": [["a"]]}},
        {"model": {"vocab": {"a": 0}, "merges": [1]}},
        {"model": {"vocab": {"a": None}, "merges": []}},
        {"model": {"vocab": {}, "merges": []}, "added_tokens": [{"content": "<s>"}]},
        {"model": {"vocab": {}, "merges": []}, "added_tokens": 3},
        [],
    ],
)
def test_a_damaged_tokenizer_json(content: object, tmp_path: Path) -> None:
    """The same in the file that holds both."""
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*expected"):
        BARTTokenizer.from_published(write(tmp_path / "tokenizer.json", content))
