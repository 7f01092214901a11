"""Published VQGANs: files in their exact layouts become codecs that compute what they should."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from dalle1.published.parts import PublishedPart
from dalle1.published.vqgan import FAMILIES, codec_part, find_weights, read_codec_part
from dvae import VQGAN, VQGANConfig
from dvae.loading import fill
from tests.parity import published_vqgan as published
from tests.published import lightning
from tests.published.dalle_mini_files import flax_bytes

SHAPE = (32, (1, 2), (1,), 12, 12, 40)  # stride 2
CONFIG = VQGANConfig(
    width=32,
    multipliers=(1, 2),
    attention_levels=(1,),
    latent_channels=12,
    embedding_dim=12,
    codebook_size=40,
)
# Weights of losses and of training that published files hold beside the codec's.
BESIDE = {
    "loss.perceptual_loss.scaling_layer.shift": torch.zeros(1, 3, 1, 1),
    "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(4, 3, 3, 3),
    "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
    "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
    "colorize": torch.zeros(3, 2, 1, 1),
    "model_ema.decay": torch.tensor(0.99),
    "model_ema.encoderconv_inweight": torch.zeros(2),
}


def weights_of(gumbel: bool = False, out: int = 3) -> dict[str, Tensor]:
    return published.random_weights(published.shapes(*SHAPE, gumbel, out))


def build(part: PublishedPart) -> VQGAN:
    """The codec of a part, as an import would fill it."""
    held = {name: weight() for name, weight in part.weights.items()}
    codec = fill(lambda: part.kind.module(part.config), held, part.path, "a codec")
    assert isinstance(codec, VQGAN)
    return codec.eval()


def check(codec: VQGAN, weights: Mapping[str, Tensor], maps_of: Callable[..., Tensor]) -> None:
    """Raises AssertionError where a codec does not compute as its published weights."""
    images, signed = torch.rand(1, 3, 8, 12), codec.config.signed_pixels
    if codec.config.encoder:
        pixels = 2 * images - 1 if signed else images
        latents = published.conv(published.encoder(pixels, weights), weights, "quant_conv")
        if codec.config.quantizer == "gumbel":
            expected = published.largest_logit(latents, weights)
        else:
            codes = weights["quantize.embedding.weight"]
            expected = published.nearest(latents, codes, codec.config.normalized_codes)
        assert torch.equal(codec.encode(images), expected)
    tokens = torch.randint(40, (1, 3, 4))
    codes = next(w for name, w in weights.items() if "embed" in name).double()
    if codec.config.normalized_codes:
        codes = codes / codes.norm(dim=1, keepdim=True)
    maps = maps_of(codes[tokens].movedim(-1, 1))
    decoded = ((maps + 1) / 2 if signed else maps).clamp(0, 1)
    torch.testing.assert_close(codec.decode(tokens).double(), decoded, rtol=1e-5, atol=1e-5)


def taming_maps(weights: Mapping[str, Tensor], vectors: Tensor, eps: float = 1e-6) -> Tensor:
    latents = published.conv(vectors, weights, "post_quant_conv")
    return published.decoder(latents, weights, eps)


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_checkpoint_of_lightning(tmp_path: Path, form: str, gumbel: bool) -> None:
    """A file that opens only where an old Lightning is installed, or whose losses are taken for the
    codec's weights."""
    weights = weights_of(gumbel)
    path = lightning.save({**weights, **BESIDE}, tmp_path / "last.ckpt", form)
    part = read_codec_part(path)
    expected = CONFIG.model_copy(update={"quantizer": "gumbel" if gumbel else "nearest"})
    assert part.config == expected
    check(build(part), weights, partial(taming_maps, weights))


def first_stage(weights: Mapping[str, Tensor], path: Path) -> Path:
    """A checkpoint of taming's transformer, or of latent diffusion."""
    held = {f"first_stage_model.{name}": weight for name, weight in weights.items()}
    held |= {
        "transformer.tok_emb.weight": torch.zeros(3, 2),
        "model.diffusion_model.time_embed.0.weight": torch.zeros(2, 2),
        "cond_stage_model.decoder.conv_in.weight": torch.zeros(2, 2, 3, 3),
    }
    return lightning.save(held, path)


