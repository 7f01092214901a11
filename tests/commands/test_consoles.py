"""Commands on consoles and in locales that know ASCII alone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dalle1 import Model
from dalle1.commands import main as cli
from dalle1.data import shapes
from tests.data.images import encoded

ROOT = Path(__file__).parents[2]
Console = Callable[..., tuple[int, str]]


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """Runs a command on a console that fails at what its encoding lacks."""

    def run(*arguments: str, encoding: str = "ascii") -> tuple[int, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            try:
                status = cli.main(arguments)
            except SystemExit as ended:
                status = int(str(ended.code))
        for stream in streams:
            stream.flush()
        return status, "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_printing_never_fails(
    encoding: str, console: Console, model: Model, tmp_path: Path
) -> None:
    """`dalle1 sample "…ü…"` that draws for hours and then fails at its last line."""
    model.save(tmp_path / "model")
    few = [f"--model={tmp_path}/model", "--candidates=2", "--keep=1"]
    out = str(tmp_path / "bîlder 漢 \udcff")
    status, said = console("sample", "漢 ü", *few, f"--out={out}", encoding=encoding)
    assert status == 0 and "\\u6f22" in said and "\\udcff" in said
    assert ("\\xfc" in said) is (encoding == "ascii")
    sheet = f"{out}/sheet.png"
    status, said = console("rank", "漢", sheet, f"--model={tmp_path}/model", encoding=encoding)
    assert status == 0 and "\\u6f22 \\udcff/sheet.png" in said
    pairs = tmp_path / "päare 漢"
    pairs.mkdir()
    (pairs / "漢.png").write_bytes(encoded(1))
    (pairs / "漢.txt").write_text("a 漢", encoding="utf-8")
    (pairs / "é.png").write_bytes(b"")
    (pairs / "é.txt").write_text("é", encoding="utf-8")
    status, _ = console("data", "inspect", str(pairs), f"--sheet={pairs}.png", encoding=encoding)
    assert status == 0
    status, said = console("data", "shard", str(pairs), f"{pairs} packed", encoding=encoding)
    assert status == 0 and "\\u6f22 packed" in said
    status, said = console("settings", encoding=encoding)
    assert status == 0 and "\\u2265" in said  # ≥


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["sämple 漢"], 2),
        (["sample", "a", "--mödel=漢"], 2),
        (["sample", "a", "--candidates=漢"], 2),
        (["rank", "漢", "漢.png", "--model=漢"], 2),
        (["plan", "漢.yaml"], 2),
        (["train", "configs/shapes/dvae.yaml", "漢=1"], 2),
        (["data", "inspect", "漢"], 2),
        (["data", "shard", "漢", "x"], 2),
        (["sample", "--help"], 0),
        (["plan", "--help"], 0),
    ],
    ids=str,
)
def test_mistakes_are_printed_too(
    arguments: list[str], status: int, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A UnicodeEncodeError in place of the line that names the mistake."""
    monkeypatch.chdir(ROOT)
    found, said = console(*arguments)
    assert found == status and ("\\u6f22" in said or status == 0)


@pytest.mark.slow
def test_files_are_utf8_in_a_locale_that_is_not(model: Model, tmp_path: Path) -> None:
    """Configs, tokenizers and captions that only a UTF-8 locale can read; a caption typed as UTF-8
    that is drawn as other letters; names of files that the locale cannot spell."""
    model.save(tmp_path / "mödel")
    shapes.write_shards(tmp_path / "shärds", "train", 2, side=16)
    (tmp_path / "pärent.yaml").write_text(
        "\ufeff# größe\ngrid: 4\ncodec: mödel\ndata: shärds\nout: x", encoding="utf-8"
    )
    (tmp_path / "töken.yaml").write_text("extends: pärent.yaml\nout: töken", encoding="utf-8")
    program = """
import sys
from dalle1.commands.main import main
few = ["--model=mödel", "--candidates=2", "--keep=1"]
for command in (
    ["sample", sys.argv[1], *few, "--out=öut"],
    ["rank", "ü", sys.argv[2], "--model=mödel"],
    ["tokenize", sys.argv[3], sys.argv[4]],
    ["tokenize", "töken.yaml"],
    ["data", "inspect", "shärds"],
):
    assert main(command) == 0, command
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py", "ü 漢", "öut/sheet.png", "töken.yaml", "out=ägain"],
        cwd=tmp_path,
        env=os.environ
        | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\xfc \\u6f22: best score" in done.stdout
    made = {os.fsencode(path.name).decode() for path in tmp_path.iterdir()}
    assert {"öut", "töken", "ägain"} <= made
    content = (tmp_path / "öut" / "result.json").read_text(encoding="utf-8")
    assert '"caption": "\\u00fc \\u6f22"' in content


@pytest.mark.slow
def test_sources_of_shards_are_the_same_in_every_locale(tmp_path: Path) -> None:
    """Rows of a table whose paths the locale cannot spell lost as "file cannot be read"; names of
    files that stand in the shards as half characters."""
    (tmp_path / "bïlder").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "bïlder" / "漢.png")
    (tmp_path / "bïlder" / "漢.txt").write_text("ü", encoding="utf-8")
    (tmp_path / "täble.csv").write_text("path,caption\nbïlder/漢.png,ü\n", encoding="utf-8")
    ascii_alone = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for out, locale in (("a", ascii_alone), ("b", {"PYTHONUTF8": "1"})):
        program = "import sys; from dalle1.commands.main import main; sys.exit(main(sys.argv[1:]))"
        for source in ("bïlder", "täble.csv"):
            done = subprocess.run(
                [sys.executable, "-c", program, "data", "shard", source, f"{out}-{source}"],
                cwd=tmp_path,
                env=os.environ | locale | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                capture_output=True,
            )
            assert done.returncode == 0, done.stderr.decode()
    for source, path in (("bïlder", "漢.png"), ("täble.csv", "bïlder/漢.png")):
        tars = [(tmp_path / f"{out}-{source}" / "000000.tar").read_bytes() for out in "ab"]
        assert tars[0] == tars[1] and json.dumps(path).encode() in tars[0]
