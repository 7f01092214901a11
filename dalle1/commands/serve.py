"""Serves models over HTTP, by the Images API that programs speak to hosted models.

    dalle1 serve [--model FOLDER] [--model NAME=FOLDER ...] [--port 8000] [--key KEY]
    dalle1 serve --model emoji --page
    curl http://127.0.0.1:8000/v1/images/generations -H "Content-Type: application/json" \\
        -d '{"prompt": "a noto emoji of a frog"}'

Only this machine can reach it unless --host says otherwise. docs/serving.md has the parameters of
requests, the limits, and a proxy to put in front. Ctrl-C or SIGTERM end it when what is being drawn
is done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dalle1.commands.command_line import exit_status, make_parser
from dalle1.commands.serving_options import (
    LIMITS,
    add_address,
    add_models,
    add_settings,
    open_models,
    settings_of,
)
from dalle1.common.extras import import_extra
from dalle1.common.hardware import released_threads
from dalle1.serving.api.settings import ServerSettings
from dalle1.serving.requests import Limits
from dalle1.serving.worker import SamplingWorker

KEY_VARIABLE = "DALLE1_KEY"
PAGE = "/page"
EXTRA = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
SERVER = {  # of `ServerSettings`, by the options that set them
    "candidates": "candidates",
    "images": "max-images",
    "body_bytes": "max-body-bytes",
    "image_pixels": "max-image-pixels",
    "head_seconds": "head-seconds",
    "body_seconds": "body-seconds",
    "send_seconds": "send-seconds",
    "url_seconds": "url-seconds",
    "url_bytes": "url-bytes",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 after SIGTERM, 130 after Ctrl-C; 2 for a mistake of the user's."""
    parser = make_parser("serve", __doc__)
    add_models(parser)
    add_address(parser, 8000)
    parser.add_argument(
        "--key",
        action="append",
        help=f"that clients must show; again for more (default: {KEY_VARIABLE}, or else none)",
    )
    parser.add_argument(
        "--page", action="store_true", help=f"show the page of `dalle1 web`, too, at {PAGE}/"
    )
    parser.add_argument("--public-url", help="what links to images begin with, behind a proxy")
    add_settings(parser, ServerSettings, SERVER)
    add_settings(parser, Limits, LIMITS)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> int:
    for package in EXTRA:
        import_extra(package, "serve", "dalle1 serve")
    if options.page:
        import_extra("gradio", "web", "dalle1 serve --page")
    from dalle1.serving.api import app, hosts, image_files, server

    settings = settings_of(
        options,
        ServerSettings,
        SERVER,
        keys=_keys(options),
        public_url=options.public_url and options.public_url.rstrip("/"),
    )
    if options.page and settings.keys:
        raise ValueError(
            "--page: expected no --key, got one, which the page does not ask for; run `dalle1 web` "
            "behind a proxy that asks for a password"
        )
    limits = settings_of(options, Limits, LIMITS)
    with (
        server.bind(options.host, options.port) as listening,  # before models are read
        released_threads() as threads,  # for the worker
    ):
        host, port = listening.getsockname()[:2]
        models = open_models(options)
        files = image_files.ImageFiles(settings.url_seconds, settings.url_bytes)
        with SamplingWorker(models, limits, threads) as worker, files:
            application = app.create_app(worker, settings, files)
            shown = f"[{host}]" if ":" in host else host
            if options.page:
                from dalle1.web.page import mount

                mount(application, worker, PAGE)
                print(f"the page: http://{shown}:{port}{PAGE}/", flush=True)
            print(f"serving {', '.join(models)} at http://{shown}:{port}/v1", flush=True)
            if not settings.keys and options.host not in hosts.LOCAL:
                print("warning: no --key: whoever reaches this port may draw", file=sys.stderr)
            known = hosts.KnownHosts(
                application, hosts.known_hosts(options.host, options.allow_host)
            )
            server.run(server.make_server(known, settings.head_seconds), listening)
    return 0


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    """The keys that are given; ValueError for an empty one, which everybody has."""
    given = options.key or [key for key in [os.environ.get(KEY_VARIABLE)] if key is not None]
    if any(not key.strip() for key in given):
        raise ValueError("--key: expected a text, got an empty one")
    return tuple(key.strip() for key in given)


if __name__ == "__main__":
    sys.exit(main())
