"""Parts that are filled with weights: no memory on a file's word, none twice, no type changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import dvae
from dalle1 import CLIPConfig, registry
from dvae import DVAE, DVAEConfig
from dvae.storage import Kind, load_part, save_part
from tests.conftest import TransformerMaker

ROOT = Path(__file__).parents[2]
SHAPE = {"width": 4, "bottleneck": 3, "groups": 2, "blocks_per_group": 1, "codebook_size": 6}


@pytest.fixture
def codec() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(**SHAPE)).eval()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The number of parameters that modules are given, in a list."""
    made = [0]

    def count(*_: Any) -> None:
        made[0] += 1

    hook = register_module_parameter_registration_hook(count)
    try:
        yield made
    finally:
        hook.remove()


def part_of(role: str, make_transformer: TransformerMaker) -> nn.Module:
    if role == "prior":
        return make_transformer()
    if role == "codec":
        return DVAE(DVAEConfig(**SHAPE))
    config = CLIPConfig(
        embedding=8, image_size=8, patch_size=4, vision_width=8, vision_layers=1, vision_heads=2,
        text_vocab=30, text_length=10, text_width=8, text_layers=1, text_heads=2,
    )  # fmt: skip
    return registry.KINDS["ranker"]["clip"].module(config)


@pytest.mark.parametrize(
    ("role", "claim"),
    [
        ("prior", {"layers": 10_000}),
        ("prior", {"layers": 10**12}),
        ("prior", {"width": 2**20, "heads": 2**17}),
        ("prior", {"image_vocab": 10**12}),
        ("prior", {"text_length": 10**9}),
        ("prior", {"grid": 10**30}),
        ("codec", {"blocks_per_group": 10_000}),
        ("codec", {"groups": 10_000}),
        ("codec", {"groups": 10**9}),
        ("codec", {"codebook_size": 10**15}),
        ("codec", {"width": 4 * 10**10}),
        ("ranker", {"vision_layers": 10_000}),
        ("ranker", {"text_layers": 10**11}),
        ("ranker", {"text_vocab": 10**12}),
        ("ranker", {"image_size": 4 * 10**7}),
        ("ranker", {"embedding": 10**11}),
    ],
)
def test_a_config_that_claims_too_much(
    role: str, claim: dict[str, int], make_transformer: TransformerMaker, tmp_path: Path
) -> None:
    """Modules and numbers that are made because a config.json says so, until memory ends."""
    part = part_of(role, make_transformer)
    save_part(registry.kind_of(role, part), part, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[role] |= claim
    path.write_text(json.dumps(config))
    with counted() as made, pytest.raises(ValueError, match=r"\.safetensors: ") as raised:
        registry.load(role, tmp_path)
    assert made[0] < 1000
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


# Loads a folder in a process of its own; prints the growth of the memory in bytes, at its peak.
MEASURE = """
import sys, torch
from dalle1 import registry
import dvae.storage

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(l.split()[1]) for l in lines if l.startswith(name))

role, small, folder = sys.argv[1:]
for path in (small, folder):  # what torch itself takes once is not counted
    before = status("VmRSS")
    part = registry.load(role, path)
    total = sum(float(p.detach().sum()) for p in part.parameters())
print(status("VmHWM") - before, {p.dtype for p in part.parameters()}, total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process' memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memory_of_weights_that_are_read(
    dtype: torch.dtype, make_transformer: TransformerMaker, tmp_path: Path
) -> None:
    """Weights that are drawn at random first, copied, or widened: twice the memory or more."""
    shape = {"width": 1024, "heads": 16, "head_size": 64, "layers": 8, "grid": 8}
    for name, config in (("small", {}), ("large", shape)):
        part = make_transformer(**config).to(dtype)
        save_part(registry.kind_of("prior", part), part, tmp_path / name)
    size = (tmp_path / "large" / "transformer.safetensors").stat().st_size
    assert size > 180e6
    folders = [str(tmp_path / name) for name in ("small", "large")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "prior", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown, rest = done.stdout.split(" ", 1)
    assert rest.startswith(f"{{{dtype}}}") and float(rest.split()[-1]) != 0
    assert int(grown) <= 1.1 * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_stay_so(
    dtype: torch.dtype, codec: DVAE, make_transformer: TransformerMaker, tmp_path: Path
) -> None:
    """A prior of 16 bits in 32, twice as large; a codec that cannot read images of 32 any more."""
    transformer = make_transformer().to(dtype)
    save_part(registry.kind_of("prior", transformer), transformer, tmp_path)
    again = registry.load("prior", tmp_path)
    assert {p.dtype for p in again.parameters()} == {dtype}
    text, image = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64)
    assert torch.equal(again.log_prob(text, image), transformer.log_prob(text, image))
    narrow = DVAE(codec.config).to(dtype).eval()
    narrow.load_state_dict(codec.state_dict())
    narrow.save(tmp_path)
    read = dvae.load(tmp_path)
    assert isinstance(read, DVAE) and {p.dtype for p in read.parameters()} == {dtype}
    images, wide = torch.rand(2, 3, 8, 8), narrow.float()
    assert torch.equal(read.encode(images), wide.encode(images))
    assert torch.equal(read.decode(read.encode(images)), wide.decode(wide.encode(images)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("encoder.blocks.input.b", torch.float32),
        ("decoder.blocks.input.w", torch.float64),
        ("decoder.blocks.output.conv.b", torch.bfloat16),
    ],
)
def test_weights_of_several_types(
    name: str, dtype: torch.dtype, codec: DVAE, tmp_path: Path
) -> None:
    """A model that cannot multiply, since its file holds some weights in 16 bits and some not."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    weights = {n: w.half() for n, w in load_file(path).items()}
    save_file({**weights, name: weights[name].to(dtype)}, path)
    again = dvae.load(tmp_path)
    assert isinstance(again, DVAE) and {p.dtype for p in again.parameters()} == {torch.float32}
    again.encode(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2])
