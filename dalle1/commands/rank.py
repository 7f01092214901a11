"""Scores images against a caption, best first.

    dalle1 rank CAPTION IMAGE ... [--model FOLDER]
    dalle1 rank "a yellow cross" out/*.png --model runs/shapes/dalle/model
    dalle1 rank "a yellow cross" out/*.png --ranker open_clip:ViT-B-32/laion2b_s34b_b79k

A ranker needs a model only where it scores by the model's likelihood, or adds it, or reads captions
by the model's tokenizer.
launch/rank.py is another command, `dalle1 evaluate`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dalle1.commands.command_line import as_path, exit_status, make_parser
from dalle1.commands.model_options import add_model, add_ranker, open_model, open_ranker
from dalle1.common.image_files import open_image
from dalle1.model import rank_images
from dalle1.registry import adds_likelihood
from dalle1.sampling import MODEL_VARIABLE, rank


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for a mistake of the user's, 130 when stopped."""
    parser = make_parser("rank", __doc__)
    parser.add_argument("caption", help="what the images should show")
    parser.add_argument("images", nargs="+", type=as_path, metavar="image", help="image files")
    add_model(parser)
    add_ranker(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _rank(options))


def _rank(options: argparse.Namespace) -> int:
    images = [open_image(path) for path in options.images]
    if options.ranker and not (options.model or os.environ.get(MODEL_VARIABLE)):
        if adds_likelihood(options.ranker):
            raise ValueError(
                f"--ranker: {options.ranker!r} adds a model's likelihood; name the model, too "
                "(--model)"
            )
        scores = rank_images(open_ranker(options), options.caption, images)
    else:
        scores = rank(options.caption, images, open_model(options))
    for i in scores.argsort(descending=True, stable=True).tolist():
        print(f"{scores[i]:.4f}  {options.images[i]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
