"""A VQGAN and its discriminator in the one trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dvae
from dalle1.data.shards.loader import Batch
from dalle1.training.config import RunConfig
from dalle1.training.gradient_clipping import clip_by_part
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.stages.codebook import Codebook
from dalle1.training.stages.vqgan import CODES, VQGANStage
from dalle1.training.trainer import Trainer
from dalle1.training.vqgan_config import CodebookSettings
from dvae.vqgan.config import VQGANConfig
from dvae.vqgan.perceptual import LPIPS
from dvae.vqgan.quantizers import NearestQuantizer

from .conftest import run_until, tiny
from .test_trainer import losses, tensors

ADVERSARY = {"start": 4, "layers": 2, "width": 8}


def vqgan(shards: str, run: Path, **settings: Any) -> RunConfig:
    """A tiny run; settings of `vqgan` and `vqgan_training` are added to the usual ones."""
    config = tiny("vqgan", shards, run, run).model_dump()
    for name in ("vqgan", "vqgan_training"):
        config[name] |= settings.pop(name, {})
    return RunConfig(**(config | settings))


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if "loss" in line]


def weights_after(run: Path, step: int) -> dict[str, Tensor]:
    saved = tensors(run, step).under("weights/")
    return {name: saved[name] for name in saved}


def same(one: dict[str, Tensor], two: dict[str, Tensor], prefix: str) -> list[bool]:
    return [torch.equal(w, two[name]) for name, w in one.items() if name.startswith(prefix)]


def test_the_discriminator_begins_when_it_is_told(tmp_path: Path, shards: str) -> None:
    """A discriminator that learns, or decays, or moves its norms before its first update; an
    adversarial loss that begins before or after it; a loss guard that takes the start for a
    spike."""
    optimizer = tiny("vqgan", shards, tmp_path, tmp_path).optimizer.model_dump()
    settings: dict[str, Any] = {
        "save_every": 1,
        "keep_checkpoints": 9,
        "steps": 6,
        "optimizer": optimizer | {"weight_decay": 0.1},
        "faults": {"spike": 1.01},
    }
    run = tmp_path / "run"
    trainer = Trainer(vqgan(shards, run, **settings))
    begun = {n: w.clone() for n, w in trainer.engine.weights()}
    statistics = {n: x.clone() for n, x in trainer.engine.buffers.items() if "main" in n}
    assert len(statistics) == 2 * 3
    trainer.run()
    before, first = weights_after(run, 4), weights_after(run, 5)
    assert all(same(begun, before, "discriminator."))
    assert not any(same(before, first, "discriminator.main.0."))
    assert not any(same(begun, before, "model.decoder.conv_out."))
    buffers = tensors(run, 4).under("buffers/")
    assert all(torch.equal(buffers[name], x) for name, x in statistics.items())
    assert int(tensors(run, 6)["buffers/discriminator.main.3.num_batches_tracked"]) == 2 * 2
    log = lines(run)
    assert ["adversarial" in line for line in log] == [False] * 4 + [True] * 2
    assert all(line["gradient_norm/discriminator"] == 0 for line in log[:4])
    assert all(line["gradient_norm/discriminator"] > 0 for line in log[4:])


def test_a_run_without_an_adversary_is_another_nets_run(tmp_path: Path, shards: str) -> None:
    """A discriminator that is there and does not count, but changes the other net's updates, or
    its random numbers."""
    for name, own in (("with", ADVERSARY | {"start": 99}), ("without", None)):
        config = vqgan(shards, tmp_path / name, steps=5, vqgan_training={"discriminator": own})
        # DeepSpeed clips a net that is alone, and rounds otherwise than we do.
        optimizer = config.optimizer.model_copy(update={"clip_norm": None})
        Trainer(config.model_copy(update={"optimizer": optimizer})).run()
    one, two = (weights_after(tmp_path / name, 5) for name in ("with", "without"))
    assert set(two) == {name for name in one if name.startswith("model.")}
    assert all(torch.equal(one[name], weight) for name, weight in two.items())


def test_each_net_is_clipped_by_its_own_norm() -> None:
    """One net's large gradients that shorten the other's steps; a norm of one tensor."""
    short, long = [torch.tensor([0.3, 0.4])], [torch.tensor([[3.0]]), torch.tensor([4.0])]
    norms = clip_by_part({"a": short, "b": long}, 1.0)
    assert norms == pytest.approx({"a": 0.5, "b": 5.0})
    assert torch.equal(short[0], torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(torch.cat([x.flatten() for x in long]), torch.tensor([0.6, 0.8]))
    assert clip_by_part({"b": long}, None) == pytest.approx({"b": 1.0})


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_both_nets_are_clipped_at_every_zero_stage(zero: int, tmp_path: Path, shards: str) -> None:
    """Gradients that DeepSpeed holds elsewhere, and so are clipped together or not at all."""
    config = vqgan(shards, tmp_path / "run", steps=6, parallel={"zero_stage": zero})
    optimizer = config.optimizer.model_copy(update={"clip_norm": 0.05, "learning_rate": 1e-2})
    trainer = Trainer(config.model_copy(update={"optimizer": optimizer}))
    trainer.run()
    last = lines(tmp_path / "run")[-1]
    assert last["gradient_norm/generator"] > 0.1 and last["gradient_norm/discriminator"] > 0.1
    first = tensors(tmp_path / "run", 6)
    # A norm of 0.05 at most in each update bounds the running mean of the discriminator's.
    moments = [first[n] for n in first if n.startswith("moments/discr") and n.endswith("exp_avg")]
    norm = torch.cat([x.flatten() for x in moments]).norm()
    assert 0.001 < float(norm) <= 0.05


@pytest.mark.parametrize(
    "training",
    [
        {"codebook": {"ema_decay": 0.9, "revive_every": 5}},
        {"codebook": {"warm_start_steps": 4, "warm_start_images": 32, "revive_every": 3}},
        {"gumbel": {"temperature_steps": 20}, "codebook": None},
        {"pixel_error": "squared", "discriminator": ADVERSARY | {"loss": "vanilla"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [3, 10])
def test_every_kind_resumes_to_the_bit(
    training: dict[str, Any], at: int, tmp_path: Path, shards: str
) -> None:
    """Running means, idle times of codes, statistics of norms or a temperature that begin anew."""
    shape = {"quantizer": "gumbel"} if "gumbel" in training else {}
    settings: dict[str, Any] = {"vqgan": shape, "vqgan_training": training}
    Trainer(vqgan(shards, tmp_path / "whole", **settings)).run()
    config = vqgan(shards, tmp_path / "parts", **settings)
    run_until(config, at)
    Trainer(config, resume=True).run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, resumed = (tensors(tmp_path / run, 20) for run in ("whole", "parts"))
    assert set(whole) == set(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert isinstance(dvae.load(tmp_path / "whole" / "model"), dvae.VQGAN)


def test_a_skipped_update_leaves_no_trace(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of a norm, or a codebook of running means, that a loss of NaN makes NaN."""
    training = {"codebook": {"ema_decay": 0.9}, "discriminator": ADVERSARY | {"start": 0}}
    config = vqgan(
        shards, tmp_path / "run", steps=3, vqgan_training=training, faults={"bad_update": "skip"}
    )
    trainer = Trainer(config)
    forward = trainer.stage.forward

    def broken(batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = forward(batch, step)
        return (loss * torch.nan if step == 1 else loss), metrics

    states = []
    update = trainer._update

    def noted(batch: Batch) -> Any:
        result = update(batch)
        everything = dict(trainer.engine.weights()) | trainer.engine.buffers
        states.append({name: value.detach().clone() for name, value in everything.items()})
        return result

    monkeypatch.setattr(trainer.stage, "forward", broken)
    monkeypatch.setattr(trainer, "_update", noted)
    trainer.run()
    assert "updates_skipped" in lines(tmp_path / "run")[-1]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[2][CODES], states[1][CODES])
    assert all(bool(value.isfinite().all()) for value in states[2].values())


