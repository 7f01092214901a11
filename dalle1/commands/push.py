"""Uploads a model folder to the Hugging Face Hub, where `dalle1.load("OWNER/NAME")` opens it.

    dalle1 push FOLDER OWNER/NAME [--private] [--license mit] [--widget CAPTION ...]
    dalle1 push runs/shapes/dalle/model me/shapes --license mit --widget "a red circle"

The folder's README.md becomes the card there, with what the Hub finds models by in front. The
repository is made where it is missing. Log in with `hf auth login` before, or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle1.commands.command_line import as_model, exit_status, make_parser
from dalle1.common.files import read_text
from dalle1.common.hardware import DTYPES
from dalle1.common.origins import CARD
from dalle1.hub.finding import find_folder
from dalle1.hub.names import as_repository
from dalle1.model import load
from dalle1.sampling import sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk or the network fails, 2 for a mistake of the user's, 130 when
    stopped."""
    parser = make_parser("push", __doc__)
    parser.add_argument(
        "folder", type=as_model, help="model folder, or the name of a model that comes with dalle1"
    )
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private"
    )
    parser.add_argument("--revision", help="a branch, which is made where it is missing")
    parser.add_argument("--message", default="Upload a model of dalle1", help="of the commit")
    parser.add_argument("--license", help="of the weights, such as mit or cc-by-4.0")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of all weights, else as they are")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--widget",
        action="append",
        default=[],
        metavar="CAPTION",
        help="draw an image for the card",
    )
    parser.add_argument(
        "--candidates", type=int, default=64, help="drawn for each --widget, of which one is kept"
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: _push(options), "stopped; nothing was uploaded")


def _push(options: argparse.Namespace) -> int:
    repository = as_repository(options.repository, "OWNER/NAME")
    folder = find_folder(options.folder)
    model = load(folder)
    widget = {}
    if options.widget:
        candidates = 1 if model.ranker is None else options.candidates
        drawn = sample(options.widget, model, candidates=candidates, keep=1)
        widget = {c: images[0] for c, images in zip(drawn.captions, drawn.images, strict=True)}
    address = model.push_to_hub(
        repository,
        private=options.private,
        revision=options.revision,
        commit_message=options.message,
        license=options.license,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        create_pr=options.create_pr,
        widget=widget,
        card=_card(folder, repository),
    )
    print(address)
    return 0


def _card(folder: Path, repository: str) -> str | None:
    """The folder's card, whose snippet opens the repository; None where it has none."""
    path = folder / CARD
    if not path.is_file():
        return None
    return read_text(path).replace('dalle1.load("this folder")', f'dalle1.load("{repository}")')


if __name__ == "__main__":
    sys.exit(main())
