"""Every command in a shell block of README and docs: program, verb, options, config, settings."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dalle1 import configs
from dalle1.commands import evaluate
from dalle1.commands import main as cli
from dalle1.common.config import Section, load_settings
from dalle1.data.precompute.encode import TokenizeSettings
from dalle1.evaluation.config import CopySettings, RankSettings, RetrievalSettings
from dalle1.training.config import RunConfig
from tests.docs.pages import PAGES, ROOT, blocks, blocks_of, commands, read, without_blocks

SHELL = ("sh", "bash")
# Programs of others, of which a page needs no more than that they are called.
OF_OTHERS = {
    *("cd", "cp", "mkdir", "source", "tar", "unzip"),  # of every system
    *("apt-get", "do", "done", "dpkg", "for"),  # where photographs come from
    *("git", "pre-commit", "tensorboard"),
}
# Configs that no file has, with the reason.
NOT_LOADED = {
    "CONFIG": "stands for any",
    "tokens.yaml": "docs/extending.md writes it, and tests/test_extending.py runs the command",
    "rank.yaml": "docs/extending.md writes it, and tests/test_extending.py runs the command",
}
MEASURES = {"copies": CopySettings, "retrieval": RetrievalSettings, "ranking": RankSettings}
WITH_TRANSFORMER = ("attention", "train", "sample", "loading")  # benchmarks that take a config
SHELL_PAGES = [page for page in PAGES if blocks(page, *SHELL)]


class Parsed(BaseException):
    """Carries what was parsed out of a command, before the command does anything."""


def parse(verb: str, arguments: list[str]) -> argparse.Namespace | None:
    """What a verb reads from its arguments; None where they ask for help or a list.

    Raises ValueError with the parser's message.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, name)

            def stop(*given: Any, original: Any = original, **more: Any) -> None:
                raise Parsed(original(*given, **more))

            patch.setattr(argparse.ArgumentParser, name, stop)
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                status = cli.main([*verb.split(), *arguments])
        except Parsed as parsed:
            found: argparse.Namespace = parsed.args[0]
            return found
        except SystemExit as end:
            status = int(str(end.code))
    if status:
        raise ValueError(errors.getvalue().strip())
    return None


def check(words: list[str], written: dict[str, str]) -> None:
    """Raises ValueError for a command that does not exist as it is written.

    written: configs that commands of the same page have saved, by their files; a command that saves
        one adds it.
    """
    program, *rest = words
    if program == "dalle1":
        check_verb(*split_verb(rest), written)
    elif program in ("deepspeed", "sbatch") or (program == "python" and rest[0] != "-m"):
        check_launch(rest, written)
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        check_paths(rest[2:])
    elif program == "python":
        check_module(rest[1], rest[2:])
    elif program == "make":
        check_targets(rest)
    elif program == "pip" and rest[0] == "install":
        check_extras(rest[1:])
    elif program not in OF_OTHERS:
        raise ValueError(f"{program}: expected a program that is checked, or one of OF_OTHERS")


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    """A verb, of one word or two, and its arguments."""
    length = 2 if words and words[0] in cli.GROUPS else 1
    return " ".join(words[:length]), words[length:]


def check_verb(verb: str, arguments: list[str], written: dict[str, str]) -> None:
    """Parses the arguments, and loads the config that they name with its settings."""
    if ">" in arguments:
        arguments, (out,) = arguments[: arguments.index(">")], arguments[-1:]
        if verb == "configs":
            written[out] = arguments[0]
    options = parse(verb, arguments)
    if verb == "configs" and options and options.name:
        assert any(f"{n}/".startswith(f"{options.name}/") for n in configs.names()), options.name
    config = getattr(options, "config", None)
    if config is None or config in NOT_LOADED:
        return
    if verb == "benchmark" and options and options.what not in WITH_TRANSFORMER:
        return
    load(verb, written.get(config, config), getattr(options, "overrides", []))


def load(verb: str, config: str, overrides: list[str]) -> None:
    """Reads a config as the verb does; ValueError for a name, key or value that does not fit."""
    kind: type[Section]
    if verb == "evaluate":
        kind = MEASURES[load_settings(evaluate.Measure, config, overrides).measure]
    else:
        kind = TokenizeSettings if verb == "tokenize" else RunConfig
    load_settings(kind, config, overrides)


def check_launch(words: list[str], written: dict[str, str]) -> None:
    """What stands behind a launcher and its options: a script of launch/, or a module."""
    for i, word in enumerate(words):
        if word == "launch/cluster/train.slurm":
            return check_verb("train", words[i + 1 :], written)
        if word.startswith("launch/") and word.endswith(".py"):
            if not (ROOT / word).is_file():
                raise ValueError(f"{word}: there is no such script")
            verb = re.match(r'"""`dalle1 ([a-z ]+)`', (ROOT / word).read_text())
            assert verb, word
            return check_verb(verb[1], words[i + 1 :], written)
        if word == "--module":
            module = words[i + 1]
            assert importlib.util.find_spec(module), module
            return check_verb(module.rpartition(".")[2], words[i + 2 :], written)
    raise ValueError(f"{' '.join(words)}: expected a script of launch/, or --module")


