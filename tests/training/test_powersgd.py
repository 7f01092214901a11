"""PowerSGD against a float64 simulation of its replicas."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle1 import CLIP, CLIPConfig, Transformer, TransformerConfig
from dalle1.training import powersgd
from dalle1.training.powersgd import PowerSGD, matrices, saving, worth_compressing
from dvae import DVAE, DVAEConfig

REPLICAS, RANK, SEED = 2, 3, 7
SHAPES = {
    "bias": (7,),
    "tall": (40, 12),
    "small": (4, 4),  # (4 + 4) * 3 >= 4 * 4: whole
    "wide": (10, 30),
    "kernel": (12, 45),  # of a gradient [12, 5, 3, 3] in channels-last memory
}
MATRICES = ["tall", "wide", "kernel"]
# What happens at each step of the replicas' run.
STEPS = [
    "uncompressed", "", "", "", "inf in a matrix", "", "nan in a bias", "", "save", "", "",
]  # fmt: skip


def gradients(replica: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + replica)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    kernel = drawn["kernel"].view(12, 5, 3, 3)
    drawn["kernel"] = kernel.contiguous(memory_format=torch.channels_last)
    if STEPS[step] == "inf in a matrix" and replica == 1:
        drawn["wide"][3, 4] = math.inf
    if STEPS[step] == "nan in a bias" and replica == 0:
        drawn["bias"][2] = math.nan
    return drawn


def mean_gradient(name: str, step: int) -> Tensor:
    return torch.stack([gradients(i, step)[name] for i in range(REPLICAS)]).mean(0)


def replica(rank: int, folder: Path) -> None:
    """One process: all steps, and what it saw of them."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", store, rank=rank, world_size=REPLICAS, timeout=timedelta(seconds=60)
    )
    powersgd.BUCKET = 60  # several messages
    compressor, second = PowerSGD(SHAPES, RANK, SEED), None
    seen: dict[str, Any] = {"q": compressor.q, "averages": [], "finite": [], "resumed": []}
    for step, event in enumerate(STEPS):
        if event == "save":
            seen["state"] = compressor.state()
            second = PowerSGD(SHAPES, RANK, SEED)
            second.load_state(seen["state"])
        given = gradients(rank, step)
        seen["finite"].append(compressor.average(given, compress=event != "uncompressed"))
        seen["averages"].append(given)
        if second is not None:
            given = gradients(rank, step)
            second.average(given)
            seen["resumed"].append(given)
    seen["buffer"] = compressor.state()
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("replicas")
    torch.multiprocessing.spawn(replica, (folder,), nprocs=REPLICAS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(REPLICAS)]


class Simulation:
    """Replicas of one matrix in float64, by the formulas alone."""

    def __init__(self, shape: tuple[int, int], q: Tensor, replicas: int) -> None:
        self.q, self.turned = q.double().numpy(), shape[0] > shape[1]
        self.errors = [np.zeros(sorted(shape)) for _ in range(replicas)]

    def average(self, given: list[Tensor]) -> np.ndarray:
        flat = [g.double().reshape(len(g), -1).numpy() for g in given]
        sums = [e + (g.T if self.turned else g) for e, g in zip(self.errors, flat, strict=True)]
        p = np.mean([m @ self.q for m in sums], axis=0)
        u, _, _ = np.linalg.svd(p, full_matrices=False)  # another basis of the same span
        common = u @ np.mean([m.T @ u for m in sums], axis=0).T
        self.errors = [m - common for m in sums]
        return common.T if self.turned else common


@pytest.mark.parametrize("name", MATRICES)
def test_replicas_as_simulated(seen: list[dict[str, Any]], name: str) -> None:
    """A factor of one replica in place of the mean, a buffer that misses its replica's own part or
    another's, a Q that is drawn anew, a kernel taken apart in memory order, or a bad step that
    left its mark on a buffer."""
    simulation = Simulation(SHAPES[name], seen[0]["q"][name], REPLICAS)
    for step, event in enumerate(STEPS):
        if event in ("", "save"):
            expected = simulation.average([gradients(i, step)[name] for i in range(REPLICAS)])
            average = seen[0]["averages"][step][name]
            assert average.shape == gradients(0, step)[name].shape
            assert average.reshape(SHAPES[name]).numpy() == pytest.approx(expected, abs=2e-5), step
    mean = np.mean(simulation.errors, axis=0)
    buffer = seen[0]["buffer"][name]
    assert buffer.numpy() == pytest.approx(mean.T if simulation.turned else mean, abs=2e-5)


