"""ruDALL-E's file against a re-statement of the model: logits, losses, drawn tokens, versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dalle1
from dalle1 import Model, Transformer, TransformerConfig
from dalle1.generation.generator import Generator
from dalle1.generation.options import SamplingOptions
from dalle1.published import rudalle
from dalle1.published.parts import PublishedPart
from dalle1.published.rudalle import (
    FAMILY,
    published_config,
    read,
    read_prior,
    recognizes,
    variant,
)
from dalle1.transformer.masks import allowed
from dvae.loading import fill
from tests.parity import published_vqgan
from tests.parity import rudalle as published
from tests.parity.rudalle import Shape, Weights, draw, logits, losses, make_weights
from tests.text.files import small_model

SHAPES = [
    Shape("v3"),
    Shape("v2"),
    Shape("v3", layers=6, side=7, heads=4),  # a last layer of columns, a window smaller than it
    Shape("v2", layers=4, side=8),
    Shape("v3", layers=1, side=12),
    Shape("v2", layers=1, side=12),
]


def captions(s: Shape, count: int = 2) -> Tensor:
    """As the tokenizer makes them: start, tokens, end, zeros."""
    text = torch.zeros(count, s.text_length, dtype=torch.int64)
    g = torch.Generator().manual_seed(3)
    for i, row in enumerate(text):
        end = min(i + 2, s.text_length - 1)
        row[0], row[end] = 2, 3
        row[1:end] = torch.randint(4, s.tokens, (end - 1,), generator=g)
    return text


def images(s: Shape, count: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(4)
    return torch.randint(s.image_classes, (count, s.side**2), generator=g)


def saved(folder: Path, weights: Weights, name: str = "pytorch_model.bin") -> Path:
    torch.save(weights, folder / name)
    return folder / name


def built(part: PublishedPart) -> Transformer:
    assert isinstance(part.config, TransformerConfig)
    transformer = Transformer(part.config)
    transformer.load_state_dict({name: read() for name, read in part.weights.items()})
    return transformer.eval()


def opened(folder: Path, s: Shape, weights: Weights) -> Transformer:
    return built(read_prior(saved(folder, weights), s.heads)[0])


@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_logits_and_losses(tmp_path: Path, s: Shape) -> None:
    """A norm left out or misplaced, q, k and v mixed, a mask or a position one cell off, paddings
    of all positions alike, text and image classes exchanged."""
    weights = make_weights(s)
    transformer = opened(tmp_path, s, weights)
    text, image = captions(s), images(s)
    ids = torch.cat([text, image], dim=1)
    expected = logits(weights, s, ids)
    t, shift = s.text_length, 1 if s.version == "v3" else 0
    with torch.no_grad():
        of_text, of_image = transformer(text, image)
        found = transformer.loss(text, image)
    want = expected[:, : t - shift, : s.text_classes]
    torch.testing.assert_close(of_text, want, rtol=0, atol=1e-5)
    want = expected[:, t - shift : s.length - shift, s.text_classes :]
    torch.testing.assert_close(of_image, want, rtol=0, atol=1e-5)
    # Ours gives the first image token its own target; the text then has one fewer.
    cost = F.cross_entropy(want.flatten(0, 1), image.flatten())
    assert found.image.item() == pytest.approx(cost.item(), abs=1e-5)
    if s.version == "v2":
        assert found.loss.item() == pytest.approx(losses(weights, s, ids)[0].item(), abs=1e-5)
    else:
        odd = transformer.config.variant.model_copy(update={"first_token_as_text": True})
        twin = Transformer(transformer.config.model_copy(update={"variant": odd}))
        twin.load_state_dict(transformer.state_dict())
        published_losses = losses(weights, s, ids)
        theirs = twin.loss(text, image)
        for a, b in zip((theirs.loss, theirs.text, theirs.image), published_losses, strict=True):
            assert a.item() == pytest.approx(b.item(), abs=1e-5)


@pytest.mark.parametrize("s", [SHAPES[0], SHAPES[3]], ids=str)
def test_gradients(tmp_path: Path, s: Shape) -> None:
    """A share of the embeddings' gradient that is none, or a start that is a weight of its own."""
    weights = {name: w.requires_grad_(w.is_floating_point() and "mask" not in name)
               for name, w in make_weights(s).items()}  # fmt: skip
    transformer = opened(tmp_path, s, {name: w.detach() for name, w in weights.items()})
    text, image = captions(s), images(s)
    config = transformer.config
    if s.version == "v3":
        odd = config.variant.model_copy(update={"first_token_as_text": True})
        config = config.model_copy(update={"variant": odd})
    twin = Transformer(config)
    twin.load_state_dict(transformer.state_dict())
    twin.loss(text, image).loss.backward()
    losses(weights, s, torch.cat([text, image], dim=1))[0].backward()
    sources = rudalle._sources(config)
    grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
    for name, weight in twin.named_parameters():
        assert weight.grad is not None
        expected = sources[name].made_of(grads)
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("s", SHAPES[:4], ids=str)
def test_drawn_tokens(tmp_path: Path, s: Shape) -> None:
    """Caches or windows that draw other tokens than the whole stream run anew for each."""
    weights = make_weights(s, seed=1)
    transformer = opened(tmp_path, s, weights)
    text = captions(s, 3)
    expected = draw(weights, s, text)
    for window, static in ((1, False), (1, True), (5, False)):
        options = SamplingOptions(temperature=0, window=window)
        generator = Generator(transformer, 3, 2, options, static)
        drawn = generator.draw(text, torch.zeros(3, 2, s.side**2))
        assert torch.equal(drawn[:, 0], expected) and torch.equal(drawn[:, 1], expected)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_masks_at_the_published_size(version: str) -> None:
    """A window that wraps, or does not, on the real grid; see `published.masks` for small ones."""
    s = Shape(version, text_length=2, side=32)
    pattern = rudalle.VERSIONS[version]
    mask = allowed(pattern, 2, 32)[2:, 2:]
    for query in (0, 31, 32, 63, 200, 500, 991, 992, 1008, 1023):
        row = [published._sees("conv_mask", query, key, s) for key in range(query + 1)]
        assert mask[query, : query + 1].tolist() == row
        assert not bool(mask[query, query + 1 :].any())


