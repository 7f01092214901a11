"""Numbers for Prometheus: requests by route and status, and what the queues have done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle1.serving.worker import SamplingWorker

SECONDS = (0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of one application; nothing is kept for the whole process."""

    def __init__(self, worker: SamplingWorker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dalle1_requests", "HTTP requests", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "dalle1_request_seconds",
            "Seconds until a response was complete",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Queues(worker))

    def text(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Queues:
    """The queues' own counts, read when they are asked for."""

    def __init__(self, worker: SamplingWorker) -> None:
        self.worker = worker

    def collect(self) -> Iterator[Any]:
        """As prometheus_client asks its collectors."""
        waiting = GaugeMetricFamily("dalle1_waiting", "Jobs that are not done", labels=["device"])
        jobs = CounterMetricFamily("dalle1_jobs", "Jobs that ended", labels=["device", "outcome"])
        batches = CounterMetricFamily("dalle1_batches", "Batches drawn", labels=["device"])
        drawn = CounterMetricFamily("dalle1_candidates", "Candidates drawn", labels=["device"])
        busy = CounterMetricFamily("dalle1_busy_seconds", "Seconds of drawing", labels=["device"])
        for device, queue in self.worker.queues.items():
            counts = queue.counts
            waiting.add_metric([device], queue.waiting)
            batches.add_metric([device], counts.batches)
            drawn.add_metric([device], counts.candidates)
            busy.add_metric([device], counts.seconds)
            for outcome, count in counts.jobs.items():
                jobs.add_metric([device, outcome], count)
        yield from (waiting, jobs, batches, drawn, busy)


class Measured:
    """An ASGI application whose requests are counted, by the routes that are named."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: tuple[str, ...]) -> None:
        """routes: beginnings of paths; a request of any other path is not counted."""
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        route = next((r for r in self.routes if path == r or path.startswith(r + "/")), None)
        if scope["type"] != "http" or route is None:
            await self.app(scope, receive, send)
            return
        status, began = "none", time.monotonic()  # a client that left

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - began)
