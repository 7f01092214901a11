"""Draws for many clients: `SamplingWorker`, which the page and the server share."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping

from dalle1.common.weights import device_of
from dalle1.generation.requests import DrawRequest, image_pixels
from dalle1.model import Model
from dalle1.protocols import CaptionCut
from dalle1.serving.device_queue import DeviceQueue
from dalle1.serving.jobs import Job
from dalle1.serving.requests import LimitExceeded, Limits, Request, UnknownModel

_CHECKING = threading.Lock()  # filters of warnings belong to the whole process


class SamplingWorker:
    """Draws images of models for many clients, with a queue for each device.

    Requests of the same model, options and first rows are drawn in one batch; what each gets is
    what `dalle1.sample` draws for its seed. To be closed, or used in a `with` block.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Limits | None = None,
        threads: int | None = None,
    ) -> None:
        """Checks the models and starts a thread for each device.

        Args:
            models: by name; at least one.
            limits: None: the defaults.
            threads: of the CPU, that a queue computes with; None: as many as this thread. Drawing
                on a CPU is up to 2.5 times as fast where no other thread has computed with
                more than one (`common.hardware.released_threads`).

        Raises:
            ValueError: there is no model, or one has weights that are not finite.
        """
        if not models:
            raise ValueError("models: expected at least one")
        self.models = dict(models)
        self.limits = limits or Limits()
        by_device: dict[str, dict[str, Model]] = {}
        for name, model in self.models.items():
            try:
                model.check_finite()
            except ValueError as error:
                raise ValueError(f"model {name!r}: {error}") from error
            by_device.setdefault(str(device_of(model.prior)), {})[name] = model
        self.queues = {d: DeviceQueue(d, own, self.limits, threads) for d, own in by_device.items()}

    def __enter__(self) -> SamplingWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, request: Request) -> Job:
        """Checks a request and puts it into its device's queue.

        Raises:
            UnknownModel: there is none of this name.
            LimitExceeded: it asks for more than the limits allow, or for a caption that is too long
                for the model.
            ValueError: it does not fit the model.
            QueueFull: too many wait.
            Closed: the worker is closed.
        """
        if request.model not in self.models:
            known = ", ".join(self.models)
            raise UnknownModel(f"model: expected one of {known}, got {request.model!r}")
        request.check_limits(self.limits)
        model = self.models[request.model]
        draw = DrawRequest(
            tuple(request.captions),
            request.candidates,
            request.keep,
            request.options,
            request.seed,
            request.rows,
            image_pixels(request.image),
            request.first_candidate,
            of_fewer=request.of_fewer,
        )
        with _CHECKING, warnings.catch_warnings():
            warnings.simplefilter("error", CaptionCut)
            try:
                draw.check(model, ranked=model.ranker is not None)
            except CaptionCut as cut:
                length = model.tokenizer.text_length
                raise LimitExceeded(
                    f"caption: expected a text that fits the model's {length} text positions, got "
                    "a longer one; shorten it"
                ) from cut
        queue = self.queues[str(device_of(model.prior))]
        job = Job(request, draw, queue.forget)
        queue.add(job)
        return job

    @property
    def waiting(self) -> int:
        """Jobs of all devices that wait or are drawn."""
        return sum(queue.waiting for queue in self.queues.values())

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(queue.alive for queue in self.queues.values())

    def close(self, timeout: float | None = 0) -> None:
        """Takes no more requests, and ends the threads; see `DeviceQueue.close`."""
        for queue in self.queues.values():
            queue.close(timeout)
