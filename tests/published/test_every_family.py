"""Every family, from its files as they are published to a fine-tuned model, by the verbs.

A line of `CASES` is a family (tests.published.every_family). What is tested here is that all verbs
take all kinds; that the numbers are right is tested beside each model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dalle1
import dvae
from dalle1 import Preview
from dalle1.commands import evaluate, import_model
from dalle1.commands import tokenize as tokenize_command
from dalle1.common.images import to_pil, to_tensor
from dalle1.data import shapes
from dalle1.data.shards.token_shard import TokenShard
from dalle1.published import families, find_family, load, sources
from dalle1.training.config import RunConfig
from dalle1.training.trainer import Trainer
from tests.conftest import ModelMaker
from tests.parity.published_clip import PublishedCLIP
from tests.parity.test_clip_published import COUNT, LENGTH
from tests.parity.test_clip_published import SIDE as SIDE_OF_CLIP
from tests.published.every_family import CASES, Case
from tests.published.test_clip import write_open_clip, write_ruclip
from tests.training.conftest import run_until
from tests.training.test_trainer import losses, tensors

CAPTION = "a red circle above a blue square"
SIDE = 16  # of the built-in images, in pixels


PRIORS = [case for case in CASES if case.has_prior]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str], Path]]:
    """Of each family that was asked for: its source, the verb's options, the imported folder."""
    return {}


