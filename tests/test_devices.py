"""Every step of the library with its weights on a device, found out without one.

A tensor that is made on the CPU by mistake fails on a GPU alone. `tests.devices` pretends a device:
its tensors hold real numbers, and mixing them with the CPU's is refused at every operator, forward
and backward. So each step here is run as it is used, decoding included, and must also give what it
gives on the CPU. What the host waits for is recorded: training, and a step that is captured as a
graph, must not wait in the middle.

Not covered: kernels themselves, DeepSpeed, several devices.

Dimensions: b batch, t text positions, m image positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import dalle1
from dalle1 import CLIP, CLIPConfig, Model, Transformer
from dalle1.data.shards.loader import Batch
from dalle1.generation.generator import Generator, complete_text
from dalle1.generation.likelihood import LikelihoodConfig, LikelihoodRanker, stepped_log_probs
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.training.config import RunConfig
from dalle1.training.ema import EMA
from dalle1.training.optimizer import TrainingOptimizer
from dalle1.training.stages.base import Stage
from dalle1.training.stages.clip import CLIPStage
from dalle1.training.stages.dvae import DVAEStage
from dalle1.training.stages.prior import PriorStage
from dalle1.transformer.config import Execution
from dalle1.transformer.layers import Layer
from dalle1.transformer.sequence import PATTERNS, Pattern
from dvae import DVAE, DVAEConfig
from dvae.calls import trusted
from dvae.objective import relaxed_elb
from dvae.warm_start import ContinuousBottleneck
from tests.conftest import ModelMaker, TransformerMaker
from tests.devices import KINDS, DeviceTensor, held, pretended

ON_EACH = pytest.mark.parametrize("kind", KINDS)
TEXT = torch.tensor([[3, 1, 13, 14, 15, 16], [7, 7, 7, 14, 15, 16]])
IMAGE = torch.arange(32).view(2, 16) * 5 % 9


def check(
    kind: str,
    part: Any,
    call: Callable[..., Any],
    *inputs: Any,
    rounding: float = 1e-4,
    again: bool = True,
) -> list[str]:
    """Runs call(part, *inputs) on the CPU and on a device, and compares the results.

    Returns what host and device waited for in a second call (`again`), when what is kept is made.
    """
    here, there = copy.deepcopy(part), copy.deepcopy(part)
    expected = call(here, *inputs)
    with pretended(kind) as device:
        there.to(device.device)
        moved = tree_map_only(Tensor, lambda x: x.to(device.device), inputs)
        found = call(there, *moved)
        device.waits.clear()
        if again:
            found = call(there, *moved)
        waits = list(device.waits)
    assert any(isinstance(x, Tensor) for x in tree_leaves(expected))
    torch.testing.assert_close(held(found), expected, rtol=10 * rounding, atol=rounding)
    return waits


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


class Toy(nn.Module):
    """Makes what it needs beside its weight where it is told to."""

    def __init__(self, place: str | None) -> None:
        super().__init__()
        self.place = place
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device if self.place is None else self.place
        rows = torch.arange(3, device=device)
        return (x @ self.weight + rows)[rows.flip(0)].masked_fill(rows == 1, 0)


class ToyBackward(torch.autograd.Function):
    """Right forward; its gradient is made of a tensor of the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.full((3,), 2.0)


@ON_EACH
def test_a_tensor_of_the_cpu_is_found(kind: str) -> None:
    """Tests of devices that pass whatever is mixed: each kind of mistake must raise here."""
    assert check(kind, Toy(None), lambda toy, x: gradients(toy(x).sum(), toy), torch.eye(3)) == []
    mixed = "expected one device"
    with pytest.raises(RuntimeError, match=mixed):
        check(kind, Toy("cpu"), lambda toy, x: toy(x), torch.eye(3))
    with pretended(kind) as device:
        x, rows = torch.eye(3, device=device.device), torch.arange(3)
        assert isinstance(x, DeviceTensor) and x.device == device.device != rows.device
        mistakes: list[Callable[[], Any]] = [
            lambda: x + rows,
            lambda: x[rows],
            lambda: x.index_select(0, rows),
            lambda: x.masked_fill(rows == 1, 0),
            lambda: torch.where(rows == 1, x, 0),
            lambda: torch.cat([x, torch.eye(3)]),
            lambda: rows[x[0].long()],
            lambda: torch.zeros(()).add_(x.sum()),
            lambda: x.new_zeros(3).copy_(rows).add_(rows),
            lambda: x.normal_(generator=torch.Generator()),
            lambda: torch.rand(3, generator=torch.Generator(device.device)),
        ]
        for mistake in mistakes:
            with pytest.raises(RuntimeError, match="expected"):
                mistake()
        y = ToyBackward.apply(x.clone().requires_grad_())  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match=mixed):
            y.sum().backward()
        allowed = x * torch.tensor(2.0) + x.new_tensor([1, 2, 3])
        allowed[:, 1] = 5
        assert allowed.tolist() == [[3, 5, 3], [1, 5, 3], [1, 5, 5]]


