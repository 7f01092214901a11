"""The codec whose codes are patches, and flat shapes as its token shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dalle1
from dalle1 import registry
from dalle1.data.shapes import make
from dalle1.data.shapes.checker import parse
from dalle1.findings.flat_shapes import (
    HELDOUT,
    TERSE,
    TEST,
    TRAINING,
    FlatSettings,
    flat_shapes,
    render_flat,
    terse,
)
from dalle1.findings.patches import PatchCodec, save_codec
from dalle1.findings.workspace import Workspace


def checkerboard(count: int = 6, side: int = 8) -> torch.Tensor:
    """Images of a few colors, [count, 3, side, side]."""
    colors = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    values = torch.randint(4, (count, side, side), generator=torch.Generator().manual_seed(1))
    return colors[values].movedim(-1, 1)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_training_images_are_copied_exactly(side: int) -> None:
    """Patches whose rows and columns are swapped, or put together in another order."""
    images = checkerboard()
    codec = PatchCodec.of_images(images, side)
    tokens = codec.encode(images)
    assert tokens.shape == (6, 8 // side, 8 // side) and tokens.dtype == torch.int64
    torch.testing.assert_close(codec.decode(tokens), images)
    corner = images[0, :, :side, -side:]  # the upper right one
    torch.testing.assert_close(codec.patches[tokens[0, 0, -1]], corner)
    assert codec.knows(images).all()


def test_each_patch_is_one_code() -> None:
    """Codes that stand for the same patch, of which a prior would have to draw either."""
    codec = PatchCodec.of_images(checkerboard(), 1)
    assert codec.vocab_size == 4
    assert len(codec.patches.flatten(1).unique(dim=0)) == 4


def test_an_unknown_patch_becomes_the_nearest() -> None:
    """An image that the codec cannot copy, and that counts as known."""
    images = checkerboard()
    codec = PatchCodec.of_images(images, 2)
    other = images.clone()
    other[0, :, :2, :2] = 0.9 * other[0, :, :2, :2]
    assert codec.knows(other).tolist() == [False] + [True] * 5
    assert torch.equal(codec.encode(other), codec.encode(images))


def test_bad_images_are_refused() -> None:
    """A patch that is cut off at the border; photographs, with as many codes as patches."""
    with pytest.raises(ValueError, match="multiples of 3"):
        PatchCodec.of_images(checkerboard(), 3)
    with pytest.raises(ValueError, match="2 to 65,536 distinct patches"):
        PatchCodec.of_images(torch.zeros(1, 3, 4, 4), 2)


def test_a_saved_codec_is_the_same(tmp_path: Path) -> None:
    """A stage that encodes with other patches."""
    codec = PatchCodec.of_images(checkerboard(), 2)
    save_codec(codec, tmp_path)
    torch.testing.assert_close(registry.load("codec", tmp_path).patches, codec.patches)


def test_flat_shapes_show_their_scenes(tmp_path: Path) -> None:
    """Scenes with soft edges, of thousands of patches; captions of one sample beside the image of
    another; sets that are not what their names say."""
    workspace = Workspace(tmp_path / "work", tmp_path, tmp_path / "pictures")
    data = flat_shapes(FlatSettings(training=600, unseen=24), workspace)
    assert 100 < data.codec.vocab_size < 700
    assert {name: len(pairs) for name, pairs in data.sets.items()} == {
        TRAINING: 600,
        TEST: 24,
        HELDOUT: 24,
        TERSE: 24,
    }
    for name, split in ((TRAINING, "train"), (HELDOUT, "heldout")):
        sample = make(0, 7, split, 16)
        text, image = data.sets[name].text[7], data.sets[name].image[7]
        said = data.tokenizer.decode(text[text < data.tokenizer.vocab_size]).strip()
        assert said == sample.caption.lower()
        true = render_flat([sample.scene])
        if name == TRAINING:
            torch.testing.assert_close(data.codec.decode(image.view(1, 8, 8)), true)
    assert torch.equal(data.sets[TERSE].image, data.sets[TEST].image)
    words = [(data.sets[name].text < data.tokenizer.vocab_size).sum() for name in (TERSE, TEST)]
    assert words[0] < 0.8 * words[1]


def test_flat_edges_follow_the_soft_ones() -> None:
    """Things that are shifted or of another color than those of the built-in images."""
    for i in range(20):
        sample = make(0, i, "train", 16)
        soft = torch.from_numpy(sample.image / np.float32(255)).movedim(-1, 0)
        gap = (render_flat([sample.scene])[0] - soft).abs().amax(dim=0)
        assert (gap < 0.01).float().mean() > 0.6 and float(gap.mean()) < 0.08


def test_terse_captions_claim_the_same() -> None:
    """A caption that lost a word that says something."""
    long = "there is a small red circle to the left of an orange cross on a grey background"
    assert terse(long) == "small red circle left of orange cross grey background"
    for i in range(50):
        caption = make(0, i, "test", 16).caption
        claims, words = parse(caption), terse(caption).split()
        said = [w for thing in claims.objects for w in (thing.color, thing.shape)]
        assert [w for w in words if w in said] == said


def test_a_run_of_the_stage_reads_the_shards(tmp_path: Path) -> None:
    """Shards or a codec that the trainer refuses, or a model that cannot be opened again."""
    from dalle1.findings.base import Options
    from dalle1.findings.results import runs_of
    from dalle1.findings.text_weight import FINDING

    options = Options(scale=0.004)
    run = runs_of(FINDING, [0], options, tmp_path)[0]
    found = FINDING.run(run.settings, run.workspace(1, options))
    assert found.values.keys() == {m.name for m in FINDING.measures}
    assert [step for step, _ in found.curves["training"]] == [1, 2, 3]
    model = dalle1.load(run.workspace(1, options).folder / "dalle" / "model")
    assert model.image_size == 16