def test_codes_of_running_means_have_no_gradient(tmp_path: Path, shards: str) -> None:
    """A codebook that moves twice, by its means and by a gradient or by weight decay."""
    settings = {"codebook": {"ema_decay": 0.99}}
    trainer = Trainer(vqgan(shards, tmp_path / "run", steps=2, vqgan_training=settings))
    assert not any(name.startswith(CODES) for name, _ in trainer.engine.moments())
    stage = trainer.stage
    assert isinstance(stage, VQGANStage) and stage.codebook is not None
    before = trainer.engine.weight(CODES)
    kept: list[tuple[Tensor, Tensor]] = []
    observe = stage.codebook.observe

    def noted(quantize: Any, latents: Tensor, tokens: Tensor, *rest: Any) -> None:
        kept.append((latents.detach().movedim(1, -1).reshape(-1, 4), tokens.flatten()))
        observe(quantize, latents, tokens, *rest)

    stage.codebook.observe = noted  # type: ignore[method-assign]
    trainer.step = 0
    trainer._update(next(trainer.data.batches()))
    ((rows, tokens),) = kept
    mass = 8 * 16 / 32  # each code's share of the tokens of an update
    for j in range(32):
        mine = rows[tokens == j]
        expected = (0.99 * mass * before[j] + 0.01 * mine.sum(0)) / (0.99 * mass + 0.01 * len(mine))
        torch.testing.assert_close(trainer.engine.weight(CODES)[j], expected)


