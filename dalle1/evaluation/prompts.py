"""The captions of a benchmark, and the true images that generated ones are compared with.

Dimensions: H W image height and width.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from dalle1.common.files import read_text
from dalle1.common.images import to_tensor
from dalle1.data.samples import (
    BadSample,
    RawSample,
    captions_of,
    cleaned,
    image_of,
    split_lines,
)
from dalle1.data.shards.index import (
    TOKENS,
    find_pairs,
    find_shards,
    kind_of,
    no_good,
    raw_samples,
)
from dalle1.data.shards.tar import is_remote
from dalle1.data.shards.token_shard import TokenShard
from dalle1.data.transforms import middle_square, read_image
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.judged import JudgedData, Prompt, open_judged

GIVEN = "captions"  # the group of data that are not judged


def read_prompts(settings: RankSettings, judged: JudgedData | None = None) -> list[Prompt]:
    """The captions of a benchmark.

    judged: what `open_judged` gives of the settings; None: it is called.

    Raises:
        ValueError: the data cannot be read or has no captions.
    """
    judged = judged or open_judged(settings)
    if judged is not None:
        return judged.prompts()
    captions = _chosen(_caption_lists(settings), settings)
    if not captions:
        raise ValueError(f"data: {settings.data} holds no captions")
    return [Prompt(caption, GIVEN) for caption in captions]


def _chosen(samples: Iterable[list[str]], settings: RankSettings) -> list[str]:
    """The captions that are drawn, of the captions of each sample.

    Without a seed they are the first of the data. With one they are chosen at random among all and
    all differ, since two of one text would be drawn as the same images; an image whose caption is
    taken already gives another one of its captions, or none.
    """
    if settings.captions_per_image == "all":
        samples = ([caption] for captions in samples for caption in captions)
    if settings.caption_seed is None:
        return [captions[0] for captions in islice(samples, settings.captions)]
    rng = np.random.default_rng(settings.caption_seed)
    listed = list(samples)
    chosen: dict[str, None] = {}  # in order
    for i in rng.permutation(len(listed)):
        captions = [listed[i][j] for j in rng.permutation(len(listed[i]))]
        if new := next((caption for caption in captions if caption not in chosen), None):
            chosen[new] = None
        if len(chosen) == settings.captions:
            break
    return list(chosen)


def _caption_lists(settings: RankSettings) -> Iterator[list[str]]:
    """The captions of each sample of the data, at least one; bad samples are skipped."""
    if _is_list(settings.data):
        yield from ([caption] for line in _lines(settings.data) if (caption := cleaned(line)))
        return
    shards = find_shards(settings.data)
    if kind_of(settings.data, shards) == TOKENS:
        for path in shards:
            yield from filter(None, TokenShard(path).captions())
        return
    bad: Counter[str] = Counter()
    good = False
    for sample in raw_samples(settings.data, frozenset({"txt", "json"})):
        try:
            yield captions_of(sample, settings.caption_key)
            good = True
        except BadSample as error:
            bad[error.cause] += 1
    if not good and bad:
        raise ValueError(no_good(settings.data, settings.caption_key, bad))


def _lines(path: str) -> list[str]:
    """The lines of a list of captions."""
    try:
        return split_lines(read_text(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} cannot be read: {error}; save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read: {error}") from error


def _is_list(data: str) -> bool:
    """Whether data are a file of captions, one a line, and not a folder that is called so."""
    return data.lower().endswith(".txt") and not is_remote(data) and not Path(data).is_dir()


def _are_tokens(data: str) -> bool:
    return kind_of(data, find_shards(data)) == TOKENS


def data_digest(settings: RankSettings, judged: JudgedData | None = None) -> str:
    """16 digits that change with the names or sizes of the files that the data are.

    Of remote shards only the addresses count. judged: see `read_prompts`.
    """
    judged = judged or open_judged(settings)
    if judged is not None:
        files = judged.files()
    else:
        listed = _is_list(settings.data)
        files = [settings.data] if listed else find_shards(settings.data)
        files = files or find_pairs(settings.data)
    sizes = [(Path(f).name, Path(f).stat().st_size) for f in files if not is_remote(f)]
    remote = [f for f in files if is_remote(f)]
    return hashlib.sha256(json.dumps([sizes, remote]).encode()).hexdigest()[:16]


def true_images(
    settings: RankSettings,
    side: int,
    wanted: Callable[[int], bool] = lambda index: True,
    judged: JudgedData | None = None,
) -> Iterator[tuple[int, Tensor | None]] | None:
    """The true images to compare with, by the number of their sample; None where the data has none.

    Each is the middle square of a sample's image, resized: float [3, side, side] in [0, 1]. It is
    None where the sample has no image that can be read.

    Args:
        settings: of the benchmark.
        side: of the images, in pixels.
        wanted: tells the samples that are asked for; no other one is decoded or returned.
        judged: see `read_prompts`.
    """
    judged = judged or open_judged(settings)
    if judged is not None:
        return judged.true_images(settings.reference_images, side, wanted)
    if _is_list(settings.data) or _are_tokens(settings.data):
        return None
    return images_of(settings.data, settings.reference_images, side, wanted)


def images_of(
    data: str, limit: int, side: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Tensor | None]]:
    """What `true_images` gives of shards or a folder of pairs."""
    samples = enumerate(islice(raw_samples(data), limit))
    return ((i, true_image(sample, side)) for i, sample in samples if wanted(i))


def true_image(sample: RawSample, side: int) -> Tensor | None:
    """The middle square of a sample's image: float [3, side, side] in [0, 1]; None where it cannot
    be read."""
    try:
        return to_tensor(np.array(middle_square(read_image(image_of(sample)), side)))
    except BadSample:
        return None
