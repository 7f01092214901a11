"""The published dVAE files: read without running them, equal to the published arithmetic."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dvae
from dvae.pickles import read_tensors
from tests.parity import released_dvae as published

WIDTH, VOCAB, BOTTLENECK = 8, 20, 12


@pytest.fixture
def parts() -> tuple[published.Encoder, published.Decoder]:
    torch.manual_seed(0)
    return published.Encoder(WIDTH, VOCAB), published.Decoder(WIDTH, VOCAB, BOTTLENECK)


def write(module: nn.Module, path: Path, form: str) -> Path:
    """Saves a part in one of the forms that users hold."""
    if form == "safetensors":
        save_file(dict(module.state_dict()), path)
    elif form == "state":
        torch.save(module.state_dict(), path)
    else:
        with published.published_names():
            torch.save(module, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["zip", "legacy", "state", "safetensors"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_equal_to_the_published(
    parts: tuple[published.Encoder, published.Decoder], tmp_path: Path, form: str
) -> None:
    """A key mapped to another weight, a gain, kernel or pooling unlike the published one."""
    encoder, decoder = parts
    codec = dvae.load_released(
        write(encoder, tmp_path / "encoder.pkl", form),
        write(decoder, tmp_path / "decoder.pkl", form),
    )
    assert codec.config == dvae.DVAEConfig(width=WIDTH, bottleneck=BOTTLENECK, codebook_size=VOCAB)
    assert not codec.training
    assert all(
        torch.equal(weight, codec.encoder.state_dict()[key])
        for key, weight in encoder.state_dict().items()
    )
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        expected = encoder(0.8 * images + 0.1)
        torch.testing.assert_close(codec.logits(images), expected, rtol=0, atol=1e-5)
        relaxed = torch.randn(2, VOCAB, 3, 2).softmax(dim=1)
        torch.testing.assert_close(codec.decoder(relaxed), decoder(relaxed), rtol=0, atol=1e-5)


def test_size_of_the_published() -> None:
    """A shape read off the weights that is not the default for the published sizes."""
    with torch.device("meta"):
        encoder, decoder = published.Encoder(256, 8192), published.Decoder(256, 8192, 128)
        codec = dvae.DVAE()
    for part, own in ((encoder, codec.encoder), (decoder, codec.decoder)):
        shapes = {key: weight.shape for key, weight in part.state_dict().items()}
        assert shapes == {key: weight.shape for key, weight in own.state_dict().items()}


def test_the_two_exchanged(
    parts: tuple[published.Encoder, published.Decoder], tmp_path: Path
) -> None:
    """The decoder given first, with a message about some key."""
    encoder = write(parts[0], tmp_path / "encoder.pkl", "zip")
    decoder = write(parts[1], tmp_path / "decoder.pkl", "zip")
    with pytest.raises(ValueError, match=r"expected the released encoder, got a dall_e\.decoder"):
        dvae.load_released(decoder, encoder)
    encoder = write(parts[0], tmp_path / "encoder.pt", "state")
    decoder = write(parts[1], tmp_path / "decoder.pt", "state")
    with pytest.raises(ValueError, match="encoder's file, then the decoder's"):
        dvae.load_released(decoder, encoder)


def test_parts_that_do_not_belong_together(
    parts: tuple[published.Encoder, published.Decoder], tmp_path: Path
) -> None:
    """A decoder of another codebook that fails, or does not, at the first picture."""
    encoder = write(parts[0], tmp_path / "encoder.pkl", "state")
    decoder = write(published.Decoder(WIDTH, 24, BOTTLENECK), tmp_path / "decoder.pkl", "state")
    with pytest.raises(ValueError, match=r"reads 24 tokens.*writes 20"):
        dvae.load_released(encoder, decoder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("blocks.group_2.block_1.id_path.w", None, "has no weight 'blocks.group_2.block_1.id_path"),
        ("blocks.extra", torch.zeros(2), "unexpected weight 'blocks.extra'"),
        ("blocks.input.b", torch.zeros(3), r"'blocks.input.b' has shape \[3\], expected \[8\]"),
        ("blocks.input.w", None, "has no weight 'blocks.input.w'"),
    ],
)
def test_weights_that_do_not_fit(
    parts: tuple[published.Encoder, published.Decoder],
    tmp_path: Path,
    key: str,
    value: torch.Tensor | None,
    message: str,
) -> None:
    """A weight left out, added or of another shape that is silently passed over."""
    weights = dict(parts[0].state_dict())
    weights.pop(key, None)
    if value is not None:
        weights[key] = value
    torch.save(weights, tmp_path / "encoder.pkl")
    decoder = write(parts[1], tmp_path / "decoder.pkl", "zip")
    with pytest.raises(ValueError, match=message):
        dvae.load_released(tmp_path / "encoder.pkl", decoder)


class Command:
    """What a hostile pickle looks like: loading it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "beside the weights"])
