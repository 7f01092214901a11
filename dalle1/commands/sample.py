"""Draws images for captions and keeps the best.

    dalle1 sample CAPTION ... [--model FOLDER] [--candidates 512] [--keep 8] [--out out]
    dalle1 sample "a noto emoji of a frog" --candidates 64
    dalle1 sample "a red circle above a blue square" --model runs/shapes/dalle/model

Where no model is named, it is the one that comes with the library. The folder gets the images, best
first, and a contact sheet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle1.commands.command_line import as_path, exit_status, make_parser
from dalle1.commands.model_options import add_model, add_ranker, open_model
from dalle1.common.files import check_writable_file
from dalle1.common.hardware import DTYPES
from dalle1.common.image_files import open_image
from dalle1.sampling import sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when the disk is full, 2 for a mistake of the user's, 130 when stopped."""
    parser = make_parser("sample", __doc__)
    parser.add_argument("captions", nargs="+", metavar="caption", help="what to draw")
    parser.add_argument("--candidates", type=int, default=512, help="drawn for each caption")
    parser.add_argument("--keep", type=int, default=8, help="kept for each caption, best first")
    parser.add_argument("--out", type=as_path, default=Path("out"), help="folder for the images")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this mass")
    parser.add_argument("--guidance", type=float, default=1.0, help="1: none")
    parser.add_argument("--image", type=as_path, help="image whose first rows are kept")
    parser.add_argument("--rows", type=int, default=0, help="token rows of --image to keep")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--batch-size", type=int, help="candidates drawn at once")
    parser.add_argument(
        "--window", type=int, help="tokens drawn in one pass; 1: one by one (default: what pays)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the prior")
    add_model(parser)
    add_ranker(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _sample(options))


def _sample(options: argparse.Namespace) -> int:
    for name in ("sheet.png", "result.json"):
        check_writable_file(options.out / name, "--out")
    result = sample(
        options.captions,
        model=open_model(options, DTYPES[options.dtype]),
        candidates=options.candidates,
        keep=options.keep,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=options.guidance,
        image=open_image(options.image) if options.image else None,
        rows=options.rows,
        seed=options.seed,
        batch_size=options.batch_size,
        window=options.window,
    )
    folder = result.save(options.out)
    for caption, scores in zip(result.captions, result.scores.tolist(), strict=True):
        print(f"{caption}: best score {scores[0]:.3f}")
    print(f"{folder / 'sheet.png'}, and {sum(map(len, result.images))} images in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
