"""Generations and edits: a body becomes a job of the queue, its result becomes the answer."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from dalle1.generation.defaults import OWN
from dalle1.generation.images import image_size
from dalle1.generation.previews import unfinished_image
from dalle1.model import Model
from dalle1.sampling import Result
from dalle1.serving.api.bodies import EditBody, ImagesBody
from dalle1.serving.api.errors import ApiError
from dalle1.serving.api.image_files import ImageFiles
from dalle1.serving.api.settings import ServerSettings
from dalle1.serving.jobs import Job
from dalle1.serving.requests import Request
from dalle1.serving.worker import SamplingWorker


@dataclass(frozen=True)
class Asked:
    """A body as the queue takes it, and what its answer needs besides."""

    body: ImagesBody
    request: Request
    size: str
    usage: dict[str, Any]


class ImageMaker:
    """Puts requests into the queue and writes what comes out as the API has it."""

    def __init__(
        self, worker: SamplingWorker, settings: ServerSettings, files: ImageFiles | None
    ) -> None:
        """files: for images that are answered as links; None: they are refused."""
        self.worker, self.settings, self.files = worker, settings, files

    def submit(self, body: ImagesBody, image: Image.Image | None = None) -> tuple[Asked, Job]:
        """Checks a body and queues it.

        Raises ApiError, or what `SamplingWorker.submit` raises.
        """
        name = next(iter(self.worker.models)) if body.model is None else body.model
        model = self.worker.models.get(name)
        if model is None:
            raise ApiError(404, f"model: there is none called {name!r}", "model", "model_not_found")
        size = size_of(model)
        if body.size not in (None, "auto", size):
            raise ApiError(400, f"size: expected {size}, got {body.size!r}", "size", "invalid_size")
        n = 1 if body.n is None else body.n
        if n > self.settings.images:
            most = self.settings.images
            raise ApiError(400, f"n: expected at most {most}, got {n}", "n", "limit_exceeded")
        if body.response_format == "url" and self.files is None:
            message = "response_format: this server answers b64_json alone"
            raise ApiError(400, message, "response_format", "invalid_value")
        request = Request(
            model=name,
            captions=body.prompt,
            candidates=self._candidates(body, n, model),
            keep=n,
            options=model.sampling.options(
                OWN if body.temperature is None else body.temperature,
                body.top_k,
                body.top_p,
                OWN if body.guidance is None else body.guidance,
            ),
            seed=secrets.randbits(31) if body.seed is None else body.seed,
            image=image,
            rows=body.rows if isinstance(body, EditBody) else 0,
            preview_rows=_preview_rows(body, model),
            preview_images=1,
        )
        job = self.worker.submit(request)
        return Asked(body, request, size, _usage(model, request)), job

    def _candidates(self, body: ImagesBody, n: int, model: Model) -> int:
        """Candidates that are drawn: as asked for, or the server's number for each image."""
        if body.candidates is not None:
            if body.candidates < n:
                raise ApiError(
                    400,
                    f"candidates: expected at least n = {n}, got {body.candidates}",
                    "candidates",
                    "invalid_value",
                )
            return body.candidates
        most = self.worker.limits.candidates
        return min(n * self.settings.candidates, most) if model.ranker is not None else n

    def response(self, asked: Asked, result: Result, base_url: str) -> dict[str, Any]:
        """The answer to a request that asks for no stream; base_url: of the server, without "/"."""
        body, data = asked.body, []
        for image in result.images[0]:
            encoded = _encode(image, body)
            if body.response_format == "url":
                assert self.files is not None
                name = self.files.add(encoded, _format(body))
                data.append(
                    {"url": f"{self.settings.public_url or base_url}/v1/images/files/{name}"}
                )
            else:
                data.append({"b64_json": base64.b64encode(encoded).decode()})
        scores = result.scores[0].tolist()
        for entry, score in zip(data, scores, strict=True):
            if score == score:  # a model without a ranker has NaN
                entry["score"] = score
        return {
            "created": int(time.time()),
            "data": data,
            **_described(asked),
            "usage": asked.usage,
            "model": asked.request.model,
            "seed": asked.request.seed,
        }

    async def events(self, asked: Asked, job: Job) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream: the first image while it is drawn, then each when it is done."""
        kind = "image_edit" if isinstance(asked.body, EditBody) else "image_generation"
        shown, wanted = 0, asked.body.partial_images or 0
        async for event in job.stream():
            if isinstance(event, Result):
                for i, image in enumerate(event.images[0]):
                    yield {
                        "type": f"{kind}.completed",
                        **await self._image_event(asked, image),
                        "usage": asked.usage,
                        "index": i,
                        "seed": asked.request.seed,
                    }
            elif shown < wanted and event.rows < self._rows(asked):
                image = unfinished_image(event.images[0], self._height(asked))
                yield {
                    "type": f"{kind}.partial_image",
                    **await self._image_event(asked, image),
                    "partial_image_index": shown,
                }
                shown += 1

    def _rows(self, asked: Asked) -> int:
        return self.worker.models[asked.request.model].prior.grid[0]

    def _height(self, asked: Asked) -> int:
        model = self.worker.models[asked.request.model]
        return image_size(model.codec, model.prior.grid)[0]

    async def _image_event(self, asked: Asked, image: Image.Image) -> dict[str, Any]:
        encoded = await asyncio.to_thread(_encode, image, asked.body)
        return {
            "b64_json": base64.b64encode(encoded).decode(),
            "created_at": int(time.time()),
            **_described(asked),
        }


def size_of(model: Model) -> str:
    """A model's images as "WIDTHxHEIGHT"."""
    height, width = image_size(model.codec, model.prior.grid)
    return f"{width}x{height}"


def _preview_rows(body: ImagesBody, model: Model) -> int | None:
    """Token rows between two previews, such that there are as many as asked for."""
    wanted = body.partial_images or 0
    if not body.stream or not wanted:
        return None
    return -(-model.prior.grid[0] // (wanted + 1))


def _usage(model: Model, request: Request) -> dict[str, Any]:
    """Tokens that a request reads and draws."""
    rows, columns = model.prior.grid
    ids: Tensor = model.tokenizer.encode(request.captions[0])[0]
    text, given = int((ids < model.tokenizer.vocab_size).sum()), request.rows * columns
    drawn = request.candidates * (rows * columns - given)
    return {
        "input_tokens": text + given,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
        "output_tokens": drawn,
        "total_tokens": text + given + drawn,
    }


def _described(asked: Asked) -> dict[str, str]:
    return {
        "size": asked.size,
        "output_format": _format(asked.body),
        "background": "opaque",
        "quality": "auto",
    }


def _format(body: ImagesBody) -> str:
    return body.output_format or "png"


def _encode(image: Image.Image, body: ImagesBody) -> bytes:
    """An image as a file of the format that is asked for."""
    quality = 100 if body.output_compression is None else body.output_compression
    file = io.BytesIO()
    if _format(body) == "png":
        image.save(file, "png")
    else:
        image.save(file, _format(body), quality=quality)
    return file.getvalue()