@pytest.fixture
def imported(
    request: pytest.FixtureRequest,
    folders: dict[str, tuple[Path, list[str], Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Case, Path, list[str], Path]]:
    """A case, its source, the verb's options, and the folder that the verb has written."""
    case: Case = request.param
    if case.name not in folders:
        folder = tmp_path_factory.mktemp(case.name)
        torch.manual_seed(0)
        source, options = case.write(folder / "source")
        out = folder / "model"
        assert import_model.main([str(source), str(out), *options]) == 0
        folders[case.name] = source, options, out
    yield case, *folders[case.name]


Imported = tuple[Case, Path, list[str], Path]
every = pytest.mark.parametrize("imported", CASES, indirect=True, ids=lambda case: case.name)
priors = pytest.mark.parametrize("imported", PRIORS, indirect=True, ids=lambda case: case.name)


def opened(imported: Imported) -> Any:
    """The source opened without a folder between."""
    _, source, options, _ = imported
    names = {options[i].removeprefix("--"): options[i + 1] for i in range(0, len(options), 2)}
    return load(source, **names)


@every
def test_the_folder_says_whose_it_is(imported: Imported) -> None:
    """A family that another one recognizes as its own, or whose license is lost."""
    case, source, _, out = imported
    config = json.loads((out / "config.json").read_text())
    role = "prior" if case.has_prior else "codec"
    family = families()[case.family]
    assert config["origins"][role]["title"] == family.title
    assert family.license in (out / "README.md").read_text()
    with sources.opened(source) as path:
        assert find_family(path) == family


@every
def test_codec_of_the_folder(imported: Imported, tmp_path: Path) -> None:
    """A codec that launch/tokenize.py cannot use, or whose tokens change on the way."""
    case, _, _, out = imported
    codec = dvae.load(out)
    theirs = opened(imported)
    theirs = theirs.codec if case.has_prior else theirs
    shapes.write_shards(tmp_path / "shards", "train", 4, side=SIDE)
    grid = SIDE // codec.stride
    settings = {"data": tmp_path / "shards", "out": tmp_path / "tokens", "codec": out, "grid": grid}
    (tmp_path / "x.yaml").write_text("\n".join(f"{k}: {v}" for k, v in settings.items()))
    assert tokenize_command.main([str(tmp_path / "x.yaml")]) == 0
    (shard,) = (tmp_path / "tokens").glob("*.safetensors")
    images = torch.stack([to_tensor(image) for image in four_images()])
    with torch.no_grad():
        tokens = theirs.encode(images)
        assert torch.equal(codec.encode(images), tokens)
        decoded, direct = codec.decode(tokens), theirs.decode(tokens)
    assert torch.equal(decoded, direct) and decoded.shape[-1] == grid * codec.out_stride
    held = [TokenShard(shard).read(i, i + 1)[0].tokens[0] for i in range(4)]
    assert [t.tolist() for t in held] == tokens.flatten(1).tolist()


def four_images() -> list[np.ndarray]:
    """uint8 [H, W, 3], the first of the shards that `shapes.write_shards` writes."""
    return [shapes.make(0, i, "train", SIDE).image for i in range(4)]


@priors
def test_drawing(imported: Imported) -> None:
    """Tokens that change by the way through a folder, a batch of another size, previews that a
    codec which cannot decode rows alone breaks."""
    *_, out = imported
    # In 32 bits: in 16, rounding depends on the size of a batch.
    model, direct = (m.to("cpu", torch.float32) for m in (dalle1.load(out), opened(imported)))
    settings: dict[str, Any] = {"candidates": 4, "keep": 4, "progress": False, "seed": 3}
    previews: list[Preview] = []
    result = dalle1.sample(CAPTION, model, **settings, on_step=previews.append, preview_rows=1)
    assert torch.equal(result.tokens, dalle1.sample(CAPTION, direct, **settings).tokens)
    alone = dalle1.sample(CAPTION, model, **settings, batch_size=1)
    assert torch.equal(alone.tokens, result.tokens)
    rows, columns = model.prior.grid
    stride = model.codec.out_stride
    assert [p.rows for p in previews] == list(range(1, rows + 1))
    assert [tuple(p.images.shape[2:]) for p in previews] == [
        (n * stride, columns * stride) for n in range(1, rows + 1)
    ]
    assert result.images[0][0].size == (columns * stride, rows * stride)
    guided = dalle1.sample(CAPTION, model, **settings, guidance=2.0)
    assert guided.tokens.shape == result.tokens.shape
    assert not torch.equal(guided.tokens, result.tokens)


@priors
def test_completing(imported: Imported) -> None:
    """Given rows that are drawn anew, or an image of another size than the codec reads."""
    *_, out = imported
    model = dalle1.load(out)
    rows, columns = model.prior.grid
    size = (columns * model.codec.stride, rows * model.codec.stride)
    image = Image.fromarray(four_images()[1]).resize(size)
    result = dalle1.sample(
        CAPTION, model, candidates=3, keep=3, image=image, rows=1, progress=False
    )
    pixels = to_tensor(image)[None]
    with torch.no_grad():
        expected = model.codec.encode(pixels)[0, :1]
    assert all(torch.equal(tokens[:1], expected) for tokens in result.tokens[0])


@priors
def test_log_prob(imported: Imported) -> None:
    """A likelihood of another model than the one that draws: by draws, and by the greedy image,
    than which no neighbor that differs in the last token is likelier."""
    *_, out = imported
    model = dalle1.load(out)
    greedy = dalle1.sample(
        CAPTION, model, candidates=1, keep=1, temperature=0.0, progress=False
    ).tokens[0]
    near = greedy.repeat(model.prior.image_vocab, 1, 1)
    near[:, -1, -1] = torch.arange(model.prior.image_vocab)
    found = model.log_prob(CAPTION, near)
    assert found.argmax() == greedy[0, -1, -1]
    # All that can stand in the last place, given the rest: probabilities of one in all.
    assert torch.allclose(model.log_prob(CAPTION, greedy), found.max()[None], atol=1e-3)


@priors
def test_what_a_prior_lacks_is_said(imported: Imported) -> None:
    """An AttributeError of a prior that models no captions."""
    case, *_, out = imported
    model = dalle1.load(out)
    if case.says_captions:
        assert isinstance(model.complete_caption("a red"), str)
    else:
        with pytest.raises(ValueError, match="models images, not captions"):
            model.complete_caption("a red")
    with pytest.raises(ValueError, match="no ranker"):
        dalle1.rank(CAPTION, [Image.new("RGB", (8, 8))], model)


@priors
def test_ranking(imported: Imported, make_model: ModelMaker, tmp_path: Path) -> None:
    """launch/rank.py and `rank` that know the paper's parts alone."""
    *_, out = imported
    model = dalle1.load(out)
    model.ranker = make_model().ranker
    model.save(tmp_path / "model")
    result = dalle1.sample(CAPTION, tmp_path / "model", candidates=4, keep=2, progress=False)
    scores = dalle1.rank(CAPTION, result.images[0], tmp_path / "model")
    # Images are rounded to bytes; what is drawn is not.
    torch.testing.assert_close(result.scores[0], scores, rtol=0, atol=1e-3)
    assert result.scores[0].tolist() == sorted(result.scores[0].tolist(), reverse=True)
    (tmp_path / "captions.txt").write_text(f"{CAPTION}\na green cross\n")
    settings = {
        "model": tmp_path / "model",
        "run": tmp_path / "run",
        "data": tmp_path / "captions.txt",
        "candidates": 4,
        "bootstrap": 5,
    }
    (tmp_path / "rank.yaml").write_text("\n".join(f"{k}: {v}" for k, v in settings.items()))
    assert evaluate.main([str(tmp_path / "rank.yaml")]) == 0
    results = json.loads((tmp_path / "run" / "ranking.json").read_text())
    assert "clip_score" in results["groups"]["captions"]["curves"]


@pytest.mark.filterwarnings("ignore::dalle1.protocols.CaptionCut")
@pytest.mark.parametrize("family", ["clip", "ruclip"])
def test_rankers(family: str, make_model: ModelMaker, tmp_path: Path) -> None:
    """A published ranker that cannot be imported, ranks otherwise than its files, or loses the
    tokenizer that it reads captions by."""
    source = tmp_path / "source"
    source.mkdir()
    torch.manual_seed(0)
    published = PublishedCLIP(SIDE_OF_CLIP, vocab=COUNT, length=LENGTH).eval()
    if family == "clip":
        write_open_clip(source, dict(published.state_dict()))
    else:
        write_ruclip(source, published)
    assert import_model.main([str(source), str(tmp_path / "ranker")]) == 0
    make_model().save(tmp_path / "model")
    model = dalle1.load(tmp_path / "model", ranker=tmp_path / "ranker")
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    scores = dalle1.rank(["a cat", "a dog"], images, model)
    direct = load(source).score(["a cat", "a dog"], images)
    assert torch.equal(scores, direct) and scores.std() > 0
    result = dalle1.sample("a red cat", model, candidates=4, keep=2, progress=False)
    assert bool(result.scores.isfinite().all())
    license_ = families()[family].license
    assert license_ in (tmp_path / "ranker" / "README.md").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_shards(folder, "train", 96, side=SIDE, samples_per_shard=48)
    return str(folder)


def further(imported: Imported, data: str, run: Path, **settings: Any) -> RunConfig:
    """A run that begins with the imported weights."""
    case, *_, out = imported
    content = {
        "stage": case.stage,
        "init": str(out),
        "run": str(run),
        "data": data,
        "steps": 16,
        "batch_size": 8,
        "log_every": 1,
        "contact_sheet_every": 16,
        "reader": {"image_size": SIDE, "shuffle_buffer": 20},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "schedule": "constant"},
        "ema": {"decay": 0.5, "every": 1},
    }
    return RunConfig(**{**content, **case.settings, **settings})


@every
def test_training_further(imported: Imported, data: str, tmp_path: Path) -> None:
    """A run from an imported model that begins anew, learns nothing, does not resume to the bit, or
    ends in a folder that does not open or has lost its license."""
    case = imported[0]
    Trainer(further(imported, data, tmp_path / "full")).run()
    found = losses(tmp_path / "full")
    assert sum(found[-4:]) < sum(found[:4])
    config = further(imported, data, tmp_path / "parts")
    run_until(config, 5)
    Trainer(config, resume=True).run()
    assert losses(tmp_path / "full") == losses(tmp_path / "parts")
    full, resumed = (tensors(tmp_path / run, 16) for run in ("full", "parts"))
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    model = tmp_path / "parts" / "model"
    family = families()[case.family]
    card = (model / "README.md").read_text()
    assert family.license in card and "trained further" in card
    if case.has_prior:
        result = dalle1.sample(CAPTION, model, candidates=2, keep=2, progress=False)
        assert len(result.images[0]) == 2
    else:
        codec = dvae.load(model)
        image = to_pil(codec.decode(codec.encode(torch.rand(1, 3, SIDE, SIDE)))[0])
        assert image.size[0] == SIDE * codec.out_stride // codec.stride