def looked_up(codebook: Codebook, quantize: NearestQuantizer, z: Tensor, step: int) -> Tensor:
    seeds = [torch.Generator().manual_seed(i) for i in range(len(z))]
    with torch.no_grad():
        codebook.observe(quantize, z, quantize.tokens(z), step, seeds)
        codes = codebook.after_update(step, True, lambda: quantize.embedding.weight.detach())
        if codes is not None:
            quantize.embedding.weight.copy_(codes)
    return quantize.embedding.weight.detach().clone()


def test_dead_codes_are_revived() -> None:
    """Codes that stay dead, living ones that are moved, or two draws that differ; codes that are
    taken for dead before their time."""
    shape = VQGANConfig(
        width=4, norm_groups=2, multipliers=(1, 1), attention_levels=(), embedding_dim=2,
        latent_channels=2, codebook_size=6,
    )  # fmt: skip
    torch.manual_seed(0)
    z = torch.randn(3, 2, 4, 4) + 5
    start = torch.tensor([[5.0, 5], [5, 6], [-50, 0], [-60, 0], [-70, 0], [-80, 0]])
    found = []
    for _ in range(2):
        quantize = NearestQuantizer(shape)
        with torch.no_grad():
            quantize.embedding.weight.copy_(start)
        codebook = Codebook(shape, CodebookSettings(revive_every=3), positions=48)
        for step in (0, 1):
            assert torch.equal(looked_up(codebook, quantize, z, step), start)
        assert codebook.idle.tolist() == [0, 0, 2, 2, 2, 2]
        codes = looked_up(codebook, quantize, z, 2)
        assert codebook.idle.tolist() == [0] * 6
        assert torch.equal(codes[:2], start[:2])
        rows = z.movedim(1, -1).reshape(-1, 2).tolist()
        revived = codes[2:].tolist()
        assert all(code in rows for code in revived) and len(set(map(tuple, revived))) == 4
        found.append(codes)
        used = set(quantize.tokens(z).flatten().tolist())
        assert used >= {2, 3, 4, 5}
    assert torch.equal(*found)