def test_hostile_pickle(
    parts: tuple[published.Encoder, published.Decoder], tmp_path: Path, form: str
) -> None:
    """Anything in the file that is run while it is read."""
    marker, path = tmp_path / "was_run", tmp_path / "encoder.pkl"
    content: object = Command(marker)
    if form == "beside the weights":
        content = {**parts[0].state_dict(), "command": content}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    decoder = write(parts[1], tmp_path / "decoder.pkl", "zip")
    with pytest.raises(ValueError, match=r"encoder\.pkl.*names (posix|nt)\.system"):
        dvae.load_released(path, decoder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["torch.load", "builtins.eval", "torch.nn.modules.linear.Linear"])
def test_names_that_are_not_listed(tmp_path: Path, name: str) -> None:
    """A list of names that lets a whole package through."""
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "encoder.pkl"
    program = f"c{module}\n{attribute}\n(S'x'\ntR.".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        dvae.load_released(path, path)


@pytest.mark.parametrize("form", ["zip", "legacy", "state", "safetensors"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_cut_short(
    parts: tuple[published.Encoder, published.Decoder], tmp_path: Path, form: str, share: float
) -> None:
    """A truncated download that loads, hangs or raises anything but a ValueError that names it."""
    path = write(parts[0], tmp_path / "encoder.pkl", form)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"encoder\.pkl"):
        dvae.load_released(path, path)


def test_missing(tmp_path: Path) -> None:
    """A FileNotFoundError in place of the ValueError that users are promised."""
    with pytest.raises(ValueError, match=r"encoder\.pkl: No such file"):
        dvae.load_released(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((5,), (1,), 0), ((2, 2), (3, 1), 0), ((2,), (1,), 3), ((10**12,), (0,), 0)],
)
def test_tensor_beyond_its_storage(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    """A forged view that reads memory behind the storage's four numbers."""

    class Forged:
        def __reduce__(self) -> tuple[object, ...]:
            storage = torch.zeros(4).storage()
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (storage, offset, size, stride, False, {})

    buffer = io.BytesIO()
    torch.save({"weight": Forged()}, buffer)
    (tmp_path / "forged.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="beyond its storage"):
        read_tensors(tmp_path / "forged.pt")


def written(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
    return path


NODE = b"cdall_e.encoder\nEncoder\n)\x81"  # an empty object of an allowed class


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo of 2^32 entries
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a buffer of 2^40 bytes
        b"\x80\x02\x82\x01.",  # a class by its registered number
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n}U\x01xK\x01sb.",  # state of a function
        b"\x80\x02cbuiltins\nset\n]\x85R}U\x01xK\x01sb.",  # state of a set
        b"\x80\x02" + NODE + b"q\x00}U\x01xh\x00sb.",  # a node that holds itself
        b"\x80\x02" + NODE + b"}U\x08_modulesK\x07sb.",  # parts that are no dictionary
        b"\x80\x02" + NODE + b"K\x07b.",  # a state that is none
        b"\x80\x02" + b"]" * 100_000 + b".",
        b"\x80\x02\xfe.",
    ],
)
def test_forged_programs(tmp_path: Path, program: bytes) -> None:
    """Memory taken because a file claims so, state that outlives the file, another exception."""
    path = written(tmp_path / "forged.pkl", program)
    with pytest.raises(ValueError, match=r"forged\.pkl"):
        dvae.load_released(path, path)


def test_compressed_program(tmp_path: Path) -> None:
    """A few kilobytes that unpack to gigabytes."""
    path = written(tmp_path / "forged.pkl", b"\x80\x02N." + bytes(10**7), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or far too long"):
        read_tensors(path)


def test_shared_nodes_are_walked_once(tmp_path: Path) -> None:
    """Forty nodes, each held twice by the next: 2^40 ways to the first."""
    program = b"\x80\x02" + NODE + b"q\x00"
    for i in range(40):
        held = b"h" + bytes([i])
        program += NODE + b"q" + bytes([i + 1]) + b"}(U\x01a" + held + b"U\x01b" + held + b"ub"
    path = written(tmp_path / "forged.pkl", program + b".")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_tensors(path, lambda module, name: True)


def test_more_groups_than_memory(
    parts: tuple[published.Encoder, published.Decoder], tmp_path: Path
) -> None:
    """Seventy groups by name, the last 2^69 wide, allocated before any shape is compared."""
    weights = dict(parts[0].state_dict())
    weights |= {f"blocks.group_{i}.block_1.x": torch.zeros(1) for i in range(5, 70)}
    torch.save(weights, tmp_path / "encoder.pkl")
    decoder = write(parts[1], tmp_path / "decoder.pkl", "state")
    with pytest.raises(ValueError, match="69 groups"):
        dvae.load_released(tmp_path / "encoder.pkl", decoder)


def test_old_file_without_its_numbers(tmp_path: Path) -> None:
    """Storages that are never filled, and load as whatever the memory held."""
    path = tmp_path / "old.pt"
    torch.save({"weight": torch.ones(7)}, path, _use_new_zipfile_serialization=False)
    assert read_tensors(path)[0]["weight"].tolist() == [1.0] * 7
    content = path.read_bytes()
    keys = content.rindex(b"\x80\x02]")
    path.write_bytes(content[:keys] + b"\x80\x02]." + content[-36:])
    with pytest.raises(ValueError, match="those in the file differ"):
        read_tensors(path)
