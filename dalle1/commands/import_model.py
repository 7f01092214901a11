"""Writes a model folder from somebody else's files, as they are published.

    dalle1 import [KIND] SOURCE OUT [--codec FOLDER] [--tokenizer FILE] [--ranker FOLDER]
    dalle1 import dvae downloads/openai runs/openai-dvae
    dalle1 import --list
    dalle1 import hub:openai/clip-vit-base-patch32 runs/openai-clip

SOURCE is a file, a folder, an archive, or hub:OWNER/NAME[@REVISION][/FILE] on the Hugging Face
Hub, whose files are fetched into the Hub's cache. Nothing else is fetched. KIND may be left out
where the files tell. Nothing in the files is executed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dalle1.commands.command_line import exit_status, make_parser
from dalle1.common.files import expand_home, size_text
from dalle1.common.hardware import DTYPES
from dalle1.published import families, import_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 when a disk fails or is full, 2 for a mistake of the user's, 130 when
    stopped."""
    parser = make_parser("import", __doc__)
    parser.usage = "dalle1 import [KIND] SOURCE OUT [options]"
    parser.add_argument(
        "names", nargs="*", metavar="[KIND] SOURCE OUT", help="the family, its files, a new folder"
    )
    parser.add_argument("--list", action="store_true", help="the families and their licenses")
    parser.add_argument(
        "--codec", help="a codec in place of the source's: a folder of ours, or files"
    )
    parser.add_argument("--tokenizer", help="the same for the tokenizer, such as bpe.model")
    parser.add_argument("--ranker", help="the same for the ranker")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the prior, else as in the files")
    parser.add_argument(
        "--download",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fetch what hub: names; with --no-download it must be in the cache",
    )
    options = parser.parse_intermixed_args(arguments)
    return exit_status(
        lambda: _import(options), f"stopped; nothing is in {(options.names or ['OUT'])[-1]}"
    )


def _import(options: argparse.Namespace) -> int:
    if options.list:
        _print_families()
        return 0
    names = options.names
    if len(names) not in (2, 3) or not all(names):
        raise ValueError(
            f"KIND SOURCE OUT: expected two or three names, got {len(names)}; see "
            "`dalle1 import --help`"
        )
    kind = names[0] if len(names) == 3 else None
    made = import_model(
        expand_home(names[-2]),
        expand_home(names[-1]),
        kind,
        codec=options.codec,
        tokenizer=options.tokenizer,
        ranker=options.ranker,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        download=options.download,
        progress=sys.stderr.isatty(),
    )
    print(f"{made.folder}: {made.family}, {size_text(made.bytes)}")
    for role, kind in made.kinds.items():
        count = f", {made.parameters[role]:,} parameters" if role in made.parameters else ""
        license_ = made.origins.get(role)
        print(f"  {role}: {kind}{count}" + (f"; license: {license_.license}" if license_ else ""))
    return 0


def _print_families() -> None:
    for family in families().values():
        print(
            f"{family.name:12} {family.title}\n{'':12} {family.origin}\n{'':12} "
            f"license of the weights: {family.license}"
        )


if __name__ == "__main__":
    sys.exit(main())
