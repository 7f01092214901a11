"""The page in another application: that of `dalle1 serve`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from dalle1.commands import serve
from dalle1.serving.worker import SamplingWorker
from dalle1.web.form import Form
from tests.web.conftest import PAGE, SECONDS, Server, running
from tests.web.test_page import call, values


@pytest.fixture
def application(worker: SamplingWorker) -> Iterator[str]:
    """The address of the server, with the page at /page."""
    for package in ("gradio", "prometheus_client", "python_multipart"):
        pytest.importorskip(package)
    from dalle1.serving.api.app import create_app
    from dalle1.web.page import mount

    app = create_app(worker)
    mount(app, worker, "/page", PAGE)
    with running(app) as address:
        yield address


def status(address: str) -> int:
    try:
        with urlopen(address, timeout=SECONDS) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_the_page_draws_beside_the_api(application: str) -> None:
    """A page that works at the root alone."""
    assert status(application + "page/") == 200
    server = Server(application + "page/", None)
    messages = call(server, "draw", values(Form("tiny", "a red cat", candidates=4, keep=2)))
    assert messages[-1]["success"] and "d1-save" in json.dumps(messages)


def test_the_page_is_as_closed_as_alone(application: str) -> None:
    """A guard that another path leads around."""
    for path in ("gradio_api/file=/etc/passwd", "gradio_api/info", "gradio_api/upload", "docs"):
        assert status(f"{application}page/{path}") == 404, path


def test_the_api_stays_its_own(application: str) -> None:
    """A page that takes over the server's addresses, or its form of errors."""
    assert status(application + "health") == 200
    with pytest.raises(HTTPError) as error:
        urlopen(application + "v1/nothing", timeout=SECONDS)
    assert "error" in json.load(error.value)
    body = {"prompt": "a red cat", "n": 1, "response_format": "b64_json"}
    head = {"content-type": "application/json"}
    request = Request(application + "v1/images/generations", json.dumps(body).encode(), head)
    with urlopen(request, timeout=SECONDS) as answer:
        assert json.load(answer)["data"][0]["b64_json"]


def test_a_key_and_a_page_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    """A server with a key, and a page that draws for whoever has none."""
    for package in ("gradio", "prometheus_client", "python_multipart"):
        pytest.importorskip(package)
    assert serve.main(["--page", "--key", "secret", "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --page: expected no --key")
