"""The files of settings that come with the library: names, headers, and files to copy."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dalle1 import configs
from dalle1.commands import main as cli
from dalle1.common.config import load_settings
from dalle1.training.config import load_config
from tests.commands.test_settings import KINDS, RunConfig

ROOT = Path(__file__).parents[2]
NAMES = configs.names()


def test_all_files_have_names() -> None:
    """A file that nobody can name, or a name of a file that is not there."""
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert sorted(ROOT / "configs" / f"{name}.yaml" for name in NAMES) == files
    assert {"shapes/dvae", "paper/12b", "finetune/shapes-dvae"} <= {*NAMES}


def test_a_name_is_known_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are looked for in the working directory alone."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        expected = ROOT / "configs" / f"{name}.yaml"
        assert configs.find(name).samefile(expected)
        assert configs.find(f"{name}.yaml").samefile(expected)
    assert load_config("shapes/dvae", ["steps=7"]).steps == 7


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own file that is passed over for ours; a folder, of a run, that is taken for one."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "shapes" / "dvae"
    own.mkdir(parents=True)
    assert load_config("shapes/dvae").steps != 3  # a folder
    own.rmdir()
    own.write_text(configs.read("shapes/dvae").replace("steps: ", "steps: 3  # "))
    assert load_config("shapes/dvae").steps == 3
    assert load_config("shapes/dvae.yaml").steps != 3  # which does not exist


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("shapes/dvea", ["shapes/dvae"]),
        ("dvae", ["paper/dvae", "shapes/dvae"]),
        ("configs/shapes/dvae.yaml", ["shapes/dvae"]),
        ("paper/12B", ["paper/12b"]),
    ],
)
def test_neither_a_path_nor_a_name(
    given: str, near: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that tells of the file alone, or not what was meant."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_config(given)
    said = str(error.value)
    assert said.startswith("config: expected a file, or a name that `dalle1 configs` lists, got ")
    assert repr(given) in said and "there is no such file" in said
    assert all(name in said.partition("did you mean ")[2] for name in near)
    with pytest.raises(ValueError, match="'xyz', and there is no such file; `dalle1 configs`"):
        load_config("xyz")
    with pytest.raises(ValueError, match=r"which is a folder"):
        load_config(str(tmp_path))
    with pytest.raises(ValueError, match=r"x', and there is no such file"):
        load_config("x" * 300)  # longer than a name of a file may be


def test_extends_is_a_path_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's parent that is looked for in the working directory, or by path alone."""
    (tmp_path / "own" / "shapes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    child = tmp_path / "own" / "child.yaml"
    child.write_text("extends: shapes/dvae\nlog_every: 5\n")
    assert load_config(child).run == load_config("shapes/dvae").run
    parent = configs.read("shapes/dvae")
    (tmp_path / "own" / "shapes" / "dvae").write_text(re.sub("run: .*", "run: own", parent))
    assert load_config(child).run == "own"  # beside the file
    assert load_config("own/child.yaml").log_every == 5
    child.write_text("extends: nothing.yaml\n")
    with pytest.raises(ValueError, match=r"child\.yaml: extends: .*'nothing\.yaml"):
        load_config(child)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is printed without its parent's settings, or another file."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", name]) == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(capsys.readouterr().out, encoding="utf-8")
    kind = KINDS.get(name.rpartition("/")[2], RunConfig)
    assert load_settings(kind, copy) == load_settings(kind, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_costs_how_much_and_how(name: str) -> None:
    """A file without one of these, or whose command runs another file."""
    header = configs.header(name)
    assert len(header.purpose) > 20 and header.cost.startswith("Cost")
    assert not re.search(r"\b(Cost|Expected|dalle1 train)\b", header.purpose)
    calls = [shlex.split(command) for command in header.commands]
    assert all(words[0] in ("dalle1", "deepspeed") for words in calls)
    # What the findings train, they vary; nobody else needs it.
    own = [words for words in calls if name in words or words[:2] == ["dalle1", "findings"]]
    assert own and not any(n in words for words in calls for n in NAMES if n != name)
    assert (name.startswith("findings/")) == (own[0][:2] == ["dalle1", "findings"])
    for words in own:
        before = words[: words.index(name)] if name in words else words
        if words[0] == "dalle1":
            assert before[1] in cli.VERBS
        else:
            assert before[-2] == "--module"
            module = ROOT / (before[-1].replace(".", "/") + ".py")
            assert 'if __name__ == "__main__":' in module.read_text()


def test_a_header_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of a command that are told as two; cost or expectation lost in the purpose."""
    (tmp_path / "a.yaml").write_text(
        "# What it\n# costs is: little.\n#   one x \\\n#     y\n#   two\n#       z\n"
        "# Cost in the\n# paper: much. Expected, of theirs: 3: 4.\nsteps: 1\n# no header\n"
    )
    monkeypatch.setattr(configs, "folder", lambda: tmp_path)
    assert configs.header("a") == configs.Header(
        "What it costs is: little.",
        ("one x y", "two z"),
        "Cost in the paper: much.",
        "Expected, of theirs: 3: 4.",
    )


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    """A list that leaves out a file, its cost or its command."""
    assert cli.main(["configs"]) == 0
    text = capsys.readouterr().out
    blocks = {block.split("\n")[0]: block for block in text.split("\n\n")}
    assert [*blocks] == NAMES
    for name, block in blocks.items():
        header = configs.header(name)
        flat = " ".join(block.split())
        for part in (header.purpose, header.cost, header.expected, *header.commands):
            assert " ".join(part.split()) in flat
    assert cli.main(["configs", "shapes/"]) == 0
    listed = re.findall(r"^(\S+)$", capsys.readouterr().out, re.M)
    assert listed == [name for name in NAMES if name.startswith("shapes/")]
    for name in ("shape", "shapes/dvea", "../configs/shapes/dvae"):
        assert cli.main(["configs", name]) == 2
        assert "expected" in capsys.readouterr().err


def test_files_beside_the_module_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installation that reads a folder configs/ which lies beside it by chance."""
    installed = tmp_path / "site-packages" / "dalle1" / "configs"
    (installed / "shapes").mkdir(parents=True)
    (tmp_path / "site-packages" / "configs").mkdir()
    monkeypatch.setattr(configs, "__file__", str(installed / "__init__.py"))
    assert configs.folder() == tmp_path / "site-packages" / "configs"  # as in a checkout
    (installed / "shapes" / "a.yaml").touch()
    assert configs.folder() == installed and configs.names() == ["shapes/a"]
