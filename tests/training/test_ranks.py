"""Several ranks, ZeRO stages, replicas: the same run however it is spread, and resumed.

Ranks are processes of this machine, forked unless a test says otherwise (see tests/forks.py);
several machines are in tests/cluster.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dalle1
from dalle1.training import distributed
from dalle1.training.config import ParallelSettings, RunConfig, load_config
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.parallel import ParallelDims
from dalle1.training.stages.base import Weights
from dalle1.training.trainer import Trainer
from dalle1.training.vqgan_config import CodebookSettings

from .conftest import tiny
from .test_trainer import STAGES, losses, tensors
from .worker import data_order, finish, start, torchrun

Whole = dict[str, list[float]]


def spread(
    config: RunConfig, ranks: int, *options: str, **environment: str
) -> tuple[list[float], Path]:
    """Runs a config on so many ranks; its losses and its folder."""
    run = Path(config.run)
    finish(start(config, ranks, run, *options, **environment), run)
    return losses(run), run


def calm(stage: str, shards: str, run: Path, parts: Path, **settings: Any) -> RunConfig:
    """A tiny run without the dVAE's k-means, whose nearest centers may tip over by rounding, and
    with a VQGAN that moves slowly past the borders between its codes, for the same reason."""
    config = tiny(stage, shards, run, parts, **({"contact_sheet_every": 20} | settings))
    if stage == "vqgan":
        slower = config.optimizer.model_copy(update={"learning_rate": 2e-4})
        config = config.model_copy(update={"optimizer": slower})
    if config.dvae_training is None:
        return config
    own = config.dvae_training.model_copy(update={"warm_start_steps": 0})
    return config.model_copy(update={"dvae_training": own})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: str, parts: Path) -> Whole:
    """Losses of one process at ZeRO stage 0."""
    found = {}
    for stage in STAGES:
        run = tmp_path_factory.mktemp(stage)
        Trainer(calm(stage, shards, run, parts)).run()
        found[stage] = losses(run)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "settings"),
    [
        ("dvae", 2, {}),
        ("vqgan", 2, {}),
        ("vqgan", 2, {"zero_stage": 2}),
        ("vqgan", 2, {"zero_stage": 3}),
        ("clip", 2, {"zero_stage": 1}),
        ("dalle", 2, {}),
        ("dalle", 2, {"zero_stage": 1}),
        ("dalle", 2, {"zero_stage": 2, "micro_batch": 2}),
        ("dalle", 2, {"zero_stage": 3, "micro_batch": 1}),
        ("dalle", 2, {"zero_stage": 2, "offload": "optimizer"}),
        ("dalle", 2, {"zero_stage": 3, "offload": "weights"}),
        ("dalle", 4, {"zero_stage": 2, "dp_shard": 2}),
        ("dalle", 4, {"zero_stage": 3, "dp_shard": 2}),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_the_ranks(
    stage: str,
    ranks: int,
    settings: dict[str, Any],
    tmp_path: Path,
    shards: str,
    parts: Path,
    whole: Whole,
) -> None:
    """Gradients summed in place of averaged, a text loss that is a mean of means, a CLIP that
    compares within a rank alone, noise that depends on the rank, replicas that drift apart; a
    discriminator whose norms, an adaptive weight or dead codes that see one rank's images."""
    config = calm(stage, shards, tmp_path / "run", parts, parallel=settings)
    found, run = spread(config, ranks)
    # A VQGAN's nearest code may tip over by rounding; norms of one rank's images differ by 1e-2.
    assert found == pytest.approx(whole[stage], abs=1e-3 if stage == "vqgan" else 1e-5)
    if stage == "dalle":  # what was sharded is exported whole
        result = dalle1.sample("a circle", run / "model", candidates=1, keep=1, progress=False)
        assert result.tokens.shape == (1, 1, 4, 4)


