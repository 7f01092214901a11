"""The transformer as its published relatives are: other starts, norms, patterns, tables and heads.

What each of them computes is compared with re-statements in tests/published; here, that every way
of running it agrees with its forward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1 import Transformer, TransformerConfig
from dalle1.generation.generator import Generator, complete_text
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.published import mindalle, rudalle
from dalle1.transformer.config import Execution
from dalle1.transformer.kv_cache import KVCache, cache_bytes
from dalle1.transformer.layers import Layer
from dalle1.transformer.masks import allowed
from dalle1.transformer.tokens import count_text_targets, text_targets
from dalle1.transformer.variant import Variant
from tests.conftest import TransformerMaker

TEXT, VOCAB, CODES, GRID = 6, 11, 9, 6
CELLS = GRID * GRID
VARIANTS = {
    "v3": rudalle.variant("v3", TEXT),
    "v2": rudalle.variant("v2", TEXT),
    "minDALL-E": mindalle.variant(padding=1),
    # Settings that no published model has together.
    "no start": Variant(start="none", patterns=("column", "conv", "row", "full")),
    "token": Variant(start="token", start_token=3, image_positions="raster", head_bias=False),
}


@pytest.fixture(params=VARIANTS)
def transformer(make_transformer: TransformerMaker, request: pytest.FixtureRequest) -> Transformer:
    """One of each variant, with a grid that rings do not span."""
    return make(make_transformer, request.param)


def make(maker: TransformerMaker, name: str, **changes: Any) -> Transformer:
    return maker(grid=GRID, variant=VARIANTS[name], **changes)


def captions(c: TransformerConfig, count: int, seed: int = 0) -> Tensor:
    """Captions of different lengths, padded as the variant has it: int64 [count, TEXT]."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(4, c.text_vocab, (count, c.text_length), generator=g)
    padding = c.text_vocab + torch.arange(c.text_length)
    if c.variant.padding_token is not None:
        padding = torch.full_like(padding, c.variant.padding_token)
    for i, row in enumerate(text):
        row[2 + i :] = padding[2 + i :]
    return text


def images(count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 100)
    return torch.randint(CODES, (count, CELLS), generator=g)


def before(image: Tensor) -> Tensor:
    """What a step is given for each position: the start, then the tokens but the last."""
    return F.pad(image[:, :-1], (1, 0), value=CODES)


def case(t: Transformer, given: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two captions, images of three candidates each, a step's inputs, and the expected logits."""
    text, image = captions(t.config, 2), images(6)
    image[:, :given] = image[0, :given]
    with torch.no_grad():
        _, expected = t(text.repeat_interleave(3, dim=0), image)
    return text, image, before(image), expected


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("given", [0, 1, 2, 13, 35])
def test_cached_steps(transformer: Transformer, given: int, static: bool) -> None:
    """A token at the wrong place of a ring, a first token that the text did not predict, given
    tokens one place off, norms that the cached step leaves out."""
    text, image, inputs, expected = case(transformer, given)
    with torch.inference_mode():
        state = transformer.start(2, 3, static)
        state.prefill(text.flip(0))  # captions whose place others take
        state.step(inputs[:, :1], torch.tensor([0]) if static else 0)
        state.prefill(text, image[0, :given])
        for p in range(given, CELLS):
            logits = state.step(inputs[:, p : p + 1], torch.tensor([p]) if static else p)
            torch.testing.assert_close(logits[:, 0], expected[:, p], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5, CELLS])
def test_windows(transformer: Transformer, count: int) -> None:
    """Windows that begin before the first token, and what they leave in the caches for it."""
    text, _, inputs, expected = case(transformer)
    state = transformer.start(2, 3)
    state.prefill(text)
    for p in range(0, CELLS, count):
        logits = state.step(inputs[:, p : p + count], p)
        torch.testing.assert_close(logits, expected[:, p : p + count], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 4])
def test_going_back(transformer: Transformer, count: int) -> None:
    """Rejected tokens that are still seen; a return to the first position, or to the second."""
    text, _, inputs, expected = case(transformer)
    wrong = (inputs + 1) % CODES
    state = transformer.start(2, 3)
    state.prefill(text)
    end = 0  # of what was fed
    for first in (0, 20, 3, 1, 30, 0):
        for p in range(end, first, count):
            state.step(inputs[:, p : min(p + count, first)], p)
        state.step(wrong[:, first : first + count], first)
        logits = state.step(inputs[:, first : first + count], first)
        torch.testing.assert_close(logits, expected[:, first : first + count], rtol=0, atol=1e-4)
        end = first + count


