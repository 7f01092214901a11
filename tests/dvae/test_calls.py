"""What a caller has set in torch changes no tokens, images, scores or weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import dalle1
import dvae
from dalle1 import Model
from dalle1.generation.options import candidate_uniforms
from dalle1.transformer import attention, masks
from dvae.calls import isolated, trusted
from tests.conftest import ModelMaker

CAPTIONS = ["a red cat", "the blue dog"]
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(5, (2, 4, 4), generator=torch.Generator().manual_seed(0))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "in torch.device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Iterator[AbstractContextManager[object]]:
    """Something that a caller may have set; masks that are kept are made anew in it."""
    for kept in (attention._mask, attention._chunks, masks.step_keys, masks.slots):
        kept.cache_clear()
    yield SETTINGS[request.param]()
    for kept in (attention._mask, attention._chunks, masks.step_keys, masks.slots):
        kept.cache_clear()


def everything(model: Model, folder: Path) -> dict[str, torch.Tensor]:
    """A tensor of everything that encodes, draws, ranks or loads."""
    settings = {"candidates": 3, "keep": 2, "progress": False, "top_p": 0.9, "guidance": 1.5}
    pixels = (255 * IMAGES[0].movedim(0, -1)).to(torch.uint8).numpy()
    drawn = dalle1.sample(CAPTIONS, model, image=pixels, rows=2, **settings)
    text = model.tokenizer.encode(CAPTIONS[0])[0]
    uniforms = candidate_uniforms(1, "x", 0, 2, 16)
    loaded, codec = dalle1.load(folder), dvae.load(folder)
    assert isinstance(model.ranker, dalle1.CLIP)
    found = {
        "tokens": drawn.tokens,
        "scores": drawn.scores,
        "images": torch.from_numpy(np.stack([np.asarray(i) for row in drawn.images for i in row])),
        "rank": dalle1.rank(CAPTIONS, IMAGES, model),
        "rank arrays": model.rank(CAPTIONS, [pixels, pixels / np.float64(255)]),
        "score": model.ranker.score(CAPTIONS, IMAGES),
        "classify": model.ranker.classify(IMAGES, CAPTIONS),
        "log_prob": model.log_prob(CAPTIONS[0], TOKENS),
        "prior": model.transformer.log_prob(text.expand(2, -1), TOKENS.flatten(1)),
        "encode": model.codec.encode(IMAGES),
        "decode": model.codec.decode(TOKENS),
        "draw": dalle1.decoding.draw(model.transformer, text, uniforms),
        "text": torch.tensor([ord(x) for x in model.complete_caption("a", seed=3)], device="cpu"),
        "codec": codec.encode(IMAGES),
        "loaded": loaded.log_prob(CAPTIONS[0], TOKENS),
    }
    for name, part in (("prior", loaded.prior), ("codec", loaded.codec), ("clip", loaded.ranker)):
        for key, weight in part.state_dict().items():
            assert not weight.is_inference()
            found[f"{name} {key}"] = weight
    return found


def test_what_the_caller_has_set_changes_nothing(
    model: Model, tmp_path: Path, setting: AbstractContextManager[object]
) -> None:
    """Other tokens, scores or weights inside of a caller's autocast, or after set_default_dtype."""
    model.save(tmp_path)
    expected = everything(model, tmp_path)
    for kept in (attention._mask, attention._chunks, masks.step_keys, masks.slots):
        kept.cache_clear()
    with setting:
        found = everything(model, tmp_path)
        again = everything(model, tmp_path)
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device().type == "cpu"
    for other in (found, again, everything(model, tmp_path)):  # masks that were kept serve on
        for name, value in expected.items():
            assert other[name].dtype == value.dtype and other[name].device == value.device, name
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_one_trains_after_drawing(make_model: ModelMaker, place: str) -> None:
    """A mask that was made while drawing, without gradients, and breaks the next update."""
    model = make_model()
    for kept in (attention._mask, attention._chunks, masks.step_keys, masks.slots):
        kept.cache_clear()
    with torch.inference_mode() if place == "inside" else torch.no_grad():
        result = dalle1.sample(CAPTIONS, model, candidates=2, keep=2, progress=False)
        scores = dalle1.rank(CAPTIONS[0], result.images[0], model)
        log_prob = model.log_prob(CAPTIONS[0], result.tokens[0])
    text = model.tokenizer.encode(CAPTIONS)
    model.transformer.loss(text, result.tokens[:, 0].flatten(1)).loss.backward()
    weight = torch.ones(2, requires_grad=True)
    ((scores + log_prob + result.scores[0]) * weight).sum().backward()
    assert weight.grad is not None


def test_weights_that_were_moved_are_trained(model: Model, tmp_path: Path) -> None:
    """A model that was loaded and moved in inference mode, and that no update can change."""
    model.save(tmp_path)
    with torch.inference_mode():
        moved = dalle1.load(tmp_path).to("cpu", torch.bfloat16)
    parameters = [p for part in (moved.transformer, moved.codec) for p in part.parameters()]
    assert not any(p.is_inference() for p in parameters)
    assert all(p.requires_grad for p in parameters)
    text = moved.tokenizer.encode(CAPTIONS)
    moved.transformer.loss(text, TOKENS.flatten(1)).loss.backward()


def test_settings_of_the_caller_come_back() -> None:
    """A caller whose autocast or default type is gone after a call, or after its error."""
    with torch.autocast("cpu", torch.bfloat16), default_dtype(torch.float64), torch.device("meta"):
        with isolated():
            assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32
        with pytest.raises(ValueError, match="no folder"):
            dalle1.load("nowhere")
        assert torch.zeros(1).dtype == torch.float64 and torch.zeros(1).device.type == "meta"
        product = torch.ones(1, 1, device="cpu").float() @ torch.ones(1, 1, device="cpu").float()
        assert product.dtype == torch.bfloat16


def test_our_own_autocast_counts() -> None:
    """`precision: bf16` of token shards that does nothing."""
    codec = dvae.DVAE(dvae.DVAEConfig(width=8, bottleneck=6, groups=2, codebook_size=7))
    seen: list[torch.dtype] = []
    codec.encoder.blocks.input.register_forward_hook(lambda *x: seen.append(x[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        codec.encode(IMAGES)
        with trusted():
            codec.encode(IMAGES)
    assert seen == [torch.float32, torch.bfloat16]
