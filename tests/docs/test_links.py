"""What README and docs name: links, anchors, paths, commands in the text, `make` targets."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from dalle1.commands import main as cli
from tests.docs.pages import DOCS, PAGES, ROOT, read, without_blocks

LINK = re.compile(r"\]\(<?([^()\s<>]+)>?(?: \"[^\"]*\")?\)")
# A script or a verb, and its arguments up to the end of the code or the line.
SCRIPT = re.compile(r"(launch/\w+\.py)([^`#\n]*)")
VERB = re.compile(r"(?:^|`|\$ )dalle1 (data [a-z]+|[a-z]+)([^`#\n]*)", re.M)


def anchors(text: str) -> set[str]:
    """What `page.md#...` may name of a page's text, as GitHub derives it from the headings: a name
    that occurs again gets a number."""
    text = without_blocks(text)
    names = [
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*?)\s*$", text, re.M)
    ]
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for name in names:
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def broken_links(page: str, text: str) -> list[str]:
    """Links of a page's text that lead to no file, or to no heading of a page."""
    found = []
    for link in LINK.findall(without_blocks(text)):
        if re.match(r"[a-z]+:", link):  # of others
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    """A link that leads nowhere on GitHub; a page that was renamed, a heading that was reworded."""
    assert broken_links(page, read(page)) == []


def test_broken_links_are_found() -> None:
    """A check of links that finds nothing."""
    text = "[a](data.md#reading) [b](date.md) [c](data.md#readings) [d](#filters) ![e](no.png)"
    assert broken_links("docs/data.md", text) == ["date.md", "data.md#readings", "no.png"]
    assert broken_links("README.md", "[a](https://example.org/x) [b](../outside.md)") == [
        "../outside.md"
    ]
    assert anchors("# A b\n\n## `c_d`: e, f\n\n## A b\n") == {"a-b", "c_d-e-f", "a-b-1"}


def test_links_within_the_site_stay_there() -> None:
    """A page of docs/ that links to a file outside of it, which the site does not have."""
    for page in PAGES:
        if page.startswith("docs/"):
            for link in LINK.findall(without_blocks(read(page))):
                if not re.match(r"[a-z]+:|#", link):
                    target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
                    assert target.is_relative_to(DOCS), f"{page}: {link}"


def test_every_page_is_in_the_list_of_the_site() -> None:
    """A page that nobody finds, as no list in docs/index.md names it; a name that is no page."""
    lists = re.findall(r"^```\{toctree\}\n(.*?)^```", read("docs/index.md"), re.M | re.S)
    lines = [line for text in lists for line in text.splitlines()]
    entries = [line for line in lines if line and not line.startswith(":") and "<" not in line]
    pages = [
        path.relative_to(DOCS).with_suffix("").as_posix()
        for path in (*DOCS.rglob("*.md"), *DOCS.rglob("*.rst"))
    ]
    assert sorted(entries) == sorted(set(pages) - {"index"})


def unknown_flags(verb: str, rest: str) -> list[str]:
    """Flags of a command line that the module of its verb does not know."""
    shared = ("dalle1.commands.command_line", "dalle1.commands.model_options")
    source = "".join(
        (ROOT / (module.replace(".", "/") + ".py")).read_text()
        for module in (cli.module_of(verb), *shared)
    )
    return [
        flag
        for flag in re.findall(r"--([a-z][\w-]*)", rest)
        if f'"--{flag}"' not in source
        and not re.search(rf"\b{flag.replace('-', '_')}\b", source)
        and flag != "help"
    ]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_exists(page: str) -> None:
    """Paths, commands and flags that are not there, in the text around the blocks too."""
    text = read(page)
    paths = re.findall(
        r"(?<![\w/.])(?:launch|configs|docs|dalle1|dvae|tests)/[\w./-]+\.(?:py|yaml|md|png|slurm)",
        text,
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for script, rest in SCRIPT.findall(text):
        verb = re.match(r'"""`dalle1 ([a-z ]+)`', (ROOT / script).read_text())
        assert verb is not None
        assert unknown_flags(verb.group(1), rest) == [], script
    for verb_name, rest in VERB.findall(text):
        assert verb_name in cli.VERBS
        assert unknown_flags(verb_name, rest) == [], verb_name


def test_pages_were_read() -> None:
    """A search that finds no page, path, script or verb, and so nothing wrong either."""
    text = "".join(read(page) for page in PAGES)
    assert {"README.md", "CONTRIBUTING.md", "docs/training.md", "docs/data.md"} <= set(PAGES)
    assert {script for script, _ in SCRIPT.findall(text)} >= {"launch/train.py", "launch/rank.py"}
    assert {verb for verb, _ in VERB.findall(text)} == set(cli.VERBS)
    assert unknown_flags("sample", " --candidates 8 --colour") == ["colour"]


def test_readme_lists_all_commands() -> None:
    """A verb or a script that the README's table forgets."""
    text = read("README.md")
    rows = dict(re.findall(r"^\| `dalle1 ([\w ]+)` \| (?:`(launch/\w+\.py)`)? *\|", text, re.M))
    assert rows.keys() == cli.VERBS.keys()
    scripts = {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.py")}
    assert {script for script in rows.values() if script} == scripts


def test_readme_tree_names_what_exists() -> None:
    """A line of the README's tree for a file that has moved, or a package that it forgets."""
    text = read("README.md")
    tree = text.split("## What is where\n\n```\n")[1].split("```")[0]
    named: set[Path] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        named.add(Path(*folders))
    assert [path for path in named if not (ROOT / path).exists()] == []
    for package in ("dalle1", "dvae"):
        own = {path.relative_to(ROOT) for path in (ROOT / package).glob("[!_]*")}
        assert {path for path in own if path.suffix in ("", ".py")} <= named


def test_readme_names_targets_that_exist() -> None:
    """`make` targets in the README that are not there."""
    text = read("README.md")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", text)) <= {*targets}


def test_paper_table_names_what_exists() -> None:
    """A row of docs/paper.md that points to code or a test which is not, or no longer, there."""
    text = read("docs/paper.md")
    references = re.findall(r"`([\w./-]+\.(?:py|yaml))(?:::(\w+))?`", text)
    assert len(references) > 60
    for path, name in references:
        source = (ROOT / path).read_text()  # a missing file is an error of its own
        defined = re.search(rf"^\s*(?:def|class) {name}\b", source, re.M) if name else True
        assert defined, f"{path} does not define {name}"
