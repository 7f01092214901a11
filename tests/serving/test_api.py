"""The server, asked by the client that programs have: OpenAI's own."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

import dalle1
from dalle1 import Model
from dalle1.generation.defaults import SamplingDefaults
from tests.conftest import ModelMaker
from tests.serving.conftest import Served, serving

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CAPTION = "a red cat"


@pytest.fixture(scope="module")
def plain(make_model: ModelMaker) -> Model:
    """A model without a ranker."""
    return make_model(clip=False, seed=1, grid=3)


@pytest.fixture(scope="module")
def served(model: Model, plain: Model) -> Iterator[Served]:
    with serving({"tiny": model, "org/plain": plain}, candidates=4) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return served.client()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def images_of(response: Any) -> list[Image.Image]:
    return [opened(base64.b64decode(entry.b64_json)) for entry in response.data]


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.convert("RGB").tobytes() for image in images]


def drawn(model: Model, caption: str = CAPTION, **settings: Any) -> list[bytes]:
    """The images that the library draws."""
    settings = {"candidates": 4, "keep": 1, "progress": False, **settings}
    return pixels(dalle1.sample(caption, model, **settings).images[0])


def picture(side: int = 8, kind: str = "PNG", seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def test_generations(client: Any, model: Model) -> None:
    """Images of another seed, caption or option, or in another order, than the library's."""
    one = client.images.generate(prompt=CAPTION, extra_body={"seed": 3})
    assert pixels(images_of(one)) == drawn(model, seed=3)
    assert (one.size, one.output_format, one.background) == ("8x8", "png", "opaque")
    assert abs(one.created - time.time()) < 60 and one.data[0].url is None
    options = {"temperature": 0.8, "top_k": 4, "top_p": 0.95, "guidance": 2.0, "seed": 5}
    response = client.images.generate(
        prompt="a blue dog", model="tiny", n=3, size="8x8", response_format="b64_json", user="me",
        quality="standard", style="vivid", extra_body={"candidates": 9, **options},
    )  # fmt: skip
    assert pixels(images_of(response)) == drawn(
        model, "a blue dog", candidates=9, keep=3, **options
    )
    scores = [entry.score for entry in response.data]
    assert scores == sorted(scores, reverse=True) and response.seed == 5
    # 3 words and of each of 9 candidates 16 positions.
    assert response.usage.input_tokens == 3 and response.usage.output_tokens == 144


