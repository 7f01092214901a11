"""Draws images for captions and keeps the best.

    dalle1 sample CAPTION ... [--model FOLDER] [--candidates 512] [--keep 8] [--out out]
    dalle1 sample "a noto emoji of a frog" --candidates 64
    dalle1 sample "a red circle above a blue square" --model runs/shapes/dalle/model
    dalle1 sample --like out/000-a-noto-emoji-of-a-frog-00.png --out again

Where no model is named, it is the one that comes with the library. The folder gets the images, best
first, and a contact sheet. Each PNG holds the settings that it was drawn with. `--like` reads them
and draws with the same ones; what is given beside it takes their place. `--redraw` draws the image
of the file alone.
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
from dalle1.common.png_settings import read_png_settings, sample_arguments
from dalle1.generation.defaults import OWN
from dalle1.sampling import sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when the disk is full, 2 for a mistake of the user's, 130 when stopped."""
    parser = make_parser("sample", __doc__)
    parser.add_argument("captions", nargs="*", metavar="caption", help="what to draw")
    like = parser.add_mutually_exclusive_group()
    like.add_argument(
        "--like", type=as_path, metavar="FILE.png", help="draw with the settings of this image"
    )
    like.add_argument(
        "--redraw", type=as_path, metavar="FILE.png", help="draw this image again, and no other"
    )
    parser.add_argument("--candidates", type=int, default=512, help="drawn for each caption")
    parser.add_argument("--keep", type=int, default=8, help="kept for each caption, best first")
    parser.add_argument("--first-candidate", type=int, default=0, help="number of the first")
    parser.add_argument("--out", type=as_path, default=Path("out"), help="folder for the images")
    parser.add_argument(
        "--temperature", type=float, help="0: the likeliest token (default: the model's, or else 1)"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this mass")
    parser.add_argument("--guidance", type=float, help="1: none (default: the model's, or else 1)")
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
    return exit_status(lambda: _sample(_with_settings_of_file(parser, options, arguments)))


def _with_settings_of_file(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
) -> argparse.Namespace:
    """The options with the settings of `--like` or `--redraw` in the place of the defaults."""
    path = options.like or options.redraw
    settings = None
    if path:
        settings = read_png_settings(path)
        option = "--like" if options.like else "--redraw"
        if settings is None:
            raise ValueError(
                f"{option}: expected a PNG that dalle1 has saved, got {str(path)!r}, which holds "
                "no settings"
            )
        found = sample_arguments(settings, alone=options.redraw is not None)
        parser.set_defaults(**found, dtype=settings["dtype"])
        options = parser.parse_args(arguments)
        if options.dtype not in DTYPES:
            raise ValueError(
                f"{option}: expected a dtype of {', '.join(DTYPES)}, got {options.dtype!r} in "
                f"{str(path)!r}; give --dtype"
            )
        if options.rows and not options.image:
            raise ValueError(
                f"{option}: expected --image too, got {str(path)!r}, which completes the first "
                f"{options.rows} rows of another image; that one is not in the file"
            )
    elif not options.captions:
        raise ValueError("captions: expected at least one, or --like FILE.png; got none")
    options.drawn_by = settings["model"] if settings else None
    return options


def _sample(options: argparse.Namespace) -> int:
    for name in ("sheet.png", "result.json"):
        check_writable_file(options.out / name, "--out")
    model = open_model(options, DTYPES[options.dtype])
    if options.drawn_by and options.drawn_by != model.fingerprint():
        print(
            f"note: {options.like or options.redraw} was drawn by another model or dtype "
            f"({options.drawn_by}, this one is {model.fingerprint()}); the images will differ",
            file=sys.stderr,
        )
    result = sample(
        options.captions,
        model=model,
        candidates=options.candidates,
        keep=options.keep,
        temperature=OWN if options.temperature is None else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=OWN if options.guidance is None else options.guidance,
        image=open_image(options.image) if options.image else None,
        rows=options.rows,
        seed=options.seed,
        batch_size=options.batch_size,
        window=options.window,
        first_candidate=options.first_candidate,
    )
    folder = result.save(options.out)
    for caption, scores in zip(result.captions, result.scores.tolist(), strict=True):
        print(f"{caption}: best score {scores[0]:.3f}")
    print(f"{folder / 'sheet.png'}, and {sum(map(len, result.images))} images in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
