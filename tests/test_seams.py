"""Parts that the library has never seen, through everything that is done with parts."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import dalle1
import dvae
from dalle1 import Model, Preview, Tokenizer, registry
from dalle1.commands import evaluate
from dalle1.commands import main as command
from dalle1.commands import tokenize as tokenize_command
from dalle1.common.images import to_tensor
from dalle1.data import shapes
from dalle1.data.shards.token_shard import TokenShard
from tests.fakes import (
    KINDS,
    PALETTE,
    BrightnessRanker,
    PaletteCodec,
    PaletteConfig,
    UnigramConfig,
    UnigramPrior,
)

ROOT = Path(__file__).parents[1]
CAPTION = "a red cat"


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fakes' kinds, for one test."""
    for role, kinds in registry.KINDS.items():
        monkeypatch.setitem(registry.KINDS, role, kinds)
    before = {role: dict(kinds) for role, kinds in registry.KINDS.items()}
    for kind in KINDS:
        registry.register(kind)
    yield
    for role, kinds in before.items():
        registry.KINDS[role].clear()
        registry.KINDS[role].update(kinds)


@pytest.fixture
def fake(tokenizer: Tokenizer) -> Model:
    torch.manual_seed(0)
    prior = UnigramPrior(UnigramConfig(text_vocab=tokenizer.vocab_size, text_length=10))
    return Model(tokenizer, prior, PaletteCodec(PaletteConfig()), BrightnessRanker())


def test_fakes_are_drawn_from(fake: Model) -> None:
    """Drawing or ranking that reaches for what only the paper's parts have."""
    previews: list[Preview] = []
    settings = {"candidates": 40, "keep": 5, "progress": False, "guidance": 1.5, "batch_size": 16}
    result = dalle1.sample(
        [CAPTION, "a bright mat"], fake, on_step=previews.append, preview_rows=2, **settings
    )
    assert result.tokens.shape == (2, 5, 4, 4) and result.images[0][0].size == (16, 16)
    assert fake.image_size == 16
    for tokens, images, scores in zip(result.tokens, result.images, result.scores, strict=True):
        expected = torch.tensor(PALETTE)[tokens].float().mean(dim=(1, 2, 3))
        factor = 1 if images is result.images[0] else 2
        torch.testing.assert_close(scores, factor * expected)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert {p.images.shape[2:] for p in previews} == {(8, 16), (16, 16)}
    full = dalle1.sample(CAPTION, fake, **{**settings, "keep": 40})
    assert full.scores[0, 0] == result.scores[0, 0]


def test_frequencies_of_the_fake(fake: Model) -> None:
    """Draws of another law than the prior's."""
    result = dalle1.sample(CAPTION, fake, candidates=500, keep=500, progress=False)
    counts = torch.bincount(result.tokens.flatten(), minlength=5) / result.tokens.numel()
    text = fake.tokenizer.encode(CAPTION)
    every = torch.arange(5)[:, None]
    expected = fake.prior.log_prob(text.expand(5, -1), every).exp().detach()
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.02)


def test_fakes_complete_an_image(fake: Model) -> None:
    """Given rows that are encoded at the size of the images that are written, not read."""
    image = Image.new("RGB", (8, 8), "blue")
    result = dalle1.sample(CAPTION, fake, candidates=3, keep=3, image=image, rows=2, progress=False)
    assert bool((result.tokens[:, :, :2] == 3).all())
    with pytest.raises(ValueError, match="expected 8x8 pixels, got 16x16"):
        dalle1.sample(CAPTION, fake, image=image.resize((16, 16)), rows=2)


def test_rank_of_captions_and_images(fake: Model) -> None:
    """A list of captions of which the first alone is scored."""
    images = [Image.new("RGB", (size, 8), c) for size, c in ((5, "black"), (9, "white"))]
    scores = dalle1.rank(["a cat", "a bright cat"], images, model=fake)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    assert dalle1.rank("a cat", images, model=fake).tolist() == [0, 1]


def test_what_the_fakes_cannot_do_is_said(fake: Model) -> None:
    """An AttributeError of a part's insides."""
    with pytest.raises(ValueError, match="UnigramPrior models images, not captions"):
        fake.complete_caption("a")
    with pytest.raises(ValueError, match=r"UnigramPrior is no registered kind.*register"):
        fake.save("nowhere")
    assert not Path("nowhere").exists()
    tokens = torch.zeros(2, 4, 4, dtype=torch.int64)
    assert fake.log_prob(CAPTION, tokens).shape == (2,)


