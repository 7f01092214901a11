"""The command `dalle1`: `sample` draws pictures for captions, `rank` scores pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from dalle1.model import Model
from dalle1.pictures import to_rgb
from dalle1.sampling import rank, resolve, sample

DTYPES = ("float32", "bfloat16", "float16")


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
    draw.add_argument("--dtype", choices=DTYPES, default="float32", help="of the transformer")
    score = commands.add_parser("rank", help="score pictures against a caption")
    score.add_argument("caption")
    score.add_argument("images", nargs="+", type=Path, metavar="image")
    score.add_argument("--model", type=Path, help="model folder (or set DALLE1_MODEL)")
    for command in (draw, score):
        command.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1 ...")
    options = parser.parse_args(arguments)
    work = _sample if options.command == "sample" else _rank
    return exit_status(lambda: work(options))


def exit_status(work: Callable[[], int], stopped: str = "stopped") -> int:
    """What a command ends with: the work's own status; 2 for a mistake of the user's and 130 for
    Ctrl-C, each with a line on stderr in place of a traceback."""
    try:
        return work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def _sample(options: argparse.Namespace) -> int:
    result = sample(
        options.captions,
        model=_model(options, getattr(torch, options.dtype)),
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
    images = [_open(path) for path in options.images]
    scores = rank(options.caption, images, _model(options))
    for i in scores.argsort(descending=True, stable=True).tolist():
        print(f"{scores[i]:.4f}  {options.images[i]}")
    return 0


def default_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _model(options: argparse.Namespace, dtype: torch.dtype | None = None) -> Model:
    try:
        return resolve(options.model).to(options.device, dtype)
    except (RuntimeError, AssertionError) as error:  # what torch raises where there is no CUDA
        raise ValueError(f"--device {options.device}: {error}") from error


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image {path}: cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
