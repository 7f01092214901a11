"""Writes images and captions as WebDataset shards.

    dalle1 data shard SOURCE OUT [--seed 0]
    python launch/shard.py SOURCE OUT [--seed 0]

    dalle1 data shard images/ shards/ --seed 0
    dalle1 data shard val2014 shards/ --coco captions_val2014.json
    dalle1 data shard CUB_200_2011 shards/ --cub text --classes testclasses.txt

SOURCE is a folder of images with a .txt for each, or a .csv, .tsv or .parquet of paths and
captions; or the folder of MS-COCO's or CUB's pictures (docs/evaluation.md). Rows that cannot be
used are left out, counted by cause and named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dalle1.commands.command_line import as_path, exit_status, make_parser
from dalle1.common.files import expand_home
from dalle1.data.curation.captions import CHOICES
from dalle1.data.curation.cub import SPLITS
from dalle1.data.curation.write_shards import write_shards


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when the disk is full, 2 for a mistake of the user's, 130 when stopped."""
    parser = make_parser("data shard", __doc__)
    parser.add_argument(
        "source", type=expand_home, help="folder of images and .txt, or .csv, .tsv, .parquet"
    )
    parser.add_argument("out", type=as_path, help="folder for the shards; must not hold any")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples of a shard at most")
    parser.add_argument(
        "--max-bytes", type=_integer, default=10**9, help="bytes of a shard at most, such as 1e9"
    )
    parser.add_argument("--image-column", default="path", help="of a table")
    parser.add_argument("--caption-column", default="caption", help="of a table")
    parser.add_argument("--coco", type=as_path, metavar="JSON", help="MS-COCO's annotations")
    parser.add_argument("--cub", type=as_path, metavar="FOLDER", help="CUB's captions")
    parser.add_argument(
        "--captions", choices=CHOICES, help="of each picture of MS-COCO or CUB; without, all"
    )
    parser.add_argument("--split", choices=tuple(SPLITS), help="of CUB; without, both")
    parser.add_argument(
        "--classes", type=as_path, metavar="FILE", help="of CUB, a name a line; without, all"
    )
    parser.add_argument("--seed", type=int, help="shuffles; without, the order of the source")
    parser.add_argument("--workers", type=int, default=4, help="threads that read")
    options = parser.parse_args(arguments)
    return exit_status(
        lambda: _shard(options),
        f"stopped; the finished shards stay in {options.out}: delete them before the next try",
    )


def _shard(options: argparse.Namespace) -> int:
    written = write_shards(**vars(options), progress=sys.stderr.isatty())
    shards = len(written.shards)
    print(
        f"{written.samples:,} samples in {shards:,} shard{'s' * (shards != 1)}, "
        f"{written.bytes / 1e6:,.1f} MB: data={options.out}"
    )
    if written.skipped:
        left_out = written.skipped.total()
        print(f"left out {left_out:,} of {left_out + written.samples:,}")
        for line in written.faults():
            print(f"  {line}")
    return 0


def _integer(text: str) -> int:
    """An integer that may be written as 1e9."""
    return int(float(text))


if __name__ == "__main__":
    sys.exit(main())