def replaces_weights(arguments: Sequence[str]) -> None:
    """A rank that comes to the end of a warm start, with other weights than other ranks."""
    trainer = Trainer(load_config(arguments[0]))
    made = trainer.stage.replacement_weights

    def differing(weights: Weights, read: Callable[[int], Tensor]) -> dict[str, Tensor]:
        return {name: w + trainer.rank for name, w in made(weights, read).items()}

    trainer.stage.replacement_weights = differing  # type: ignore[method-assign]
    trainer._replace_weights()
    for name, weight in trainer.engine.weights():
        values = weight.flatten().tolist()
        assert distributed.max_over_ranks(values) == values, name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dvae", "vqgan"])
def test_ranks_leave_the_warm_start_alike(
    stage: str, tmp_path: Path, shards: str, parts: Path
) -> None:
    """Ranks that go on with codes of their own, where k-means rounds otherwise on each GPU."""
    config = tiny(stage, shards, tmp_path / "run", parts)
    if config.vqgan_training is not None:
        codebook = CodebookSettings(warm_start_steps=2, warm_start_images=32)
        training = config.vqgan_training.model_copy(update={"codebook": codebook})
        config = config.model_copy(update={"vqgan_training": training})
    finish(start(config, 2, tmp_path / "ranks", function=replaces_weights), tmp_path / "ranks")


# Each two of ranks, stage and ZeRO stage once; with all three in all ways: `make test-nightly`.
COVERED = {
    (1, "dvae", 3),
    (2, "dvae", 1),
    (1, "vqgan", 3),
    (2, "vqgan", 1),
    (1, "clip", 1),
    (2, "clip", 3),
    (1, "dalle", 1),
    (2, "dalle", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "zero"),
    [
        pytest.param(*case, marks=[] if case in COVERED else pytest.mark.nightly)
        for case in itertools.product((1, 2), STAGES, (1, 3))
    ],
)
def test_resume_is_exact(
    ranks: int, stage: str, zero: int, tmp_path: Path, shards: str, parts: Path
) -> None:
    """State that is lost or rounded between stop and --resume on any rank, to the bit: losses,
    weights, moments, average, order of the data; a contact sheet that changes what is trained."""
    parallel = {"zero_stage": zero}
    config = tiny(stage, shards, tmp_path / "one", parts, parallel=parallel, contact_sheet_every=5)
    expected, one = spread(config, ranks)
    config = tiny(stage, shards, tmp_path / "two", parts, parallel=parallel)
    spread(config, ranks, "--stop-at", "10")
    found, two = spread(config, ranks, "--resume")
    assert found == expected
    same_to_the_bit(one, two)


@pytest.mark.slow
def test_resume_from_nothing_is_exact(tmp_path: Path, shards: str, parts: Path) -> None:
    """A start under torchrun that meets nobody; an import that is missing where no server has done
    it before; noise or an order that hang on the hash seed, which differs from rank to rank."""
    parallel = {"zero_stage": 2}
    expected, one = spread(tiny("dalle", shards, tmp_path / "one", parts, parallel=parallel), 2)
    config = tiny("dalle", shards, tmp_path / "two", parts, parallel=parallel)
    spread(config, 2, "--stop-at", "10")
    two = Path(config.run)
    torchrun(config, 2, two, "--resume")
    assert losses(two) == expected
    same_to_the_bit(one, two)


