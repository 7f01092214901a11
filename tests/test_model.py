"""A whole model: its folder, its parts, its log-probabilities."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import dalle1
from dalle1 import CLIP, CLIPConfig, Model, registry
from dvae import DVAE, DVAEConfig
from dvae.storage import save_part
from tests.conftest import ModelMaker

FILES = {
    "config.json",
    "tokenizer.json",
    "transformer.safetensors",
    "dvae.safetensors",
    "clip.safetensors",
    "clip_tokenizer.json",
    "README.md",
}
SECTIONS = {"prior": "transformer", "codec": "dvae", "ranker": "clip"}


def draws(model: Model) -> dalle1.Result:
    return dalle1.sample(
        ["a red cat", "the blue dog"], model, candidates=4, keep=3, seed=5, progress=False
    )


def test_save_and_load(model: Model, tmp_path: Path) -> None:
    """A part that is saved in part, cast, or loaded with other settings: other pictures."""
    folder = tmp_path / "deep" / "model"
    model.save(folder)
    again = dalle1.load(folder)
    for part in ("transformer", "dvae", "clip"):
        module, expected = getattr(again, part), getattr(model, part)
        assert not module.training
        assert module.config == expected.config
        state = expected.state_dict()
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(w, state[key]) for key, w in module.state_dict().items())
    first, second = draws(model), draws(again)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.scores, second.scores)
    for a, b in zip(first.images, second.images, strict=True):
        assert [x.tobytes() for x in a] == [x.tobytes() for x in b]


def test_folder(model: Model, make_model: ModelMaker, tmp_path: Path) -> None:
    """A pickle in the folder, a file left beside its place, a CLIP of an earlier save."""
    model.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    for name in FILES:
        content = (tmp_path / name).read_bytes()
        assert content[:2] not in (b"PK", b"\x80\x02"), f"{name} is a pickle"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 2
    kinds = {role: section["kind"] for role, section in config.items() if role != "format"}
    assert kinds == {
        "tokenizer": "bpe",
        "prior": "sparse_transformer",
        "codec": "dvae",
        "ranker": "clip",
    }
    assert "8x8" in (tmp_path / "README.md").read_text()
    make_model(clip=False).save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES - {
        "clip.safetensors",
        "clip_tokenizer.json",
    }
    assert dalle1.load(tmp_path).ranker is None


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *itertools.product(sorted(FILES - {"README.md"}), (0, 0.5)),
        # Without its own file a CLIP reads captions by the prior's tokenizer.
        *((name, None) for name in sorted(FILES - {"README.md", "clip_tokenizer.json"})),
    ],
)
def test_damaged_folder(model: Model, tmp_path: Path, name: str, kept: float | None) -> None:
    """A missing or cut file that loads as something else or raises without naming it."""
    model.save(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        dalle1.load(tmp_path)


@pytest.mark.parametrize("section", sorted(SECTIONS))
@pytest.mark.parametrize(
    "content", [3, [], {"wdith": 8}, {"kind": "dave"}, {"kind": 3}, {"kind": ["bpe"]}, "x" * 9999]
)
def test_config_sections(model: Model, tmp_path: Path, section: str, content: object) -> None:
    """An unknown key or a section of another kind that raises anything but ValueError."""
    model.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[section] = content
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        dalle1.load(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("role", "wrong", "message"),
    [
        ("prior", {"layers": "three"}, r"prior\.layers: .*integer.*, got 'three'; take the file"),
        (
            "prior",
            {"layers": None, "gird": 4},
            r"prior\.layers: .*, got None; prior\.gird: .*got 4",
        ),
        ("prior", {"conv_kernel": 4}, r"prior: conv_kernel must be odd, got 4"),
        ("prior", {"heads": 10**400}, r"prior: width must be heads"),
        ("codec", {"groups": 0}, r"codec\.groups: .*got 0"),
        ("codec", {"residual_gain": math.inf}, r"codec\.residual_gain: .*finite.*got inf"),
        ("ranker", {"mean": [0.5]}, r"ranker\.mean\.1: Field required"),
        ("ranker", {"mean": [math.nan, 0, 0]}, r"ranker\.mean\.0: .*finite.*got nan"),
        ("ranker", {"std": [0.2, 0, 0.2]}, r"ranker: std: expected more than 0"),
        ("ranker", {f"x{i}": i for i in range(50)}, r"ranker.*; and 45 more; take"),
    ],
)
def test_config_mistakes_are_one_line(
    model: Model, tmp_path: Path, role: str, wrong: dict[str, object], message: str
) -> None:
    """A page of another library's, with its addresses; numbers with which all scores are NaN."""
    model.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config[role] |= wrong
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: {message}") as raised:
        dalle1.load(tmp_path)
    assert "\n" not in str(raised.value) and "http" not in str(raised.value)
    assert len(str(raised.value)) < 900