@ON_EACH
def test_waits_are_recorded(kind: str) -> None:
    """A check for waits that sees none of them, or some where there are none."""
    with pretended(kind) as device:
        x = torch.eye(3, device=device.device)
        x[1:, 0] = 2
        x.clone().to(torch.float16).to(x.device).sum()
        torch.arange(3, device=x.device), x.new_ones(3), torch.zeros(2).tolist()
        assert device.waits == []
        waits: list[Callable[[], Any]] = [
            lambda: float(x[0, 0]),
            lambda: bool((x == 1).all()),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: torch.equal(x, x),
            lambda: torch.zeros(3, 3).copy_(x),
            lambda: x.copy_(torch.eye(3)),
            lambda: torch.eye(3).to(x.device),
            lambda: torch.tensor([1, 2], device=x.device),
        ]
        for wait in waits:
            device.waits.clear()
            wait()
            assert len(device.waits) == 1


SHAPES = [
    {},
    {"groups": 1},
    {"groups": 3, "blocks_per_group": 2},
    {"encoder_window": 2},
    {"residual_gain": 0.5, "init_gain": 1.5},
]


def make_codec(**shape: Any) -> DVAE:
    torch.manual_seed(0)
    small = {"width": 8, "bottleneck": 6, "groups": 2, "blocks_per_group": 1, "codebook_size": 5}
    return DVAE(DVAEConfig(**{**small, **shape}))


@ON_EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codec(kind: str, shape: dict[str, Any]) -> None:
    """A table or an index of `encode` or `decode` that stays on the CPU; a look at the pixels
    where our own code, whose pixels are known, would wait for it."""
    codec = make_codec(**shape)
    images = torch.rand(2, 3, 8, 8)
    check(kind, codec, lambda c, x: (c.encode(x), c.decode(c.encode(x)), c.logits(x)), images)
    with trusted():
        assert check(kind, codec, lambda c, x: c.encode(x), images) == []


