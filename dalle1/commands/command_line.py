"""What the commands have in common: parsers, exit statuses, warnings.

Nothing here imports torch, so that help is there at once. Options of models are in `model_options`.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

FAILED, MISTAKE, RANK_LOST, STOPPED = 1, 2, 75, 130  # exit statuses


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and adds the default to each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        none = default is None or isinstance(default, bool) or default is argparse.SUPPRESS
        if none or not action.option_strings:
            return action.help
        return f"{action.help or ''} (default: %(default)s)".lstrip()


class _Parser(argparse.ArgumentParser):
    """Takes what was typed as UTF-8 and lets no text fail to be printed, from its own help on."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        escape_unprintable()
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_as_utf8(text) for text in given], namespace)


def _as_utf8(text: str) -> str:
    """What was typed, where the locale knows ASCII alone."""
    if sys.getfilesystemencoding() != "ascii":
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def escape_unprintable() -> None:
    """From here on a console gets an escape such as \\xfc for what its encoding lacks, in place of
    an error after all work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def make_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `dalle1 VERB`, whose help shows the description: the module's docstring."""
    return _Parser(
        prog=f"dalle1 {verb}",
        description=(description or "").strip(),
        formatter_class=_HelpFormatter,
    )


def as_path(text: str) -> Path:
    """What an option that is a path stands for: a `~` in front is the home folder."""
    if not text:  # of a variable that is not set; it would be the working folder
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    from dalle1.common.files import expand_home

    return Path(expand_home(text))


def as_model(text: str) -> str:
    """What an option that is a model stands for: a folder, as `as_path`, or a name."""
    return str(as_path(text)) if text.startswith("~") or not text else text


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    """The arguments of commands that read a YAML file of settings."""
    parser.add_argument(
        "config", help=f"YAML file, or a name that `dalle1 configs` lists, such as {example}"
    )
    parser.add_argument("overrides", nargs="*", help="settings as key=value, after the file's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher's


def exit_status(command: Callable[[], int], stopped: str = "stopped", failed: str = "") -> int:
    """Runs a command; its exit status, with one line on stderr in place of a traceback.

    Args:
        command: returns the status of a run without an exception.
        stopped: the line for Ctrl-C.
        failed: the end of the line where a disk or a network failed.

    Returns:
        The command's own status; MISTAKE for a mistake of the user's, FAILED for a disk or a
        network that failed, STOPPED for Ctrl-C.
    """
    try:
        with plain_warnings():
            return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        why = error.strerror if error.strerror and not error.filename else error
        print(f"error: {why}{failed}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED


@contextmanager
def plain_warnings() -> Iterator[None]:
    """In this block a warning for users is one line on stderr, without the source line that warns.

    These are Python's FutureWarning, such as of settings that have a new name, `CaptionCut`, and
    `CacheUsedWarning`.
    """
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        from dalle1.hub.errors import CacheUsedWarning
        from dalle1.protocols import CaptionCut

        if issubclass(category, (FutureWarning, CaptionCut, CacheUsedWarning)):
            print(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def require_deepspeed(verb: str) -> None:
    """Raises ValueError where DeepSpeed is not installed, which some commands start with."""
    if find_spec("deepspeed") is None:
        raise ValueError(
            f"deepspeed: expected to be installed for `dalle1 {verb}`, got none; it runs on Linux: "
            "`pip install deepspeed`"
        )