@pytest.mark.parametrize("count", [1, 3])
def test_rows_at_different_positions(transformer: Transformer, count: int) -> None:
    """Rows at the first position that write over what others hold, or read it."""
    text, _, inputs, expected = case(transformer)
    state = transformer.start(2, 3)
    state.prefill(text)
    at, g = torch.zeros(6, dtype=torch.int64), torch.Generator().manual_seed(0)
    rows = torch.arange(6)[:, None]
    while int(at.min()) + count <= CELLS:
        first = at.clamp(max=CELLS - count)
        index = first[:, None] + torch.arange(count)
        logits = state.step(inputs.gather(1, index), first)
        torch.testing.assert_close(logits, expected[rows, index], rtol=0, atol=1e-4)
        at = first + torch.randint(0, count + 1, (6,), generator=g)


def test_what_each_token_reaches(transformer: Transformer) -> None:
    """A leak from the future, a token that is fed too late, or a mask whose cells are one off:
    a token changes those positions that a path of allowed keys leads to, and no others."""
    c = transformer.config
    n = TEXT + CELLS
    reach = torch.eye(n, dtype=torch.bool)  # [query, key]
    for pattern in c.patterns:
        step = allowed(pattern, TEXT, GRID, c.conv_kernel)
        reach = (step.float() @ reach.float()) > 0
    # Token j of the stream is fed at position j + 1, or j where no start stands before it; what a
    # position predicts is token p, or p + 1.
    moved_by = F.pad(reach, (0, 1))[:, 1 - c.shift :]
    text = torch.randint(4, VOCAB, (1, TEXT), generator=torch.Generator().manual_seed(1))
    image = images(1)
    with torch.no_grad():
        first = torch.cat(_padded(transformer(text, image)), dim=1)
        for j in range(n):
            other_text, other_image = text.clone(), image.clone()
            if j < TEXT:
                other_text[0, j] = (text[0, j] - 3) % 7 + 4
            else:
                other_image[0, j - TEXT] = (image[0, j - TEXT] + 1) % CODES
            after = torch.cat(_padded(transformer(other_text, other_image)), dim=1)
            moved = ((first - after).abs().amax(dim=(0, 2)) > 1e-5).tolist()
            expected = moved_by[:, j] if j < moved_by.shape[1] else torch.zeros(n)
            assert moved == expected[: len(moved)].bool().tolist(), j


