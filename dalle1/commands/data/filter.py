"""Drops samples that are not worth training on.

    dalle1 data filter IN OUT [--report report.json] [--workers 4]
    python launch/filter.py IN OUT [--report report.json] [--workers 4]

    dalle1 data filter shards/ kept/ --report report.json

IN is shards such as 'path/{0000..0009}.tar', a folder of tars, or `pipe:` and http(s) addresses.
OUT gets a shard for each, with the samples that are kept, unchanged. When it is stopped, the same
command resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dalle1.commands.command_line import as_path, exit_status, make_parser
from dalle1.common.files import check_writable_file, expand_home, write_text
from dalle1.data.curation.dedup import MAX_DISTANCE
from dalle1.data.curation.filter_shards import filter_shards
from dalle1.data.curation.filters import (
    DUPLICATES,
    ENGLISH,
    FilterSettings,
    current_duplicates,
)

# What argparse is told of each field of `FilterSettings`.
OPTIONS: dict[str, dict[str, Any]] = {
    "caption_key": {"help": "txt, or a key of the json"},
    "min_words": {"type": int, "help": "of a caption; 0: any"},
    "boilerplate_words": {
        "type": int,
        "help": "fewer words besides dates, file names and stock phrases are boilerplate; 0: off",
    },
    "english": {
        "choices": ENGLISH,
        "help": "script: no other letters than Latin ones; language: also what py3langid says",
    },
    "min_english": {"type": float, "help": "least probability, of --english language"},
    "max_aspect": {"type": float, "help": "longer side / shorter side; 0: any"},
    "min_side": {"type": int, "help": "pixels of the shorter side"},
    "max_pixels": {"type": int, "help": "of an image, as reader.max_pixels; 0: any"},
    "duplicates": {
        "type": current_duplicates,
        "choices": DUPLICATES,
        "help": "pair: the same image and caption; image: the same image, any caption",
    },
    "near_duplicates": {
        "type": int,
        "metavar": "BITS",
        "help": f"drops images whose hashes differ in at most so many of 64 bits, 0 to "
        f"{MAX_DISTANCE}; needs imagehash (default: off)",
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk fails or is full, 2 for a mistake of the user's, 130 when
    stopped."""
    parser = make_parser("data filter", __doc__)
    parser.add_argument("data", metavar="IN", type=expand_home, help="shards, or a folder of tars")
    parser.add_argument("out", metavar="OUT", type=as_path, help="folder for the filtered shards")
    for field in fields(FilterSettings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, **OPTIONS[field.name])
    parser.add_argument("--report", type=as_path, help="file for the counts and examples (.json)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read and filter")
    options = parser.parse_args(arguments)
    again = "the same command resumes"
    return exit_status(lambda: _filter(options), f"stopped; {again}", f"; {again}")


def _filter(options: argparse.Namespace) -> int:
    settings = FilterSettings(**{f.name: getattr(options, f.name) for f in fields(FilterSettings)})
    report: Path | None = options.report
    if report:
        check_writable_file(report, "--report")
    found = filter_shards(
        options.data, options.out, settings, options.workers, progress=sys.stderr.isatty()
    )
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        write_text(report, found.to_json())
    print(found.table())
    print(f"data={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