def bare(weights: Mapping[str, Tensor], path: Path) -> Path:
    torch.save(dict(weights), path)
    return path


def in_safetensors(weights: Mapping[str, Tensor], path: Path) -> Path:
    save_file(dict(weights), path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def in_data_parallel(weights: Mapping[str, Tensor], path: Path) -> Path:
    torch.save({"state_dict": {f"module.{name}": w for name, w in weights.items()}}, path)
    return path


@pytest.mark.parametrize("write", [first_stage, bare, in_safetensors, in_data_parallel])
def test_where_weights_lie(tmp_path: Path, write: Callable[..., Path]) -> None:
    """A codec that is found only where its authors put it."""
    weights = weights_of()
    part = read_codec_part(write(weights, tmp_path / "model.ckpt"))
    assert part.config == CONFIG
    check(build(part), weights, partial(taming_maps, weights))


def sber_haar(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of Sber's file with the Haar decoder."""
    half = 2**-0.5
    held = {}
    for name, weight in weights.items():
        wrapped = name.startswith(("decoder.", "post_quant_conv."))
        held[f"model.decoder.{name}" if wrapped else f"model.{name}"] = weight
    held["model.post_quant_conv.weight"] = torch.full((12, 12, 1, 1), 9.0)  # which is never run
    held["model.post_quant_conv.bias"] = torch.full((12,), 9.0)
    for axis, shape in (("col", (1, 1, 2, 1)), ("row", (1, 1, 1, 2))):
        held[f"model.decoder.idwt.g0_{axis}"] = torch.tensor([half, half]).view(shape)
        held[f"model.decoder.idwt.g1_{axis}"] = torch.tensor([half, -half]).view(shape)
    return held


def test_sbers_haar_decoder(tmp_path: Path) -> None:
    """The outer convolution, which the published code never runs, in place of the decoder's own;
    images of half the side."""
    weights = weights_of(gumbel=True, out=12)
    path = tmp_path / "vqgan.gumbelf8-sber-dwt.model.ckpt"
    torch.save({"state_dict": sber_haar(weights)}, path)
    part = read_codec_part(path)
    assert part.config == CONFIG.model_copy(update={"quantizer": "gumbel", "output": "haar"})
    check(build(part), weights, lambda z: published.from_bands(taming_maps(weights, z)))


def test_another_wavelet_is_named(tmp_path: Path) -> None:
    """Images that are made of bands by the wrong transform."""
    held = sber_haar(weights_of(gumbel=True, out=12))
    held["model.decoder.idwt.g1_row"] = torch.tensor([0.5, 0.5])
    torch.save(held, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"decoder\.idwt\.g1_row: expected the taps"):
        read_codec_part(tmp_path / "a.ckpt")


def flax(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and axes of DALL·E mini's file."""
    held = {}
    for name, weight in weights.items():
        parts = name.split(".")
        for place in ("down", "up", "block", "attn"):
            if place in parts:
                i = parts.index(place)
                parts[i : i + 2] = [f"{place}_{parts[i + 1]}"]
        end = {"embedding": "embedding"}.get(parts[-2], "kernel" if weight.ndim == 4 else "scale")
        parts[-1] = end if parts[-1] == "weight" else parts[-1]
        held[".".join(parts)] = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight
    return held


def test_names_and_axes_of_flax() -> None:
    """A kernel with exchanged axes: 1x1 and square ones fit all the same. Or pixels in [-1, 1],
    which make pale images."""
    weights = weights_of()
    held = flax(weights)
    assert {"encoder.down_0.block_0.norm1.scale", "decoder.up_1.attn_2.q.kernel"} <= held.keys()
    assert {"encoder.mid.block_1.conv1.kernel", "quantize.embedding.embedding"} <= held.keys()
    lazy = {name: (lambda weight=weight: weight) for name, weight in held.items()}
    part = codec_part(lazy, Path("flax_model.msgpack"))
    assert part.config == CONFIG.model_copy(update={"signed_pixels": False})
    check(build(part), weights, partial(taming_maps, weights))
    signed = codec_part(lazy, Path("flax_model.msgpack"), signed_pixels=True)
    assert signed.config == CONFIG


def test_a_file_of_flax(tmp_path: Path) -> None:
    """A codec of DALL·E mini that no family, or another one, recognizes; a damaged file that fails
    without its name."""
    weights = weights_of()
    path = tmp_path / "flax_model.msgpack"
    content = flax_bytes({name: weight.numpy() for name, weight in flax(weights).items()})
    path.write_bytes(content)
    (tmp_path / "config.json").write_text('{"ch": 32}')
    for source in (path, tmp_path):
        (family,) = (family for family in FAMILIES if family.recognizes(source))
        assert family.name == "dalle_mini_vqgan"
        part = family.read(source).codec
        assert part is not None
        check(build(part), weights, partial(taming_maps, weights))
    taming = next(family for family in FAMILIES if family.name == "vqgan")
    with pytest.raises(ValueError, match="layout taming, got flax"):
        taming.read(path)
    path.write_bytes(content[:-100])
    assert not family.recognizes(path)
    with pytest.raises(ValueError, match=r"flax_model\.msgpack: no readable msgpack"):
        family.read(path)


def test_min_dalles_decoder(tmp_path: Path) -> None:
    """Norms with another eps, pixels of another range, or an encoder that is missing."""
    weights = {
        name.removeprefix("quantize."): weight
        for name, weight in weights_of().items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    torch.save(weights, tmp_path / "detoker.pt")
    part = read_codec_part(tmp_path / "detoker.pt")
    assert part.config == CONFIG.model_copy(
        update={"signed_pixels": False, "norm_eps": 1e-5, "encoder": False}
    )
    check(build(part), weights, partial(taming_maps, weights, eps=1e-5))


def llamagen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of LlamaGen's file: of two levels, those of the decoder from the lowest."""
    held = {"quantize.codebook_used": torch.zeros(65536)}
    for name, weight in weights.items():
        for level in range(2):
            name = name.replace(f"encoder.down.{level}.", f"encoder.conv_blocks.{level}.")
            name = name.replace(f"decoder.up.{level}.", f"decoder.conv_blocks.{1 - level}.")
        if "conv_blocks" in name:
            name = name.replace(".block.", ".res.")
        for i, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f"mid.{part}.", f"mid.{i}.")
        held[name] = weight
    return held


def test_llamagens_names(tmp_path: Path) -> None:
    """Levels in the wrong order, or codes that are not of length 1."""
    weights = weights_of()
    torch.save({"model": llamagen(weights), "steps": 3}, tmp_path / "vq_ds16_c2i.pt")
    part = read_codec_part(tmp_path / "vq_ds16_c2i.pt")
    assert part.config == CONFIG.model_copy(update={"normalized_codes": True})
    check(build(part), weights, partial(taming_maps, weights))


def test_16_bits_stay(tmp_path: Path) -> None:
    """Weights that an import makes twice as large."""
    weights = {name: weight.half() for name, weight in weights_of().items()}
    part = read_codec_part(bare(weights, tmp_path / "model.pt"))
    assert {weight().dtype for weight in part.weights.values()} == {torch.float16}


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch HARMED",)


class Looked:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("text", "upper")


@pytest.mark.parametrize("harm", [Harm(), Looked()])
def test_hostile_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: object) -> None:
    """A pickle whose calls are run, or skipped without a word, because objects beside the weights
    may be of any class."""
    monkeypatch.chdir(tmp_path)
    path = lightning.save(weights_of(), tmp_path / "last.ckpt", callbacks={"x": harm})
    with pytest.raises(ValueError, match="which weights have no use for"):
        read_codec_part(path)
    assert not (tmp_path / "HARMED").exists()


def test_names_of_training_are_not_looked_up(tmp_path: Path) -> None:
    """A class of an installed package that is imported, or made, while a file is read."""
    program = pickle.dumps({"state_dict": {}}, protocol=2)[:-1]  # without its end
    calls = b"cnumpy.testing\nmeasure\n(X\x05\x00\x00\x001 / 0tR0"  # would raise, if it were called
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", program + calls + b".")
    (tmp_path / "a.ckpt").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="holds no tensors"):
        read_codec_part(tmp_path / "a.ckpt")


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__delitem__(name)


def resized(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("decoder.mid.attn_1.q.weight"), r"no weight 'decoder\.mid\.attn_1\.q\.weight'"),
        (without("encoder.conv_in.weight"), r"no weight 'encoder\.conv_in\.weight'"),
        (without("decoder.conv_out.weight"), r"no weight 'decoder\.conv_out\.weight'"),
        (without("quantize.embedding.weight"), "without a codebook and a decoder"),
        (resized("decoder.conv_in.weight", 64, 13, 3, 3), r"has shape \[64, 13, 3, 3\]"),
        (resized("encoder.conv_in.weight", 48, 3, 3, 3), "multiple of 48 channels"),
        (resized("encoder.conv_in.weight", 0, 3, 3, 3), "multiple of 0 channels"),
        (resized("encoder.down.0.block.0.temb_proj.weight", 2, 2), "unexpected weight"),
        (resized("quantize.embedding.weight", 40), r"no weight 'quantize\.embedding\.weight'"),
        (resized("quantize.used", 9), r"quantize\.used.*restricted"),
        (resized("encoder.conv_out.weight", 24, 64, 3, 3), r"has shape \[24, 64, 3, 3\]"),
        (resized("decoder.conv_out.weight", 2**60, 0, 3, 3), r"model\.pt: a VQGAN cannot be built"),
    ],
)
def test_wrong_weights_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    """A file of another model, or a damaged one, that fails where nobody knows why, or does not."""
    weights = weights_of()
    change(weights)
    with pytest.raises(ValueError, match=message):
        read_codec_part(bare(weights, tmp_path / "model.pt"))


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    """An error without the file's name."""
    path = lightning.save(weights_of(), tmp_path / "last.ckpt")
    content = path.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"last\.ckpt: "):
            read_codec_part(path)
    with pytest.raises(ValueError, match="No such file"):
        read_codec_part(tmp_path / "none.ckpt")