@pytest.mark.parametrize("s", SHAPES[2:], ids=str)
def test_versions_are_told_by_the_mask(tmp_path: Path, s: Shape) -> None:
    """v2's weights under v3's rules: nothing fails, and images are noise."""
    other = "v3" if s.version == "v2" else "v2"
    named = saved(tmp_path, make_weights(s), f"pytorch_model_{other}.bin")
    if s.side <= 6:
        return
    part, notes = read_prior(named, s.heads)
    assert isinstance(part.config, TransformerConfig)
    assert part.config.variant == variant(s.version, s.text_length)
    assert notes == (f"ruDALL-E {s.version}, told by its conv_mask",)


def test_versions_are_told_otherwise(tmp_path: Path) -> None:
    """A small grid, which both windows span, or a file without masks, taken for either version."""
    for s in SHAPES[:2]:
        part, notes = read_prior(saved(tmp_path, make_weights(s)), s.heads)
        assert part.config == read_prior(saved(tmp_path, make_weights(s)), s.heads)[0].config
        assert notes[0].startswith(f"ruDALL-E {s.version}, told by its masks")
        bare = {name: w for name, w in make_weights(s).items() if "mask" not in name}
        named = saved(tmp_path, bare, f"pytorch_model_{s.version}.bin")
        assert read_prior(named, s.heads)[1][0].startswith(
            f"ruDALL-E {s.version}, told by the name"
        )
        with pytest.raises(ValueError, match="has no conv_mask, which tells v2 from v3"):
            read_prior(saved(tmp_path, bare), s.heads)


def test_the_first_release(tmp_path: Path) -> None:
    """Masks at the top of the file that are taken for weights."""
    s = SHAPES[3]
    weights = {name.replace("transformer.row_mask", "row_mask")
               .replace("transformer.col_mask", "col_mask")
               .replace("transformer.conv_mask", "conv_mask"): w
               for name, w in make_weights(s).items()}  # fmt: skip
    assert "conv_mask" in weights
    part, notes = read_prior(saved(tmp_path, weights), s.heads)
    assert notes == ("ruDALL-E v2, told by its conv_mask",)
    built(part)