def test_config_nested_without_end(model: Model, tmp_path: Path) -> None:
    """A RecursionError of the reader of JSON."""
    model.save(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: truncated or not JSON"):
        dalle1.load(tmp_path)


@pytest.mark.parametrize("section", ["prior", "codec"])
def test_config_without_a_section(model: Model, tmp_path: Path, section: str) -> None:
    """A folder of another stage that ends in a KeyError."""
    model.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config[section]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json.*{section}"):
        dalle1.load(tmp_path)


@pytest.mark.parametrize("role", sorted(SECTIONS))
def test_weights_of_another_shape(model: Model, tmp_path: Path, role: str) -> None:
    """Weights of another config that are loaded where they happen to fit."""
    model.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    setting = {"prior": "layers", "codec": "blocks_per_group", "ranker": "text_layers"}[role]
    config[role][setting] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{SECTIONS[role]}\.safetensors"):
        dalle1.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_of_16_bits(dtype: torch.dtype, make_model: ModelMaker, tmp_path: Path) -> None:
    """Images and scores in 16 bits, or an error at the first image, because a file is in them; a
    prior in 32 of twice the memory."""
    made = make_model()
    for part in (made.prior, made.codec, made.ranker):
        part.to(dtype)
    made.save(tmp_path)
    again = dalle1.load(tmp_path)
    assert {p.dtype for p in again.prior.parameters()} == {dtype}
    for part in (again.codec, again.ranker):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    expected = Model(made.tokenizer, made.prior.float(), made.codec.float(), made.ranker.float())
    image = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.rank("a red cat", image), expected.rank("a red cat", image))
    draws(again)
    wide = again.to("cpu", torch.float32)
    assert torch.equal(draws(wide).tokens, draws(expected).tokens)
    clip = make_model().ranker
    wide.ranker = clip.to(dtype)
    assert {p.dtype for p in clip.parameters()} == {torch.float32}


def test_a_folder_is_written_in_16_bits_when_asked(make_model: ModelMaker, tmp_path: Path) -> None:
    """Files as large as before, a model that is changed by saving it, a weight that becomes
    infinite, tables of whole numbers that are rounded."""
    made = make_model()
    before = draws(made).tokens
    made.save(tmp_path / "a")
    made.save(tmp_path / "b", dtype=torch.float16)
    assert torch.equal(draws(made).tokens, before)
    for name in SECTIONS.values():
        sizes = [(tmp_path / f / f"{name}.safetensors").stat().st_size for f in "ab"]
        assert sizes[1] < 0.7 * sizes[0]
    again = dalle1.load(tmp_path / "b")
    for role in ("prior", "codec", "ranker"):
        for name, weight in getattr(made, role).state_dict().items():
            rounded = weight.half() if weight.is_floating_point() else weight
            assert torch.equal(getattr(again, role).state_dict()[name], rounded.to(weight.dtype))
    with torch.no_grad():
        next(made.prior.parameters()).view(-1)[0] = 1e6
    with pytest.raises(ValueError, match=r"expected weights that torch\.float16 holds"):
        made.save(tmp_path / "b", dtype=torch.float16)
    made.save(tmp_path / "b", dtype=torch.bfloat16)
    assert dalle1.load(tmp_path / "b").prior.state_dict().keys() == made.prior.state_dict().keys()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("layers.", "layers._orig_mod."),
        lambda name: name.replace(".attention.", "._orig_mod.attention."),
        lambda name: name.replace(".resblocks.", ".module._orig_mod.resblocks."),
    ],
)
def test_folder_of_wrapped_parts(model: Model, tmp_path: Path, wrapped: Any) -> None:
    """Weights of compiled or data-parallel parts, or of compiled layers, that are refused."""
    model.save(tmp_path)
    for name in SECTIONS.values():
        path = tmp_path / f"{name}.safetensors"
        save_file({wrapped(key): w for key, w in load_file(path).items()}, path)
    first, second = draws(model), draws(dalle1.load(tmp_path))
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.scores, second.scores)


def test_no_folder(tmp_path: Path) -> None:
    """A path that is no model folder, or a config that is no object, with a puzzling error."""
    for wrong in (None, 3, b"x", torch.nn.Identity()):
        with pytest.raises(ValueError, match="model: expected a folder, got"):
            dalle1.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nowhere is no folder"):
        dalle1.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        dalle1.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected an object"):
        dalle1.load(tmp_path)