def test_nothing_is_made_that_a_file_claims(tmp_path: Path) -> None:
    """Modules for a hundred levels, of which each doubles the width."""
    weights = {f"decoder.up.{i}.block.0.conv1.weight": torch.zeros(0) for i in range(100)}
    weights |= {"quantize.embedding.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="expected 1 to 8 levels"):
        read_codec_part(bare(weights, tmp_path / "model.pt"))


def settings(**others: Any) -> dict[str, Any]:
    nets = {
        "double_z": False,
        "z_channels": 12,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [128],
        "dropout": 0.0,
    }
    params = {"embed_dim": 12, "n_embed": 40, "ddconfig": nets, "lossconfig": {"target": "x.Y"}}
    nets.update({name: value for name, value in others.items() if name in nets})
    params.update({name: value for name, value in others.items() if name in params})
    return {"model": {"target": "taming.models.vqgan.VQModel", "params": params}, "data": {}}


@pytest.mark.parametrize(
    ("weights", "beside"),
    [
        ("ckpts/last.ckpt", "configs/model.yaml"),
        ("vqgan.1024.model.ckpt", "vqgan.1024.config.yml"),
        ("model.ckpt", "config.yaml"),
    ],
)
def test_settings_beside_the_weights(tmp_path: Path, weights: str, beside: str) -> None:
    """Settings of another model, which its file is believed to be until images are wrong."""
    for name in (weights, beside):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    lightning.save(weights_of(), tmp_path / weights)
    (tmp_path / beside).write_text(yaml.safe_dump(settings()))
    assert read_codec_part(tmp_path).config == CONFIG
    for key, value, told in (
        ("n_embed", 1024, 40),
        ("ch_mult", [1, 1], r"\[1, 2\]"),
        ("attn_resolutions", [256], r"\[1\]"),
        ("double_z", True, "False"),
    ):
        (tmp_path / beside).write_text(yaml.safe_dump(settings(**{key: value})))
        with pytest.raises(ValueError, match=rf"{key}.*: expected {told} as in .*ckpt, got"):
            read_codec_part(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "truncated or no YAML"),
        ("a: !!python/object/apply:os.system ['touch HARMED']", "truncated or no YAML"),
        ("a: " + "x" * 2**20, "at most"),
        ("[" * 100_000, "truncated or no YAML"),
        ("a: &a [1]\nb: [*a, *a]", "got an alias"),
    ],
)
def test_settings_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    """A file of settings that runs code, or takes all memory."""
    monkeypatch.chdir(tmp_path)
    lightning.save(weights_of(), tmp_path / "model.ckpt")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_codec_part(tmp_path)
    assert not (tmp_path / "HARMED").exists()


