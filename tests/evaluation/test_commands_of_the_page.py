"""docs/evaluation.md: its commands for an imported model, on small files of published layouts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dalle1.commands import main as cli
from tests.evaluation.test_inception import Restated
from tests.evaluation.test_published_sets import coco_of
from tests.parity.published_clip import PublishedCLIP
from tests.parity.test_clip_published import COUNT, LENGTH, SIDE, vocabulary
from tests.published.every_family import write_mindalle

ROOT = Path(__file__).parents[2]
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
# What makes the commands fast; later settings take the place of earlier ones.
FEW = [
    "captions=2",
    "candidates=2",
    "blur=[0]",
    "image_size=24",
    "inception_splits=1",
    "bootstrap=5",
]


def commands(verbs: set[str]) -> list[list[str]]:
    """The arguments of the page's shell commands with these verbs, in order, of MS-COCO alone."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line]
    return [w[1:] for w in lines if w[0] == "dalle1" and w[1] in verbs and "--cub" not in w]


def write_downloads(folder: Path) -> None:
    """minDALL-E's archive, OpenAI's CLIP with its vocabulary, and FID's network; all random."""
    write_mindalle(folder)
    published = PublishedCLIP(SIDE, vocab=COUNT, length=LENGTH).eval()
    ids = F.pad(torch.tensor([[COUNT - 2, 3, COUNT - 1]]), (0, LENGTH - 3))
    with torch.no_grad():
        traced = torch.jit.trace(published, (torch.zeros(1, 3, SIDE, SIDE), ids))
    traced.save(folder / "ViT-B-32.pt")
    vocabulary(folder / "bpe_simple_vocab_16e6.txt.gz")
    network = Restated()
    network(torch.zeros(1, 3, 75, 75))
    torch.save(network.weights, folder / INCEPTION)


@pytest.mark.filterwarnings("ignore::dalle1.protocols.CaptionCut")
def test_an_imported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command of the page that does not fit the next one; a public model whose ranker is lost
    on the way, or whose FID is one of another network."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_downloads(tmp_path / "downloads")
    annotations = coco_of(tmp_path, count=3)
    (tmp_path / "annotations").mkdir()
    annotations.rename(tmp_path / "annotations" / annotations.name)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran = commands({"data", "import", "evaluate"})
    assert [verb for verb, *_ in ran] == ["data", "import", "evaluate"]
    for verb, *arguments in ran:
        assert cli.main([verb, *arguments, *FEW * (verb == "evaluate")]) == 0, (
            capsys.readouterr().err
        )
    results = json.loads((tmp_path / "runs" / "coco-mindalle" / "ranking.json").read_text())
    assert results["names"]["fid"] == "FID" and results["names"]["clip_score"] == "CLIP score"
    assert results["true_images"] == {"images": 3, "unreadable": 0}
    points = results["groups"]["captions"]["pictures"]["0"]
    assert points.keys() == {"1", "2"} and all(p["fid"] > 0 for p in points.values())