def test_codes_of_the_log(tmp_path: Path, shards: str) -> None:
    """Codes counted on one rank, since the beginning, or in validation too."""
    run = tmp_path / "run"
    settings: dict[str, Any] = {"steps": 6, "log_every": 3, "contact_sheet_every": 6}
    validation = {"data": shards, "every": 2, "batches": 1}
    trainer = Trainer(vqgan(shards, run, **settings, validation=validation))
    seen: list[set[int]] = []
    stage = trainer.stage
    assert isinstance(stage, VQGANStage) and stage.codebook is not None
    observe = stage.codebook.observe

    def noted(quantize: Any, latents: Tensor, tokens: Tensor, *rest: Any) -> None:
        seen.append(set(tokens.flatten().tolist()))
        observe(quantize, latents, tokens, *rest)

    stage.codebook.observe = noted  # type: ignore[method-assign]
    trainer.run()
    assert len(seen) == 6
    found = lines(run)
    assert [x["codes_used"] for x in found] == [len(set().union(*seen[i : i + 3])) for i in (0, 3)]
    assert all(1 <= x["codes_perplexity"] <= x["codes_used"] for x in found)
    assert any("psnr" in line for line in read_metrics(run))
    checked = [line for line in read_metrics(run) if "validation/loss" in line]
    assert len(checked) == 3 and checked[-1]["validation/adversarial_weight"] == 0


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_frozen_codebook_stays(decay: float | None, tmp_path: Path, shards: str) -> None:
    """Running means or revived codes that move what `train_only` leaves out, so that tokens mean
    other things."""
    training = {"codebook": {"ema_decay": decay, "revive_every": 2}}
    trainer = Trainer(
        vqgan(shards, tmp_path / "run", vqgan_training=training, train_only=["decoder"], steps=6)
    )
    before = {n: w.clone() for n, w in trainer.engine.weights()}
    trainer.run()
    after = weights_after(tmp_path / "run", 6)
    for frozen in (CODES, "model.encoder.", "model.quant_conv."):
        assert all(same(before, after, frozen))
    assert not all(same(before, after, "model.decoder."))
    assert not all(same(before, after, "discriminator."))


def test_images_of_twice_the_side(tmp_path: Path, shards: str) -> None:
    """A decoder of Haar bands that is compared with images of half its side."""
    config = vqgan(
        shards, tmp_path / "run", steps=5, vqgan={"output": "haar"}, contact_sheet_every=5
    )
    Trainer(config).run()
    assert (tmp_path / "run" / "sheets" / "step-0000005.png").is_file()
    assert all(loss == loss for loss in losses(tmp_path / "run"))


