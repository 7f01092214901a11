"""Names of weights that others have saved, and safetensors files in shards."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import dvae
from dvae import DVAE, DVAEConfig
from dvae.pickles import read_tensors
from dvae.storage import Kind, load_part, save_part
from tests.fakes import PaletteConfig
from tests.parity import released_dvae as published

SHAPE = {"width": 4, "bottleneck": 3, "groups": 2, "blocks_per_group": 1, "codebook_size": 6}


@pytest.fixture
def codec() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(**SHAPE)).eval()


def same(codec: nn.Module, weights: dict[str, Tensor]) -> bool:
    held = codec.state_dict()
    return held.keys() == weights.keys() and all(
        torch.equal(held[n], w) for n, w in weights.items()
    )


def behind_blocks(name: str, wrapper: str) -> str:
    """`encoder.blocks.input.w` -> `encoder.blocks._orig_mod.input.w`"""
    return name.replace(".blocks.", f".blocks.{wrapper}.")


WRAPPED: dict[str, Callable[[str], str]] = {
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled, then data parallel": lambda name: f"module._orig_mod.{name}",
    "data parallel, then compiled": lambda name: f"_orig_mod.module.{name}",
    "twice": lambda name: f"module.module.{name}",
    "sharded": lambda name: f"_fsdp_wrapped_module.{name}",
    "sharded by an older release": lambda name: f"_fsdp_wrapped_module._fpw_module.{name}",
    "Lightning's": lambda name: f"_forward_module.{name}",
    "compiled by Lightning": lambda name: f"_orig_mod._forward_module.{name}",
    "a list of parts": lambda name: behind_blocks(name, "_orig_mod"),
    "each part": lambda name: name.replace(".input.", ".input._orig_mod."),
    "outside and inside": lambda name: f"module.{behind_blocks(name, '_orig_mod')}",
    "a half": lambda name: name.replace("encoder.", "encoder.module."),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_names_of_wrapped_models(codec: DVAE, tmp_path: Path, way: str) -> None:
    """A state dictionary of a compiled or data-parallel model that is refused."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    weights = load_file(path)
    wrapped = {WRAPPED[way](name): weight.clone() for name, weight in weights.items()}
    assert wrapped.keys() != weights.keys()
    save_file(wrapped, path)
    assert same(dvae.load(tmp_path), weights)


@pytest.mark.parametrize("way", WRAPPED)
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_released_files_of_wrapped_models(tmp_path: Path, way: str, form: str) -> None:
    """The same of the two published files, which are read before any name is known."""
    torch.manual_seed(0)
    parts = {"encoder": published.Encoder(8, 20), "decoder": published.Decoder(8, 20, 12)}
    for name, part in parts.items():
        # As if encoder and decoder were saved in the whole, of which the file is a part.
        renamed = (WRAPPED[way](f"{name}.{key}") for key in part.state_dict())
        keys = [key.replace(f"{name}.", "", 1) for key in renamed]
        weights = dict(zip(keys, part.state_dict().values(), strict=True))
        if form == "torch":
            torch.save(weights, tmp_path / name)
        else:
            save_file(weights, tmp_path / name)
    codec = dvae.load_released(tmp_path / "encoder", tmp_path / "decoder")
    assert same(codec.encoder, dict(parts["encoder"].state_dict()))
    assert same(codec.decoder, dict(parts["decoder"].state_dict()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, AveragedModel])
def test_what_torch_itself_writes(codec: DVAE, tmp_path: Path, wrap: Any) -> None:
    """Names that are ours alone and not those of torch; an average's count, taken for a weight."""
    codec.save(tmp_path)
    weights = dict(codec.state_dict())
    save_file(dict(wrap(codec).state_dict()), tmp_path / "dvae.safetensors")
    assert same(dvae.load(tmp_path), weights)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_checkpoints_of_others(tmp_path: Path, key: str) -> None:
    """A checkpoint of DeepSpeed's or of a training script, in which no tensors are found."""
    torch.manual_seed(0)
    parts = {"encoder": published.Encoder(8, 20), "decoder": published.Decoder(8, 20, 12)}
    for name, part in parts.items():
        weights = {f"module.{n}": w for n, w in part.state_dict().items()}
        moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        torch.save({"epoch": 3, "optimizer": moments, key: weights}, tmp_path / name)
    codec = dvae.load_released(tmp_path / "encoder", tmp_path / "decoder")
    assert same(codec.encoder, dict(parts["encoder"].state_dict()))


