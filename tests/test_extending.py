"""docs/extending.md: the parts that the page builds, its commands, and the numbers it claims."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dalle1
from dalle1 import registry
from dalle1.commands import main as command
from dalle1.data.shapes.checker import check
from dalle1.data.shards.token_shard import TokenShard

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
MODULE = "# color_parts.py\n"
# Runs `dalle1 VERB ...` for each line of its input.
COMMANDS = """
import shlex, sys
from dalle1.commands.main import main
for line in sys.stdin.read().splitlines():
    program, *arguments = shlex.split(line)
    assert program == "dalle1" and main(arguments) == 0, line
assert "color_parts" in sys.modules
"""


def blocks(language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The lines of the page's shell blocks."""
    return "".join(blocks("sh")).splitlines()


@dataclass
class Run:
    """What the page leaves: its folder and the names that its blocks define."""

    folder: Path
    names: dict[str, Any]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The page's Python, block after block in a folder of its own; the kinds go away again."""
    before = {role: dict(kinds) for role, kinds in registry.KINDS.items()}
    folder = tmp_path_factory.mktemp("extending")
    module, script = [], []
    for block in blocks("python"):
        (module if block.startswith(MODULE) else script).append(block.removeprefix(MODULE))
    (folder / "color_parts.py").write_text("\n\n".join(module))
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for i, block in enumerate(script):
            exec(compile(block, f"docs/extending.md, block {i}", "exec"), names)
        yield Run(folder, names)
    sys.modules.pop("color_parts", None)
    for role, kinds in before.items():
        registry.KINDS[role].clear()
        registry.KINDS[role].update(kinds)


def test_parts_of_the_page_draw_and_rank(page: Run) -> None:
    """An example that no longer runs, or whose candidates are not ranked."""
    result = page.names["result"]
    assert result.tokens.shape == (5, 8, 8, 8) and result.images[0][0].size == (32, 32)
    assert (result.scores.diff(dim=1) <= 0).all() and (result.scores[:, 0] > 0).all()
    assert torch.equal(page.names["every"].tokens[:, :8], result.tokens)
    assert (page.folder / "out" / "sheet.png").is_file()


def test_the_page_is_better_than_noise(page: Run) -> None:
    """A prior that has learned nothing, or does not read its caption; numbers that are not so."""
    names = page.names
    noise, candidates = names["score_of_noise"], names["score_of_candidates"]
    scores, nats = ([float(x) for x in line.split()] for line in re.findall(r"prints `(.*)`", PAGE))
    assert [noise, candidates, names["score_of_best"]] == pytest.approx(scores, abs=0.02)
    measured = [names["nats"], names["nats_without"], names["nats_of_others"]]
    assert measured == pytest.approx(nats, abs=0.01)
    assert noise < -0.25 and candidates > 0 and names["score_of_best"] > 0.07
    unseen = names["unseen"][:64]
    images = torch.stack([names["to_tensor"](sample.image) for sample in unseen])
    true = dalle1.rank([sample.caption for sample in unseen], images, names["model"]).diag()
    assert true.mean().item() == pytest.approx(0.09, abs=0.01)
    # By another measure than the ranker's: the mean color of all candidates of "a red circle".
    red, green, blue = page.names["model"].codec.decode(names["every"].tokens[0]).mean((0, 2, 3))
    assert red > green + 0.05 and red > blue + 0.05
    assert names["nats"] < names["nats_without"] < names["nats_of_others"] < 0.25 * math.log(24)


def test_the_page_shows_no_shapes(page: Run) -> None:
    """A page that says less of its own example than is so."""
    pairs = zip(page.names["wanted"], page.names["result"].images, strict=True)
    assert not any(check(image, caption).ok for caption, images in pairs for image in images)


def test_reconstructions_of_the_page(page: Run) -> None:
    """A palette that lacks colors of the data."""
    codec, images = page.names["codec"], page.names["images"][:100]
    error = (codec.decode(codec.encode(images)) - images).abs().mean()
    assert error < 0.03
    with pytest.raises(ValueError, match="expected sides of 4n"):
        codec.encode(images[:, :, 1:])


def test_folder_of_the_page(page: Run) -> None:
    """A folder without the kinds; a page that shows another config.json than is written."""
    config = json.loads((page.folder / "model" / "config.json").read_text())
    assert config == json.loads(blocks("json")[0])
    again = dalle1.load(page.folder / "model")
    assert type(again.prior) is page.names["NeighborPrior"]


def test_commands_of_the_page(page: Run) -> None:
    """Kinds that only a process which has imported them knows; a codec that only `sample` uses."""
    (toml,) = blocks("toml")
    pattern = r'^\[project\.entry-points\."(.*)"\]\n(\w+) = "(\w+)"'
    ((group, name, module),) = re.findall(pattern, toml, flags=re.MULTILINE)
    metadata = page.folder / "color_parts-0.1.dist-info"  # what pip writes of the toml
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: color-parts\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
    lines = [line for line in commands() if not line.startswith("dalle1 evaluate")]
    assert [line.split()[1] for line in lines] == ["sample", "tokenize"]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(lines),
        cwd=page.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(page.folder)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (page.folder / "out" / "red" / "sheet.png").is_file()
    (path,) = (page.folder / "tokens").glob("*.safetensors")
    expected = page.names["codec"].encode(page.names["images"][:32]).flatten(1)
    stored = [sample.tokens[0].tolist() for sample in TokenShard(path).read(0, 32)]
    assert stored == expected.tolist()


def test_evaluation_of_the_page(page: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ranking benchmark that needs CLIP, or that does not rank by the model's own ranker."""
    (line,) = [line for line in commands() if line.startswith("dalle1 evaluate")]
    monkeypatch.chdir(page.folder)
    # In this process, because its imports (DeepSpeed, torchmetrics) take long.
    assert command.main(shlex.split(line)[1:]) == 0
    results = json.loads((page.folder / "ranking" / "ranking.json").read_text())
    curve = results["groups"]["captions"]["curves"]["clip_score"]
    means = [curve[str(n)]["mean"] for n in (1, 4, 16)]
    assert means == sorted(means) and means[0] + 0.01 < means[-1]
