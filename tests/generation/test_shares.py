"""Candidates of several requests in one batch: what each gets is what it gets alone."""

from __future__ import annotations

from itertools import product
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1 import Model, SamplingOptions
from dalle1.generation.batches import draw_parts
from dalle1.generation.generator import Generator
from dalle1.generation.shares import BatchTooLarge, Share, ShareDrawer, group_size

SHARES = [
    Share("a red cat", 3, range(0, 4)),
    Share("a blue dog", 0, range(2, 3)),
    Share("a red cat", 4, range(5, 8)),
    Share("a red cat", 3, range(4, 6)),
]


def alone(model: Model, share: Share, options: SamplingOptions | None = None) -> Tensor:
    """The share's candidates as `draw_parts` draws them, each in a batch of its own."""
    parts = draw_parts(model, [share.caption], share.candidates.stop, share.seed, 1, options)
    return torch.cat([part.tokens[0] for part in parts])[share.candidates.start :]


@pytest.mark.parametrize(
    "options",
    [SamplingOptions(), SamplingOptions(top_k=3, guidance=2.0), SamplingOptions(window=4)],
)
def test_shares_do_not_depend_on_each_other(model: Model, options: SamplingOptions) -> None:
    """A request that gets the images of another seed, caption or number, or of a neighbor."""
    drawer = ShareDrawer(model, options)
    wanted = {share: alone(model, share, options) for share in SHARES}
    for shares in (SHARES, SHARES[:1], SHARES[1:3], SHARES[::-1]):
        drawn = drawer.draw(shares)
        assert len(drawn) == len(shares)
        for share, tokens in zip(shares, drawn, strict=True):
            assert torch.equal(tokens, wanted[share])


def test_first_tokens_and_rows(model: Model) -> None:
    """Shares whose first tokens are not those given, or that are told of too late or in another
    order."""
    prefix, told = torch.tensor([1, 4, 0, 2]), []

    def on_row(done: int, tokens: list[Tensor]) -> None:
        told.append((done, [own[:, :done].clone() for own in tokens]))

    drawn = ShareDrawer(model, SamplingOptions()).draw(SHARES, prefix, on_row)
    assert [done for done, _ in told] == [8, 12, 16]
    for own, share in zip(drawn, SHARES, strict=True):
        assert own.shape == (len(share), 16) and bool((own[:, :4] == prefix).all())
    for done, tokens in told:
        for own, share in zip(tokens, drawn, strict=True):
            assert torch.equal(own, share[:, :done])


def test_what_a_row_raises_ends_the_drawing(model: Model) -> None:
    """A batch that is drawn to its end though nobody waits for it, or a drawer that is of no use
    afterwards."""
    rows = []

    def gone(done: int, tokens: list[Tensor]) -> None:
        rows.append(done)
        raise InterruptedError

    drawer = ShareDrawer(model, SamplingOptions(window=1))
    with pytest.raises(InterruptedError):
        drawer.draw(SHARES, on_row=gone)
    assert rows == [4]
    assert torch.equal(drawer.draw(SHARES)[0], alone(model, SHARES[0]))


def test_limit_is_halved_when_memory_runs_out(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is tried at the same size for ever, or one candidate that is tried again."""
    plain, limit = Generator.draw, 3

    def narrow(self: Generator, text: Any, uniforms: Tensor, *rest: Any) -> Tensor:
        if uniforms.shape[0] * uniforms.shape[1] > limit:
            raise torch.OutOfMemoryError("no memory")
        return plain(self, text, uniforms, *rest)

    monkeypatch.setattr(Generator, "draw", narrow)
    drawer = ShareDrawer(model, SamplingOptions(), 8)
    with pytest.raises(BatchTooLarge):
        drawer.draw([Share("a red cat", 3, range(7))])
    assert drawer.limit == 3
    share = Share("a red cat", 3, range(3))
    assert torch.equal(drawer.draw([share])[0], alone(model, share))
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        drawer.draw([Share("a red cat", 3, range(1))])
    with pytest.raises(ValueError, match="expected 1 to 3 candidates, got 4"):
        drawer.draw([Share("a red cat", 3, range(4))])


def test_other_errors_are_no_lack_of_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that is answered with ever smaller batches."""

    def fail(*_: object) -> Tensor:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Generator, "draw", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        ShareDrawer(model, SamplingOptions()).draw(SHARES)


def test_groups_waste_little() -> None:
    """Groups that exceed the limit, or compute more than candidates one by one would."""
    for sizes in product(range(1, 7), repeat=3):
        for limit in (sum(sizes), sum(sizes) + 3):
            b = group_size(sizes, limit, length=64, text_length=16)
            groups = sum(ceil(size / b) for size in sizes)
            assert groups * b <= limit
            assert groups * (b * 64 + 16) <= sum(sizes) * (64 + 16)
    assert group_size([40], 64, 64, 16) == 40  # one caption is read once
    assert group_size([8, 8, 8], 64, 64, 16) == 8
    assert group_size([7, 1], 64, 1000, 1) == 1