def same_to_the_bit(one: Path, two: Path) -> None:
    """Order of the data, weights, moments and average after 20 updates of two runs."""
    assert data_order(two) == data_order(one)
    a, b = tensors(one, 20), tensors(two, 20)
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, {"zero_stage": 3}), (1, {})), ((1, {}), (2, {"zero_stage": 2}))],
    ids=["2 ranks at stage 3 to 1", "1 rank to 2 at stage 2"],
)
def test_resume_on_other_ranks(
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
    tmp_path: Path,
    shards: str,
    parts: Path,
    whole: Whole,
) -> None:
    """A checkpoint that only as many ranks at the same ZeRO stage can read."""
    run = tmp_path / "run"
    for (ranks, parallel), option in ((before, "--stop-at=10"), (after, "--resume")):
        config = tiny("dalle", shards, run, parts, parallel=parallel)
        found, _ = spread(config, ranks, option)
    assert found == pytest.approx(whole["dalle"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, {}), (4, {"zero_stage": 3, "dp_shard": 2})], ids=str
)
def test_compressed_run_resumes(
    ranks: int, parallel: dict[str, Any], tmp_path: Path, shards: str, parts: Path
) -> None:
    """Error buffers lost between stop and --resume: what they owe never reaches the weights.

    A stop makes each replica go on with the buffers' mean, which changes nothing but rounding.
    """
    settings: dict[str, Any] = {"parallel": parallel, "compression": {"rank": 4, "first_step": 2}}
    expected, _ = spread(tiny("dalle", shards, tmp_path / "one", parts, **settings), ranks)
    config = tiny("dalle", shards, tmp_path / "two", parts, **settings)
    spread(config, ranks, "--stop-at", "10")
    found, two = spread(config, ranks, "--resume")
    assert found == pytest.approx(expected, abs=1e-5)
    buffers = tensors(two, 20).under("compression/")
    assert len(buffers) and all(bool(buffers[name].any()) for name in buffers)


