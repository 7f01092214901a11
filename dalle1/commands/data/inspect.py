"""Says what a data set holds and what is wrong with it.

    dalle1 data inspect DATA [--sheet sheet.png]
    python launch/inspect_data.py DATA [--sheet sheet.png]

    dalle1 data inspect 'shards/{0000..0009}.tar' --sheet sheet.png

DATA is what the setting `data` of a run takes: shards such as 'path/{0000..0009}.tar', a folder of
tars, a folder of images with a .txt of the same name for each, `pipe:` and http(s) addresses, or
token shards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dalle1.commands.command_line import as_path, exit_status, make_parser
from dalle1.common.files import check_writable_file, expand_home, write_text
from dalle1.data.curation.inspect import describe, draw_contact_sheet, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 for a mistake of the user's, 130 when stopped."""
    parser = make_parser("data inspect", __doc__)
    parser.add_argument("data", type=expand_home, help="shards, or a folder of shards or of pairs")
    parser.add_argument("--caption-key", default="txt", help="txt, or a key of the json")
    parser.add_argument("--samples", type=int, default=1000, help="that are read and decoded")
    parser.add_argument("--all", action="store_true", help="read and decode all samples")
    parser.add_argument("--sheet", type=as_path, help="file for a contact sheet of some samples")
    parser.add_argument("--count", type=int, default=24, help="samples on the contact sheet")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> int:
    sheet: Path | None = options.sheet
    kind = Image.registered_extensions().get(sheet.suffix.lower()) if sheet else None
    if sheet and kind not in Image.SAVE:  # others can be read alone
        raise ValueError(
            f"--sheet: expected a name that ends in .png, .jpg or the like, got {str(sheet)!r}"
        )
    if sheet and options.count < 1:
        raise ValueError(f"--count: expected 1 or more, got {options.count}")
    if sheet:
        captions = sheet.with_name(f"{sheet.stem}_captions.txt")
        for path in (sheet, captions):
            check_writable_file(path, "--sheet")
    report = inspect(
        options.data,
        options.caption_key,
        None if options.all else options.samples,
        options.seed,
        options.count if sheet else 0,
        progress=sys.stderr.isatty(),
    )
    print(describe(report))
    if sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        draw_contact_sheet(report.images).save(sheet)
        # The sheet shortens long captions, and its font has the letters of English alone. The file
        # has another stem, or the two would be a pair to a reader of their folder.
        texts = (" ".join(text.split()) for _, text in report.images)
        write_text(captions, "".join(f"{i}: {text}\n" for i, text in enumerate(texts, 1)))
        print(f"\n{sheet}, captions in full in {captions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
