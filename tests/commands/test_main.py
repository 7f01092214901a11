"""`dalle1 VERB`: the dispatcher, its verbs, and the scripts of launch/."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dalle1.commands.main import MODULES, VERBS, main

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
NO_VERBS = {"__init__", "main", "command_line"}


def test_every_verb_is_a_module_and_every_module_a_verb() -> None:
    """A verb that the table names and nobody wrote, or a command that no user can find."""
    modules = {path.stem for path in (ROOT / "dalle1" / "commands").glob("*.py")}
    assert modules - NO_VERBS == {MODULES.get(verb, verb) for verb in VERBS}
    for verb in VERBS:
        module = import_module(f"dalle1.commands.{MODULES.get(verb, verb)}")
        assert callable(module.main), verb


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help that argparse cannot format, or without a line that a user can copy."""
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: dalle1 {verb} ")
    scripts = [path.name for path in SCRIPTS if f"commands.{verb} " in path.read_text()]
    shown = re.findall(r"^    (?:.* )?(dalle1 \w+|launch/\w+\.py) ", text, re.M)
    assert f"dalle1 {verb}" in shown
    assert {f"launch/{name}" for name in scripts} <= set(shown)
    assert "local_rank" not in text  # the launcher's


def test_no_verb_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """A bare `dalle1` that a script takes for success, or help that leaves out a verb."""
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert main(["--help"]) == main(["-h"]) == 0
    assert capsys.readouterr().out == 2 * usage
    assert re.findall(r"^  (\w+) ", usage, re.M) == list(VERBS)


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for a mistyped verb, or a module of commands/ that is none."""
    for verb in ("sampel", "command_line", "../sample"):
        assert main([verb, "x"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: VERB: expected sample, rank, ") and repr(verb) in said


def test_arguments_and_exit_status_pass_through() -> None:
    """`python -m dalle1` that drops a verb's arguments or its exit status."""
    command = [sys.executable, "-m", "dalle1", "plan", "configs/paper/12b.yaml", "--gpus", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --gpus: expected") and "got 12" in done.stderr


def test_help_waits_for_nothing_heavy() -> None:
    """Seconds of DeepSpeed, or its absence, before `dalle1 sample` or another verb says a word."""
    code = """
import sys
from dalle1.commands.main import MODULES, VERBS, main
for verb in VERBS:
    try:
        main([verb, "--help"])
    except SystemExit:
        print("loaded", verb, *{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"deepspeed", "gradio", "matplotlib", "tensorboard", "transformers"}
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("loaded ")]
    assert [verb for verb, *_ in lines] == list(VERBS)
    assert all("torch" in modules for _, *modules in lines)
    assert {verb: heavy & {*modules} for verb, *modules in lines} == {v: set() for v in VERBS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_hands_on_to_a_verb(script: Path) -> None:
    """A script of launch/ that calls a command which is not, or no longer, there."""
    source = script.read_text()
    verbs = set(re.findall(r"dalle1\.commands\.(\w+)", source))
    assert len(verbs) == 1 and verbs <= set(VERBS)
    (verb,) = verbs
    assert source.startswith(f'"""`dalle1 {verb}`')
