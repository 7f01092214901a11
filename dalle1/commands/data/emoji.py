"""Writes the emoji data set, images with captions, as WebDataset shards.

    dalle1 data emoji OUT [--packages FOLDER] [--download] [--split train test ...]
    python launch/emoji.py OUT [--packages FOLDER] [--download]

    dalle1 data emoji data/emoji --download --split all

The pictures and names are those of published packages: emoji-datasource-google (style noto),
emoji-datasource-twitter (twemoji), @lobehub/fluent-emoji-3d (fluent), emojibase-data (names). They
lie unpacked in the folder of packages, as npm puts them, or npm is asked for those that are missing
when --download is given. OUT gets a folder for each split and a README with the licenses and what
they ask to be said (docs/emoji.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle1.commands.command_line import as_path, exit_status, make_parser
from dalle1.common.files import check_writable, size_text
from dalle1.data.emoji.dataset import SIDE, SPLITS
from dalle1.data.emoji.export import COUNTS, OTHER_COUNT, SHARD_SIZE, write_emoji
from dalle1.data.emoji.npm import fetch_packages
from dalle1.data.emoji.packages import NAMES, PACKAGES, find_packages, missing_packages
from dalle1.data.emoji.sources import LEAST, STYLES

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when the disk is full, 2 for a mistake of the user's, 130 when stopped."""
    parser = make_parser("data emoji", __doc__)
    parser.add_argument(
        "out", type=as_path, help="folder for the splits; new, or of the same packages"
    )
    parser.add_argument(
        "--packages",
        type=as_path,
        default=Path("data/packages"),
        help="folder in which each package is looked for by its name",
    )
    parser.add_argument(
        "--download", action="store_true", help="ask npm for the packages that are not there"
    )
    parser.add_argument(
        "--styles", nargs="+", choices=list(STYLES), default=list(STYLES), help="two or more"
    )
    for use, package in PACKAGES.items():
        parser.add_argument(
            f"--{use}", type=as_path, metavar="FOLDER", help=f"where {package.name} lies unpacked"
        )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=(*SPLITS, ALL),
        default=["train"],
        help="what to write (default: train)",
    )
    parser.add_argument(
        "--count",
        type=int,
        help=f"samples of a split (default: {COUNTS['train']} of train, {OTHER_COUNT} of others)",
    )
    parser.add_argument("--side", type=int, default=SIDE, help="of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--shard-size", type=int, default=SHARD_SIZE, help="samples of a shard at most"
    )
    parser.add_argument(
        "--no-skin-tones",
        action="store_true",
        help="use emoji without skin tones only: half as many pictures to learn",
    )
    options = parser.parse_args(arguments)
    return exit_status(
        lambda: _emoji(options),
        "stopped; what is finished stays, and the same command writes it and the rest again",
    )


def _emoji(options: argparse.Namespace) -> int:
    uses = _uses(options)
    check_writable(options.out, "OUT")
    given = {use: path for use in PACKAGES if (path := getattr(options, use)) is not None}
    if options.download and (missing := missing_packages(uses, options.packages, given)):
        fetch_packages(missing, options.packages, lambda line: print(line, file=sys.stderr))
    written = write_emoji(
        options.out,
        find_packages(uses, options.packages, given),
        SPLITS if ALL in options.split else list(dict.fromkeys(options.split)),
        options.count,
        options.seed,
        options.side,
        options.shard_size,
        skin_tones=not options.no_skin_tones,
        progress=sys.stderr.isatty(),
    )
    pictures = ", ".join(f"{count:,} {style}" for style, count in written.pictures.items())
    print(f"{written.emoji:,} emoji ({pictures})")
    if written.left_out:
        print(f"left out {written.left_out:,} that fewer than {LEAST} of these styles have")
    for split, samples in written.samples.items():
        size = size_text(written.bytes[split])
        print(f"{samples:,} samples of {split}, {size}: data={options.out / split}")
    print(f"licenses and attribution: {options.out / 'README.md'}")
    return 0


def _uses(options: argparse.Namespace) -> list[str]:
    """The styles and the names; ValueError for too few styles, or a folder of one not in use."""
    uses = [style for style in STYLES if style in options.styles]
    if len(uses) < LEAST:
        raise ValueError(
            f"--styles: expected {LEAST} or more of {', '.join(STYLES)}, got {', '.join(uses)}; a "
            "data set shows emoji in several styles"
        )
    for style in STYLES:
        if style not in uses and getattr(options, style) is not None:
            raise ValueError(f"--{style}: expected a style of --styles, which has it not; add it")
    return [*uses, NAMES]


if __name__ == "__main__":
    sys.exit(main())