def _padded(logits: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Text and image logits [b, n, v] of so many classes each that both can be put together."""
    most = max(x.shape[2] for x in logits)
    return [F.pad(x, (0, most - x.shape[2])) for x in logits]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_executions_agree(transformer: Transformer, checkpointing: bool) -> None:
    """Blocks of the sparse patterns that lose or add a key, or gradients that do."""
    other = Transformer(transformer.config, Execution(attention="sparse"))
    if checkpointing:
        execution = Execution(attention="sparse", checkpointing=True)
        other = Transformer(transformer.config, execution)
    other.load_state_dict(transformer.state_dict())
    text, image = captions(transformer.config, 3), images(3)
    found = []
    for t in (transformer, other):
        t.zero_grad()
        loss = t.train().loss(text, image).loss
        loss.backward()
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    for (name, a), b in zip(transformer.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    transformer.zero_grad()
    transformer.eval()


def test_an_image_cut_short(transformer: Transformer) -> None:
    """Logits of a beginning that differ from those of the full image, or are none."""
    c = transformer.config
    text, image = captions(c, 2), images(2)
    with torch.no_grad():
        of_text, of_image = transformer(text, image)
        assert of_text.shape == (2, TEXT - c.shift, c.text_classes)
        assert of_image.shape == (2, CELLS, CODES)
        for given in (0, 1, 5):
            cut_text, cut_image = transformer(text, image[:, :given])
            assert cut_image.shape[1] == max(1, given)
            torch.testing.assert_close(cut_text, of_text, rtol=1e-4, atol=1e-5)
            expected = of_image[:, : max(1, given)]
            torch.testing.assert_close(cut_image, expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns(transformer: Transformer) -> None:
    """A table or norm that is built but not used."""
    transformer.zero_grad()
    transformer.loss(captions(transformer.config, 4), images(4)).loss.backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert bool(parameter.grad.isfinite().all()), name
    transformer.zero_grad()


def test_loss_is_the_mean_of_the_targets(transformer: Transformer) -> None:
    """Targets one off, paddings that are counted or not against the variant, heads exchanged."""
    c, v = transformer.config, transformer.config.variant
    text, image = captions(c, 3), images(3)
    with torch.no_grad():
        losses = transformer.loss(text, image)
        of_text, of_image = (x.log_softmax(dim=-1) for x in transformer(text, image))
    costs = []
    for row, logits in zip(text.tolist(), of_text, strict=True):
        for p in range(c.shift, TEXT):
            is_padding = row[p] in (v.padding_token, VOCAB + p)
            target = VOCAB + p if is_padding and v.position_paddings else row[p]
            if is_padding and not v.predicts_padding:
                if p and row[p - 1] in (v.padding_token, VOCAB + p - 1):
                    continue
                target = v.end_of_caption
            costs.append(-float(logits[p - c.shift, target]))
    assert len(costs) == count_text_targets(c, text)
    assert losses.text.item() == pytest.approx(sum(costs) / len(costs), rel=1e-5)
    chosen = of_image.gather(2, image[..., None])
    assert losses.image.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)
    expected = losses.text.item() / 8 + 7 / 8 * losses.image.item()
    assert losses.loss.item() == pytest.approx(expected, rel=1e-6)
    total = transformer.log_prob(text, image)
    torch.testing.assert_close(total, chosen.sum(dim=(1, 2)), rtol=1e-5, atol=1e-4)


def test_parts_of_a_batch(transformer: Transformer) -> None:
    """A mean of means where captions differ in length."""
    text, image = captions(transformer.config, 4), images(4)
    with torch.no_grad():
        full = transformer.loss(text, image)
        count = count_text_targets(transformer.config, text) / 2
        halves = [transformer.loss(text[i : i + 2], image[i : i + 2], count) for i in (0, 2)]
    assert sum(x.loss.item() for x in halves) / 2 == pytest.approx(full.loss.item(), rel=1e-5)


def test_first_token_as_text(make_transformer: TransformerMaker) -> None:
    """The published loss of v3 without its mistake, or ours with it."""
    plain = make(make_transformer, "v3")
    odd = Transformer(
        plain.config.model_copy(
            update={
                "variant": VARIANTS["v3"].model_copy(update={"first_token_as_text": True}),
            }
        )
    )
    odd.load_state_dict(plain.state_dict())
    text, image = captions(plain.config, 2), images(2)
    assert text_targets(plain.config, text, image)[:, -1].tolist() == [-100, -100]
    assert text_targets(odd.config, text, image)[:, -1].tolist() == image[:, 0].tolist()
    assert count_text_targets(odd.config, text) == 2 * TEXT
    odd.loss(text, image).image.backward()
    with torch.no_grad():
        _, logits = plain(text, image)
        cost = F.cross_entropy(logits[:, 1:].flatten(0, 1), image[:, 1:].flatten())
    assert odd.loss(text, image).image.item() == pytest.approx(cost.item(), rel=1e-5)


def test_embeddings_with_a_share_of_their_gradient(make_transformer: TransformerMaker) -> None:
    """A share that changes what is computed, reaches other weights, or does nothing."""
    grads = []
    for share in (1.0, 0.1):
        v = VARIANTS["v3"].model_copy(update={"embedding_gradient": share})
        t = make_transformer(grid=GRID, variant=v)
        loss = t.loss(captions(t.config, 2), images(2)).loss
        loss.backward()
        grads.append((loss.item(), {name: p.grad for name, p in t.named_parameters()}))
    assert grads[0][0] == grads[1][0]
    for name, grad in grads[0][1].items():
        other = grads[1][1][name]
        assert grad is not None and other is not None
        factor = 0.1 if "embedding" in name or "position" in name else 1.0
        torch.testing.assert_close(factor * grad, other, rtol=1e-4, atol=1e-7, msg=name)


def test_ways_of_drawing_agree(transformer: Transformer) -> None:
    """A start that a recorded step or a window reads otherwise, with guidance and given tokens."""
    c = transformer.config
    text = captions(c, 2)
    uniforms = torch.stack([candidate_uniforms(0, name, 0, 3, CELLS) for name in ("a", "b")])
    prefix = images(1)[0, :4]
    for guidance in (1.0, 2.0):
        drawn = []
        for window, static in ((1, False), (1, True), (4, False), (CELLS, False)):
            options = SamplingOptions(guidance=guidance, window=window)
            generator = Generator(transformer, 2, 3, options, static)
            drawn.append(generator.draw(text, uniforms))
            drawn.append(generator.draw(text, uniforms, prefix))
        for i, tokens in enumerate(drawn):
            assert torch.equal(tokens, drawn[i % 2])
        assert not torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[1][..., :4], prefix.expand(2, 3, -1))


def test_guidance_compares_with_no_caption(transformer: Transformer) -> None:
    """An empty caption of other ids than training with dropped captions reads."""
    v, empty = transformer.config.variant, transformer.empty_caption()
    tokens = list(v.empty_caption)
    assert empty[: len(tokens)].tolist() == tokens
    padding = [v.padding_token] * TEXT if not v.position_paddings else list(range(VOCAB, VOCAB + 6))
    assert empty[len(tokens) :].tolist() == padding[len(tokens) :]
    if v.position_paddings and v.padding_token is not None:  # both spellings mean the same
        zeros = torch.tensor([[*tokens, *[v.padding_token] * (TEXT - len(tokens))]])
        with torch.no_grad():
            a, b = transformer(zeros, images(1)), transformer(empty[None], images(1))
        assert torch.equal(a[1], b[1])


def test_captions_are_completed(transformer: Transformer) -> None:
    """The text logits of a position before, or an end that is another model's."""
    c = transformer.config
    ids = [2, 5, 7]
    text = captions(c, 1)
    text[0, :3] = torch.tensor(ids)
    with torch.no_grad():
        expected = transformer(text, images(1))[0][0, 3 - c.shift]
        found = transformer.next_text_logits(ids)
        torch.testing.assert_close(found, expected[:VOCAB], rtol=0, atol=1e-5)
        if c.shift:
            with pytest.raises(ValueError, match="text: expected a beginning, got none"):
                transformer.next_text_logits([])
        end = transformer.end_of_caption
        assert end == c.variant.end_of_caption
        completed = complete_text(transformer, ids, torch.rand(TEXT).double())
    assert completed[:3] == ids and end not in completed[3:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_the_caches(transformer: Transformer, dtype: torch.dtype) -> None:
    """A count that forgets a pattern, or a ring where the whole grid is held."""
    cache = KVCache(transformer.layers, transformer.config, 2, 3)
    assert cache.bytes == 2 * cache_bytes(transformer.config, 3, torch.float32)
    assert cache_bytes(transformer.config, 3, dtype) * 4 == cache.bytes // 2 * dtype.itemsize
    caption, candidate = transformer.decoding_bytes()
    assert 2 * caption < cache.bytes <= 2 * caption + 6 * candidate


@pytest.mark.parametrize("checkpointing", [False, True])
def test_float16_with_gradient_scales(transformer: Transformer, checkpointing: bool) -> None:
    """A second norm of a block whose gradient leaves 16 bits, or is not scaled back."""
    text, image = captions(transformer.config, 2), images(2)
    execution = Execution(checkpointing=checkpointing)
    narrow = Transformer(transformer.config, execution)
    narrow.load_state_dict(transformer.state_dict())
    scales = [s for layer in narrow.layers for s in layer.scale_gradients(1)]  # type: ignore[operator]
    transformer.zero_grad()
    losses = []
    for t in (transformer, narrow):
        loss = t.loss(text, image).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert not any(scale.take_broken() for scale in scales)
    for (name, a), b in zip(transformer.named_parameters(), narrow.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and b.grad.dtype == torch.float32
        assert float((a.grad - b.grad).norm()) <= 0.02 * float(a.grad.norm()) + 1e-6, name
    transformer.zero_grad()


def test_steps_in_16_bits(transformer: Transformer) -> None:
    """A cache or a first token's logits in another type than the weights'."""
    t = Transformer(transformer.config).eval()
    t.load_state_dict(transformer.state_dict())
    t.bfloat16()
    text, _, inputs, expected = case(t)
    state = t.start(2, 3)
    state.prefill(text)
    for p in range(4):
        logits = state.step(inputs[:, p : p + 1], p)
        assert logits.dtype == torch.float32
        assert float((logits[:, 0] - expected[:, p]).abs().max()) <= 0.1
    assert t.start(2, 3).step(inputs[:, :3], 0).shape == (6, 3, CODES)


def test_updates_lower_the_loss(transformer: Transformer) -> None:
    """A variant that can be read and not trained."""
    t = Transformer(transformer.config, seed=0)
    text, image = captions(t.config, 4), images(4)
    optimizer = torch.optim.AdamW(t.parameters(), lr=1e-2)
    found = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = t.loss(text, image).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]


def test_initial_weights(transformer: Transformer) -> None:
    """A norm that begins at 0 or at random, or a bias that is not 0."""
    for name, w in Transformer(transformer.config, seed=1).named_parameters():
        if name.endswith("bias"):
            assert not w.any(), name
        else:
            assert bool((w == 1).all()) == ("norm" in name), name


def test_blocks_run_by_themselves(transformer: Transformer) -> None:
    """A layer that does not say which pattern it has, as the caches ask it."""
    patterns = [layer.attention.pattern for layer in transformer.layers if isinstance(layer, Layer)]
    assert tuple(patterns) == transformer.config.patterns


def test_the_papers_config_is_written_as_before() -> None:
    """A folder of the paper's model that the release before cannot open, or a variant that is
    lost when it is saved."""
    small: dict[str, Any] = {"width": 16, "layers": 4, "heads": 2, "head_size": 8}
    small |= {"text_vocab": VOCAB, "text_length": TEXT}
    assert "variant" not in TransformerConfig().model_dump()
    assert "variant" not in TransformerConfig(**small).model_dump(mode="json")
    for v in VARIANTS.values():
        c = TransformerConfig(**small, variant=v)
        assert c.model_dump()["variant"] == v.model_dump()
        assert TransformerConfig(**c.model_dump(mode="json")) == c
        assert hash(c) == hash(TransformerConfig(**c.model_dump()))
    names = set(Transformer(TransformerConfig(**small, grid=4)).state_dict())
    assert {"start_of_text", "start_of_image", "row_position.weight"} < names
    assert not any("head_norm" in name or "out_norm" in name for name in names)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"position_paddings": False}, "padding_token is needed"),
        ({"first_token_as_text": True}, "start 'none'.*got start 'vectors'"),
        ({"patterns": ("row", "full")}, r"patterns: expected one for each of 4 layers, got 2"),
        ({"patterns": "papers"}, "patterns"),
        ({"start_token": 11}, r"start_token: expected a text token, 0 to 10, got 11"),
        ({"padding_token": 12}, "padding_token.*got 12"),
        ({"end_of_caption": 11}, "end_of_caption.*got 11"),
        ({"empty_caption": (2, -3)}, r"empty_caption\[1\].*got -3"),
        ({"empty_caption": (2,) * 7}, "empty_caption: expected at most 6 tokens, got 7"),
        ({"text_position_rows": 6, "start": "token"}, "at least the 7 that are read, got 6"),
        ({"start": "none", "first_token_as_text": True}, "as many text classes.*9, got 8"),
        ({"norm": "post"}, "norm"),
    ],
)
def test_settings_that_do_not_fit(variant: dict[str, Any], message: str) -> None:
    """A setting that is swallowed, or that fails far from the mistake."""
    vocab = 8 if "first_token_as_text" in variant else VOCAB
    with pytest.raises(ValueError, match=message):
        TransformerConfig(
            width=16, layers=4, heads=2, head_size=8, text_vocab=vocab, text_length=TEXT,
            image_vocab=CODES, grid=4, variant=variant,
        )  # fmt: skip


def test_tokens_that_do_not_fit(make_transformer: TransformerMaker) -> None:
    """A padding of a position that is read where positions have none."""
    t = make(make_transformer, "minDALL-E")
    with pytest.raises(ValueError, match=r"expected tokens in \[0, 10\]; got 13"):
        t(torch.tensor([[1, 1, 13, 1, 1, 1]]), images(1))
    t = make(make_transformer, "v3")
    with pytest.raises(ValueError, match="padding 11 \\+ p; got 13"):
        t(torch.tensor([[1, 13, 1, 1, 1, 1]]), images(1))
