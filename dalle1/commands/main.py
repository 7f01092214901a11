"""`dalle1 VERB ...`: finds the verb's module and hands the other arguments on.

A verb is imported when it is asked for, so that `dalle1 sample` never waits for DeepSpeed, and
`dalle1 --help` for nothing.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from dalle1.commands.command_line import MISTAKE, escape_unprintable
from dalle1.version import __version__

VERBS = {
    "sample": "draw images for captions and keep the best",
    "rank": "score images against a caption",
    "web": "show a page to draw on",
    "serve": "answer programs that speak the Images API",
    "train": "train a codec, a ranker or a prior",
    "import": "write a model folder from somebody else's files",
    "push": "upload a model folder to the Hugging Face Hub",
    "tokenize": "encode shards of images as token shards, once",
    "evaluate": "draw, rank and report over many captions",
    "data shard": "write WebDataset shards from a folder or a table",
    "data inspect": "say what a data set holds and what is wrong with it",
    "data filter": "drop samples that are not worth training on",
    "data emoji": "write shards of emoji in several styles, with captions",
    "configs": "list the files of settings that come with the library, or print one",
    "settings": "list all settings with types, defaults and bounds",
    "plan": "say what a run asks of a cluster",
    "benchmark": "measure speed and memory",
    "findings": "run the paper's findings as small experiments",
    "demo": "train all parts on built-in images, draw, rank, report",
}
GROUPS = sorted({verb.partition(" ")[0] for verb in VERBS if " " in verb})
HELP = ("-h", "--help")
EXAMPLES = {  # of all, and of a group
    "": 'dalle1 sample "a noto emoji of a frog" --candidates 64',
    "data": "dalle1 data inspect shards/ --sheet sheet.png",
}


def module_of(verb: str) -> str:
    """The module of a verb; `import` is a word of Python."""
    name = "import_model" if verb == "import" else verb.replace(" ", ".")
    return f"dalle1.commands.{name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; its exit status, or 2 for a verb that is missing or does not exist."""
    escape_unprintable()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        print(f"dalle1 {__version__}")
        return 0
    group = given[0] if given and given[0] in GROUPS else ""
    length = 2 if group else 1
    words, rest = given[:length], given[length:]
    verb = " ".join(words)
    if len(words) < length or words[-1] in HELP:
        print(_usage(group))
        return 0 if words and words[-1] in HELP else MISTAKE
    if verb not in VERBS:
        known = [v for v in VERBS if v.startswith(group)]
        expected = f"expected {', '.join(known)}, got {verb!r}"
        print(f"error: VERB: {expected}{_hint(verb)}", file=sys.stderr)
        return MISTAKE
    status: int = import_module(module_of(verb)).main(rest)
    return status


def _hint(verb: str) -> str:
    """The verb that was meant, where one is near or ends in this word."""
    near = [v for v in VERBS if v.endswith(f" {verb}")]
    near += difflib.get_close_matches(verb, VERBS, 1, 0.7)
    return f"; did you mean `dalle1 {near[0]}`?" if near else ""


def _usage(group: str) -> str:
    """The verbs, or those of a group, a line each, and an example."""
    called = f"dalle1 {group}".strip()
    lines = [f"  {verb:14} {text}" for verb, text in VERBS.items() if verb.startswith(group)]
    return "\n".join(
        [
            f"usage: {called} VERB ...",
            "",
            *lines,
            "",
            f"    {EXAMPLES[group]}",
            "",
            f"{called} VERB --help says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
