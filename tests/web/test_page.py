"""The page as a program uses it: Gradio's own messages, without a browser."""

from __future__ import annotations

import json
from typing import Any
from urllib.request import Request, urlopen

import pytest

from dalle1.generation.defaults import SamplingDefaults
from dalle1.serving.worker import SamplingWorker
from dalle1.web.form import FIELDS, Form
from tests.web.conftest import PAGE, SECONDS, Pace, Server, running
from tests.web.pictures import BAD, picture


def config(server: Server) -> dict[str, Any]:
    with urlopen(server.address + "config", timeout=SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def function(server: Server, name: str) -> dict[str, Any]:
    """A function of the page by the name that Gradio has for it."""
    return next(d for d in config(server)["dependencies"] if d["api_name"] == name)


def call(server: Server, name: str, data: list[Any], event: Any = None) -> list[dict[str, Any]]:
    """All messages of a call."""
    body = {
        "data": data, "fn_index": function(server, name)["id"], "session_hash": "abc",
        "event_data": event,
    }  # fmt: skip
    head = {"content-type": "application/json"}
    at = server.address + "gradio_api/queue/"
    with urlopen(Request(at + "join", json.dumps(body).encode(), head), timeout=SECONDS):
        pass
    messages = []
    with urlopen(at + "data?session_hash=abc", timeout=SECONDS) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                messages.append(json.loads(line[6:]))
                if messages[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    return messages


def values(form: Form) -> list[Any]:
    return [getattr(form, name) for name in FIELDS]


def test_a_drawing_comes_in_parts(server: Server) -> None:
    """Fields that are wired in another order than `Form` has; pictures that come all at once."""
    form = Form("tiny", "a red cat", candidates=4, keep=2, seed=8)
    messages = call(server, "draw", values(form))
    parts = [m for m in messages if m["msg"] == "process_generating"]
    assert len(parts) >= 4 and messages[-1]["success"]
    first = parts[0]["output"]["data"]
    assert "d1-drawing" in first[0] and first[4] == 8
    assert "d1-save" in json.dumps([m["output"] for m in messages if "output" in m])


def test_a_mistake_is_an_answer(server: Server) -> None:
    """A mistake that is an error of the server's."""
    for form in (Form("tiny", ""), Form("other", "a"), Form("tiny", "a", candidates="x")):
        messages = call(server, "draw", values(form))
        assert messages[-1]["success"], messages
        assert "d1-mistake" in json.dumps(messages)


def test_an_upload_is_answered(server: Server) -> None:
    """An upload that is not wired to the form, or a bad one that is an error of the server's."""
    messages = call(server, "upload", [picture(), "tiny"])
    assert messages[-1]["output"]["data"][0].startswith("data:image/png")
    for url, _ in BAD.values():
        if isinstance(url, str):
            messages = call(server, "upload", [url, "tiny"])
            assert messages[-1]["success"]
            assert "d1-mistake" in messages[-1]["output"]["data"][1]


@pytest.mark.parametrize("event", [None, {}, [], "x", {"picture": 3}, {"picture": "/etc/passwd"}])
def test_a_wrong_event_is_answered(server: Server, event: Any) -> None:
    """A program that sends what no tile sends, and gets an error of the server's."""
    messages = call(server, "use", ["tiny"], event)
    assert messages[-1]["success"], messages
    assert "d1-mistake" in messages[-1]["output"]["data"][1]


def test_models_are_chosen(server: Server) -> None:
    """A form that keeps the former model's rows, candidates, temperature and guidance."""
    messages = call(server, "choose", ["plain", 1, 1])
    rows, candidates, temperature, guidance, _ = messages[-1]["output"]["data"]
    assert rows["maximum"] == 3 and candidates["visible"] is False
    assert (temperature, guidance) == (0.75, 1)
    assert "d1-mistake" in call(server, "choose", ["other", 1, 1])[-1]["output"]["data"][-1]


def test_what_a_visitor_has_set_stays(server: Server) -> None:
    """Settings of a picture that are gone once its model is chosen."""
    found = call(server, "choose", ["plain", 0.5, 1])[-1]["output"]["data"]
    assert found[2] == {"__type__": "update"} and found[3] == 1
    # A program that sends what no slider does.
    messages = call(server, "choose", ["plain", [1], {}])
    assert messages[-1]["success"]


def test_the_form_begins_with_the_models_own(worker: SamplingWorker) -> None:
    """Pictures of the page that are worse than those of `sample`."""
    from dalle1.web.server import create_app

    worker.models["tiny"].sampling = SamplingDefaults(temperature=0.9, guidance=1.5)
    app = create_app(worker, page=PAGE)
    with running(app) as address:
        components = config(Server(address, app))["components"]
    sliders = {c["props"].get("label"): c["props"] for c in components}
    assert sliders["Temperature"]["value"] == 0.9 and sliders["Guidance"]["value"] == 1.5


def test_stop_and_leave_reach_nobody_else(
    server: Server, worker: SamplingWorker, pace: Pace
) -> None:
    """A stop of a visitor without a drawing that is an error."""
    assert call(server, "stop", [])[-1]["success"]


def test_no_function_is_for_programs(server: Server) -> None:
    """A programming interface that one did not mean to have, beside the image API."""
    assert {d["api_visibility"] for d in config(server)["dependencies"]} == {"private"}
