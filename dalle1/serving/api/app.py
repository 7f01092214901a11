"""The application: routes of the Images API, and what watches over them. Needs FastAPI."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from dalle1.common.image_files import TooManyPixels, UnreadableImage, read_encoded
from dalle1.serving.api.answers import ClientGone, EventStream, error_response, result_of
from dalle1.serving.api.bodies import EditBody, GenerationBody, ImagesBody
from dalle1.serving.api.errors import SERVER, ApiError, api_error
from dalle1.serving.api.guard import Guard
from dalle1.serving.api.image_files import ImageFiles
from dalle1.serving.api.images import ImageMaker, size_of
from dalle1.serving.api.metrics import Measured, Metrics
from dalle1.serving.api.openapi import DESCRIPTIONS
from dalle1.serving.api.settings import ServerSettings
from dalle1.serving.worker import SamplingWorker
from dalle1.version import __version__

Body = TypeVar("Body", bound=ImagesBody)
FORMATS = ("PNG", "JPEG", "WEBP")  # of pictures that are sent
CLIENT_GONE = 499  # nobody reads it; it shows in the metrics
MAX_FIELDS = 64  # of a form


def create_app(
    worker: SamplingWorker,
    settings: ServerSettings | None = None,
    files: ImageFiles | None = None,
) -> FastAPI:
    """The server's application, on which a page can be mounted too.

    Routes are /v1/..., /health, /metrics and /openapi.json; all other paths are free.

    Args:
        worker: draws; it is closed by whoever made it.
        settings: None: the defaults.
        files: where images that are answered as links are kept; None: they are refused.
    """
    return _Server(worker, settings or ServerSettings(), files).app


class _Server:
    """The routes, and what they share."""

    def __init__(
        self, worker: SamplingWorker, settings: ServerSettings, files: ImageFiles | None
    ) -> None:
        self.worker, self.settings, self.files = worker, settings, files
        self.maker = ImageMaker(worker, settings, files)
        self.metrics = Metrics(worker)
        self.created = int(time.time())
        self.app = app = FastAPI(
            title="dalle1",
            version=__version__,
            description="Images of captions: the Images API of hosted models, on your own.",
            docs_url=None,  # its page loads scripts from elsewhere
            redoc_url=None,
        )
        routes: tuple[tuple[str, str, Callable[..., Awaitable[Response]]], ...] = (
            ("POST", "/v1/images/generations", self.generations),
            ("POST", "/v1/images/edits", self.edits),
            ("GET", "/v1/images/files/{name}", self.file),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.numbers),
        )
        for method, path, route in routes:
            described = DESCRIPTIONS[path.replace(":path", "")]
            app.add_api_route(
                path, route, methods=[method], response_class=Response, openapi_extra=described,
                summary=described["summary"], responses={},
            )  # fmt: skip
        for status in (400, 404, 405):
            app.add_exception_handler(status, _on_status)
        app.add_exception_handler(ApiError, _on_api_error)
        app.add_exception_handler(Exception, _on_exception)
        # The one that is added last sees a request first.
        app.add_middleware(
            Guard, settings=settings, paths=("/v1/", "/metrics"), without_key=("/v1/images/files/",)
        )
        counted = tuple(path.partition("/{")[0] for _, path, _ in routes)
        app.add_middleware(Measured, metrics=self.metrics, routes=counted)

    async def generations(self, request: Request) -> Response:
        """Images of a caption."""
        return await self._answer(request, _body(GenerationBody, _json(await request.body())))

    async def edits(self, request: Request) -> Response:
        """Images that begin with the upper rows of one that is sent."""
        values, data = await _form(request)
        body = _body(EditBody, values, strict=False)
        image = await asyncio.to_thread(_picture, data, self.settings.image_pixels)
        return await self._answer(request, body, image)

    async def _answer(
        self, request: Request, body: ImagesBody, image: Image.Image | None = None
    ) -> Response:
        try:
            asked, job = await asyncio.to_thread(self.maker.submit, body, image)
            if body.stream:
                return EventStream(job, self.maker.events(asked, job))
            result = await result_of(job, request.receive)
            base_url = str(request.base_url).rstrip("/")
            content = await asyncio.to_thread(self.maker.response, asked, result, base_url)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            return error_response(api_error(error))
        return JSONResponse(content)

    async def file(self, request: Request) -> Response:
        """An image that was answered as a link."""
        name = request.path_params["name"]
        data = await asyncio.to_thread(self.files.find, name) if self.files else None
        if data is None:
            raise ApiError(404, "there is no such image, or not any more", None, "not_found")
        headers = {"Cache-Control": "private, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(data, 200, headers, f"image/{name.rpartition('.')[2]}")

    async def models(self, request: Request) -> Response:
        """All models."""
        data = [self._described(name) for name in self.worker.models]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        if name not in self.worker.models:
            raise ApiError(404, f"model: there is none called {name!r}", "model", "model_not_found")
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        model = self.worker.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "dalle1",
            "size": size_of(model),
            "rows": model.prior.grid[0],
            "text_tokens": model.tokenizer.text_length,
            "ranker": model.ranker is not None,
            "temperature": model.sampling.temperature,  # where a request names none
            "guidance": model.sampling.guidance,
        }

    async def health(self, request: Request) -> Response:
        """Whether images can be drawn, for balancers; no key is asked for."""
        alive = self.worker.alive
        content = {"status": "ok" if alive else "stopped", "waiting": self.worker.waiting}
        return JSONResponse(content, 200 if alive else 503)

    async def numbers(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _on_status(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: an unknown path or method, a form that is none."""
    status = getattr(error, "status_code", 400)
    told = {
        404: f"there is no {request.url.path}",
        405: f"{request.method} is not for {request.url.path}",
    }
    message = told.get(status, str(getattr(error, "detail", "the request cannot be read")))
    codes = {404: "not_found", 405: "method_not_allowed"}
    response = error_response(ApiError(status, message, None, codes.get(status)))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_exception(request: Request, error: Exception) -> Response:
    """A mistake of ours; the server logs it."""
    return error_response(ApiError(500, "the server made a mistake", kind=SERVER))