@pytest.mark.parametrize("text", ["", "- 1", "stage1: {n_embed: 3}", "model: {params: 3}"])
def test_settings_of_something_else(tmp_path: Path, text: str) -> None:
    """A codec that does not open because another model's settings lie in its folder."""
    lightning.save(weights_of(), tmp_path / "model.ckpt")
    (tmp_path / "config.yaml").write_text(text)
    assert read_codec_part(tmp_path).config == CONFIG


def test_the_file_of_a_folder(tmp_path: Path) -> None:
    """The first of several files, which is an older one."""
    with pytest.raises(ValueError, match="expected one file of weights"):
        find_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("epoch=000001.ckpt", "last.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    assert find_weights(tmp_path).name == "last.ckpt"
    (tmp_path / "checkpoints" / "last.ckpt").rename(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"got other\.ckpt, checkpoints/epoch=000001\.ckpt"):
        find_weights(tmp_path)


FILES: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "vqgan": ("last.ckpt", weights_of),
    "sber_vqgan": ("vqgan.gumbelf8-sber.model.ckpt", partial(weights_of, True)),
    "llamagen_vqgan": ("vq_ds16_c2i.pt", lambda: llamagen(weights_of())),
    "min_dalle_detokenizer": (
        "detoker.pt",
        lambda: {
            name.removeprefix("quantize."): weight
            for name, weight in weights_of().items()
            if not name.startswith(("encoder.", "quant_conv."))
        },
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_families_know_their_own(tmp_path: Path, name: str) -> None:
    """A file that two families recognize, or none; a folder of a prior that is taken for its
    codec's."""
    file, make = FILES[name]
    path = bare(make(), tmp_path / file)
    for source in (path, tmp_path):
        assert [family.name for family in FAMILIES if family.recognizes(source)] == [name]
        family = next(family for family in FAMILIES if family.name == name)
        model = family.read(source)
        assert model.codec is not None and model.prior is None and model.notes
    (tmp_path / "stage2_last.ckpt").touch()
    assert not any(family.recognizes(tmp_path) for family in FAMILIES)


def test_another_family_is_named(tmp_path: Path) -> None:
    """A KIND that is given and does not matter."""
    path = bare(llamagen(weights_of()), tmp_path / "vq.pt")
    with pytest.raises(ValueError, match="layout taming, got llamagen"):
        next(family for family in FAMILIES if family.name == "vqgan").read(path)


def test_what_no_family_recognizes(tmp_path: Path) -> None:
    """An error, or a long read, where somebody else's file is only looked at."""
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04")
    (tmp_path / "b.msgpack").write_bytes(b"\x81\xa5model\x80")
    (tmp_path / "c.txt").write_text("decoder.conv_in.weight post_quant_conv.weight quantize.embed")
    bare({"conv_in.weight": torch.zeros(2)}, tmp_path / "d.pt")
    for path in (*tmp_path.iterdir(), tmp_path / "none.ckpt", tmp_path):
        assert not any(family.recognizes(path) for family in FAMILIES)