def test_checkpoints_that_hold_more_say_what_to_save(tmp_path: Path) -> None:
    """A refusal without a remedy, for a checkpoint that holds a script's arguments."""
    torch.save({"state_dict": {}, "args": Namespace(lr=0.1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"argparse\.Namespace.*save the state dictionary alone"):
        read_tensors(tmp_path / "x.pt")


class Nested(nn.Module):
    """Has parts with the names that wrappers use."""

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__()
        self.config = config
        self.module = nn.Linear(2, 3)
        self.layers = nn.Sequential()
        self.layers.add_module("_orig_mod", nn.Linear(3, 4))


NESTED = Kind("codec", "nested", PaletteConfig, Nested, "nested.safetensors")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_part_of_that_name_keeps_it(tmp_path: Path, prefix: str) -> None:
    """A weight `module.weight` of the model's own whose name loses its first half."""
    part = Nested(PaletteConfig())
    save_part(NESTED, part, tmp_path)
    weights = {prefix + name: w.clone() for name, w in part.state_dict().items()}
    save_file(weights, tmp_path / "nested.safetensors")
    again = load_part("codec", {"nested": NESTED}, tmp_path)
    assert same(again, dict(part.state_dict()))


def test_the_same_weight_twice(codec: DVAE, tmp_path: Path) -> None:
    """A file with and without a prefix, of which the later weight wins."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    weights = load_file(path)
    save_file({**weights, "module.encoder.blocks.input.b": torch.zeros(4)}, path)
    with pytest.raises(ValueError, match=r"dvae\.safetensors: .*are the same weight twice"):
        dvae.load(tmp_path)


@pytest.mark.parametrize("name", ["modules.", "my_module.", "_orig_module.", "ema.", "x.module."])
def test_other_prefixes_are_refused(codec: DVAE, tmp_path: Path, name: str) -> None:
    """A prefix that means something else, taken off as if it were nothing."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    save_file({name + key: w for key, w in load_file(path).items()}, path)
    with pytest.raises(
        ValueError, match=r"dvae\.safetensors: has (no|an unexpected) weight"
    ) as raised:
        dvae.load(tmp_path)
    assert "\n" not in str(raised.value)


def divided(folder: Path, file: str, index: str, count: int = 3) -> dict[str, str]:
    """Divides a file of a folder into shards and an index; returns the weight map."""
    weights = load_file(folder / file)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    files = {key: names[i % count] for i, key in enumerate(weights)}
    for name in names:
        shard = {key: w.clone() for key, w in weights.items() if files[key] == name}
        save_file(shard, folder / name)
    (folder / file).unlink()
    written(folder / index, files)
    return files


def written(index: Path, weight_map: Any) -> None:
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", ["dvae.safetensors.index.json", "model.safetensors.index.json"])
def test_shards_of_a_part(codec: DVAE, tmp_path: Path, index: str) -> None:
    """An index that is not followed, or of which the first shard alone is read."""
    codec.save(tmp_path)
    weights = dict(codec.state_dict())
    divided(tmp_path, "dvae.safetensors", index)
    assert same(dvae.load(tmp_path), weights)


def test_shards_of_wrapped_models(codec: DVAE, tmp_path: Path) -> None:
    """Either of the two that is read only without the other."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    save_file({f"module._orig_mod.{key}": w for key, w in load_file(path).items()}, path)
    divided(tmp_path, path.name, f"{path.name}.index.json", 2)
    assert same(dvae.load(tmp_path), dict(codec.state_dict()))


def test_shards_of_a_released_part(tmp_path: Path) -> None:
    """Published weights in shards, given as index or as folder, that are refused."""
    encoder, decoder = published.Encoder(8, 20), published.Decoder(8, 20, 12)
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        (tmp_path / name).mkdir()
        save_file(dict(part.state_dict()), tmp_path / name / "model.safetensors")
    index = "model.safetensors.index.json"
    divided(tmp_path / "encoder", "model.safetensors", index)
    codec = dvae.load_released(tmp_path / "encoder" / index, tmp_path / "decoder")
    assert same(codec.encoder, dict(encoder.state_dict()))
    again = dvae.load_released(tmp_path / "encoder", tmp_path / "decoder" / "model.safetensors")
    assert same(again, dict(codec.state_dict()))


def test_links_of_a_cache(codec: DVAE, tmp_path: Path) -> None:
    """A snapshot of a hub's cache, in which index and shards are links into one folder."""
    codec.save(tmp_path)
    files = divided(tmp_path, "dvae.safetensors", "model.safetensors.index.json")
    (tmp_path / "blobs").mkdir()
    for i, name in enumerate([*set(files.values()), "model.safetensors.index.json"]):
        shutil.move(tmp_path / name, tmp_path / "blobs" / f"{i:064x}")
        (tmp_path / name).symlink_to(f"blobs/{i:064x}")
    assert same(dvae.load(tmp_path), dict(codec.state_dict()))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "..", ".", "", "a/../../outside.safetensors", "/etc/passwd",
        "sub/x", "..\\outside.safetensors", "C:\\x", "nul\0byte", "line\nbreak", "link", "fifo",
        "absent.safetensors", "config.json", 3, None, ["model-00001-of-00003.safetensors"], {},
    ],
)  # fmt: skip
def test_an_index_names_files_of_its_folder(codec: DVAE, tmp_path: Path, name: Any) -> None:
    """A file of somebody else that is read, a traceback, a wait without end."""
    folder = tmp_path / "model"
    codec.save(folder)
    files = divided(folder, "dvae.safetensors", "dvae.safetensors.index.json")
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / next(iter(files.values())), outside)
    (folder / "sub").mkdir()
    shutil.copy(outside, folder / "sub" / "x")
    (folder / "link").symlink_to(outside)
    os.mkfifo(folder / "fifo")
    written(folder / "dvae.safetensors.index.json", {**files, next(iter(files)): name})
    with pytest.raises(ValueError, match=r"(index|config)\.json") as raised:
        dvae.load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no index of shards"),
        ("[" * 100_000, "no index of shards"),
        ("[]", "weight_map: expected the names"),
        ("{}", "weight_map: expected the names"),
        ('{"weight_map": {}}', "weight_map: expected the names"),
        ('{"weight_map": ["model-00001-of-00003.safetensors"]}', "weight_map: expected the names"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is there twice"),
        ('{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}', "'weight_map' is there twice"),
    ],
)
def test_an_index_that_is_none(codec: DVAE, tmp_path: Path, content: str, message: str) -> None:
    """Other JSON, or none, with a traceback; a name that stands for two files."""
    codec.save(tmp_path)
    divided(tmp_path, "dvae.safetensors", "dvae.safetensors.index.json")
    (tmp_path / "dvae.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: .*" + message) as raised:
        dvae.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_index_with_a_mark_in_front(codec: DVAE, tmp_path: Path) -> None:
    """An index that an editor saved with U+FEFF, which config.json may have."""
    codec.save(tmp_path)
    divided(tmp_path, "dvae.safetensors", "dvae.safetensors.index.json")
    path = tmp_path / "dvae.safetensors.index.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert same(dvae.load(tmp_path), dict(codec.state_dict()))


