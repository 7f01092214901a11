"""minDALL-E's folder against a re-statement of the model: logits, losses, drawn tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dalle1
from dalle1 import Model, Transformer
from dalle1.generation.generator import Generator
from dalle1.generation.options import SamplingOptions
from dalle1.published.mindalle import (
    FAMILY,
    HPARAMS,
    published_config,
    read,
    read_prior,
    recognizes,
)
from dalle1.published.parts import PublishedPart
from dvae.loading import fill
from tests.parity import published_vqgan
from tests.parity.mindalle import Shape, Weights, draw, logits, make_weights

SHAPE = Shape()
PADDING = 1
CONFIG = """
dataset: {{context_length: {text_length}}}
stage1: {{n_embed: {image_classes}}}
stage2:
  type: transformer1d
  vocab_size_txt: {text_classes}
  vocab_size_img: {image_classes}
  hparams: {{embed_dim: {width}, n_layers: {layers}, n_dense_layers: {layers}, n_heads: {heads},
    ctx_len_img: {cells}, ctx_len_txt: {text_length}, embd_pdrop: 0.0}}
"""


def made(folder: Path, weights: Weights | None = None, s: Shape = SHAPE) -> Path:
    """A folder in the published layout, its first stage a small VQGAN of stride 2."""
    root = folder / "1.3B"
    (root / "tokenizer").mkdir(parents=True, exist_ok=True)
    settings = CONFIG.format(**vars(s), cells=s.side**2)
    (root / "config.yaml").write_text(settings, encoding="utf-8")
    tokens = ("[UNK]", "[PAD]", "a", "b", "a</w>", "b</w>", "ab</w>")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = "#version: 0.2\na b</w>\n"
    (root / "tokenizer" / "bpe-16k-vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (root / "tokenizer" / "bpe-16k-merges.txt").write_text(merges, encoding="utf-8")
    codec = published_vqgan.shapes(32, (1, 2), (1,), 12, 12, s.image_classes)
    save({"state_dict": published_vqgan.random_weights(codec)}, root / "stage1_last.ckpt")
    save({"state_dict": weights or make_weights(s)}, root / "stage2_last.ckpt")
    return root


def save(content: object, path: Path) -> None:
    torch.save(content, path)


def built(part: PublishedPart) -> Any:
    weights = {name: read() for name, read in part.weights.items()}
    return fill(lambda: part.kind.module(part.config), weights, part.path, "a part").eval()


def opened(folder: Path, weights: Weights) -> Transformer:
    transformer = built(read_prior(made(folder, weights))[1])
    assert isinstance(transformer, Transformer)
    return transformer


def captions(count: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(2)
    text = torch.randint(2, SHAPE.text_classes, (count, SHAPE.text_length), generator=g)
    for i, row in enumerate(text):
        row[2 * i + 1 :] = PADDING
    return text


def images(count: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randint(SHAPE.image_classes, (count, SHAPE.side**2), generator=g)


def test_logits_and_losses(tmp_path: Path) -> None:
    """Query, key and value exchanged, a position or a head one off, padding that is masked."""
    weights = make_weights(SHAPE)
    transformer = opened(tmp_path, weights)
    text, image = captions(), images()
    of_text, of_image = logits(weights, SHAPE, text, image)
    with torch.no_grad():
        found = transformer(text, image)
        losses = transformer.loss(text, image)
    torch.testing.assert_close(found[0], of_text, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], of_image[:, :-1], rtol=0, atol=1e-5)
    cost = F.cross_entropy(of_text.flatten(0, 1), text[:, 1:].flatten())
    assert losses.text.item() == pytest.approx(cost.item(), abs=1e-5)
    cost = F.cross_entropy(of_image[:, :-1].flatten(0, 1), image.flatten())
    assert losses.image.item() == pytest.approx(cost.item(), abs=1e-5)


def test_drawn_tokens(tmp_path: Path) -> None:
    """Caches or windows that draw other tokens than the whole stream run anew for each."""
    weights = make_weights(SHAPE, seed=1)
    transformer = opened(tmp_path, weights)
    text = captions()
    expected = draw(weights, SHAPE, text)
    for window, static in ((1, False), (1, True), (5, False), (16, False)):
        options = SamplingOptions(temperature=0, window=window)
        drawn = Generator(transformer, 3, 2, options, static).draw(text, torch.zeros(3, 2, 16))
        assert torch.equal(drawn[:, 0], expected) and torch.equal(drawn[:, 1], expected)


def test_what_the_config_leaves_out(tmp_path: Path) -> None:
    """Sizes that are needed in a file whose authors lay it over defaults."""
    root = made(tmp_path)
    (root / "config.yaml").write_text("stage2: {hparams: {n_layers: 3}}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'tok_emb_txt.weight' has shape \[20, 16\], expected "):
        read_prior(root)
    assert HPARAMS["embed_dim"] == 1536


def test_published_size() -> None:
    """A weight too many or too few at the published size (section 3.1)."""
    c = published_config(PADDING)
    with torch.device("meta"):
        transformer = Transformer(c)
    assert sum(p.numel() for p in transformer.parameters()) == 1_291_081_728
    assert (c.layers, c.heads, c.head_size) == (42, 24, 64)
    assert set(c.patterns) == {"full"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_heads: 2", "n_heads: 3", "heads that divide the width"),
        ("n_heads: 2", "n_heads: many", "n_heads: expected a positive number, got 'many'"),
        ("ctx_len_img: 16", "ctx_len_img: 17", "a square image"),
        ("embd_pdrop: 0.0", "gelu_use_approx: true", "gelu_use_approx: expected False"),
        ("n_layers: 3, ", "n_layers: 4, ", "has no weight 'blocks.3.attn.key.bias' of minDALL-E"),
        ("n_layers: 3, ", "n_layers: 1000000000, ", "weights of 1,000,000,000 layers of minDALL-E"),
        ("ctx_len_img: 16", "ctx_len_img: 1" + "0" * 400, "of no minDALL-E that could be built"),
        ("stage2:", "stage2: [", "config.yaml: truncated or no YAML"),
        ("stage2:\n  type: transformer1d", "stage2:\n  type: [", "config.yaml"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, old: str, new: str, message: str) -> None:
    """A config of another model, or no config, that fails deep in torch."""
    root = made(tmp_path)
    text = (root / "config.yaml").read_text(encoding="utf-8")
    assert old in text
    (root / "config.yaml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prior(root)


def test_a_model_of_all_parts(tmp_path: Path) -> None:
    """A tokenizer, a prior and a codec that do not fit each other, or that pad differently."""
    found = read(made(tmp_path))
    assert found.prior is not None and found.codec is not None
    model = Model(found.tokenizer, built(found.prior), built(found.codec))
    text = model.tokenizer.encode("Ab a")
    assert text.tolist() == [[6, 4, 1, 1, 1, 1]]
    assert model.prior.empty_caption().tolist() == [PADDING] * 6
    result = dalle1.sample("ab a", model=model, candidates=2, keep=2, guidance=2, progress=False)
    assert result.images[0][0].size == (8, 8)
    with torch.no_grad():
        _, logits = model.prior(text, result.tokens[0, :1].flatten(1))  # type: ignore[operator]
    expected = -F.cross_entropy(logits[0], result.tokens[0, 0].flatten(), reduction="sum")
    torch.testing.assert_close(model.log_prob("ab a", result.tokens[0, 0]), expected)
    assert isinstance(model.complete_caption("ab"), str)
    with pytest.raises(ValueError, match="text: expected a beginning, got none"):
        model.complete_caption("")
    model.save(tmp_path / "model")
    again = dalle1.load(tmp_path / "model")
    twice = dalle1.sample("ab a", model=again, candidates=2, keep=2, guidance=2, progress=False)
    assert torch.equal(twice.tokens, result.tokens)


def test_folders(tmp_path: Path) -> None:
    """A folder with a piece missing that is opened, or a missing piece that is not named."""
    root = made(tmp_path)
    assert recognizes(root) and FAMILY.recognizes(root) and not recognizes(tmp_path)
    vocab = root / "tokenizer" / "bpe-16k-vocab.json"
    text = vocab.read_text(encoding="utf-8")
    vocab.write_text(text.replace("[PAD]", "[END]"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"bpe-16k-vocab\.json.*\[PAD\]"):
        FAMILY.read(root)
    (root / "stage1_last.ckpt").unlink()
    assert not recognizes(root)
    with pytest.raises(ValueError, match=r"stage1_last\.ckpt is missing"):
        FAMILY.read(root)
