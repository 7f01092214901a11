"""How long a training step waits for a caption's tokens, with BPE dropout, in five scripts."""

from __future__ import annotations

import random
from statistics import median
from time import perf_counter

from dalle1.tokenizer import Tokenizer

TEXT_LENGTH, VOCAB = 256, 4096
LETTERS = (10, 1_000, 100_000)  # of a caption
# A caption in each script; the words are drawn in any order. Chinese is one word without spaces.
SCRIPTS = {
    "Latin": "a photograph of an old lighthouse on the coast while boats return in the evening",
    "Cyrillic": "фотография старого маяка на берегу когда вечером возвращаются лодки",  # noqa: RUF001
    "Chinese": "傍 晚 船 只 归 来 时 海 岸 上 一 座 古 老 灯 塔 的 照 片",
    "Devanagari": "तट पर एक पुराने प्रकाशस्तंभ की तस्वीर जब शाम को नावें लौटती हैं",
    "Arabic": "صورة لمنارة قديمة على الساحل بينما تعود القوارب في المساء",
}


def caption(script: str, letters: int, rng: random.Random) -> str:
    """Words of a script in a random order, cut to a number of letters."""
    words, space = SCRIPTS[script].split(), "" if script == "Chinese" else " "
    return space.join(rng.choice(words) for _ in range(letters))[:letters]


def report_dropout(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Prints and returns milliseconds of `Tokenizer.tokens`, {script: {letters: [repeats]}}.

    The vocabulary is learned from captions in all five scripts, so that there is much to merge.
    """
    rng = random.Random(0)
    corpus = [caption(script, 100, rng) for script in SCRIPTS for _ in range(400)]
    tokenizer = Tokenizer.train(corpus, VOCAB, TEXT_LENGTH, dropout=0.1)
    print(f"{tokenizer.vocab_size:,} tokens, {TEXT_LENGTH} text positions; ms of a caption")
    found: dict[str, dict[str, list[float]]] = {}
    for script in SCRIPTS:
        found[script] = {}
        for letters in LETTERS:
            text, times = caption(script, letters, rng), []
            for _ in range(repeats):
                start = perf_counter()
                tokenizer.tokens(text, rng)
                times.append(1e3 * (perf_counter() - start))
            found[script][str(letters)] = times
            spread = f"{median(times):10.2f}  ({min(times):.2f} to {max(times):.2f})"
            print(f"{script:12}{letters:9,} letters{spread}", flush=True)
    return found