def test_parts_that_do_not_fit(model: Model) -> None:
    """Parts of different runs, whose pictures would be noise without an error."""
    codec = DVAE(DVAEConfig(width=4, bottleneck=2, groups=2, codebook_size=6))
    with pytest.raises(ValueError, match=r"codec's vocabulary is 6.*image_vocab is 5"):
        Model(model.tokenizer, model.transformer, codec)
    longer = model.tokenizer.resized(11)
    with pytest.raises(ValueError, match=r"text_length is 11.*text_length is 10"):
        Model(longer, model.transformer, model.dvae)
    other = dalle1.Tokenizer.train(["a"], vocab_size=257, text_length=10)
    with pytest.raises(ValueError, match=r"vocabulary is 257.*text_vocab is 280"):
        Model(other, model.transformer, model.dvae)
    assert model.clip is not None
    config = CLIPConfig(**{**model.clip.config.model_dump(), "text_vocab": 280})
    with pytest.raises(ValueError, match=r"CLIP's text_vocab less 2 is 278.*vocabulary is 280"):
        Model(model.tokenizer, model.transformer, model.dvae, CLIP(config))


def test_image_size(model: Model, make_model: ModelMaker) -> None:
    """A side that is the grid's alone, without the dVAE's stride."""
    assert model.image_size == 8
    assert make_model(grid=3).image_size == 6


def test_log_prob_by_hand(model: Model) -> None:
    """A sum over other tokens than the image's, a mean, text tokens that are counted too."""
    caption, images = "a red cat", torch.randint(5, (3, 4, 4))
    with torch.no_grad():
        text = model.tokenizer.encode(caption).expand(3, -1)
        _, logits = model.transformer(text, images.flatten(1))
    p = logits.double().softmax(dim=-1)
    expected = [
        sum(p[i, r * 4 + c, images[i, r, c]].log().item() for r in range(4) for c in range(4))
        for i in range(3)
    ]
    got = model.log_prob(caption, images)
    assert got.shape == (3,) and got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    one = model.log_prob(caption, images[1])
    assert one.shape == () and one.item() == pytest.approx(expected[1], rel=1e-5)
    assert model.log_prob("the blue dog", images[1]).item() != pytest.approx(expected[1], rel=1e-4)


def test_probabilities_sum_to_one(make_model: ModelMaker) -> None:
    """Log-probabilities that see the token they predict: their sum over all images is not 1."""
    model = make_model(grid=2, codes=3)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(81, 2, 2)
    log_probs = model.log_prob("a blue dog", every)
    assert log_probs.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_probs.max() - log_probs.min() > 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(16, dtype=torch.int64), r"\[4, 4\] or \[b, 4, 4\], got \[16\]"),
        (torch.zeros(3, 4, dtype=torch.int64), r"got \[3, 4\]"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), r"got \[1, 1, 4, 4\]"),
        (torch.full((4, 4), 5), r"\[0, 4\], got \[5, 5\]"),
        (torch.zeros(4, 4), "float32"),
    ],
)
def test_log_prob_errors(model: Model, tokens: Tensor, message: str) -> None:
    """Part of an image, or tokens outside the vocabulary, that get a probability."""
    with pytest.raises(ValueError, match=message):
        model.log_prob("a red cat", tokens)
    with pytest.raises(ValueError, match="caption: expected text"):
        model.log_prob("", torch.zeros(4, 4, dtype=torch.int64))


def test_rank_is_dalle1_rank(model: Model) -> None:
    """A method that ranks otherwise than the function of its name."""
    images = [Image.new("RGB", (9, 9), c) for c in ("red", "blue")]
    assert torch.equal(model.rank("a cat", images), dalle1.rank("a cat", images, model=model))


def test_clip_folder(model: Model, tmp_path: Path) -> None:
    """A CLIP's own folder that does not open again, or opens without its tokenizer."""
    clip = model.ranker
    assert isinstance(clip, CLIP)
    save_part(registry.kind_of("ranker", clip), clip, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "clip.safetensors",
        "clip_tokenizer.json",
    }
    again = registry.load("ranker", tmp_path)
    images, captions = torch.rand(2, 3, 8, 8), ["a red cat", "a mat"]
    assert torch.equal(again.score(captions, images), clip.score(captions, images))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no 'ranker' section"):
        registry.load("ranker", tmp_path)


def test_a_newer_format_is_refused(model: Model, tmp_path: Path) -> None:
    """A folder of a later release that is read as if it were of this one."""
    model.save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(ValueError, match="format: expected 2 at most, got 3"):
        dalle1.load(tmp_path)


def test_another_ranker_is_taken(model: Model, make_model: ModelMaker, tmp_path: Path) -> None:
    """A ranker put into a model that cannot read captions, trains, or is not saved with it."""
    plain = make_model(clip=False)
    assert isinstance(model.ranker, CLIP)
    clip = CLIP(model.ranker.config)
    plain.ranker = clip
    assert plain.clip is clip and not clip.training
    image = torch.rand(1, 3, 8, 8)
    scores = plain.rank("a red cat", image)
    plain.save(tmp_path)
    assert torch.equal(dalle1.load(tmp_path).rank("a red cat", image), scores)
    wrong = CLIPConfig(**{**clip.config.model_dump(), "text_vocab": 280})
    with pytest.raises(ValueError, match="CLIP's text_vocab less 2 is 278"):
        plain.ranker = CLIP(wrong)