def test_a_weight_in_two_shards(codec: DVAE, tmp_path: Path) -> None:
    """The later shard's weight in the place of the one that the index names."""
    codec.save(tmp_path)
    files = divided(tmp_path, "dvae.safetensors", "dvae.safetensors.index.json", 2)
    key = next(iter(files))
    other = tmp_path / "model-00002-of-00002.safetensors"
    save_file({**load_file(other), key: torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=rf"index\.json: weight '{key}': expected in one shard"):
        dvae.load(tmp_path)


def test_a_weight_in_another_shard_or_none(codec: DVAE, tmp_path: Path) -> None:
    """An index that is not of these shards."""
    codec.save(tmp_path)
    files = divided(tmp_path, "dvae.safetensors", "dvae.safetensors.index.json", 2)
    index, (first, second) = tmp_path / "dvae.safetensors.index.json", sorted(set(files.values()))
    key = next(name for name, file in files.items() if file == first)
    written(index, {**files, key: second})
    with pytest.raises(ValueError, match=f"weight '{key}': '{second}' does not hold it"):
        dvae.load(tmp_path)
    written(index, {**files, "more": first})
    with pytest.raises(ValueError, match=f"weight 'more': '{first}' does not hold it"):
        dvae.load(tmp_path)
    without = {name: file for name, file in files.items() if file == second}
    written(index, without)
    with pytest.raises(ValueError, match="has no weight"):
        dvae.load(tmp_path)


def test_a_file_stands_before_an_index(codec: DVAE, tmp_path: Path) -> None:
    """An index that was left behind, in the place of the file that a run has written since."""
    codec.save(tmp_path)
    divided(tmp_path, "dvae.safetensors", "dvae.safetensors.index.json")
    other = DVAE(codec.config)
    other.save(tmp_path)
    assert same(dvae.load(tmp_path), dict(other.state_dict()))


@pytest.mark.parametrize("length", [2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_headers_are_bounded(codec: DVAE, tmp_path: Path, length: int) -> None:
    """Memory for a header that is as long as the file says."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    content = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(ValueError, match=r"dvae\.safetensors: truncated or no safetensors"):
        dvae.load(tmp_path)
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match=r"dvae\.safetensors: truncated or no safetensors"):
        dvae.load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    """An IsADirectoryError, or a file of another name that is taken."""
    with pytest.raises(ValueError, match=r"model\.safetensors: No such file"):
        read_tensors(tmp_path)


POINTED = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 67108864\n"


def test_files_that_are_no_safetensors_say_what_to_do(codec: DVAE, tmp_path: Path) -> None:
    """A repository cloned without Git LFS, or a renamed file of torch.save, called truncated."""
    codec.save(tmp_path)
    path = tmp_path / "dvae.safetensors"
    path.write_text(POINTED)
    with pytest.raises(ValueError, match=r"dvae\.safetensors: .*git lfs pull"):
        dvae.load(tmp_path)
    with pytest.raises(ValueError, match=r"dvae\.safetensors: .*git lfs pull"):
        dvae.load_released(path, path)
    torch.save(codec.state_dict(), path)
    with pytest.raises(ValueError, match=r"dvae\.safetensors: .*safetensors\.torch\.save_file"):
        dvae.load(tmp_path)


def test_a_header_as_long_as_an_archive_begins(codec: DVAE, tmp_path: Path) -> None:
    """Safetensors taken for a file of torch.save, since the header's length is spelled "PK"."""
    codec.save(tmp_path)
    path, length = tmp_path / "dvae.safetensors", 0x4B50
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])
    assert path.read_bytes()[:2] == b"PK"
    assert same(dvae.load(tmp_path), dict(codec.state_dict()))
