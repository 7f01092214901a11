"""The command `dalle1`: `sample` draws pictures for captions, `rank` scores pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dalle1.pictures import to_rgb
from dalle1.sampling import rank, sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for a mistake of the user's, which is named on stderr."""
    parser = argparse.ArgumentParser(prog="dalle1", description="Captions to pictures.")
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("sample", help="draw pictures for captions and keep the best")
    draw.add_argument("captions", nargs="+", metavar="caption")
    draw.add_argument("--model", type=Path, help="model folder (or set DALLE1_MODEL)")
    draw.add_argument("--candidates", type=int, default=512, help="drawn for each caption")
    draw.add_argument("--keep", type=int, default=8, help="kept for each caption, best first")
    draw.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    draw.add_argument("--temperature", type=float, default=1.0)
    draw.add_argument("--top-k", type=int)
    draw.add_argument("--top-p", type=float)
    draw.add_argument("--guidance", type=float, default=1.0)
    draw.add_argument("--image", type=Path, help="picture whose first rows are kept")
    draw.add_argument("--rows", type=int, default=0, help="token rows of --image to keep")
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--batch-size", type=int, help="candidates drawn at once")
    score = commands.add_parser("rank", help="score pictures against a caption")
    score.add_argument("caption")
    score.add_argument("images", nargs="+", type=Path, metavar="image")
    score.add_argument("--model", type=Path, help="model folder (or set DALLE1_MODEL)")
    options = parser.parse_args(arguments)
    try:
        return _sample(options) if options.command == "sample" else _rank(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _sample(options: argparse.Namespace) -> int:
    result = sample(
        options.captions,
        model=options.model,
        candidates=options.candidates,
        keep=options.keep,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=options.guidance,
        image=_open(options.image) if options.image else None,
        rows=options.rows,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    folder = result.save(options.out)
    for caption, scores in zip(result.captions, result.scores.tolist(), strict=True):
        print(f"{caption}: best score {scores[0]:.3f}")
    print(f"{folder / 'sheet.png'}, and {sum(map(len, result.images))} pictures beside it")
    return 0


def _rank(options: argparse.Namespace) -> int:
    scores = rank(options.caption, [_open(path) for path in options.images], options.model)
    for i in scores.argsort(descending=True, stable=True).tolist():
        print(f"{scores[i]:.4f}  {options.images[i]}")
    return 0


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image {path}: cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
