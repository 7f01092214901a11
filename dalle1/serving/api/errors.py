"""Errors as the API tells them: {"error": {"message", "type", "param", "code"}}, in one line."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from dalle1.common.extras import one_line
from dalle1.generation.batches import out_of_memory
from dalle1.serving.requests import (
    Cancelled,
    Closed,
    LimitExceeded,
    NothingComplete,
    QueueFull,
    UnknownModel,
)

INVALID, SERVER = "invalid_request_error", "server_error"
# The library's arguments by the API's names.
PARAMETERS = {"caption": "prompt", "captions": "prompt", "keep": "n"}
RETRY_SECONDS = 2  # after which a client may ask a full queue again


class ApiError(Exception):
    """What a client is told in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        return {
            "error": {
                "message": one_line(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (408, 413):  # the rest of the body is not read
            return {"Connection": "close"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the queue or the library.

    A ValueError is the client's mistake, and its message is for people. Of all others only the
    class is told: their messages are about our insides.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="rate_limit_exceeded", kind="rate_limit_error")
    if isinstance(error, Closed | Cancelled | NothingComplete):
        return ApiError(503, str(error), code="server_shutdown", kind=SERVER)
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), "model", "model_not_found")
    if out_of_memory(error):
        message = "out of memory: ask for fewer candidates"
        return ApiError(503, message, code="out_of_memory", kind=SERVER)
    if isinstance(error, ValueError):
        code = "limit_exceeded" if isinstance(error, LimitExceeded) else "invalid_value"
        return _of_message(str(error), code)
    return ApiError(500, f"the images could not be made: {type(error).__name__}", kind=SERVER)


def _of_message(message: str, code: str) -> ApiError:
    """An error of the grammar "NAME: expected X, got Y", by the API's name of the argument."""
    found = re.match(r"(\w+): ", message)
    if not found:
        return ApiError(400, message, code=code)
    param = PARAMETERS.get(found[1], found[1])
    return ApiError(400, f"{param}: {message[found.end() :]}", param, code)


def _of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's body."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: no such parameter", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param}: is missing", param, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'body'}: {message}", param, "invalid_value")
