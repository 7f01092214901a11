"""The transformers that findings compare with the paper's: what they attend to and predict."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle1.findings.transformers import (
    JointVocabularyTransformer,
    MaskedPaddingTransformer,
    SeparateSoftmaxTransformer,
)
from dalle1.tokenizer import padding_id
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.layers import Layer
from dalle1.transformer.model import Transformer

SHAPE = TransformerConfig(
    width=16,
    layers=3,
    heads=2,
    head_size=8,
    text_vocab=11,
    text_length=6,
    image_vocab=7,
    grid=3,
    conv_kernel=3,
    init_std=0.5,
)


def captions(*lengths: int) -> Tensor:
    """Captions of so many tokens, padded by position."""
    rows = torch.randint(1, 11, (len(lengths), 6), generator=torch.Generator().manual_seed(1))
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = torch.tensor([padding_id(11, p) for p in range(length, 6)])
    return rows


def images(count: int) -> Tensor:
    return torch.randint(7, (count, 9), generator=torch.Generator().manual_seed(2))


def test_a_seed_gives_the_same_weights() -> None:
    """Arms that differ by their initial weights and not by what is compared."""
    paper = Transformer(SHAPE, seed=3).state_dict()
    for kind in (MaskedPaddingTransformer, SeparateSoftmaxTransformer, JointVocabularyTransformer):
        other = kind(SHAPE, 3).state_dict()
        assert other.keys() == paper.keys()
        assert all(torch.equal(other[name], weight) for name, weight in paper.items())


def test_nothing_reads_masked_padding() -> None:
    """A mask that is one position off, or one that the image does not have."""
    prior, image = MaskedPaddingTransformer(SHAPE, 0), images(1)
    short = captions(3)
    text, drawn = prior(short, image)
    with torch.no_grad():
        prior.text_embedding.weight[11:] += 5.0  # the paddings of all positions
    moved_text, moved = prior(short, image)
    torch.testing.assert_close(drawn, moved)
    torch.testing.assert_close(text[:, :4], moved_text[:, :4])  # the end of the caption included
    full = Transformer(SHAPE, seed=0)
    before = full.image_logits(short, image)
    with torch.no_grad():
        full.text_embedding.weight[11:] += 5.0
    assert not torch.allclose(before, full.image_logits(short, image))  # the paper's reads it


def test_masked_captions_are_those_of_a_shorter_text() -> None:
    """A start or a last word that is masked with the padding; padding that counts in the sum."""
    prior, image = MaskedPaddingTransformer(SHAPE, 4), images(1)
    text = captions(3)
    found = prior.image_logits(text, image)
    # The start and three words need four positions: a model that has no others.
    small = Transformer(SHAPE.model_copy(update={"text_length": 4}), seed=4)
    weights = prior.state_dict()
    for name in ("text_position.weight", "text_embedding.weight"):
        weights[name] = weights[name][: len(small.state_dict()[name])]
    small.load_state_dict(weights)
    cut = torch.cat([text[:, :3], torch.tensor([[padding_id(11, 3)]])], dim=1)
    torch.testing.assert_close(found, small.image_logits(cut, image))


def test_captions_without_padding_are_the_papers() -> None:
    """A masked attention that is another attention too."""
    full, image = captions(6), images(2)[:1]
    paper, masked = Transformer(SHAPE, seed=5), MaskedPaddingTransformer(SHAPE, 5)
    for one, other in zip(paper(full, image), masked(full, image), strict=True):
        torch.testing.assert_close(one, other)


def test_two_softmaxes_each_sum_to_one() -> None:
    """One softmax cut in two, whose parts sum to less; text that reads in two softmaxes as well."""
    prior = SeparateSoftmaxTransformer(SHAPE, 0)
    for layer in prior.layers:
        assert isinstance(layer, Layer)
        n, v = 15, torch.zeros(1, 2, 15, 8)
        q, k = torch.randn(2, 1, 2, n, 8, generator=torch.Generator().manual_seed(3))
        v[:, :, :6] = 1.0  # text
        v[:, :, 6:] = 10.0  # image
        found = layer.attention.attend(q, k, v, False)
        torch.testing.assert_close(found[:, :, :6], torch.ones(1, 2, 6, 8))
        torch.testing.assert_close(found[:, :, 6:], torch.full((1, 2, 9, 8), 11.0))


def test_two_softmaxes_stay_causal() -> None:
    """A loss that falls because the next token is read."""
    prior, text, image = SeparateSoftmaxTransformer(SHAPE, 1), captions(4, 6), images(2)
    later = image.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 7
    one, other = prior.image_logits(text, image), prior.image_logits(text, later)
    torch.testing.assert_close(one[:, :6], other[:, :6])
    assert not torch.allclose(one[:, 6:], other[:, 6:])


def test_one_vocabulary_is_one_softmax() -> None:
    """Targets of the image that are text tokens; paddings that count as targets."""
    prior, text, image = JointVocabularyTransformer(SHAPE, 2), captions(3, 6), images(2)
    losses = prior.loss(text, image)
    text_states, image_states = prior.states(text, image)
    total: dict[str, list[Tensor]] = {"text": [], "image": []}
    for i, length in enumerate((3, 6)):
        wanted = [*text[i, :length].tolist(), *([0] if length < 6 else [])]  # and the end
        for p, token in enumerate(wanted):
            total["text"].append(-joint(prior, text_states[i, p])[token])
        for p, token in enumerate(image[i].tolist()):
            total["image"].append(-joint(prior, image_states[i, p])[11 + token])
    for name, values in total.items():
        torch.testing.assert_close(getattr(losses, name), torch.stack(values).mean())
    torch.testing.assert_close(losses.loss, losses.text / 8 + losses.image * 7 / 8)
    paper = Transformer(SHAPE, seed=2).loss(text, image)
    assert float(losses.image) > float(paper.image)  # words take their share


def joint(prior: Transformer, state: Tensor) -> Tensor:
    """Log-probabilities of text tokens and then image tokens at a position."""
    return F.log_softmax(torch.cat([prior.text_head(state), prior.image_head(state)]), dim=0)