def test_other_masks_are_refused(tmp_path: Path) -> None:
    """A model of other patterns that is run with these."""
    for name in ("row_mask", "conv_mask"):
        weights = make_weights(SHAPES[2])
        mask = weights[f"transformer.{name}"]
        mask[-1, SHAPES[2].text_length] ^= True
        with pytest.raises(ValueError, match=rf"pytorch_model.bin: {name} is n"):
            read_prior(saved(tmp_path, weights), 4)


def test_16_bits_stay(tmp_path: Path) -> None:
    """Weights that double in memory, or are read before they are asked for."""
    s = SHAPES[0]
    weights = make_weights(s, dtype=torch.float16)
    part, _ = read_prior(saved(tmp_path, weights), s.heads)
    made = {name: read() for name, read in part.weights.items()}
    assert {w.dtype for w in made.values()} == {torch.float16}
    assert torch.equal(made["text_head.weight"], weights["to_logits.1.weight"][: s.text_classes])
    assert torch.equal(made["image_head.bias"], weights["to_logits.1.bias"][s.text_classes :])
    transformer = Transformer(part.config).half()  # type: ignore[arg-type]
    transformer.load_state_dict(made)
    with torch.no_grad():
        _, found = transformer.eval()(captions(s), images(s))
        _, expected = built(part).float()(captions(s), images(s))
    assert float((found - expected).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("to_logits.1.bias", r"has no weight 'to_logits.1.bias' of ruDALL-E"),
        ("text_pos_embeddings.weight", "has no weight 'text_pos_embeddings.weight'"),
        ("transformer.layers.1.mlp.dense_4h_to_h.weight", "no weight 'transformer.layers.1.mlp"),
    ],
)
def test_missing_weights_are_named(tmp_path: Path, change: str, message: str) -> None:
    """A weight that stays as it was initialized."""
    weights = make_weights(SHAPES[0])
    del weights[change]
    with pytest.raises(ValueError, match=message):
        read_prior(saved(tmp_path, weights), 2)


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    """A shape, type or name that fails deep in torch, or not at all."""
    s = SHAPES[0]
    key = "transformer.layers.1.attention.query_key_value.weight"
    for changed, message in (
        ({key: torch.zeros(47, 16)}, rf"weight '{key}' has shape \[47, 16\], expected \[48, 16\]"),
        ({key: torch.zeros(48, 16, dtype=torch.int64)}, "has type torch.int64"),
        ({"to_logits.1.weight": torch.zeros(34, 16)}, r"'to_logits.1.weight' has shape \[8, 16\]"),
        ({"lora.weight": torch.zeros(2)}, "has an unexpected weight 'lora.weight' of ruDALL-E"),
        ({"to_logits.1.weight": torch.zeros(())}, r"'to_logits.1.weight' has shape \[\]"),
        ({"transformer.layers.999999.a": torch.zeros(2)}, "weights of 1,000,000 layers of ruDALL"),
        ({f"transformer.layers.{'9' * 5000}.a": torch.zeros(2)}, "an unexpected weight"),
        ({"image_row_embeddings.weight": torch.zeros(10**6, 0)}, "row_mask is not the one"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prior(saved(tmp_path, {**make_weights(s), **changed}), 2)
    with pytest.raises(ValueError, match="width: expected a multiple of 64 for the heads, got 16"):
        read_prior(saved(tmp_path, make_weights(s)))


@pytest.mark.parametrize("version", ["v3", "v2"])
def test_a_model_of_all_parts(tmp_path: Path, version: str) -> None:
    """A tokenizer, a prior and a codec beside each other that are not found, or do not fit."""
    s = Shape(version, width=64, heads=1, text_length=12, text_classes=52, image_classes=40)
    saved(tmp_path, make_weights(s))
    small_model().write(tmp_path / "bpe.model")
    for name, width in (("", 32), ("-dwt", 64)):
        codec = published_vqgan.shapes(width, (1, 2), (1,), 12, 12, 40, gumbel=True)
        weights = published_vqgan.random_weights(codec)
        torch.save({"state_dict": weights}, tmp_path / f"vqgan.gumbelf8-sber{name}.model.ckpt")
    found = read(tmp_path)
    assert found.prior is not None and found.codec is not None
    assert found.codec.path.name == "vqgan.gumbelf8-sber.model.ckpt"
    assert "-dwt.model.ckpt" in found.notes[1]
    parts = [
        fill(
            lambda part=part: part.kind.module(part.config),  # type: ignore[misc]
            {name: read() for name, read in part.weights.items()}, part.path, "a part",
        )
        for part in (found.prior, found.codec)
    ]  # fmt: skip
    model = Model(found.tokenizer, *parts)
    text = model.tokenizer.encode("Cat at")
    assert text[0, 0] == 2 and int((text[0] == 3).sum()) == 1 and int(text[0, -1]) == 40 + 11
    result = dalle1.sample("cat at", model=model, candidates=2, keep=2, progress=False)
    assert result.images[0][0].size == (8, 8)
    zeros = torch.where(text >= 40, 0, text)  # as their tokenizer pads
    flat = result.tokens[0, :1].flatten(1)
    expected = logits(make_weights(s), s, torch.cat([zeros, flat], dim=1))
    shift = 1 if version == "v3" else 0
    expected = expected[0, 12 - shift : s.length - shift, s.text_classes :]
    cost = F.cross_entropy(expected, flat[0], reduction="sum")
    assert model.log_prob("cat at", result.tokens[0, 0]).item() == pytest.approx(-cost.item(), 1e-4)
    for text_given in ("", "cat"):
        assert model.complete_caption(text_given).startswith(text_given)
    model.save(tmp_path / "model")
    again = dalle1.load(tmp_path / "model")
    twice = dalle1.sample("cat at", model=again, candidates=2, keep=2, progress=False)
    assert torch.equal(twice.tokens, result.tokens)


def test_folders(tmp_path: Path) -> None:
    """Another family's `pytorch_model.bin` taken for one, or one of several taken at random."""
    s = Shape("v3", width=64, heads=1)
    file = saved(tmp_path, make_weights(s), "pytorch_model_v3.bin")
    assert recognizes(tmp_path) and recognizes(file) and FAMILY.recognizes(file)
    torch.save({"visual.proj": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    model = read(tmp_path)
    assert model.prior is not None and model.prior.path == file
    assert isinstance(model.prior.config, TransformerConfig) and model.prior.config.heads == 1
    saved(tmp_path, make_weights(s), "pytorch_model_v2.bin")
    with pytest.raises(ValueError, match=r"got pytorch_model_v2.bin, pytorch_model_v3.bin; name"):
        read(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not recognizes(empty) and not recognizes(empty / "nothing.bin")
    with pytest.raises(ValueError, match="got none"):
        read(empty)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    """A download that broke off and is read as weights."""
    file = saved(tmp_path, make_weights(SHAPES[0]))
    os.truncate(file, os.path.getsize(file) - 4000)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        read_prior(file, 2)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "count"),
    [(24, 2048, 16, 1_310_410_880), (64, 3840, 60, 11.52e9)],
)
def test_published_sizes(layers: int, width: int, heads: int, count: float) -> None:
    """A weight too many or too few at the sizes that are published (section 2.1)."""
    for version in rudalle.VERSIONS:
        c = published_config(version, layers, width)
        assert (c.layers, c.width, c.heads, c.text_length) == (layers, width, heads, 128)
        with torch.device("meta"):
            transformer = Transformer(c)
        found = sum(p.numel() for p in transformer.parameters())
        assert found == count if isinstance(count, int) else abs(found / count - 1) < 1e-3
        layer = sum(p.numel() for p in transformer.layers[0].parameters())
        assert layer == 12 * width**2 + 17 * width  # two maps and four norms
        assert layer == 50_366_464 or layers != 24
        assert rudalle.HEADS[layers, width] == heads
        assert c.patterns.count("column") == layers // 4
        assert (c.patterns[-1], c.patterns[0]) == (rudalle.VERSIONS[version], "row")
        assert (c.text_vocab, c.text_classes, c.image_vocab, c.grid) == (16384, 16512, 8192, 32)
