"""Puts the help of each `dalle1 VERB` into docs/commands.md, from the parsers themselves."""

from __future__ import annotations

import argparse
import re
from typing import Any
from unittest import mock

from sphinx.application import Sphinx

from dalle1.commands import main as cli

PAGE = "commands"
WIDTH = "88"  # of the usage, in letters


class Asked(BaseException):
    """Carries the parser that was asked for its help out of a command."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", add_help)
    return {"parallel_read_safe": True}


def add_help(app: Sphinx, name: str, source: list[str]) -> None:
    """Appends a section for each verb to the page, in the order of `dalle1 --help`."""
    if name == PAGE:
        source[0] += "".join(section(verb) for verb in cli.VERBS)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, from the verb itself."""

    def give_away(parser: argparse.ArgumentParser, file: Any = None) -> None:
        raise Asked(parser)

    with mock.patch.object(argparse.ArgumentParser, "print_help", give_away):
        try:
            cli.main([*verb.split(), "--help"])
        except Asked as asked:
            found: argparse.ArgumentParser = asked.args[0]
            return found
    raise ValueError(f"dalle1 {verb}: expected --help to print the help of a parser; it did not")


def section(verb: str) -> str:
    """A verb's section in Markdown: its description, its usage, its arguments."""
    parser = parser_of(verb)
    with mock.patch.dict("os.environ", {"COLUMNS": WIDTH}):
        usage = re.sub(r"(?m)^(usage: | {7})", "", parser.format_usage()).rstrip()
    lines = [f"\n## dalle1 {verb}\n", description(parser.description or "")]
    lines += ["```text", usage, "```", ""]
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
    if shown:
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| {called(a)} | {meaning(parser, a)} |" for a in shown]
    return "\n".join(lines) + "\n"


def description(text: str) -> str:
    """A docstring as Markdown, whose indented examples are shell commands."""

    def fenced(lines: str) -> str:
        code = "\n".join(line[4:] for line in lines.strip("\n").splitlines())
        return f"\n```sh\n{code}\n```\n"

    parts = re.split(r"((?:^ {4}.*\n?)+)", text.strip() + "\n", flags=re.MULTILINE)
    return "".join(fenced(part) if part.startswith("    ") else escaped(part) for part in parts)


def escaped(text: str) -> str:
    """Plain text as Markdown, with code where it names an option."""
    code = r"(`[^`]*`|(?<![\w-])--[a-z][\w-]*)"
    parts = re.split(code, text)
    plain = [re.sub(r"([\\*_{}\[\]<>|])", r"\\\1", part) for part in parts[::2]]
    quoted = [_code(part.strip("`")) for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*quoted, ""], strict=True))


def called(action: argparse.Action) -> str:
    """The names of an argument, and what stands behind them: "`--keep KEEP`"."""
    default = action.dest.upper() if action.option_strings else action.dest
    value = action.metavar or default
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return _code(str(value))
    takes = action.nargs != 0
    return ", ".join(_code(f"{o} {value}" if takes else o) for o in action.option_strings)


def meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of an argument, with its default."""
    text = parser._get_formatter()._expand_help(action)
    return escaped(" ".join(text.split()))


def _code(text: str) -> str:
    cell = text.replace("|", "\\|")
    return f"`{cell}`"
