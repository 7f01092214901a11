"""The best of a caption's candidates, and the best of fewer."""

from __future__ import annotations

import math
import random

import pytest

import dalle1
from dalle1.generation.ranking import best_of_fewer
from dalle1.serving.requests import Request
from dalle1.serving.worker import SamplingWorker
from tests.conftest import ModelMaker


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_best_of_fewer_holds_every_ranking(keep: int) -> None:
    """A number of candidates whose best are not there; candidates that are never among the best."""
    for seed in range(30):
        dice = random.Random(seed)
        scores = [float(dice.randrange(8)) for _ in range(dice.randrange(1, 30))]  # with equals
        wanted: set[int] = set()
        for n in range(1, len(scores) + 1):
            wanted |= set(sorted(range(n), key=lambda i: (-scores[i], i))[:keep])
        assert best_of_fewer(scores, keep) == sorted(wanted)


def test_they_are_few() -> None:
    """All images of a caption on the page, of which nobody sees most."""
    dice = random.Random(0)
    scores = [dice.random() for _ in range(512)]
    assert len(best_of_fewer(scores, 8)) < 2 * 8 * (1 + math.log(512 / 8))


def test_a_result_has_them_where_asked(make_model: ModelMaker) -> None:
    """Images, scores or numbers of other candidates than those of fewer."""
    model = make_model()
    with SamplingWorker({"tiny": model}) as worker:
        request = Request("tiny", ["a red cat", "a blue dog"], 12, 2, seed=4, of_fewer=True)
        result = worker.submit(request).result(60)
        plain = worker.submit(Request("tiny", "a red cat", 12, 2, seed=4)).result(60)
    assert plain.best_of_fewer == [] and len(result.best_of_fewer) == 2
    for i, caption in enumerate(result.captions):
        other = result.best_of_fewer[i]
        images = {
            int(number): image.tobytes()
            for part, row in ((result, i), (other, 0))
            for number, image in zip(part.candidate_numbers[row], part.images[row], strict=True)
        }
        assert len(images) == len(result.images[i]) + len(other.images[0])
        for n in range(1, 13):
            few = dalle1.sample(caption, model, n, min(2, n), seed=4, progress=False)
            for number, image in zip(few.candidate_numbers[0], few.images[0], strict=True):
                assert images[int(number)] == image.tobytes()
