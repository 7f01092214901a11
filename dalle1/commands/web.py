"""Shows a page to type captions into: rows appear while they are drawn, then the best images.

    dalle1 web [--model [NAME=]FOLDER ...] [--host 127.0.0.1] [--port 7860]
    dalle1 web
    dalle1 web --model shapes=runs/shapes/dalle/model --model emoji

Needs `pip install 'dalle1[web]'`. The page is for this machine alone unless --host says otherwise:
it asks for no password. Where no model is named, it is the one that comes with the library.
"""

from __future__ import annotations

import argparse
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
from dalle1.serving.requests import Limits
from dalle1.serving.worker import SamplingWorker
from dalle1.web.limits import PageLimits

PAGE = {  # of `PageLimits`, by the options that set them
    "keep": "max-pictures",
    "upload_bytes": "max-upload-bytes",
    "upload_pixels": "max-upload-pixels",
    "body_seconds": "body-seconds",
}
HEAD_SECONDS = 60.0  # for which a browser may send a request's head


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 after SIGTERM, 130 after Ctrl-C; 2 for a mistake of the user's."""
    parser = make_parser("web", __doc__)
    add_models(parser)
    add_address(parser, 7860)
    add_settings(parser, PageLimits, PAGE)
    add_settings(parser, Limits, LIMITS)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _web(options))


def _web(options: argparse.Namespace) -> int:
    for package in ("gradio", "fastapi", "uvicorn"):
        import_extra(package, "web", "dalle1 web")
    from dalle1.serving.api import hosts, server
    from dalle1.web.server import address_of, create_app

    limits = settings_of(options, Limits, LIMITS)
    page = settings_of(options, PageLimits, PAGE)
    with (
        server.bind(options.host, options.port) as listening,  # before models are read
        released_threads() as threads,  # for the worker
        SamplingWorker(open_models(options), limits, threads) as worker,
    ):

        def started() -> None:
            print(f"the page: {address_of(listening)}", flush=True)

        application = hosts.KnownHosts(
            create_app(worker, started, page), hosts.known_hosts(options.host, options.allow_host)
        )
        server.run(server.make_server(application, HEAD_SECONDS), listening)
    return 0


if __name__ == "__main__":
    sys.exit(main())
