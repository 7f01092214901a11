"""`dalle1 VERB`: the dispatcher, its verbs, and the scripts of launch/."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dalle1
from dalle1.commands.main import EXAMPLES, GROUPS, VERBS, main, module_of

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
NO_VERBS = {"main", "command_line", "model_options", "serving_options"}


def test_every_verb_is_a_module_and_every_module_a_verb() -> None:
    """A verb that the table names and nobody wrote, or a command that no user can find."""
    folder = ROOT / "dalle1" / "commands"
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("[!_]*.py")]
    modules = {".".join(path.parts) for path in paths} - NO_VERBS
    assert {f"dalle1.commands.{name}" for name in modules} == {module_of(verb) for verb in VERBS}
    for verb in VERBS:
        assert callable(import_module(module_of(verb)).main), verb


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help that argparse cannot format, or without a line that a user can copy."""
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: dalle1 {verb} ")
    scripts = [path.name for path in SCRIPTS if f"{module_of(verb)} " in path.read_text()]
    shown = re.findall(rf"^    (?:.* )?(dalle1 {verb}|launch/\w+\.py) ", text, re.M)
    assert f"dalle1 {verb}" in shown
    assert {f"launch/{name}" for name in scripts} <= set(shown)
    assert "local_rank" not in text  # the launcher's


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_is_one(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example with placeholders, which nobody can type, or with an option that is none."""
    module = import_module(module_of(verb))
    ran: list[object] = []
    monkeypatch.setattr(module, "exit_status", lambda *arguments: ran.append(arguments) or 0)
    lines = re.findall(rf"^    (dalle1 {verb}(?: .*)?)$", module.__doc__ or "", re.M)
    examples = [line for line in lines if not re.search(r"\[|\.\.\.|\b[A-Z]{2,}\b", line)]
    assert examples, lines
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert main(words[1:]) == 0, example
    assert len(ran) == len(examples)


def test_no_verb_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """A bare `dalle1` that a script takes for success, or help that leaves out a verb."""
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert main(["--help"]) == main(["-h"]) == 0
    assert capsys.readouterr().out == 2 * usage
    assert re.findall(r"^  ((?:data )?\w+) ", usage, re.M) == list(VERBS)
    assert f"    {EXAMPLES['']}\n" in usage
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dalle1 {dalle1.__version__}\n"


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_and_its_help(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A group that is taken for a verb, or whose help lists the verbs of others."""
    assert main([group]) == 2
    usage = capsys.readouterr().out
    assert main([group, "--help"]) == main([group, "-h"]) == 0
    assert capsys.readouterr().out == 2 * usage
    expected = [verb for verb in VERBS if verb.startswith(f"{group} ")]
    assert re.findall(rf"^  ({group} \w+) ", usage, re.M) == expected and len(expected) > 1
    assert main([group, "nothing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: VERB: expected {', '.join(expected)}, got '{group} nothing'")


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback for a mistyped verb, or a module of commands/ that is none."""
    for verb in ("sampel", "command_line", "../sample"):
        assert main([verb, "x"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: VERB: expected sample, rank, ") and repr(verb) in said
        assert ("did you mean `dalle1 sample`?" in said) is (verb != "command_line")


@pytest.mark.parametrize("verb", ["shard", "inspect", "filter", "emoji"])
def test_a_verb_of_a_group_alone(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A second spelling, or a user of the first one who is not told of the new."""
    assert main([verb, "x"]) == 2
    assert f"did you mean `dalle1 data {verb}`?" in capsys.readouterr().err


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
from dalle1.commands.main import VERBS, main
for words in ([], ["data"], ["--version"], ["configs"], ["configs", "shapes/dvae"]):
    main(words)
print("loaded", "nothing", *{name.partition(".")[0] for name in sys.modules})
for verb in VERBS:
    try:
        main([*verb.split(), "--help"])
    except SystemExit:
        print("loaded", verb.replace(" ", "."), *{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"deepspeed", "gradio", "matplotlib", "tensorboard", "transformers"}
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("loaded ")]
    verbs = ["nothing", *(verb.replace(" ", ".") for verb in VERBS)]
    assert [verb for verb, *_ in lines] == verbs
    assert ["torch" in modules for _, *modules in lines] == [False, *[True] * len(VERBS)]
    assert {verb: heavy & {*modules} for verb, *modules in lines} == {v: set() for v in verbs}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_hands_on_to_a_verb(script: Path) -> None:
    """A script of launch/ that calls a command which is not, or no longer, there."""
    source = script.read_text()
    (module,) = set(re.findall(r"dalle1\.commands\.[\w.]+", source))
    (verb,) = (verb for verb in VERBS if module_of(verb) == module)
    assert source.startswith(f'"""`dalle1 {verb}`')
