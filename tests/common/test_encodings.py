"""Text is UTF-8 whatever the locale: no source of ours leaves the encoding to the machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dalle1.common.files import read_text, write_text

ROOT = Path(__file__).parents[2]
# What has an `open` that gives no text.
BINARY = {"tarfile", "zipfile", "Image", "archive", "os", "webdataset"}
TEXT = {"open", "read_text", "write_text", "fdopen", "TextIOWrapper", "NamedTemporaryFile"}
STARTS = {"run", "Popen", "check_output", "check_call", "call", "getoutput"}


def sources() -> Iterator[Path]:
    """The library, its scripts, and what tests share."""
    for folder in ("dalle1", "dvae", "launch"):
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield from (p for p in sorted((ROOT / "tests").rglob("*.py")) if p.name[:5] != "test_")


def opened_by_locale(source: str) -> list[int]:
    """Lines that open, read or write text, or a command's output, without naming its encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id in BINARY and name != "fdopen":
            continue
        if not method and name in ("read_text", "write_text"):  # ours, of dalle1.common.files
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        values = [*node.args, named.get("mode")]
        modes = [v.value for v in values if isinstance(v, ast.Constant) and type(v.value) is str]
        binary = name not in ("read_text", "write_text") and any("b" in mode for mode in modes)
        binary |= name == "NamedTemporaryFile" and "mode" not in named
        if name in TEXT and not binary and "encoding" not in named:
            lines.append(node.lineno)
        if name in STARTS and {"text", "universal_newlines"} & {*named} and "encoding" not in named:
            lines.append(node.lineno)
    return lines


def test_every_text_names_its_encoding() -> None:
    """A caption, a config or a vocabulary in UTF-8 that cannot be read under LC_ALL=C."""
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for line in opened_by_locale(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open('a')", True),
        ("open('a', 'w')", True),
        ("open('a', mode='a')", True),
        ("path.open()", True),
        ("(folder / x).open('a')", True),
        ("path.read_text()", True),
        ("path.write_text('b')", True),
        ("Path(x).read_text().splitlines()", True),
        ("os.fdopen(3, 'w')", True),
        ("io.TextIOWrapper(file)", True),
        ("tempfile.NamedTemporaryFile(mode='w')", True),
        ("subprocess.run(c, text=True)", True),
        ("open('a', 'rb')", False),
        ("path.open('rb+')", False),
        ("open('a', encoding='utf-8')", False),
        ("path.write_text('b', encoding='utf-8')", False),
        ("write_text(path, 'b')", False),
        ("tarfile.open(path, 'w')", False),
        ("Image.open(path)", False),
        ("tempfile.NamedTemporaryFile()", False),
        ("subprocess.run(c)", False),
        ("subprocess.run(c, text=True, encoding='utf-8')", False),
    ],
)
def test_the_search_finds_what_it_should(source: str, found: bool) -> None:
    """A walk that passes whatever the sources say."""
    assert bool(opened_by_locale(source)) is found


def test_odd_names_are_written(tmp_path: Path) -> None:
    """A report lost at its end since it names a file whose name is no UTF-8."""
    write_text(tmp_path / "a.txt", "ü \udcfc")
    assert read_text(tmp_path / "a.txt") == "ü \\udcfc"
