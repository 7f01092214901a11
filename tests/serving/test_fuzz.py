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

EXAMPLES = int(os.environ.get("DALLE1_FUZZ", "15"))  # of each route


def test_no_request_is_answered_by_a_500(model: Model) -> None:
    """A body, path or parameter that nobody thought of and that the server falls over; an answer
    that the description does not foresee."""
    with serving({"tiny": model}, {"candidates": 20, "batch_size": None}) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        statuses: dict[str, set[int]] = {}
        for found in schema.get_all_operations():
            operation = found.ok()
            case_of, told = operation.as_strategy(), set[int]()
            statuses[operation.path] = told

            @hypothesis.settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=case_of)
            def ask(case: Any, told: set[int] = told) -> None:
                response = case.call(base_url=served.url)
                assert response.status_code < 500, response.text
                case.validate_response(response, base_url=served.url)
                told.add(response.status_code)

            ask()
        assert statuses.keys() >= {"/v1/images/generations", "/v1/images/edits", "/v1/models"}
        assert 400 in statuses["/v1/images/edits"]
