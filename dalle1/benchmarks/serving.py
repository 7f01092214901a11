"""The server under load: requests of several clients against one `sample` call of as many
candidates."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from dalle1.benchmarks.timing import timed
from dalle1.common.extras import import_extra
from dalle1.common.hardware import released_threads
from dalle1.generation.defaults import SamplingDefaults
from dalle1.model import Model, load
from dalle1.sampling import sample
from dalle1.serving.requests import Limits
from dalle1.serving.worker import SamplingWorker

PATH = "/v1/images/generations"
SECONDS = 600  # for which a client waits for its answer


@dataclass(frozen=True)
class _Load:
    """What is asked for."""

    captions: Sequence[str]
    clients: int
    in_flight: int  # requests of each client at once
    requests: int  # of all clients
    candidates: int  # of each request
    keep: int


def report_serving(
    folder: str | Path,
    captions: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    candidates: Sequence[int],
    clients: int,
    in_flight: int,
    requests: int,
    repeats: int,
) -> dict[str, Any]:
    """Prints, and returns for a JSON file, images a second of both ways.

    Each client has so many requests in flight, and asks again when one is answered: for the best of
    the next caption's candidates where the model has a ranker, else for all of them. The ways take
    turns, so that noise hits both.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        import_extra(package, "serve", "dalle1 benchmark serving")
    report: dict[str, Any] = {}
    with released_threads() as threads:
        model = load(folder).to(device, dtype)
        model.sampling = SamplingDefaults()  # figures of models that are drawn alike
        ranked = model.ranker is not None
        print(
            f"{requests} requests of {clients} clients, {in_flight} at once each, over HTTP, "
            "against one sample call of as many candidates; "
            + ("ranked" if ranked else "without a ranker")
        )
        for each in candidates:
            asked = _Load(captions, clients, in_flight, requests, each, 1 if ranked else each)
            found = _measure(model, asked, device, repeats, threads)
            report[str(each)] = found
            _print(asked, found)
    return report


def _print(asked: _Load, found: dict[str, Any]) -> None:
    total = asked.requests * asked.candidates
    rates = {way: [total / s for s in found[way]] for way in ("sample", "served")}
    print(f"  {asked.candidates} candidates a request, {total} in all")
    for way, values in rates.items():
        print(
            f"    {way:8}{median(values):9.2f} candidates/s "
            f"({min(values):.2f} to {max(values):.2f})"
        )
    waits = sorted(found["waits"])
    print(
        f"    {median(rates['served']) / median(rates['sample']):.2f} of sample; "
        f"{found['answered']} of {found['asked']} answered, each after {median(waits):.2f} s "
        f"(at most {waits[-1]:.2f}), {found['mean_batch']:.1f} candidates a batch, "
        f"{found['memory'] / 2**20:,.0f} MB held",
        flush=True,
    )


def _measure(
    model: Model, asked: _Load, device: torch.device, repeats: int, threads: int
) -> dict[str, Any]:
    """Seconds of all candidates both ways, and of each request.

    Each way computes in a thread that is begun for it and ended with it: CPU threads of the one
    would slow the other down.
    """
    total = asked.requests * asked.candidates
    seconds: dict[str, list[float]] = {"sample": [], "served": []}
    waits: list[float] = []
    answered = drawn = batches = 0
    keep = total if model.ranker is None else asked.keep * asked.requests

    def all_at_once() -> float:
        torch.set_num_threads(threads)
        sample(asked.captions[0], model, asked.keep, asked.keep, progress=False)  # warms up
        return timed(lambda: sample(asked.captions[0], model, total, keep, progress=False), device)

    for _ in range(repeats):
        with ThreadPoolExecutor(1) as alone:
            seconds["sample"].append(alone.submit(all_at_once).result())
        with _served(model, threads) as (port, worker):
            _ask(port, asked, 0)  # what is only slow once
            began = time.perf_counter()
            with ThreadPoolExecutor(asked.clients * asked.in_flight) as pool:
                times = list(pool.map(lambda i: _ask(port, asked, i), range(asked.requests)))
            seconds["served"].append(time.perf_counter() - began)
            counts = [queue.counts for queue in worker.queues.values()]
            drawn += sum(c.candidates for c in counts) - asked.candidates
            batches += sum(c.batches for c in counts) - 1
        answered += sum(wait is not None for wait in times)
        waits += [wait for wait in times if wait is not None]
    return {
        **seconds,
        "waits": waits,
        "asked": repeats * asked.requests,
        "answered": answered,
        "mean_batch": drawn / batches,
        "memory": psutil.Process().memory_info().rss,
    }


@contextmanager
def _served(model: Model, threads: int) -> Iterator[tuple[int, SamplingWorker]]:
    """A server in a thread of this process: its port and its worker."""
    from dalle1.serving.api.app import create_app
    from dalle1.serving.api.server import bind, make_server
    from dalle1.serving.api.settings import ServerSettings

    settings = ServerSettings(images=10_000)
    with (
        SamplingWorker({"model": model}, Limits(candidates=10_000), threads) as worker,
        bind("127.0.0.1", 0) as listening,
    ):
        server = make_server(create_app(worker, settings), settings.head_seconds)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        try:
            yield listening.getsockname()[1], worker
        finally:
            server.should_exit = True
            thread.join()


def _ask(port: int, asked: _Load, number: int) -> float | None:
    """Seconds until a request was answered; None where it was not."""
    body = {
        "prompt": asked.captions[number % len(asked.captions)],
        "n": asked.keep,
        "candidates": asked.candidates,
        "seed": number,
    }
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        images = json.load(answer).get("data", ())
    finally:
        connection.close()
    complete = answer.status == 200 and len(images) == asked.keep
    return time.perf_counter() - began if complete else None
