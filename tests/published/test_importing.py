"""Folders of ours written from somebody else's files, and models opened from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dalle1
import dvae
from dalle1 import Model, Tokenizer
from dalle1.commands import import_model as command
from dalle1.common.origins import Origin
from dalle1.published import import_model, importing, load
from tests.conftest import ModelMaker
from tests.fakes import PaletteCodec, UnigramPrior
from tests.parity import released_dvae
from tests.published import fakes
from tests.published.fakes import FILES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fake_family")


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    fakes.write(tmp_path / "source", tokenizer)
    return tmp_path / "source"


def test_a_model_is_written_and_opened(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A weight under another's name, turned or not; a folder that `dalle1.load` refuses."""
    table = fakes.write(source, tokenizer)
    made = import_model(source, tmp_path / "out", progress=False)
    assert (made.family, made.kinds) == (
        "fake",
        {"prior": "unigram", "codec": "palette", "tokenizer": "bpe"},
    )
    assert made.bytes == 4 * (table.numel() + 15) and made.parameters["prior"] == table.numel()
    model = dalle1.load(tmp_path / "out")
    assert isinstance(model.prior, UnigramPrior) and isinstance(model.codec, PaletteCodec)
    assert torch.equal(model.prior.tilt.weight, table)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("config.json", "README.md", "tokenizer.json"),
        *("unigram.safetensors", "palette.safetensors"),
    }
    opened = load(source)
    assert isinstance(opened, Model)
    settings = {"candidates": 4, "keep": 4, "progress": False}
    for one, two in ((model, opened), (opened, model)):
        first, second = (dalle1.sample("a red cat", m, **settings).tokens for m in (one, two))
        assert torch.equal(first, second)


