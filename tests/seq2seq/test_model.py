"""The encoder-decoder against its restatement, its sizes, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.protocols import TextPrior, TokenwisePrior, WindowPrior
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.seq2seq.model import Seq2Seq
from dalle1.transformer.config import Execution
from tests.parity.dalle_mini import PAD, Restated
from tests.seq2seq.sizes import MEGA


def captions(count: int = 3, length: int = 9, vocab: int = 50) -> Tensor:
    """<s> ... </s> and padding, of several lengths."""
    g = torch.Generator().manual_seed(count)
    text = torch.full((count, length), PAD)
    for i, row in enumerate(text):
        words = torch.randint(3, vocab, (1 + 2 * i,), generator=g)[: length - 2]
        row[: len(words) + 2] = torch.cat([torch.tensor([0]), words, torch.tensor([2])])
    return text


def images(count: int = 3, length: int = 16, vocab: int = 40) -> Tensor:
    return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "total"),
    [
        (Seq2SeqConfig(), 202_591_224, 235_242_488, 437_833_712),
        (MEGA, 1_110_022_144, 1_477_498_880, 2_587_521_024),
    ],
    ids=["mini", "mega"],
)
def test_published_sizes(config: Seq2SeqConfig, encoder: int, decoder: int, total: int) -> None:
    """A bias, a scale or a row too many, or a head that is shared."""
    with torch.device("meta"):
        model = Seq2Seq(config)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    assert counts == [encoder, decoder] and sum(p.numel() for p in model.parameters()) == total


def test_logits_equal_the_restatement(pair: tuple[Seq2Seq, Restated]) -> None:
    """A norm at another place, a gate and its partner swapped, heads or a mask of another order, a
    start that is another row, a tanh in the GELU."""
    model, restated = pair
    with torch.no_grad():
        logits = model(captions(), images())
        expected = restated.logits(captions(), images())
    assert expected.shape[-1] > logits.shape[-1] == 40
    torch.testing.assert_close(logits.double(), expected[..., :40], rtol=0, atol=1e-5)


def test_log_prob_is_of_what_can_be_drawn(pair: tuple[Seq2Seq, Restated]) -> None:
    """Probability on rows of the head that no code belongs to, or a sum that misses a position."""
    model, restated = pair
    expected = restated.logits(captions(), images())[..., :40].log_softmax(-1)
    expected = expected.gather(-1, images()[..., None]).sum((1, 2))
    torch.testing.assert_close(
        model.log_prob(captions(), images()).double(), expected, rtol=0, atol=1e-4
    )


def test_each_token_has_its_log_prob(pair: tuple[Seq2Seq, Restated]) -> None:
    """Tokens scored one position late, or by steps where one pass would do."""
    model, restated = pair
    expected = restated.logits(captions(), images())[..., :40].log_softmax(-1)
    expected = expected.gather(-1, images()[..., None])[..., 0]
    assert isinstance(model, TokenwisePrior)
    with torch.no_grad():
        got = model.token_log_probs(captions(), images()).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_loss_is_the_published_one(pair: tuple[Seq2Seq, Restated]) -> None:
    """A loss over the codes alone, or of the text too; gradients of a head without a bias."""
    model, restated = copy.deepcopy(pair[0]), pair[1]
    w = restated.w["lm_head.kernel"].requires_grad_()
    expected = F.cross_entropy(
        restated.logits(captions(), images()).flatten(0, 1), images().flatten()
    )
    expected.backward()
    loss = model.loss(captions(), images()).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert w.grad is not None and model.decoder.head.weight.grad is not None
    torch.testing.assert_close(
        model.decoder.head.weight.grad.t().double(), w.grad, rtol=0, atol=1e-5
    )
    w.grad = None
    w.requires_grad_(False)


def test_every_weight_is_trained(prior: Seq2Seq) -> None:
    """A weight that nothing reads."""
    model = copy.deepcopy(prior)
    model.loss(captions(), images()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_padding_is_not_read(prior: Seq2Seq) -> None:
    """Padding that is attended to in the encoder or by the decoder."""
    model, changed = prior, copy.deepcopy(prior)
    with torch.no_grad():
        changed.encoder.embedding.weight[PAD] += 1
        expected = model(captions(), images())
        assert torch.equal(changed(captions(), images()), expected)
        changed.encoder.embedding.weight[2] += 1
        assert not torch.allclose(changed(captions(), images()), expected)


def test_padding_beyond_the_vocabulary() -> None:
    """Tokenizers that are trained here pad each position with an id of its own."""
    config = Seq2SeqConfig(
        width=16, heads=2, encoder_layers=1, decoder_layers=1, ffn_width=24, text_vocab=20,
        text_length=5, padding=None, empty_caption=(0,), image_vocab=9, grid=2,
    )  # fmt: skip
    model = Seq2Seq(config, seed=0).eval()
    assert model.empty_caption().tolist() == [0, 21, 22, 23, 24]
    image = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        short = model(torch.tensor([[7, 8, 22, 23, 24]]), image)
        again = model(torch.tensor([[7, 8, 20, 20, 20]]), image)
        other = model(torch.tensor([[7, 8, 19, 23, 24]]), image)
    assert torch.equal(short, again) and not torch.equal(short, other)


def test_empty_caption(prior: Seq2Seq) -> None:
    """Guidance that compares with padding alone, or with another text than the published."""
    assert prior.empty_caption().tolist() == [0, 2] + 7 * [PAD]


@pytest.mark.parametrize("execution", [{"checkpointing": True}, {"compile": False}])
def test_execution_changes_nothing(prior: Seq2Seq, execution: dict[str, bool]) -> None:
    """Gradients of the encoder that are lost where a block is computed twice."""
    twin = Seq2Seq(prior.config, Execution(**execution))
    twin.load_state_dict(prior.state_dict())
    model = copy.deepcopy(prior)
    for one in (model, twin):
        one.loss(captions(), images()).loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_16_bits_in_the_blocks(prior: Seq2Seq, narrow: torch.dtype) -> None:
    """Gradients that leave a block for the encoder with its scale still on them."""
    wide, model = copy.deepcopy(prior), copy.deepcopy(prior)
    for layer in model.residual_layers:
        if narrow == torch.float16:
            layer.scale_gradients(1)
        else:
            layer.narrow = narrow
    for one in (wide, model):
        one.loss(captions(), images()).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert float(error) < (0.1 if narrow == torch.bfloat16 else 0.02), name


def test_initial_weights_are_of_seed_and_name() -> None:
    """Weights that depend on the order in which they are made."""
    config = Seq2SeqConfig(
        width=16, heads=2, encoder_layers=1, decoder_layers=2, ffn_width=24, text_vocab=2000,
        text_length=5, image_vocab=999, grid=2,
    )  # fmt: skip
    first, second, other = (Seq2Seq(config, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["decoder.head.weight"], other["decoder.head.weight"])
    assert float(first["encoder.embedding.weight"].std()) == pytest.approx(0.02, rel=0.05)
    for name, value in first.items():
        if name.endswith("norm.weight"):
            assert bool((value == 1).all()), name
        elif name.endswith("bias"):
            assert not value.any(), name


def test_protocols(prior: Seq2Seq) -> None:
    """A caption's probability that is asked of a model that has none."""
    assert not isinstance(prior, TextPrior) and isinstance(prior, WindowPrior)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1000, "heads": 16}, "width must be a multiple of heads 16, got 1000"),
        ({"padding": 50264}, "padding must be below text_vocab 50264, got 50264; null"),
        ({"image_rows": 16000}, "image_rows must be at least image_vocab 16384, got 16000"),
        ({"start": 16385}, "start must be a row of the image embedding, below 16385, got 16385"),
        ({"empty_caption": (0, 1)}, "empty_caption must be .* without padding"),
        ({"empty_caption": (0, 50264)}, "empty_caption must be"),
        ({"empty_caption": (0,) * 65}, "empty_caption must be at most 64 tokens"),
        ({"depth": 3}, "Extra inputs are not permitted"),
    ],
)
def test_shapes_that_cannot_be(changes: dict[str, object], message: str) -> None:
    """A model that fails at its first step, or reads a table out of its bounds."""
    with pytest.raises(ValueError, match=message):
        Seq2SeqConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        (captions().int(), images(), "text_tokens: expected int64"),
        (captions()[:, :5], images(), "text_tokens: expected 9 positions .* got 5"),
        (captions() + 49, images(), r"text_tokens: expected values in \[0, 49\]"),
        (torch.full((3, 9), PAD), images(), "at least one token in each caption"),
        (captions(), images()[0], "image_tokens: expected int64"),
        (captions(), images(length=17), "image_tokens: expected 1 to 16 positions, got 17"),
        (captions(), images(2), "differ in batch: 3 and 2"),
        (captions(), images() + 39, r"image_tokens: expected values in \[0, 39\]"),
    ],
)
def test_tokens_that_do_not_fit(prior: Seq2Seq, text: Tensor, image: Tensor, message: str) -> None:
    """Rows of unused ids that are read as codes; attention to nothing, which is NaN."""
    with pytest.raises(ValueError, match=message):
        prior(text, image)
