"""Requests that are made up from /openapi.json: each gets an answer that it describes, no 500."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dalle1 import Model
from tests.serving.conftest import serving

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("fastapi")

# Not whether all that the schema allows is taken: a caption must have words that the model reads.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
EXAMPLES = int(os.environ.get("DALLE1_FUZZ", "15"))  # of each route


def explore(operation: Any, url: str) -> set[int]:
    """The statuses of made-up requests of a route."""
    from schemathesis import checks

    checks.load_all_checks()
    statuses: set[int] = set()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        response = case.call(base_url=url)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=[getattr(checks, name) for name in CHECKS])
        statuses.add(response.status_code)

    ask()
    return statuses


def test_no_request_is_answered_by_a_500(model: Model) -> None:
    """A body, path or parameter that nobody thought of and that the server falls over; an answer
    that the description does not foresee."""
    with serving({"tiny": model}, {"candidates": 20, "batch_size": None}) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        statuses = {operation.path: explore(operation, served.url) for operation in operations}
    assert statuses.keys() >= {"/v1/images/generations", "/v1/images/edits", "/v1/models"}
    assert 400 in statuses["/v1/images/edits"]