def test_origin_and_license_stay(source: Path, tmp_path: Path) -> None:
    """A model that is saved again, or trained further, and no longer says whose it is."""
    import_model(source, tmp_path / "out", progress=False)
    for folder in (tmp_path / "out", tmp_path / "again", tmp_path / "third"):
        card = (folder / "README.md").read_text()
        assert "- prior: Fake-E\n  - from nobody, nowhere\n" in card and "CC-BY-NC 4.0" in card
        assert "version 7" in card
        origins = json.loads((folder / "config.json").read_text())["origins"]
        assert (
            origins["prior"]["license"] == "CC-BY-NC 4.0" and origins["codec"]["title"] == "Fake-E"
        )
        if folder.name != "third":
            following = {"out": "again", "again": "third"}[folder.name]
            dalle1.load(folder).save(tmp_path / following)
    assert load(source).origins == dalle1.load(tmp_path / "third").origins


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_stay_16_bits(
    source: Path, tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Twice the disk and the memory; or numbers that went through another type."""
    table = fakes.write(source, tokenizer, dtype)
    import_model(source, tmp_path / "out", progress=False)
    held = load_file(tmp_path / "out" / "unigram.safetensors")["tilt.weight"]
    assert held.dtype == dtype and torch.equal(held, table)
    assert load_file(tmp_path / "out" / "palette.safetensors")["palette"].dtype == torch.float32
    assert load(source).prior.tilt.weight.dtype == dtype
    import_model(source, tmp_path / "wide", dtype=torch.float32, progress=False)
    held = load_file(tmp_path / "wide" / "unigram.safetensors")["tilt.weight"]
    assert held.dtype == torch.float32 and torch.equal(held, table.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_types_that_nothing_computes_in(
    source: Path, tmp_path: Path, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """A folder that cannot be drawn from: 64 bits become 32, whole numbers are named."""
    fakes.write(source, tokenizer, dtype)
    if dtype == torch.int32:
        with pytest.raises(ValueError, match=r"tilt\.weight' has type torch\.int32"):
            import_model(source, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()
    else:
        import_model(source, tmp_path / "out", progress=False)
        held = load_file(tmp_path / "out" / "unigram.safetensors")["tilt.weight"]
        assert held.dtype == torch.float32


def test_parts_that_are_given_apart(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A prior alone that makes half a model; another's codec under the first one's license."""
    out = tmp_path / "out"
    apart = tmp_path / "apart"
    apart.mkdir()
    for name in (FILES.codec, FILES.tokenizer):
        os.replace(source / name, apart / name)
    with pytest.raises(ValueError, match="hold a prior and no codec; give --codec: a folder"):
        import_model(source, out, progress=False)
    with pytest.raises(ValueError, match="hold a prior and no tokenizer; give --tokenizer: its"):
        import_model(source, out, codec=apart / FILES.codec, progress=False)
    assert not out.exists()
    made = import_model(
        source,
        out,
        codec=apart / FILES.codec,
        tokenizer=apart / FILES.tokenizer,
        progress=False,
    )
    assert set(made.kinds) == {"prior", "codec", "tokenizer"}
    again = import_model(source, tmp_path / "again", codec=out, tokenizer=out, progress=False)
    assert again.origins == made.origins and again.kinds == made.kinds
    model = load(source, codec=dalle1.load(out).codec, tokenizer=str(out))
    assert isinstance(model, Model) and set(model.origins) == {"prior"}
    with pytest.raises(ValueError, match="--codec: expected a file or folder, got 'nowhere'"):
        import_model(source, tmp_path / "x", codec="nowhere", progress=False)
    with pytest.raises(ValueError, match=r"SOURCE: .* a folder of ours; dalle1\.load opens it"):
        import_model(out, tmp_path / "x", progress=False)
    with pytest.raises(ValueError, match=r"--ranker: .* holds no ranker"):
        import_model(source, tmp_path / "x", ranker=apart, progress=False)


def test_a_ranker_of_ours(
    source: Path, tmp_path: Path, make_model: ModelMaker, tokenizer: Tokenizer
) -> None:
    """A ranker without its tokenizer file, or copied under a license that it is not under."""
    ours = make_model()
    ours.save(tmp_path / "ours")
    made = import_model(source, tmp_path / "out", ranker=tmp_path / "ours", progress=False)
    assert made.kinds["ranker"] == "clip" and "ranker" not in made.origins
    model = dalle1.load(tmp_path / "out")
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(model.rank("a red cat", images), ours.rank("a red cat", images))


def test_a_ranker_that_takes_anothers_place(tmp_path: Path, make_model: ModelMaker) -> None:
    """A card that says of our own ranker that it is somebody else's."""
    model = make_model()
    model.origins = {role: Origin("Fake-E", "nobody", "none") for role in ("prior", "ranker")}
    model.save(tmp_path)
    assert set(dalle1.load(tmp_path).origins) == {"prior", "ranker"}
    assert set(dalle1.load(tmp_path, ranker="none").origins) == {"prior"}
    model.ranker = make_model(seed=1).ranker
    assert set(model.origins) == {"prior"}


def test_one_part_alone(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A codec that is refused for want of a prior, or opened as a model."""
    for name in (FILES.prior, FILES.tokenizer):
        (source / name).unlink()
    with pytest.raises(ValueError, match="dtype: expected a prior, whose weights it is for"):
        import_model(source, tmp_path / "out", dtype=torch.float16, progress=False)
    import_model(source, tmp_path / "out", progress=False)
    assert isinstance(dvae.load(tmp_path / "out"), PaletteCodec)
    assert "CC-BY-NC 4.0" in (tmp_path / "out" / "README.md").read_text()
    assert isinstance(load(source), PaletteCodec)
    (source / FILES.codec).unlink()
    tokenizer.save(source / FILES.tokenizer)
    with pytest.raises(ValueError, match="got a tokenizer alone"):
        import_model(source, tmp_path / "other", "fake", progress=False)
    assert load(source, "fake").reads_like(tokenizer)


def test_parts_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    """Gigabytes written before somebody finds that the vocabulary is another model's."""
    other = Tokenizer.train(["a green hat", "a hat"], vocab_size=270, text_length=10)
    other.save(source / FILES.tokenizer)
    with pytest.raises(
        ValueError, match=r"source: the tokenizer's vocabulary is 2\d\d, but the prior"
    ):
        import_model(source, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="the tokenizer's vocabulary is"):
        load(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [FILES.prior, FILES.codec])
def test_a_file_cut_short(source: Path, tmp_path: Path, name: str) -> None:
    """A download that ended early and becomes a model all the same."""
    path = source / name
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        import_model(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_changed_file_is_named(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A bit that flipped on the way, found by its checksum and not in the pictures."""
    path = source / FILES.prior
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the table's numbers
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prior\.bin: no readable weights file: Bad CRC"):
        import_model(source, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"tables": torch.zeros(5, 3)}, "prior.bin: has no weight 'table'"),
        (
            {"table": torch.zeros(6, 290)},
            r"'tilt.weight' has shape \[290, 6\], expected \[290, 5\]",
        ),
    ],
)
def test_another_version(
    source: Path, tmp_path: Path, weights: dict[str, Tensor], message: str
) -> None:
    """Weights of another version that are put where they do not belong."""
    torch.save(weights, source / FILES.prior)
    with pytest.raises(ValueError, match=message):
        import_model(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_model(source: Path, tmp_path: Path) -> None:
    """Somebody's trained model that is written over."""
    out = tmp_path / "out"
    import_model(source, out, progress=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match=r"OUT: .*already holds a model; give another folder"):
        import_model(source, out, progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="OUT: expected a folder that can be written"):
        import_model(source, tmp_path / "file", progress=False)


def test_an_import_that_stops_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a model that opens; gigabytes that nobody finds again."""
    monkeypatch.setattr(importing, "write_text", lambda path, text: 1 / 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ZeroDivisionError):
        import_model(source, tmp_path / "out", progress=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_disk_that_is_too_small(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of a model written before the disk is full."""

    def check(folder: Path, count: int) -> None:
        raise ValueError(f"{folder}: expected {count} bytes free")

    monkeypatch.setattr(importing, "check_space", check)
    with pytest.raises(ValueError, match=r"out: expected \d+ bytes free"):
        import_model(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def write_released(folder: Path) -> tuple[released_dvae.Encoder, released_dvae.Decoder]:
    """Small random files in the layout of OpenAI's."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    parts = released_dvae.Encoder(8, 20), released_dvae.Decoder(8, 20, 12)
    with released_dvae.published_names():
        for part, name in zip(parts, ("encoder", "decoder"), strict=True):
            torch.save(part, folder / f"{name}.pkl")
    return parts


@pytest.mark.parametrize("which", ["", "encoder.pkl", "decoder.pkl"])
def test_the_released_dvae(tmp_path: Path, which: str) -> None:
    """Either of the two files taken for another family's, or encoder and decoder exchanged."""
    encoder, _ = write_released(tmp_path / "openai")
    made = import_model(tmp_path / "openai" / which, tmp_path / "out", progress=False)
    assert made.family == "dvae" and made.kinds == {"codec": "dvae"}
    codec = dvae.load(tmp_path / "out")
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(codec.encode(images), encoder(0.8 * images + 0.1).argmax(dim=1))
    released = dvae.load_released(
        *(tmp_path / "openai" / f"{n}.pkl" for n in ("encoder", "decoder"))
    )
    weights = load(tmp_path / "openai").state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in released.state_dict().items())


def test_the_released_dvae_without_its_other_half(tmp_path: Path) -> None:
    """A missing file that is not named."""
    write_released(tmp_path)
    (tmp_path / "decoder.pkl").unlink()
    with pytest.raises(ValueError, match=r"expected encoder\.pkl and decoder\.pkl in one folder"):
        import_model(tmp_path, tmp_path / "out", "dvae", progress=False)


def test_verb(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dalle1 import` whose names are exchanged, or that hides what it wrote."""
    for names in ([str(source), str(tmp_path / "a")], ["fake", str(source), str(tmp_path / "b")]):
        assert command.main(names) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{names[-1]}: fake, ")
        assert "prior: unigram, 1,4" in said and "parameters; license: CC-BY-NC 4.0" in said
        assert dalle1.load(names[-1]).image_size == 16
    assert command.main([str(source), "--dtype", "bfloat16", str(tmp_path / "c")]) == 0
    assert dalle1.load(tmp_path / "c").prior.tilt.weight.dtype == torch.bfloat16
    capsys.readouterr()
    assert command.main([str(source)]) == 2
    assert "expected two or three names, got 1" in capsys.readouterr().err
    assert command.main(["nonsense", str(source), str(tmp_path / "d")]) == 2
    assert "KIND: expected one of dvae, " in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    assert "modified MIT" in capsys.readouterr().out


MEMORY = """
import resource, sys
from dalle1.published import import_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
made = import_model(sys.argv[1], sys.argv[2], progress=False)
print(before, peak(), made.bytes)
"""


def test_memory_of_an_import(tmp_path: Path) -> None:
    """Weights that are in memory twice: as they are read, and again as they are written."""
    with torch.device("meta"):
        codec = dvae.DVAE()  # of the published size, 98 million numbers
    for part in ("encoder", "decoder"):
        state = getattr(codec, part).state_dict()
        weights = {name: torch.full(w.shape, 0.5, dtype=torch.float16) for name, w in state.items()}
        torch.save(weights, tmp_path / f"{part}.pkl")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak, size = map(int, done.stdout.split())
    assert size == 2 * sum(w.numel() for w in codec.state_dict().values()) > 190e6
    assert peak - before < 1.3 * size, (peak - before) / size
