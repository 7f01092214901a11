"""Lists the files of settings that come with the library, or prints one to copy and edit.

    dalle1 configs [NAME]
    dalle1 configs shapes
    dalle1 configs shapes/dvae > mine.yaml

Each is listed with what it is for, what it costs and its command. Commands that take a CONFIG know
these names: `dalle1 train shapes/dvae`. The first part of a name lists all that begin with it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence

from dalle1 import configs
from dalle1.commands.command_line import exit_status, make_parser

WIDTHS = (40, 120)  # of the lines, at least and at most


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for a name that there is not."""
    parser = make_parser("configs", __doc__)
    parser.add_argument("name", nargs="?", help="such as shapes/dvae, or shapes for all of them")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _configs(options))


def _configs(options: argparse.Namespace) -> int:
    name: str = (options.name or "").removesuffix(configs.SUFFIX).strip("/")
    listed = [n for n in configs.names() if not name or n.startswith(f"{name}/")]
    if listed:
        print("\n\n".join(map(describe, listed)))
        return 0
    if name not in configs.names():
        configs.find(options.name)  # says which names are near
        raise ValueError(f"NAME: expected a name that `dalle1 configs` lists, got {options.name!r}")
    print(configs.read(name), end="")
    return 0


def describe(name: str) -> str:
    """A file's name, what it is for, what it costs, its commands."""
    least, most = WIDTHS
    width = min(max(least, shutil.get_terminal_size().columns), most)
    header = configs.header(name)
    lines = [name]
    for text in (header.purpose, header.cost, header.expected):
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines + [f"    {command}" for command in header.commands])


if __name__ == "__main__":
    sys.exit(main())
