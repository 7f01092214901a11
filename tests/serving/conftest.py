"""A server on a free port of this machine, in a thread of the test."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dalle1 import Model
from dalle1.serving.requests import Limits
from dalle1.serving.worker import SamplingWorker


@dataclass
class Served:
    """A running server."""

    host: str
    port: int
    worker: SamplingWorker
    app: Any

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, **settings: Any) -> Any:
        """OpenAI's own client, which asks once."""
        import openai

        settings = {"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def metric(self, name: str) -> float:
        """A number of /metrics, by its name and labels."""
        from urllib.request import urlopen

        with urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return next((float(s.split()[-1]) for s in lines if s.rpartition(" ")[0] == name), 0.0)


@contextmanager
def serving(
    models: Mapping[str, Model],
    limits: Mapping[str, Any] | None = None,
    head_seconds: float = 20,
    **settings: Any,
) -> Iterator[Served]:
    """Serves models until the end of the block."""
    from dalle1.serving.api.app import create_app
    from dalle1.serving.api.image_files import ImageFiles
    from dalle1.serving.api.server import bind, make_server
    from dalle1.serving.api.settings import ServerSettings

    chosen = ServerSettings(**settings)
    files = ImageFiles(chosen.url_seconds, chosen.url_bytes)
    with (
        SamplingWorker(models, Limits(**{"gather_seconds": 0.01, **(limits or {})})) as worker,
        files,
        bind("127.0.0.1", 0) as listening,
    ):
        app = create_app(worker, chosen, files)
        server = make_server(app, head_seconds)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield Served(*listening.getsockname(), worker, app)
        finally:
            server.should_exit = True
            thread.join()