@pytest.mark.slow
def test_dropped_error_buffers_are_told(
    tmp_path: Path, shards: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PowerSGD's error buffers dropped in silence, when a run goes on without compression or as a
    single replica; a warning where nothing is lost."""
    compression = {"rank": 4, "first_step": 0}
    config = tiny("dalle", shards, tmp_path / "run", parts, steps=5, compression=compression)
    _, run = spread(config, 2)
    before = config.model_copy(update={"steps": 6})
    for update in ({"compression": None}, {}):
        Trainer(before.model_copy(update=update), resume=True)  # one rank
        found = capsys.readouterr().err
        assert "warning: compression: " in found and "step-0000005" in found
        assert "dropped: this run goes on with one replica" in found
    spread(before.model_copy(update={"compression": None}), 2, "--resume")
    log = (run / "rank-0.txt").read_text()
    assert "dropped: this run goes on without compression" in log
    spread(config.model_copy(update={"steps": 7}), 2, "--resume")  # from 6, without buffers
    assert "they begin with zeros" in (run / "rank-0.txt").read_text()
    plain = tiny("dalle", shards, tmp_path / "plain", parts, steps=2)
    Trainer(plain).run()
    Trainer(plain.model_copy(update={"steps": 3}), resume=True)
    assert "compression" not in capsys.readouterr().err


@pytest.mark.slow
def test_float16_on_two_ranks(tmp_path: Path, shards: str, parts: Path, whole: Whole) -> None:
    """Gradient scales that differ between ranks, or are forgotten when the run goes on."""
    config = tiny("dalle", shards, tmp_path / "run", parts, parallel={"precision": "fp16"})
    spread(config, 2, "--stop-at", "10")
    found, run = spread(config, 2, "--resume")
    assert found == pytest.approx(whole["dalle"], rel=2e-3)
    from dalle1.training.checkpoints import load

    further = tiny("dalle", shards, run, parts, steps=21)  # in float32 from here on
    Trainer(further, resume=True).run()
    state = load(run / "checkpoints" / "step-0000020").state["gradient_scales"]
    assert len(state) == 6
    assert all(2**13 < value < 2**13 * 2 ** (20.5 / 1000) for value, _ in state)


@pytest.mark.slow
def test_float16_on_sharded_replicas(
    tmp_path: Path, shards: str, parts: Path, whole: Whole
) -> None:
    """What 12b.yaml puts together: gradient scales of M = all ranks though a loss is a replica's,
    an overflow that one replica skips and another does not, buffers of PowerSGD that take in what
    was skipped, a loss that differs from that of one process in float32."""
    transformer = tiny("dalle", shards, tmp_path, parts).transformer
    settings: dict[str, Any] = {
        "parallel": {"zero_stage": 3, "dp_shard": 2, "micro_batch": 1, "precision": "fp16"},
        "compression": {"approximation_rank": 4, "first_step": 10},
        "execution": {"checkpointing": True},
        "faults": {"bad_update": "stop"},
    }
    assert transformer is not None
    config = tiny("dalle", shards, tmp_path / "run", parts, **settings)
    found, run = spread(config, 4, "--stop-at", "12")
    assert found[:10] == pytest.approx(whole["dalle"][:10], rel=2e-3)  # in full until then
    # One block's scale so high that its gradients overflow in the next update.
    state_file = run / "checkpoints" / "step-0000012" / "state.json"
    state = json.loads(state_file.read_text())
    assert len(state["gradient_scales"]) == 2 * transformer.layers
    values = [value for value, _ in state["gradient_scales"]]
    assert values == pytest.approx([2**13 * 2 ** (12 / 1000)] * len(values))
    state["gradient_scales"][1][0] = 2.0**40
    state_file.write_text(json.dumps(state))
    found, run = spread(config, 4, "--resume")
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert "updates_skipped" not in lines[11]
    assert lines[12]["updates_skipped"] == lines[12]["updates_skipped/overflow"] == 1
    assert lines[12]["gradient_scale/001"] == 4 * 2.0**24  # down to the upper bound
    assert lines[12]["gradient_scale/000"] > lines[11]["gradient_scale/000"]
    assert all(math.isfinite(loss) for loss in found) and len(found) == 20
    assert (run / "model").is_dir()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compression": {"rank": 4}, "parallel": {"zero_stage": 2}}, "parallel.zero_stage 2"),
        ({"compression": {"rank": 4}, "parallel": {"zero_stage": 3}}, "set parallel.dp_shard"),
        (
            {"parallel": {"zero_stage": 3, "dp_shard": 2, "offload": "weights"}},
            "offload 'weights' does not go",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    settings: dict[str, Any], words: str, tmp_path: Path, shards: str, parts: Path
) -> None:
    """A setting that is quietly ignored or fails in the middle of a run."""
    with pytest.raises(ValueError, match=words):
        Trainer(tiny("dalle", shards, tmp_path / "run", parts, **settings))


@pytest.mark.parametrize(
    ("batch", "ranks", "parallel", "expected"),
    [
        (8, 1, {}, (8, 1, 1, 1)),
        (1024, 8, {"zero_stage": 3, "micro_batch": 8}, (8, 16, 8, 1)),
        (1024, 1024, {"zero_stage": 3, "micro_batch": 8, "dp_shard": 8}, (1, 1, 8, 128)),
        (36, 2, {"micro_batch": 8}, (6, 3, 1, 2)),  # 18 = 3 x 6, not 2 x 8 + 2
        (8, 4, {"zero_stage": 2, "dp_shard": 8}, (2, 1, 4, 1)),
    ],
)
def test_layout(
    batch: int, ranks: int, parallel: dict[str, Any], expected: tuple[int, int, int, int]
) -> None:
    """Passes of different sizes, more samples than were allowed, groups that are not there."""
    found = ParallelDims(batch, ParallelSettings(**parallel), ranks)
    assert (
        found.micro_batch,
        found.grad_accum_steps,
        found.dp_shard,
        found.dp_replicate,
    ) == expected


@pytest.mark.parametrize(
    ("batch", "ranks", "parallel", "words"),
    [
        (9, 2, {}, "batch_size 9 .* 2 ranks: set it to 8 or 10"),
        (8, 4, {"zero_stage": 3, "dp_shard": 3}, "dp_shard 3 must divide the 4 ranks"),
    ],
)
def test_layout_that_does_not_divide(
    batch: int, ranks: int, parallel: dict[str, Any], words: str
) -> None:
    """Samples that are lost, or ranks that wait for a group that never comes."""
    with pytest.raises(ValueError, match=words):
        ParallelDims(batch, ParallelSettings(**parallel), ranks)