def test_the_models_own_sampling(
    client: Any, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that says nothing and gets worse images than the library's."""
    monkeypatch.setattr(model, "sampling", SamplingDefaults(temperature=0.5, guidance=2))
    for options in ({}, {"temperature": 1.0}, {"guidance": 1.0}):
        body = {"seed": 3, "candidates": 4, **options}
        response = client.images.generate(prompt=CAPTION, extra_body=body)
        expected = {"temperature": 0.5, "guidance": 2.0, **options}
        assert pixels(images_of(response)) == drawn(model, seed=3, **expected)
    (told,) = [entry for entry in client.models.list() if entry.id == "tiny"]
    assert (told.temperature, told.guidance) == (0.5, 2)


def test_without_a_seed_images_differ(client: Any, model: Model) -> None:
    """The same image for everybody; or a seed that is told and not the one that was used."""
    found = [client.images.generate(prompt=CAPTION) for _ in range(6)]
    assert len({response.seed for response in found}) == 6
    assert len({response.data[0].b64_json for response in found}) > 1
    assert pixels(images_of(found[0])) == drawn(model, seed=found[0].seed)


def test_a_model_without_a_ranker(client: Any, plain: Model) -> None:
    """Candidates that nobody ranks, a score that is NaN, or the images of the first model."""
    response = client.images.generate(
        prompt=CAPTION, model="org/plain", n=2, extra_body={"seed": 1}
    )
    assert pixels(images_of(response)) == drawn(plain, candidates=2, keep=2, seed=1)
    assert response.size == "6x6" and "score" not in response.data[0].to_dict()
    with pytest.raises(openai.BadRequestError, match="no ranker"):
        client.images.generate(prompt=CAPTION, model="org/plain", extra_body={"candidates": 3})


def test_urls(client: Any, model: Model) -> None:
    """A link that leads nowhere or to another image, or a file of the server's."""
    response = client.images.generate(
        prompt=CAPTION, n=2, response_format="url", extra_body={"seed": 3}
    )
    found = []
    for entry in response.data:
        assert entry.b64_json is None
        with urlopen(entry.url) as answer:
            assert answer.headers["content-type"] == "image/png"
            found.append(opened(answer.read()))
    assert pixels(found) == drawn(model, candidates=8, keep=2, seed=3)
    folder = response.data[0].url.rpartition("/")[0]
    for name in ("other.png", "..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", ".", "%00"):
        with pytest.raises(OSError, match=r"40[04]"):
            urlopen(f"{folder}/{name}")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_formats(client: Any, model: Model, kind: str) -> None:
    """A file of another format than was asked for."""
    response = client.images.generate(
        prompt=CAPTION, output_format=kind, output_compression=90, extra_body={"seed": 3}
    )
    (image,) = images_of(response)
    assert image.format == kind.upper() and response.output_format == kind
    wanted = np.frombuffer(drawn(model, seed=3)[0], np.uint8).astype(int)
    found = np.frombuffer(image.convert("RGB").tobytes(), np.uint8).astype(int)
    assert np.abs(found - wanted).mean() < (1 if kind == "png" else 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_edits(client: Any, model: Model, kind: str) -> None:
    """Rows that are drawn anew, or images that the library would complete otherwise."""
    data = picture(kind=kind)
    response = client.images.edit(
        image=("x", data), prompt=CAPTION, n=2, extra_body={"rows": 2, "seed": 4, "candidates": 6}
    )
    wanted = drawn(model, image=opened(data), rows=2, candidates=6, keep=2, seed=4)
    assert pixels(images_of(response)) == wanted
    assert response.usage.input_tokens_details.image_tokens == 8
    url = client.images.edit(
        image=[data], prompt=CAPTION, response_format="url", extra_body={"rows": 2, "seed": 4}
    )
    with urlopen(url.data[0].url) as answer:
        wanted = drawn(model, image=opened(data), rows=2, seed=4)
        assert pixels([opened(answer.read())]) == wanted


@pytest.mark.parametrize(("asked", "rows"), [(0, []), (1, [2]), (3, [1, 2, 3])])
def test_streams(client: Any, model: Model, asked: int, rows: list[int]) -> None:
    """A partial image that is not the beginning of one, or a stream without its last image."""
    stream = client.images.generate(
        prompt=CAPTION, n=2, stream=True, partial_images=asked, extra_body={"seed": 3}
    )
    *partial, first, second = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * asked
    assert [event.partial_image_index for event in partial] == list(range(asked))
    assert first.type == second.type == "image_generation.completed"
    assert first.usage.output_tokens == 8 * 16 and first.size == "8x8"
    completed = [opened(base64.b64decode(event.b64_json)) for event in (first, second)]
    assert pixels(completed) == drawn(model, candidates=8, keep=2, seed=3)
    candidates = dalle1.sample(CAPTION, model, 8, 8, seed=3, progress=False)
    shown: list[dalle1.Preview] = []
    dalle1.sample(
        CAPTION, model, 8, 8, seed=3, progress=False, on_step=shown.append, preview_rows=1
    )
    assert len(candidates.images[0]) == 8
    for event, row in zip(partial, rows, strict=True):
        found = np.asarray(opened(base64.b64decode(event.b64_json)))
        assert found.shape == (8, 8, 3)
        upper = (255 * shown[row - 1].images[0].permute(1, 2, 0)).round().byte().numpy()
        assert np.array_equal(found[: 2 * row], upper)
        assert (found[2 * row :] == 211).all()  # light gray


def test_streams_of_edits(client: Any, model: Model) -> None:
    """Events of another name, or partial images of rows that are given."""
    data = picture()
    stream = client.images.edit(
        image=data, prompt=CAPTION, stream=True, partial_images=3,
        extra_body={"rows": 2, "seed": 4},
    )  # fmt: skip
    events = list(stream)
    assert [e.type for e in events] == ["image_edit.partial_image", "image_edit.completed"]
    wanted = drawn(model, image=opened(data), rows=2, seed=4)
    assert pixels([opened(base64.b64decode(events[-1].b64_json))]) == wanted


def test_models(client: Any) -> None:
    """A model that is served and not listed, or one with a slash in its name that is not found."""
    assert [entry.id for entry in client.models.list()] == ["tiny", "org/plain"]
    found = client.models.retrieve("org/plain")
    assert (found.id, found.object, found.size, found.ranker) == (
        "org/plain",
        "model",
        "6x6",
        False,
    )
    with pytest.raises(openai.NotFoundError, match="none called 'other'") as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_several_clients_at_once(client: Any, served: Served, model: Model) -> None:
    """A client that gets the images of another, or waits until all others are served."""
    before = served.metric('dalle1_batches_total{device="cpu"}')

    def ask(seed: int) -> list[bytes]:
        response = client.images.generate(prompt=CAPTION, extra_body={"seed": seed})
        return pixels(images_of(response))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(24)))
    assert found == [drawn(model, seed=seed) for seed in range(24)]
    assert served.metric('dalle1_batches_total{device="cpu"}') - before < 20


