"""What /openapi.json says of each route: bodies, answers, errors."""

from __future__ import annotations

from typing import Any

from dalle1.serving.api.bodies import EditBody, GenerationBody

Schema = dict[str, Any]


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


TEXT: Schema = {"type": "string"}
OPTIONAL: Schema = {"type": ["string", "null"]}
NUMBER: Schema = {"type": "integer"}
ERROR = _object(
    ["error"],
    error=_object(
        ["message", "type", "param", "code"],
        message=TEXT,
        type=TEXT,
        param=OPTIONAL,
        code=OPTIONAL,
    ),
)
IMAGES = _object(
    ["created", "data"],
    created=NUMBER,
    data={
        "type": "array",
        "items": _object([], b64_json=TEXT, url=TEXT, score={"type": "number"}),
    },
    size=TEXT,
    output_format=TEXT,
    background=TEXT,
    quality=TEXT,
    usage={"type": "object"},
    model=TEXT,
    seed=NUMBER,
)
MODEL = _object(
    ["id", "object", "created", "owned_by"],
    id=TEXT,
    object={"const": "model"},
    created=NUMBER,
    owned_by=TEXT,
)
MODELS = _object(
    ["object", "data"], object={"const": "list"}, data={"type": "array", "items": MODEL}
)
HEALTH = _object(["status", "waiting"], status=TEXT, waiting=NUMBER)
ERRORS = {
    400: "The request does not fit; the message says what was expected.",
    401: "No key, or none of the server's.",
    404: "No such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    500: "The images could not be made.",
    503: "The server shuts down, or has too little memory.",
    507: "The disk is full.",
}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _answers(content: Schema, *errors: int) -> Schema:
    answers: Schema = {"200": {"description": "Done.", "content": content}}
    for status in errors:
        answers[str(status)] = {"description": ERRORS[status], "content": _json(ERROR)}
    return answers


def _edit_schema() -> Schema:
    schema = EditBody.model_json_schema()
    picture = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP"}
    schema["properties"] = {"image": picture, **schema["properties"]}
    schema["required"] = ["image", *schema["required"]]
    return schema


def _names_parameter() -> list[Schema]:
    return [{"name": "name", "in": "path", "required": True, "schema": TEXT}]


_IMAGES = {**_json(IMAGES), "text/event-stream": {}}
_MAKING = (400, 401, 404, 408, 413, 429, 500, 503, 507)

DESCRIPTIONS: dict[str, Schema] = {
    "/v1/images/generations": {
        "summary": "Images of a caption",
        "requestBody": {"required": True, "content": _json(GenerationBody.model_json_schema())},
        "responses": _answers(_IMAGES, *_MAKING),
    },
    "/v1/images/edits": {
        "summary": "Images that begin with the upper rows of one that is sent",
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": _edit_schema()}},
        },
        "responses": _answers(_IMAGES, *_MAKING),
    },
    "/v1/images/files/{name}": {
        "summary": "An image that was answered as a link",
        "parameters": _names_parameter(),
        "responses": _answers(
            {f"image/{kind}": {"schema": TEXT} for kind in ("png", "jpeg", "webp")}, 404
        ),
    },
    "/v1/models": {"summary": "All models", "responses": _answers(_json(MODELS), 401)},
    "/v1/models/{name}": {
        "summary": "One model",
        "parameters": _names_parameter(),
        "responses": _answers(_json(MODEL), 401, 404),
    },
    "/health": {
        "summary": "Whether images can be drawn",
        "responses": {
            **_answers(_json(HEALTH)),
            "503": {"description": "They cannot.", "content": _json(HEALTH)},
        },
    },
    "/metrics": {
        "summary": "Numbers for Prometheus",
        "responses": _answers({"text/plain": {"schema": TEXT}}, 401),
    },
}