def check_paths(arguments: list[str]) -> None:
    """What pytest is given."""
    missing = [a for a in arguments if "/" in a and not (ROOT / a.partition("::")[0]).exists()]
    if missing:
        raise ValueError(f"{missing}: there is no such path")


def check_module(module: str, arguments: list[str]) -> None:
    """A module that is run, and that its source has the options."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(f"{module}: there is no such module")
    source = Path(found.origin).read_text()
    unknown = [a for a in arguments if a.startswith("--") and f'"{a}"' not in source]
    if unknown:
        raise ValueError(f"{module}: has no {unknown}")


def check_targets(words: list[str]) -> None:
    """Targets of the Makefile."""
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    unknown = {word for word in words if "=" not in word} - set(known)
    if unknown:
        raise ValueError(f"make {unknown}: expected one of {known}")


def check_extras(arguments: list[str]) -> None:
    """Extras of ours; packages of others are theirs."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", section, re.M))
    for argument in arguments:
        extras = re.fullmatch(r"dalle1\[([\w,]+)\]", argument)
        if extras and not set(extras[1].split(",")) <= known:
            raise ValueError(f"{argument}: expected extras of {sorted(known)}")


@pytest.mark.parametrize("page", SHELL_PAGES)
def test_commands_exist_as_they_are_written(page: str) -> None:
    """A program, a verb, an option, a config, a setting or a target that a page names and that is
    not there, or a value that it does not take."""
    written: dict[str, str] = {}
    for block in blocks(page, *SHELL):
        for words in commands(block):
            try:
                check(words, written)
            except (ValueError, AssertionError) as error:
                pytest.fail(f"{block.place}: {' '.join(words)}\n{error}")


@pytest.mark.parametrize(
    "line",
    [
        "dalle1 sampel 'a cat'",
        "dalle1 sample 'a cat' --colour 3",
        "dalle1 sample 'a cat' --candidates many",
        "dalle1 train shapes/dvea",
        "dalle1 train shapes/dvae learning_rate=1e-3",
        "dalle1 train shapes/dvae steps=0",
        "dalle1 evaluate shapes/rank candidate=3",
        "dalle1 tokenize shapes/tokens outs=x",
        "dalle1 data shard images",
        "dalle1 configs shape",
        "deepspeed launch/trian.py shapes/dvae",
        "deepspeed --hostfile hosts launch/train.py shapes/dvea",
        "deepspeed --module dalle1.train shapes/dvae step=4",
        "sbatch --nodes=2 launch/cluster/train.slurm paper/13b",
        "python launch/plan.py paper/12b --gpu-number 8",
        "python -m tests.data.fuzz --round 3",
        "python -m pytest tests/generations",
        "make documentation",
        "pip install 'dalle1[eval,nothing]'",
        "cd somewhere && dalle1 trian shapes/dvae",
        "curl https://example.org",
    ],
)
def test_mistakes_are_found(line: str) -> None:
    """A check that lets through what it is for."""
    (block,) = blocks_of(f"```sh\n{line}\n```", "page.md")
    with pytest.raises((ValueError, AssertionError)):
        for words in commands(block):
            check(words, {})


def test_lines_are_read_as_a_shell_reads_them() -> None:
    """A comment or a second line taken for arguments; a command behind `&&` that nobody checks."""
    text = "```sh\nmake demo # all\ncd a && dalle1 train \\\n  b data='c/{0..1}.tar' > d\n```\n"
    (block,) = blocks_of(text, "page.md")
    train = ["dalle1", "train", "b", "data=c/{0..1}.tar", ">", "d"]
    assert commands(block) == [["make", "demo"], ["cd", "a"], train]


def plain_lines(page: str) -> Iterator[tuple[int, str]]:
    """Lines of code that no shell or Python block holds, with their numbers."""
    for number, line in enumerate(without_blocks(read(page)).splitlines(), 1):
        if line.startswith("    "):
            yield number, line
    for block in blocks(page):
        if block.language in ("", "text"):
            for offset, line in enumerate(block.text.splitlines(), 1):
                yield block.line + offset, line


@pytest.mark.parametrize("page", PAGES)
def test_no_command_stands_outside_of_a_shell_block(page: str) -> None:
    """A command that is not checked, because its block has no language."""
    called = re.compile(r"\s*(\$ )?(dalle1|deepspeed|sbatch|python|pip|make|import|from) [\w-]+")
    found = [f"{page}:{n}: {line}" for n, line in plain_lines(page) if called.match(line)]
    assert found == []