def test_types_that_nothing_computes_in(dtype: torch.dtype, codec: DVAE, tmp_path: Path) -> None:
    """Weights of 64 or 8 bits that meet images of 32."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    save_file({n: w.to(dtype) for n, w in load_file(path).items()}, path)
    again = dvae.load(tmp_path)
    assert isinstance(again, DVAE) and {p.dtype for p in again.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_numbers_of_another_sort(dtype: torch.dtype, codec: DVAE, tmp_path: Path) -> None:
    """Whole numbers taken for weights."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    weights = load_file(path)
    weights["encoder.blocks.input.b"] = weights["encoder.blocks.input.b"].to(dtype)
    save_file(weights, path)
    with pytest.raises(ValueError, match=rf"'encoder\.blocks\.input\.b' has type {dtype}, expect"):
        dvae.load(tmp_path)


def default_dtype() -> Any:
    @contextmanager
    def set_and_back() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return set_and_back()


@pytest.mark.parametrize(
    "inside",
    [
        nullcontext,
        default_dtype,
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
)
def test_loading_is_the_same_whatever_is_set(inside: Any, codec: DVAE, tmp_path: Path) -> None:
    """Parts in 64 bits, without numbers, or that no loss accepts, as the caller's mode has it."""
    codec.save(tmp_path)
    published = {name: tmp_path / f"{name}.pt" for name in ("encoder", "decoder")}
    for name, path in published.items():
        torch.save(getattr(released(), name).state_dict(), path)
    with inside():
        parts = [dvae.load(tmp_path), dvae.load_released(*published.values())]
    for again, expected in zip(parts, (codec, released()), strict=True):
        assert isinstance(again, DVAE) and not again.training
        for (name, held), weight in zip(
            again.named_parameters(), expected.parameters(), strict=True
        ):
            assert torch.equal(held, weight) and held.dtype == torch.float32, name
            assert held.requires_grad and not held.is_inference()
        again.logits(torch.rand(1, 3, 64, 64)).sum().backward()
    assert torch.get_default_dtype() == torch.float32


def released() -> DVAE:
    torch.manual_seed(1)
    return DVAE(DVAEConfig(width=4, bottleneck=3, codebook_size=6))


def test_training_from_mapped_weights(codec: DVAE, tmp_path: Path) -> None:
    """Memory that cannot be written to; updates that end up in the file; a model that changes with
    the file that takes the place of its own."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    content = path.read_bytes()
    first, second = dvae.load(tmp_path), dvae.load(tmp_path)
    assert isinstance(first, DVAE) and isinstance(second, DVAE)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    first.logits(torch.rand(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert path.read_bytes() == content
    bias, expected = "encoder.blocks.output.conv.b", codec.state_dict()
    assert not torch.equal(first.state_dict()[bias], expected[bias])
    assert torch.equal(second.state_dict()[bias], expected[bias])
    first.save(tmp_path)  # over the file that both have mapped
    assert torch.equal(second.state_dict()[bias], expected[bias])
    third = dvae.load(tmp_path)
    assert isinstance(third, DVAE)
    assert torch.equal(third.state_dict()[bias], first.state_dict()[bias])


def test_weights_that_share_memory(tmp_path: Path) -> None:
    """Two weights of a pickle that are one: an update of one changes the other."""
    codec = released()
    weights = dict(codec.encoder.state_dict())
    one, other = (f"blocks.group_4.block_{i}.res_path.conv_4.b" for i in (1, 2))
    weights[one] = weights[other]
    turned = "blocks.group_1.block_1.res_path.conv_4.w"
    weights[turned] = weights[turned].transpose(0, 1).contiguous().transpose(0, 1)
    torch.save(weights, tmp_path / "encoder.pt")
    torch.save(codec.decoder.state_dict(), tmp_path / "decoder.pt")
    held = dict(
        dvae.load_released(tmp_path / "encoder.pt", tmp_path / "decoder.pt").named_parameters()
    )
    with torch.no_grad():
        held[f"encoder.{one}"].fill_(7)
    assert torch.equal(held[f"encoder.{other}"], weights[other])
    assert all(parameter.is_contiguous() for parameter in held.values())


class EmptyConfig(BaseModel):
    size: int = 3


class Foreign(nn.Module):
    """Parts of others are derived from this one, each with what a loader may get wrong."""

    def __init__(self, config: EmptyConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.size, config.size)

    def check(self, other: Any) -> None:
        assert torch.equal(self.linear.weight, other.linear.weight)
        x = torch.rand(2, self.config.size)
        assert torch.equal(self(x), other(x))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class Tables(Foreign):
    """Numbers that are not saved: a buffer, an attribute, a list."""

    def __init__(self, config: EmptyConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.other = torch.linspace(0, 1, 3)
        self.several = [torch.ones(3), {"deep": torch.full((3,), 2.0)}]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.table + self.other + self.several[0]
        return y + self.several[1]["deep"]  # type: ignore[index]


class ReadsItself(Foreign):
    """Cannot be built on the meta device."""

    def __init__(self, config: EmptyConfig) -> None:
        super().__init__(config)
        self.first = float(self.linear.weight[0, 0])


class KnowsByTwoNames(Foreign):
    """Keeps a parameter beside its own place."""

    def __init__(self, config: EmptyConfig) -> None:
        super().__init__(config)
        self.weights = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0]


class Frozen(Foreign):
    def __init__(self, config: EmptyConfig) -> None:
        super().__init__(config)
        self.linear.weight.requires_grad_(False)

    def check(self, other: Any) -> None:
        super().check(other)
        assert not other.linear.weight.requires_grad and other.linear.bias.requires_grad


class Statistics(Foreign):
    """A module of torch that adds what older files lack as it loads them."""

    def __init__(self, config: EmptyConfig) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.size)
        with torch.no_grad():
            self.norm.running_mean.fill_(2)  # type: ignore[union-attr]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        held = super().state_dict(*args, **kwargs)
        held.pop("norm.num_batches_tracked", None)
        return held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x))
        return y


class OwnWay(Foreign):
    """Takes weights in its own way, without `assign`."""

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict(state, strict)


class Renamed(Foreign):
    """Opens files in which its weights had other names."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        held = super().state_dict(*args, **kwargs)
        return type(held)((name.replace("linear.", "former."), w) for name, w in held.items())

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for name in [name for name in state if name.startswith("former.")]:
            state[name.replace("former.", "linear.")] = state.pop(name)
        super()._load_from_state_dict(state, prefix, *args)


class Plain:
    """No module, but a state."""

    def __init__(self, config: EmptyConfig) -> None:
        self.config, self.weight = config, torch.rand(config.size)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weight = state["weight"]

    def check(self, other: Any) -> None:
        assert torch.equal(self.weight, other.weight)


FOREIGN = (Tables, ReadsItself, KnowsByTwoNames, Frozen, Statistics, OwnWay, Renamed, Plain)


@pytest.mark.parametrize("module", FOREIGN)
def test_parts_of_others(module: Any, tmp_path: Path) -> None:
    """A part of a user's that opens without its tables, on no device, or not at all."""
    kind = Kind("codec", "foreign", EmptyConfig, module, "foreign.safetensors")
    part = module(EmptyConfig())
    part = part.eval() if isinstance(part, nn.Module) else part
    save_part(kind, part, tmp_path)
    part.check(load_part("codec", {"foreign": kind}, tmp_path))


@pytest.mark.parametrize("module", [ReadsItself, Tables, OwnWay])
def test_parts_of_others_that_claim_too_much(module: Any, tmp_path: Path) -> None:
    """A traceback of torch's, or memory, for a part that cannot be built without numbers."""
    kind = Kind("codec", "foreign", EmptyConfig, module, "foreign.safetensors")
    save_part(kind, module(EmptyConfig()), tmp_path)
    for size in (4, 20_000, 10**12):
        config = {"format": 2, "codec": {"kind": "foreign", "size": size}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"foreign\.safetensors: ") as raised:
            load_part("codec", {"foreign": kind}, tmp_path)
        assert "\n" not in str(raised.value)