@ON_EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("generators", [None, 1, 2])
def test_relaxed_elb(kind: str, generators: int | None, dtype: torch.dtype) -> None:
    """Noise that is drawn on the CPU, a term of the loss that is, or a wait between the two
    passes."""

    def call(codec: DVAE, images: Tensor) -> Any:
        torch.manual_seed(0)
        several = [torch.Generator(images.device).manual_seed(i) for i in range(2)]
        given = {None: None, 1: several[0], 2: several}[generators]
        with trusted(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            elb = relaxed_elb(codec, images, 0.9, 0.5, given)
        found = [elb.loss.detach(), elb.kl.detach(), elb.reconstruction.detach(), elb.tokens]
        return (found, gradients(elb.loss, codec)) if dtype == torch.float32 else found[0]

    assert check(kind, make_codec(), call, torch.rand(2, 3, 8, 8)) == []


class WithBottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codec = make_codec()
        self.bottleneck = ContinuousBottleneck(self.codec, 3)


@ON_EACH
def test_warm_start(kind: str) -> None:
    """k-means that draws with a generator of the CPU from samples of the device, or that holds its
    counts on the CPU."""

    def install(both: WithBottleneck, images: Tensor) -> Any:
        generator = torch.Generator(images.device).manual_seed(0)
        both.bottleneck.install_centers(both.codec, images, 2.0, generator)
        return {name: weight.detach() for name, weight in both.named_parameters()}

    def train(both: WithBottleneck, images: Tensor) -> Any:
        torch.manual_seed(0)
        loss = both.bottleneck.loss(both.codec, images, noise=0.1)
        return loss.detach(), gradients(loss, both)

    check(kind, WithBottleneck(), install, torch.rand(4, 3, 8, 8))
    assert check(kind, WithBottleneck(), train, torch.rand(4, 3, 8, 8)) == []


def make(maker: TransformerMaker, execution: Execution | None = None, **shape: Any) -> Transformer:
    """A transformer of all patterns, with heads that FlexAttention's kernels take."""
    sides = {"width": 32, "heads": 2, "head_size": 16}
    transformer = maker(**{"layers": len(PATTERNS), "std": 0.2, **sides, **shape})
    for layer, pattern in zip(transformer.layers, PATTERNS, strict=False):
        assert isinstance(layer, Layer)
        layer.attention.pattern = pattern
        if execution is not None:
            layer.attention.execution = execution
            layer.checkpointing = execution.checkpointing
    return transformer


def losses(transformer: Transformer, text: Tensor, image: Tensor) -> Any:
    found = transformer.loss(text, image, 3.5)
    return found.text.detach(), found.image.detach(), gradients(found.loss, transformer)


@ON_EACH
@pytest.mark.parametrize("attention", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformer_trains(
    make_transformer: TransformerMaker, kind: str, attention: Any, checkpointing: bool
) -> None:
    """A mask, a target or an index of one pattern that is made on the CPU, forward or backward, in
    the blocks of sparse attention too; a wait in the middle of an update."""
    execution = Execution(attention=attention, checkpointing=checkpointing)
    transformer = make(make_transformer, execution)
    if (kind, attention) == ("mps", "sparse"):
        with pytest.raises(ValueError, match=r"^sparse attention.*mps.*dense"):
            check(kind, transformer, losses, TEXT, IMAGE)
        return
    assert check(kind, transformer, losses, TEXT, IMAGE) == []


@ON_EACH
def test_a_long_stream(make_transformer: TransformerMaker, kind: str) -> None:
    """Kernels of the CPU that are chosen for a device, since from some length on they are faster on
    the CPU."""
    transformer = make(make_transformer, text_length=70, grid=14)
    text, image = torch.arange(2 * 70).view(2, 70) % 11, torch.arange(2 * 196).view(2, 196) % 9
    with torch.no_grad():
        assert check(kind, transformer, lambda t, *x: t(*x), text, image) == []


@ON_EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_narrow_blocks(
    make_transformer: TransformerMaker, kind: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    """Autocast of another device than the states', a gradient scale or its record of overflow on
    the CPU, a look at each scale in the middle of the backward pass."""

    def call(transformer: Transformer, text: Tensor, image: Tensor) -> Any:
        scales = []
        for layer in transformer.layers:
            assert isinstance(layer, Layer)
            layer.narrow = dtype
            if dtype == torch.float16 and not layer.scales:
                layer.scale_gradients(1)
            scales += layer.scales
        loss = transformer.loss(text, image).loss
        found = gradients(loss, transformer)
        made = [x for scale in scales for x in scale._broken]
        assert not made or type(made[0]) is type(loss.detach())
        for scale in scales:
            scale._broken.clear()
        # In 16 bits the two attentions differ by their rounding.
        assert found and all(x.dtype == torch.float32 for x in found.values())
        return loss.detach()

    transformer = make(make_transformer, Execution(checkpointing=checkpointing))
    assert check(kind, transformer, call, TEXT, IMAGE, rounding=1e-2) == []


@ON_EACH
@pytest.mark.parametrize("pattern", PATTERNS)
def test_likelihoods(make_transformer: TransformerMaker, kind: str, pattern: Pattern) -> None:
    """`log_prob`, a cut image or the text alone with a mask or an index of the CPU."""
    transformer = make(make_transformer, layers=2)
    for layer in transformer.layers:
        assert isinstance(layer, Layer)
        layer.attention.pattern = pattern

    def call(t: Transformer, text: Tensor, image: Tensor) -> Any:
        with torch.no_grad():
            cut = t(text, image[:, :7]), t(text, image[:, :0])
        return t.log_prob(text, image), cut, t.next_text_logits([3, 1]), t.empty_caption()

    check(kind, transformer, call, TEXT, IMAGE)


def fed(rows: int, image_vocab: int) -> Tensor:
    """Image inputs [n, m + 1], the start first."""
    image = torch.arange(rows * 16).view(rows, 16) * 7 % 9
    return torch.cat([torch.full((rows, 1), image_vocab), image], dim=1)


@ON_EACH
@pytest.mark.parametrize("given", [0, 5])
@pytest.mark.parametrize("places", ["numbers", "static", "rows"])
def test_steps(make_transformer: TransformerMaker, kind: str, places: str, given: int) -> None:
    """Caches or tables of slots on the CPU, for positions that are numbers, tensors, or one for
    each row."""

    def call(t: Transformer, text: Tensor, inputs: Tensor) -> Any:
        state = t.start(2, 2, places == "static")
        state.prefill(text, inputs[0, 1 : given + 1] if given else None)
        logits = []
        for p in range(given, 9):
            position: int | Tensor = p
            if places != "numbers":
                position = torch.full((1 if places == "static" else 4,), p, device=text.device)
            logits.append(state.step(inputs[:, p : p + 1], position))
        return torch.cat(logits, dim=1)

    inputs = fed(4, 9)
    inputs[:, : given + 1] = inputs[0, : given + 1]
    check(kind, make(make_transformer, grid=3), call, TEXT, inputs, again=False)


@ON_EACH
def test_a_static_step_waits_for_nothing(make_transformer: TransformerMaker, kind: str) -> None:
    """A step that no graph can be captured of: a copy from the CPU, or a look at a number."""

    transformer = copy.deepcopy(make(make_transformer, grid=3))
    with pretended(kind) as device, torch.inference_mode():
        state = transformer.to(device.device).start(2, 1, True)
        state.prefill(TEXT.to(device.device))
        token = torch.full((2, 1), 9, device=device.device)
        position = torch.zeros(1, dtype=torch.int64, device=device.device)
        device.waits.clear()
        for _ in range(9):
            state.step(token, position)
            position += 1
        assert device.waits == []


@ON_EACH
def test_windows_and_going_back(make_transformer: TransformerMaker, kind: str) -> None:
    """Rings of windows, their masks, or what is kept to fill them anew, on the CPU, where rows
    stand at different positions and go back further than the caches reach."""

    def call(t: Transformer, text: Tensor, inputs: Tensor) -> Any:
        state = t.start(2, 1)
        state.prefill(text, inputs[0, 1:3])
        steps: list[tuple[list[int], int]] = [
            ([2, 2], 3), ([3, 4], 3), ([6, 7], 2), ([0, 1], 2), ([2, 2], 1), ([1, 0], 1),
            ([2, 1], 4),
        ]  # fmt: skip
        logits = []
        for first, count in steps:
            index = torch.tensor(first)[:, None] + torch.arange(count)
            tokens = inputs.gather(1, index.to(text.device))
            logits.append(state.step(tokens, torch.tensor(first, device=text.device)))
        return logits

    inputs = fed(2, 9)
    inputs[:, :3] = inputs[0, :3]
    check(kind, make(make_transformer, grid=3), call, TEXT, inputs, again=False)


OPTIONS = [
    {},
    {"temperature": 0.0, "guidance": 1.5},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.8},
]


@ON_EACH
@pytest.mark.parametrize("settings", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["steps", "static", "windows"])
def test_generator(
    make_transformer: TransformerMaker, kind: str, mode: str, settings: dict[str, Any]
) -> None:
    """Tokens, random numbers or what is told of them on the CPU; a wait in a step that a graph is
    captured of. The tokens must be those of the CPU."""
    transformer = make(make_transformer, grid=3)
    options = SamplingOptions(window=4 if mode == "windows" else 1, **settings)
    uniforms = torch.stack([candidate_uniforms(1, str(i), 0, 2, 9) for i in range(2)])
    shown: list[int] = []

    def call(t: Transformer) -> Any:
        # What users hand in lies on the CPU.
        generator = Generator(t, 2, 2, options, mode == "static")
        prefix = torch.tensor([3, 1, 4]) if settings else None
        return generator.draw(TEXT, uniforms, prefix, lambda done, tokens: shown.append(done))

    check(kind, transformer, call, again=False)
    assert shown == ([6, 9] if settings else [3, 6, 9]) * 2


@ON_EACH
def test_captions_are_completed(make_transformer: TransformerMaker, kind: str) -> None:
    """Random numbers of the CPU for logits of the device."""
    uniforms = candidate_uniforms(0, "x", 0, 1, 6)[0]

    def call(t: Transformer) -> Any:
        return torch.tensor(complete_text(t, [3], uniforms, SamplingOptions(top_p=0.9)))

    check(kind, make(make_transformer), call)


@ON_EACH
@pytest.mark.parametrize("side", [8, 12])
def test_ranker(model: Model, kind: str, side: int) -> None:
    """Mean, deviation, ids, or the places of the captions' ends on the CPU; a wait in the loss."""
    assert isinstance(model.ranker, CLIP)
    images, ids = torch.rand(3, 3, side, side), model.ranker.ids(["a red cat", "a dog", "mats"])

    def loss(clip: CLIP, images: Tensor, ids: Tensor) -> Any:
        found = clip.loss(images, ids)
        return found.detach(), gradients(found, clip)

    def use(clip: CLIP, images: Tensor, ids: Tensor) -> Any:
        with torch.no_grad():
            embedded = clip.encode_image(images), clip.encode_text(ids), clip(images, ids)
        scores = clip.score(["a red cat", "a dog"], images), clip.score(["a dog"], images.cpu())
        return embedded, scores, clip.classify(images, ["a cat", "a dog"])

    with trusted():
        assert check(kind, model.ranker, loss, images, ids) == []
    check(kind, model.ranker, use, images, ids)


@ON_EACH
def test_ranker_with_a_resnet(kind: str) -> None:
    """Positions or statistics that stay on the CPU."""
    config = CLIPConfig(
        embedding=8, image_size=32, vision_width=4, vision_layers=(1, 2, 1, 1), vision_heads=2,
        text_vocab=20, text_length=8, text_width=8, text_layers=1, text_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    clip, images = CLIP(config).eval(), torch.rand(3, 3, 40, 36)

    def call(clip: CLIP, images: Tensor) -> Any:
        with torch.no_grad():
            return clip.embed_images(images)

    check(kind, clip, call, images)


@ON_EACH
@pytest.mark.parametrize("measure", ["log_prob", "perplexity"])
def test_likelihood(make_model: ModelMaker, kind: str, measure: str) -> None:
    """Captions or tokens of the CPU for a prior on the device, images for its codec."""
    model, images = make_model(), torch.rand(2, 3, 12, 12)
    model.ranker = LikelihoodRanker(LikelihoodConfig.model_validate({"measure": measure}))
    tokens = torch.randint(5, (2, 16))

    def call(model: Model, tokens: Tensor, images: Tensor) -> Any:
        ranker, captions = model.ranker, ["a red cat", "mats"]
        assert isinstance(ranker, LikelihoodRanker)
        text = model.tokenizer.encode("a red cat")[0].to(model.device)
        stepped = stepped_log_probs(model.prior, text, tokens.to(model.device))
        return (
            ranker.score_tokens(captions, tokens.cpu()),
            ranker.score(captions, images.cpu()),
            stepped,
        )

    check(kind, model, call, tokens, images)


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", torch.bfloat16), ("mps", torch.float32)])
def test_full_model(make_model: ModelMaker, kind: str, dtype: torch.dtype) -> None:
    """A part of a model that is handed the tensors of another one without a look at its device."""
    model, pixels = make_model(), torch.rand(3, 8, 8)

    def call(model: Model) -> Any:
        results = []
        for window, rows in ((1, 2), (4, 0)):
            result = dalle1.sample(
                ["a red cat", "a dog"], model, 2, 1, progress=False, window=window,
                image=pixels if rows else None, rows=rows, on_step=lambda preview: None,
            )  # fmt: skip
            results.append(result)
        tokens = results[0].tokens[0]
        shapes = [torch.tensor(result.tokens.shape) for result in results]
        scores = dalle1.rank(["a dog", "a cat"], [*results[0].images[0], pixels], model)
        known = model.log_prob("a dog", tokens), scores
        exact = [(r.tokens, r.scores) for r in results], known, len(model.complete_caption("a"))
        return exact if dtype == torch.float32 else shapes

    expected = call(copy.deepcopy(model).to("cpu", dtype))
    with pretended(kind) as device:
        there = copy.deepcopy(model).to(device.device, dtype)
        assert there.device == device.device
        found = call(there)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def folder(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full model, whose parts the stages read."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save(folder)
    return folder


def config_of(name: str, folder: Path, precision: str) -> RunConfig:
    model = dalle1.load(folder)
    sections: dict[str, dict[str, Any]] = {
        "dvae": {
            "dvae": model.codec.config,
            "dvae_training": {"grain": 0.02, "warm_start_steps": 2, "warm_start_images": 16},
        },
        "clip": {"clip": model.ranker.config, "tokenizer": str(folder)},
        "dalle": {
            "transformer": model.prior.config,
            "codec": str(folder),
            "ranker": str(folder),
            "tokenizer": str(folder),
            "caption_dropout": 0.5,
        },
    }
    common = {"run": str(folder / "run"), "data": "shapes", "steps": 9, "batch_size": 4}
    parallel = {"precision": precision}
    reader = {"image_size": 8}
    return RunConfig(stage=name, **common, parallel=parallel, reader=reader, **sections[name])


STAGES: dict[str, Callable[[RunConfig], Stage]] = {
    "dvae": DVAEStage,
    "clip": CLIPStage,
    "dalle": PriorStage,
}


def batch_of(tokens: bool) -> Batch:
    """What the dataloader gives: images or tokens on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator)
    found = torch.randint(5, (4, 16), dtype=torch.int32, generator=generator)
    captions = ["a red cat", "a blue dog", "the mat", "one cat"]
    if tokens:
        return Batch(None, captions, [1, 2, 3, 4], found)
    return Batch(images, captions, [1, 2, 3, 4])


def first_images(count: int) -> Tensor:
    images = batch_of(False).images
    assert images is not None
    return images.repeat(count // 4, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "precision", "tokens", "uploads"),
    [
        ("dvae", "fp32", False, 1),  # the images
        ("dvae", "bf16", False, 1),
        ("clip", "fp32", False, 2),  # the captions too
        ("clip", "bf16", False, 2),
        ("dalle", "fp32", False, 2),
        ("dalle", "bf16", True, 2),
        ("dalle", "fp16", True, 2),
    ],
)
def test_updates(folder: Path, name: str, precision: str, tokens: bool, uploads: int) -> None:
    """What a stage adds to its model on the CPU: noise, targets, counts of codes, gradients of 0,
    moments, the average. And waits in a micro-batch other than for its samples."""
    scaled = precision == "fp16"
    stage = STAGES[name](config_of(name, folder, "fp32" if scaled else precision))

    def call(stage: Stage, waits: Sequence[str]) -> Any:
        if isinstance(stage, PriorStage) and scaled:
            stage._set_precision(precision)  # once the weights are moved, which it hooks into
        torch.manual_seed(0)
        optimizer = TrainingOptimizer(
            [{"params": list(stage.parameters()), "maximum": 4.0}], stage.settings.optimizer
        )
        optimizer.init_state(stage.parameters())
        average = EMA(stage.model.named_parameters(), dict(stage.model.named_parameters()), 0.9)
        found = []
        for step in range(4):
            (micro_batch,) = stage.micro_batches(batch_of(tokens), 4)
            if stage.replaces_weights(step):
                weights = {name: p.detach().clone() for name, p in stage.named_parameters()}
                stage.load_state_dict(stage.replacement_weights(weights, first_images))
            before = len(waits)
            loss, metrics = stage(micro_batch, step)
            optimizer.zero_grad()
            loss.backward()
            if step % 2:  # of each phase the first makes what is kept
                assert len(waits) - before == (uploads if waits else 0), waits[before:]
            optimizer.step()
            average.update(stage.model.named_parameters())
            found.append((loss.detach(), metrics["logit_scale"] if name == "clip" else 0))
            for scale in stage.gradient_scales:
                scale.update(scale.take_broken())
        stage.pop_metrics()
        return found, average.average

    expected, _ = call(copy.deepcopy(stage), ())
    with pretended("cuda") as device:
        there = copy.deepcopy(stage).to(device.device)
        found, average = call(there, device.waits)
        assert not any(isinstance(x, DeviceTensor) for x in average.values())
        full = there.model_with(average).to(device.device)
        there.draw_contact_sheet(full, batch_of(tokens))
    rounding = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}[precision]
    torch.testing.assert_close(held(found), expected, rtol=rounding, atol=rounding)