@pytest.fixture
def lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of a small random LPIPS; `perceptual.load` reads such ones here."""
    torch.manual_seed(0)
    module, whole = LPIPS((4, 4, 4, 4, 4)), LPIPS.__init__
    for weight in module.parameters():
        nn.init.uniform_(weight, 0, 0.5)
    monkeypatch.setattr(LPIPS, "__init__", lambda self, widths=(4,) * 5: whole(self, widths))
    state = module.state_dict()
    for name, begin in (("vgg", "features"), ("lin", "lin")):
        torch.save({n: w for n, w in state.items() if n.startswith(begin)}, tmp_path / name)
    return {"vgg": str(tmp_path / "vgg"), "lin": str(tmp_path / "lin")}


def test_lpips_is_read_and_not_trained(tmp_path: Path, shards: str, lpips: dict[str, str]) -> None:
    """A perceptual loss that does not count, whose weights are trained or copied into every
    checkpoint, or that another file takes the place of on --resume."""
    settings: dict[str, Any] = {"steps": 4, "vqgan_training": {"perceptual": lpips}}
    run = tmp_path / "run"
    trainer = Trainer(vqgan(shards, run, **settings))
    trainer.run()
    assert all(line["perceptual"] > 0 for line in lines(run))
    assert not any("features" in name for name in tensors(run, 4))
    assert (run / "model" / "vqgan.safetensors").is_file()
    other = {name: torch.ones_like(w) for name, w in torch.load(lpips["lin"]).items()}
    torch.save(other, lpips["lin"])
    with pytest.raises(ValueError, match=r"^vqgan_training\.perceptual\.lin: .*/lin \("):
        Trainer(vqgan(shards, run, **settings | {"steps": 5}), resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vqgan": {"encoder": False}}, r"vqgan\.encoder: expected true"),
        ({"vqgan": {"quantizer": "gumbel"}}, "vqgan_training.codebook is not read"),
        ({"vqgan_training": {"gumbel": {}}}, "vqgan_training.gumbel is not read"),
        ({"reader": {"image_size": 18}}, "must be a multiple of 4"),
        ({"vqgan_training": {"discriminator": {"layers": 3}}}, "at least 24, got 16"),
        ({"vqgan_training": {"codebook": {"warm_start_steps": 20}}}, "must be less than steps"),
        (
            {"vqgan_training": {"codebook": {"warm_start_steps": 2, "warm_start_images": 1}}},
            r"codebook\.warm_start_images: expected 2 to 1048576, .* 32 codes with 16 .*got 1;",
        ),
        (
            {"vqgan_training": {"codebook": {"warm_start_steps": 2, "warm_start_images": 2**21}}},
            "expected 2 to 1048576, .*got 2097152",
        ),
        (
            {
                "train_only": ["quantize"],
                "vqgan_training": {"codebook": {"ema_decay": 0.9}, "discriminator": None},
            },
            "got the codes alone",
        ),
        ({"train_only": ["encoder"]}, "add decoder.conv_out"),
        ({"train_only": ["encoder*"]}, "add decoder.conv_out"),
        ({"train_only": ["decoder.conv_out.bias"]}, "add decoder.conv_out"),
        (
            {
                "train_only": ["decoder"],
                "vqgan_training": {"codebook": {"warm_start_steps": 2}},
            },
            "which train_only leaves out",
        ),
        ({"vqgan_training": {"perceptual": {"vgg": "no.pth", "lin": "no.pth"}}}, "no.pth"),
        ({"parallel": {"precision": "fp16"}}, "takes 'bf16' or 'fp32'"),
        (
            {"parallel": {"zero_stage": 2, "offload": "optimizer"}},
            "offload 'optimizer' does not go with .*clip_norm",
        ),
    ],
    ids=str,
)
def test_mistakes_before_the_first_update(
    settings: dict[str, Any], words: str, tmp_path: Path, shards: str
) -> None:
    """A setting that is not read, or that fails in the middle of a run."""
    with pytest.raises(ValueError, match=words):
        Trainer(vqgan(shards, tmp_path / "run", **settings))


@pytest.mark.parametrize("name", ["decoder.conv_out", "decoder.*", "conv_out", "*conv_out.weight"])
def test_names_that_train_the_last_weight(name: str, tmp_path: Path, shards: str) -> None:
    """A pattern or an ending of the weight's name, refused since the name does not begin so."""
    settings: dict[str, Any] = {"train_only": [name]}
    stage = Trainer(vqgan(shards, tmp_path / "run", **settings)).stage
    assert isinstance(stage, VQGANStage) and stage.objective.discriminator is not None
    assert stage.objective.discriminator.adaptive
    assert stage.model.decoder.conv_out.weight.requires_grad
    assert not stage.model.encoder.conv_in.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("discriminator.layers", {"discriminator": None}),
        ("discriminator.width", {"discriminator": ADVERSARY | {"width": 16}}),
        ("codebook.ema_decay", {"codebook": {"ema_decay": 0.9}}),
    ],
)
def test_a_run_resumes_with_its_nets(
    name: str, changed: dict[str, Any], tmp_path: Path, shards: str
) -> None:
    """A KeyError in the middle of a checkpoint, or a discriminator that begins anew."""
    Trainer(vqgan(shards, tmp_path / "run", steps=2)).run()
    config = vqgan(shards, tmp_path / "run", steps=4, vqgan_training=changed)
    with pytest.raises(ValueError, match=rf"^vqgan_training\.{name}: .* resumes with"):
        Trainer(config, resume=True)


def test_a_checkpoint_without_its_buffers(tmp_path: Path, shards: str) -> None:
    """Statistics that begin anew without a word."""
    trainer = Trainer(vqgan(shards, tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match=r"expected the buffer codebook\.idle"):
        trainer.engine.load_buffers({})