def _json(data: bytes) -> Any:
    """A JSON object. Raises ApiError for anything else."""
    try:
        found = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "body: expected JSON in UTF-8", None, "invalid_json") from error
    if not isinstance(found, dict):
        message = f"body: expected a JSON object, got {type(found).__name__}"
        raise ApiError(400, message, None, "invalid_json")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _body(kind: type[Body], values: Any, strict: bool = True) -> Body:
    """A body, checked; strict: numbers are numbers, not text, as a form has them."""
    try:
        return kind.model_validate(values, strict=strict)
    except ValueError as error:
        raise api_error(error) from error


async def _form(request: Request) -> tuple[dict[str, str], bytes]:
    """The fields of a form and the bytes of its picture. Raises ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        message = "body: expected multipart/form-data with an image"
        raise ApiError(400, message, None, "invalid_content_type")
    try:
        async with request.form(max_files=2, max_fields=MAX_FIELDS) as form:
            values: dict[str, str] = {}
            pictures: list[bytes] = []
            for name, value in form.multi_items():
                if name in ("image", "image[]"):
                    pictures.append(await _upload(value))
                elif isinstance(value, str):
                    values[name] = value
                else:
                    raise ApiError(
                        400, f"{name}: no such parameter, or no file", name, "unknown_parameter"
                    )
    except (ValueError, KeyError, AssertionError) as error:  # a charset that does not exist
        raise ApiError(400, "body: the form cannot be read", None, "invalid_form") from error
    if len(pictures) != 1:
        code = "invalid_value" if pictures else "missing_required_parameter"
        raise ApiError(400, f"image: expected one file, got {len(pictures)}", "image", code)
    return values, pictures[0]


async def _upload(value: Any) -> bytes:
    """A file's bytes; what is text, such as a path, is no file."""
    if isinstance(value, str):
        raise ApiError(400, "image: expected a file, got text", "image", "invalid_value")
    data: bytes = await value.read()
    return data


def _picture(data: bytes, max_pixels: int) -> Image.Image:
    """A picture that was sent, in mode RGB. Raises ApiError."""
    try:
        return read_encoded(data, max_pixels, FORMATS)
    except TooManyPixels as error:
        raise ApiError(400, f"image: {error}", "image", "image_too_large") from error
    except UnreadableImage as error:
        message = f"image: expected a picture as {', '.join(FORMATS)}, got none that can be read"
        raise ApiError(400, message, "image", "invalid_image") from error