@pytest.mark.usefixtures("_known")
def test_folder_of_fakes(fake: Model, tmp_path: Path) -> None:
    """A folder that names no kinds, or a kind that is read as the paper's part."""
    fake.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["codec"] == {"kind": "palette", "stride": 2}
    assert config["prior"]["kind"] == "unigram" and config["ranker"] == {"kind": "brightness"}
    again = dalle1.load(tmp_path)
    assert isinstance(again.prior, UnigramPrior) and isinstance(again.ranker, BrightnessRanker)
    settings = {"candidates": 6, "keep": 3, "progress": False}
    assert torch.equal(
        dalle1.sample(CAPTION, again, **settings).tokens,
        dalle1.sample(CAPTION, fake, **settings).tokens,
    )
    assert isinstance(dvae.load(tmp_path), PaletteCodec)
    out = ["--out", str(tmp_path / "out"), "--candidates", "4", "--keep", "1"]
    assert command.main(["sample", CAPTION, "--model", str(tmp_path), *out]) == 0


def test_kinds_that_are_not_known(fake: Model, tmp_path: Path) -> None:
    """A folder of a stranger's part that ends in a KeyError; two classes under one name."""
    config = {"format": 2, "codec": {"kind": "palette"}, "prior": {"kind": "unigram"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"prior\.kind: expected one of sparse_transformer"):
        dalle1.load(tmp_path)
    with pytest.raises(
        ValueError, match=r"codec\.kind: expected one of dvae, vqgan, got 'palette'"
    ):
        dvae.load(tmp_path)
    taken = dvae.storage.Kind("codec", "dvae", PaletteConfig, PaletteCodec, "x.safetensors")
    with pytest.raises(ValueError, match="'dvae' is DVAE already"):
        registry.register(taken)


@pytest.mark.usefixtures("_known")
def test_fakes_are_encoded_and_ranked(
    fake: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """launch/tokenize.py or launch/rank.py that works with a dVAE or a CLIP alone."""
    fake.save(tmp_path / "model")
    shapes.write_shards(tmp_path / "shards", "train", 12, side=16)
    settings = {
        "data": tmp_path / "shards",
        "out": tmp_path / "tokens",
        "codec": tmp_path / "model",
    }
    lines = [f"{key}: {value}" for key, value in settings.items()]
    (tmp_path / "tokens.yaml").write_text("\n".join([*lines, "grid: 8"]))
    assert tokenize_command.main([str(tmp_path / "tokens.yaml")]) == 0
    (path,) = (tmp_path / "tokens").glob("*.safetensors")
    shard = TokenShard(path)
    first = shapes.make(0, 0, "train", 16).image
    expected = fake.codec.encode(to_tensor(first)[None]).flatten().tolist()
    assert shard.count == 12 and shard.read(0, 1)[0].tokens[0].tolist() == expected
    captions = tmp_path / "captions.txt"
    captions.write_text("a red cat\na bright dog\nthe blue cat\n")
    rank = {"model": tmp_path / "model", "run": tmp_path / "run", "data": captions}
    lines = [f"{key}: {value}" for key, value in rank.items()]
    (tmp_path / "rank.yaml").write_text("\n".join([*lines, "candidates: 8", "bootstrap: 10"]))
    assert evaluate.main([str(tmp_path / "rank.yaml")]) == 0
    results = json.loads((tmp_path / "run" / "ranking.json").read_text())
    curve = results["groups"]["captions"]["curves"]["clip_score"]
    means = [curve[str(n)]["mean"] for n in (1, 2, 4, 8)]
    assert means == sorted(means)
    pictures = results["groups"]["captions"]["pictures"]["0"]["8"]
    assert pictures["fid"] is None and pictures["inception_score"] is None


PARTS = re.compile(r"\b(DVAE|Transformer|CLIP|DVAEConfig|CLIPConfig|TransformerConfig)\b")
# Rooms of the parts themselves, of what trains and measures these very parts, and tables of kinds.
OWN = (
    *("clip", "transformer", "published", "training", "benchmarks", "findings"),
    *("registry.py", "__init__.py"),
)


def test_nobody_else_knows_a_part_by_name() -> None:
    """A line that would have to be changed for a second codec, prior or ranker."""
    found = []
    for path in sorted((ROOT / "dalle1").rglob("*.py")):
        name = path.relative_to(ROOT / "dalle1")
        if name.parts[0] in OWN or str(name) == "commands/benchmark.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.id] if isinstance(node, ast.Name) else []
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            found += [f"{path}: {name}" for name in names if PARTS.fullmatch(name)]
    assert found == []
