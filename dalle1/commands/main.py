"""`dalle1 VERB ...`: finds the verb's module and hands the other arguments on.

A verb is imported when it is asked for, so that `dalle1 sample` never waits for DeepSpeed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from dalle1.commands.command_line import MISTAKE, escape_unprintable

VERBS = {
    "sample": "draw images for captions and keep the best",
    "rank": "score images against a caption",
    "train": "train a codec, a ranker or a prior",
    "import": "write a model folder from somebody else's files",
    "tokenize": "encode shards of images as token shards, once",
    "evaluate": "draw, rank and report over many captions",
    "shard": "write WebDataset shards from a folder or a table",
    "emoji": "write shards of emoji in several styles, with captions",
    "inspect": "say what a data set holds and what is wrong with it",
    "filter": "drop samples that are not worth training on",
    "plan": "say what a run asks of a cluster",
    "settings": "list all settings with types, defaults and bounds",
    "benchmark": "measure speed and memory",
    "findings": "run the paper's findings as small experiments",
    "demo": "train all parts on built-in images, draw, rank, report",
}
# Modules of verbs that are words of Python.
MODULES = {"import": "import_model"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; its exit status, or 2 for a verb that is missing or does not exist."""
    escape_unprintable()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else MISTAKE
    verb, rest = given[0], given[1:]
    if verb not in VERBS:
        print(f"error: VERB: expected {', '.join(VERBS)}, got {verb!r}", file=sys.stderr)
        return MISTAKE
    status: int = import_module(f"dalle1.commands.{MODULES.get(verb, verb)}").main(rest)
    return status


def _usage() -> str:
    """The verbs, a line each."""
    lines = ["usage: dalle1 VERB ...", ""]
    lines += [f"  {verb:10} {text}" for verb, text in VERBS.items()]
    return "\n".join([*lines, "", "dalle1 VERB --help says more."])


if __name__ == "__main__":
    sys.exit(main())