def test_replicas_agree(seen: list[dict[str, Any]]) -> None:
    """Weights that drift apart between replicas: by a Q, a sum or a verdict of a replica's own."""
    first, second = seen
    assert first["finite"] == second["finite"]
    for one, other in zip(first["averages"], second["averages"], strict=True):
        for name in SHAPES:
            assert torch.equal(one[name].nan_to_num(9.0), other[name].nan_to_num(9.0)), name
    for name in MATRICES:
        assert torch.equal(first["q"][name], second["q"][name])
        assert torch.equal(first["state"][name], second["state"][name])


def test_sent_whole(seen: list[dict[str, Any]]) -> None:
    """Biases, or matrices that do not pay, that are compressed, summed or forgotten; first steps
    that are not exact."""
    for step in range(3):
        names = SHAPES if STEPS[step] == "uncompressed" else ("bias", "small")
        for name in names:
            average = seen[0]["averages"][step][name]
            torch.testing.assert_close(average, mean_gradient(name, step))


def test_not_finite(seen: list[dict[str, Any]]) -> None:
    """An infinity of one replica that another replica takes for a gradient, or that is hidden from
    the caller by the basis; that the buffers survive it is seen in the steps after it."""
    for saw in seen:
        assert saw["finite"] == [not event.startswith(("inf", "nan")) for event in STEPS]
        for step, event in enumerate(STEPS):
            if event.startswith(("inf", "nan")):
                assert all(saw["averages"][step][name].isnan().all() for name in MATRICES)
        assert saw["averages"][STEPS.index("nan in a bias")]["bias"][2].isnan()


def test_overflow_of_the_second_factor() -> None:
    """A verdict by P alone, where the gradient is finite and its factor is not."""
    compressor = PowerSGD({"w": (6, 60)}, 1, SEED)
    # Finite in P, where the signs of Q cancel, but the rows' sums are not.
    big = torch.full((6, 60), 3e38)
    compressor.q["w"].fill_(0.0)[0] = 1e-3
    assert not compressor.average({"w": big}) and big.isnan().all()
    assert compressor.state()["w"].eq(0).all()


def test_resumed_is_equal_to_the_bit(seen: list[dict[str, Any]]) -> None:
    """A resumed run that differs from the one that went on."""
    for saw in seen:
        averages = saw["averages"][STEPS.index("save") :]
        for expected, resumed in zip(averages, saw["resumed"], strict=True):
            assert all(torch.equal(resumed[name], expected[name]) for name in SHAPES)