def test_metrics_and_health(served: Served, client: Any) -> None:
    """A number that stays as it is, or a balancer that is told nothing."""
    route = '{route="/v1/images/generations",status="%s"}'
    before = [served.metric(f"dalle1_requests_total{route % s}") for s in (200, 400)]
    client.images.generate(prompt=CAPTION)
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="")
    after = [served.metric(f"dalle1_requests_total{route % s}") for s in (200, 400)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]
    assert served.metric('dalle1_jobs_total{device="cpu",outcome="done"}') >= 1
    assert served.metric('dalle1_candidates_total{device="cpu"}') >= 4
    with urlopen(f"{served.url}/health") as response:
        assert response.status == 200 and b'"status":"ok"' in response.read()


def test_keys(model: Model) -> None:
    """A server with a key that answers without it, or a key that is compared by its beginning."""
    with serving({"tiny": model}, keys=("secret", "other")) as served:
        for key in ("secret", "other"):
            assert served.client(api_key=key).models.list().data
        for key in ("wrong", "secre", "secrets", "SECRET"):
            with pytest.raises(openai.AuthenticationError) as caught:
                served.client(api_key=key).images.generate(prompt=CAPTION)
            assert caught.value.code == "invalid_api_key"
            assert key not in str(caught.value.body)
        for path, status in (("/v1/models", "401"), ("/metrics", "401"), ("/v1/x", "401")):
            with pytest.raises(OSError, match=status):
                urlopen(served.url + path)
        with urlopen(f"{served.url}/health") as response:
            assert response.status == 200
        client = served.client(api_key="secret")
        link = client.images.generate(prompt=CAPTION, response_format="url").data[0].url
        with urlopen(link) as response:  # whoever has it may see the image
            assert response.status == 200


def test_a_full_queue(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that grows without end, or a client that is not told to come again."""
    from dalle1.generation.generator import Generator

    plain, opened_ = Generator.draw, threading.Event()

    def held(self: Generator, *arguments: Any) -> torch.Tensor:
        assert opened_.wait(60)
        return plain(self, *arguments)

    monkeypatch.setattr(Generator, "draw", held)
    with serving({"tiny": model}, {"waiting": 2}) as served, ThreadPoolExecutor(2) as pool:
        client = served.client()
        first = [pool.submit(client.images.generate, prompt=CAPTION) for _ in range(2)]
        while served.worker.waiting < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt=CAPTION)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) > 0
        opened_.set()
        assert all(job.result().data for job in first)
        assert client.images.generate(prompt=CAPTION).data