def test_resumed_with_another_number_of_replicas(seen: list[dict[str, Any]]) -> None:
    """Buffers of one replica alone in a checkpoint, another Q after a restart, or a debt that grows
    or shrinks with the number of replicas."""
    compressor = PowerSGD(SHAPES, RANK, SEED)
    compressor.load_state(seen[0]["state"])
    for step in range(STEPS.index("save"), len(STEPS)):
        given = {name: mean_gradient(name, step) for name in SHAPES}
        assert compressor.average(given)
        for name in SHAPES:
            expected = seen[0]["averages"][step][name]
            torch.testing.assert_close(given[name], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", MATRICES)
def test_nothing_is_lost(seen: list[dict[str, Any]], name: str) -> None:
    """A part of the gradients that is neither returned nor in the buffers, or that is in both."""
    steps = [i for i, event in enumerate(STEPS) if event in ("", "save")]
    taken = sum(mean_gradient(name, i).double() for i in steps)
    given = sum(seen[0]["averages"][i][name].double() for i in steps)
    buffer = seen[0]["buffer"][name].double().reshape(taken.shape)
    torch.testing.assert_close(given + buffer, taken, atol=2e-5, rtol=0)


def test_state_is_a_copy() -> None:
    """A checkpoint that changes after it was taken."""
    compressor = PowerSGD(SHAPES, RANK, SEED)
    compressor.average(gradients(0, 1))
    state = compressor.state()
    before = {name: error.clone() for name, error in state.items()}
    compressor.average(gradients(0, 2))
    assert all(torch.equal(state[name], before[name]) for name in MATRICES)
    assert not torch.equal(compressor.state()["tall"], before["tall"])


def test_low_rank_mean_is_exact() -> None:
    """A basis that does not span P, or a jitter that is felt."""
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(20, 3, generator=generator), torch.randn(3, 50, generator=generator)
    for shape in ((20, 50), (50, 20)):
        compressor = PowerSGD({"w": shape}, 3, SEED)
        matrix = (left @ right).reshape(20, 50)
        given = {"w": (matrix if shape == (20, 50) else matrix.T).clone()}
        expected = given["w"].clone()
        assert compressor.compressed == ["w"]
        compressor.average(given)
        torch.testing.assert_close(given["w"], expected, atol=1e-4, rtol=0)


def test_error_feedback() -> None:
    """Directions outside of the rank of which no update ever takes its full share, or buffers
    that grow without end."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(16, 24, generator=generator)
    compressor, forgetful = (PowerSGD({"w": (16, 24)}, 2, SEED) for _ in range(2))
    steps = 600
    total, without = torch.zeros(16, 24), torch.zeros(16, 24)
    for _ in range(steps):
        noisy = true + torch.randn(16, 24, generator=generator)
        given = {"w": noisy.clone()}
        compressor.average(given)
        total += given["w"] / steps
        given = {"w": noisy.clone()}
        forgetful.load_state({"w": torch.zeros(16, 24)})
        forgetful.average(given)
        without += given["w"] / steps
    assert (total - true).norm() < 0.1 * true.norm()
    assert (without - true).norm() > 0.5 * true.norm()


def test_buffers_are_orthogonal_to_q() -> None:
    """What the docstring says of a fixed Q no longer true: a gradient that never changes takes the
    same directions for ever, and the rest stays in the buffers for ever."""
    true = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    compressor = PowerSGD({"w": (16, 24)}, 2, SEED)
    for step in range(1, 4):
        given = {"w": true.clone()}
        compressor.average(given)
        buffer = compressor.state()["w"]
        torch.testing.assert_close(buffer, step * (true - given["w"]), atol=1e-4, rtol=0)
        assert (buffer @ compressor.q["w"]).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_shorter_side_is_orthogonalized(shape: tuple[int, int]) -> None:
    """A matrix that lies the other way, whose gradient is then projected on its long side."""
    compressor = PowerSGD({"w": shape}, 3, SEED)
    assert compressor.q["w"].shape == (50, 3)
    true = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given = {"w": true.clone()}
    compressor.average(given)
    # O Oᵀ M: a projection of the 20-dimensional side, onto the span of M Q.
    lying, projected = (x if shape == (20, 50) else x.T for x in (true, given["w"]))
    p = (lying @ compressor.q["w"]).double()
    expected = p @ torch.linalg.pinv(p) @ lying.double()
    torch.testing.assert_close(projected.double(), expected, atol=1e-5, rtol=0)


def test_zero_and_rank_deficient_gradients() -> None:
    """A basis of NaN where P has no full rank, as at parameters that are not trained yet."""
    compressor = PowerSGD({"w": (8, 40)}, 4, SEED)
    given = {"w": torch.zeros(8, 40)}
    assert compressor.average(given) and given["w"].eq(0).all()
    single = torch.zeros(8, 40)
    single[2, 5] = 3.0
    given = {"w": single.clone()}
    assert compressor.average(given)
    torch.testing.assert_close(given["w"], single, atol=1e-5, rtol=0)
    # Far below the jitter the basis is I's, not one of rounding errors.
    tiny = 1e-12 * torch.randn(8, 40, generator=torch.Generator().manual_seed(4))
    given, compressor = {"w": tiny.clone()}, PowerSGD({"w": (8, 40)}, 4, SEED)
    assert compressor.average(given)
    torch.testing.assert_close(given["w"][:4], tiny[:4], atol=1e-15, rtol=0)
    assert given["w"][4:].abs().max() < 1e-15


def test_q_depends_on_seed_and_name_alone() -> None:
    """A Q that changes with the other matrices, the global generator or a restart, or that all
    matrices or all seeds share."""
    torch.manual_seed(1)
    first = PowerSGD({"a": (10, 40), "b": (10, 40)}, 2, SEED).q
    torch.manual_seed(2)
    second = PowerSGD({"b": (40, 10)}, 2, SEED).q
    assert torch.equal(first["b"], second["b"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["b"], PowerSGD({"b": (10, 40)}, 2, SEED + 1).q["b"])
    drawn = PowerSGD({"a": (10, 4000)}, 5, SEED).q["a"]
    assert drawn.mean().abs() < 0.05 and drawn.std().item() == pytest.approx(1, abs=0.05)


def test_q_does_not_move() -> None:
    """A warm start, or an average in place that spoils Q."""
    compressor = PowerSGD(SHAPES, RANK, SEED)
    before = {name: q.clone() for name, q in compressor.q.items()}
    compressor.average(gradients(0, 1))
    assert all(torch.equal(compressor.q[name], before[name]) for name in MATRICES)


def test_flat_shards() -> None:
    """A gradient that must have its matrix's shape, so that ZeRO's flat pieces cannot be given."""
    compressor, flat = (PowerSGD({"w": (10, 40)}, 2, SEED) for _ in range(2))
    true = torch.randn(10, 40)
    one, other = {"w": true.clone()}, {"w": true.flatten()}
    compressor.average(one)
    flat.average(other)
    assert torch.equal(one["w"].flatten(), other["w"])


def test_messages() -> None:
    """Hundreds of small messages, one that needs the memory of all gradients, or tensors that are
    sent twice or not at all."""
    tensors = [torch.zeros(n) for n in (30, 20, 10, 1, 59, 60, 200, 0, 5)]
    cut = [[t.numel() for t in bucket] for bucket in powersgd.buckets(tensors, 60)]
    assert cut == [[30, 20, 10], [1, 59], [60], [200], [0, 5]]


def test_bytes() -> None:
    """A saving that counts one factor, or that forgets what is sent uncompressed."""
    compressor = PowerSGD(SHAPES, RANK, SEED)
    whole = 7 + 4 * 4
    assert compressor.compressed == MATRICES
    assert compressor.bytes_uncompressed == 4 * (whole + 40 * 12 + 10 * 30 + 12 * 45)
    assert compressor.bytes_sent == 4 * (whole + 3 * (40 + 12 + 10 + 30 + 12 + 45))


def test_pays() -> None:
    """Matrices that are compressed to more than they are, or without a gain."""
    assert (
        worth_compressing((8, 8), 3)
        and not worth_compressing((8, 8), 4)
        and not worth_compressing((8, 100), 8)
    )
    assert not worth_compressing((64,), 1)


@pytest.mark.parametrize(
    ("width", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)]
)
def test_saving_of_table_1(width: int, rank: int, percent: int) -> None:
    """A formula of other shapes than the paper's, or a rank of each shard where the sum is
    meant."""
    assert saving(width, rank) == pytest.approx(1 - 5 * rank / (8 * width))
    assert round(100 * saving(width, rank)) == percent
    for gpus in (8, 16):
        piece = width // gpus
        shards = dict.fromkeys(("q", "k", "v", "out"), (width, piece))
        shards |= {"up": (width, 4 * piece), "down": (4 * piece, width)}
        compressor = PowerSGD(shards, rank // gpus, SEED)
        spared = 1 - compressor.bytes_sent / compressor.bytes_uncompressed
        assert spared == pytest.approx(saving(width, rank, gpus))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return matrices({f"model.{name}": p.shape for name, p in module.named_parameters()})


def test_what_is_compressed() -> None:
    """An embedding, a head, a gain or an outer convolution that is compressed, or a matrix of a
    block that is not."""
    with torch.device("meta"):
        transformer = shapes_of(Transformer(TransformerConfig()))
        clip, dvae = shapes_of(CLIP(CLIPConfig())), shapes_of(DVAE(DVAEConfig()))
    ends = {"attention.qkv", "attention.out", "mlp.up", "mlp.down"}
    chosen = {name for name, shape in transformer.items() if len(shape) == 2}
    assert chosen == {f"model.layers.{i}.{end}.weight" for i in range(64) for end in ends}
    assert transformer["model.layers.63.mlp.down.weight"] == (3968, 4 * 3968)
    assert transformer["model.text_head.weight"] == (16384 * 3968,)

    ends = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    chosen = {name for name, shape in clip.items() if len(shape) == 2}
    towers, layers = ("visual.transformer", "transformer"), range(12)
    assert chosen == {f"model.{t}.resblocks.{i}.{e}" for t in towers for i in layers for e in ends}
    assert clip["model.logit_scale"] == (1,)

    left = {name for name, shape in dvae.items() if len(shape) == 1 and name.endswith(".w")}
    outer = ("encoder.blocks.input", "encoder.blocks.output.conv")
    outer += ("decoder.blocks.input", "decoder.blocks.output.conv")
    assert left == {f"model.{name}.w" for name in outer}
    assert all(len(shape) == 1 for name, shape in dvae.items() if name.endswith(".b"))
    name = "model.encoder.blocks.group_1.block_1.res_path.conv_1.w"
    assert dvae[name] == (64, 256 * 3 * 3)


def test_wrong_gradients() -> None:
    """A parameter that is silently never averaged, or in 16 bits."""
    compressor = PowerSGD({"a": (3,), "w": (10, 40)}, 2, SEED)
    good = {"a": torch.zeros(3), "w": torch.zeros(10, 40)}
    with pytest.raises(ValueError, match=r"\['a'\]"):
        compressor.average({"w": good["w"]})
    with pytest.raises(ValueError, match=r"w: expected float32 of 400 elements, got .*bfloat16"):
        compressor.average({**good, "w": good["w"].bfloat16()})
    with pytest.raises(ValueError, match=r"a: .* \[4\]"):
        compressor.average({**good, "a": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"\['w'\]"):
        compressor.load_state({})
    with pytest.raises(ValueError, match=r"w: expected \[10, 40\], got \[40, 10\]"):
        compressor.load_state({"w": torch.zeros(40, 10)})
    with pytest.raises(ValueError, match="rank 0"):
        PowerSGD({}, 0, SEED)
