"""Published CLIP files of every family, against independent implementations on random weights."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import dalle1
from dalle1 import CLIP, CLIPConfig
from dalle1.clip.tokenizer import CLIPTokenizer
from tests.conftest import ModelMaker
from tests.parity.published_clip import PublishedCLIP

SIDE, VOCAB, LENGTH = 32, 600, 12


def ids(count: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(0)
    result = torch.zeros(count, LENGTH, dtype=torch.int64)
    for i, row in enumerate(result):
        words = torch.randint(1, VOCAB - 2, (3 + 2 * i,), generator=g)
        row[: len(words) + 2] = torch.cat(
            [torch.tensor([VOCAB - 2]), words, torch.tensor([VOCAB - 1])]
        )
    return result


def pixels(count: int = 3) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def normalized(images: Tensor) -> Tensor:
    """The published mean and deviation, written out."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    return (images - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture(scope="module")
def published() -> PublishedCLIP:
    torch.manual_seed(0)
    return PublishedCLIP(SIDE, vocab=VOCAB, length=LENGTH).eval()


@pytest.fixture(scope="module")
def archive(published: PublishedCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript archive, which is how OpenAI publishes its weights."""
    path = tmp_path_factory.mktemp("clip") / "ViT.pt"
    with torch.no_grad():
        torch.jit.trace(published, (normalized(pixels()), ids())).save(path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", ["archive", "state", "half", "safetensors", "data parallel"])
def test_openai(published: PublishedCLIP, archive: Path, tmp_path: Path, form: str) -> None:
    """A weight under another name, heads counted wrong, a mask or pooling unlike the published."""
    path = tmp_path / "clip.pt"
    state = dict(published.state_dict())
    if form == "archive":
        path = archive
    elif form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        if form == "half":  # as the published files are, with numbers beside the weights
            state = {key: value.half() for key, value in state.items()}
            state |= {
                "input_resolution": torch.tensor(SIDE),
                "context_length": torch.tensor(LENGTH),
            }
        if form == "data parallel":
            state = {f"module.{key}": value for key, value in state.items()}
        torch.save(state, path)
    clip = dalle1.clip.load_released(path)
    assert not clip.training and clip.config.image_size == SIDE and clip.config.patch_size == 16
    assert (clip.config.vision_heads, clip.config.text_heads) == (2, 1)
    with torch.no_grad():
        expected = published(normalized(pixels()), ids())
        tolerance = 5e-3 if form == "half" else 1e-4
        assert float((clip(pixels(), ids()) - expected).abs().max()) <= tolerance
    assert clip.logit_scale.item() == pytest.approx(2.659, abs=1e-3)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("visual.", "visual._orig_mod."),
        lambda name: name.replace(".resblocks.", ".resblocks.module."),
        lambda name: f"module.{name}" if name.startswith("ln_") else name,
    ],
)
@pytest.mark.parametrize("form", ["torch", "safetensors", "shards", "folder"])
def test_wrapped_models(
    published: PublishedCLIP, tmp_path: Path, form: str, wrapped: Callable[[str], str]
) -> None:
    """Weights of compiled or data-parallel models, alone or in shards, that are refused."""
    state = {wrapped(key): value.contiguous() for key, value in published.state_dict().items()}
    path = tmp_path / "clip.pt"
    if form == "torch":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form == "safetensors":
        save_file(state, path)
    else:
        files = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(state)}
        for file in set(files.values()):
            save_file({k: v for k, v in state.items() if files[k] == file}, tmp_path / file)
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    clip = dalle1.clip.load_released(tmp_path if form == "folder" else path)
    expected = dict(published.state_dict())
    expected["logit_scale"] = expected["logit_scale"].reshape(1)
    held = clip.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], weight) for name, weight in expected.items())


def test_a_weight_with_and_without_a_prefix(published: PublishedCLIP, tmp_path: Path) -> None:
    """One of two weights of the same name, taken without a word."""
    state = dict(published.state_dict())
    torch.save({**state, "module.ln_final.bias": torch.zeros(64)}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip\.pt: .*are the same weight twice"):
        dalle1.clip.load_released(tmp_path / "clip.pt")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face(tmp_path: Path, activation: str) -> None:
    """q, k and v joined in another order, a projection not turned, a norm of another place."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "hidden_act": activation}
    text = {
        "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH, "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 16,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text | shared, vision_config=vision | shared, projection_dim=32
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    clip = dalle1.clip.load_released(tmp_path / "model.safetensors", activation=activation)
    with torch.no_grad():
        out = model(input_ids=ids(), pixel_values=normalized(pixels()))
        expected = out.image_embeds @ out.text_embeds.t()
        assert float((clip(pixels(), ids()) - expected).abs().max()) <= 1e-4
        other = "gelu" if activation == "quick_gelu" else "quick_gelu"
        wrong = dalle1.clip.load_released(tmp_path / "model.safetensors", activation=other)
        assert float((wrong(pixels(), ids()) - expected).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ViT-B/32", {}),
        ("ViT-B/16", {"patch_size": 16}),
        ("ViT-L/14", {"patch_size": 14}),
        ("ViT-L/14@336", {"patch_size": 14, "image_size": 336}),
        ("open_clip's ViT-H/14", {"patch_size": 14}),
    ],
)
def test_published_sizes(name: str, changes: dict[str, int]) -> None:
    """A size read off the weights that is not the model's."""
    if "L/14" in name:
        changes |= {
            "vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "embedding": 768,
            "text_width": 768, "text_heads": 12,
        }  # fmt: skip
    if "H/14" in name:
        changes |= {
            "vision_width": 1280, "vision_layers": 32, "vision_heads": 16, "embedding": 1024,
            "text_width": 1024, "text_heads": 16, "text_layers": 24,
        }  # fmt: skip
    config = CLIPConfig(**changes)
    with torch.device("meta"):
        weights = dict(CLIP(config).state_dict())
    assert CLIPConfig(**dalle1.clip.published_shape(weights)) == config


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_files_that_are_none(published: PublishedCLIP, archive: Path, tmp_path: Path) -> None:
    """A command that is run, a cut file that loads, weights of something else."""
    path, marker = tmp_path / "clip.pt", tmp_path / "was_run"
    torch.save({**published.state_dict(), "x": Command(marker)}, path)
    with pytest.raises(ValueError, match=r"clip\.pt.*system"):
        dalle1.clip.load_released(path)
    assert not marker.exists()
    path.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"clip\.pt"):
        dalle1.clip.load_released(path)
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"clip\.pt: no CLIP"):
        dalle1.clip.load_released(path)
    for key, value in (
        ("logit_scale", torch.zeros(2)),
        ("text_projection", torch.zeros(2, 2, 2)),
        ("positional_embedding", torch.tensor(1.0)),
        ("visual.conv1.weight", torch.zeros(100, 3, 16, 16)),
    ):
        torch.save({**published.state_dict(), key: value}, path)
        with pytest.raises(ValueError, match=r"clip\.pt"):
            dalle1.clip.load_released(path)
    state = dict(published.state_dict())
    del state["ln_final.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"(?s)clip\.pt.*ln_final\.bias"):
        dalle1.clip.load_released(path)


MERGES = ["a t</w>", "c at</w>", "h e</w>", "t he</w>", "r e", "re d</w>", "d o", "do g</w>", "t h"]
COUNT = 512 + len(MERGES) + 2


def vocabulary(path: Path, zipped: bool = True) -> Path:
    text = '"bpe_simple_vocab - version: 0.2\n' + "\n".join(MERGES) + "\nlater merge\n"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    return path


def naive(caption: str) -> list[int]:
    """The published algorithm word by word, for lower-case ASCII."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    table = signs + [s + "</w>" for s in signs] + [m.replace(" ", "") for m in MERGES]
    result = []
    for word in caption.split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [f"{a} {b}" for a, b in pairwise(parts)]
            known = [MERGES.index(p) for p in pairs if p in MERGES]
            if not known:
                break
            i = pairs.index(MERGES[min(known)])
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        result += [table.index(part) for part in parts]
    return result


@pytest.mark.parametrize("zipped", [True, False])
def test_vocabulary(tmp_path: Path, zipped: bool) -> None:
    """Ids shifted by one, merges in another order, a word's end lost, more merges than asked."""
    tokenizer = CLIPTokenizer.from_published(vocabulary(tmp_path / "bpe", zipped), COUNT)
    assert tokenizer.vocab_size == COUNT
    for caption in ("the cat", "red dog the", "that reredo", "thecat ~ !"):
        tokens = naive(caption)
        row = tokenizer.encode_for_clip(caption, 20)[0].tolist()
        assert row == [COUNT - 2, *tokens, COUNT - 1] + [0] * (18 - len(tokens)), caption
    same = tokenizer.encode_for_clip(["  The\n CAT ", "the &amp;amp; cat", "12 dog's"], 20)
    assert same[0].tolist() == tokenizer.encode_for_clip("the cat", 20)[0].tolist()
    assert same[1].tolist() == tokenizer.encode_for_clip("the & cat", 20)[0].tolist()
    assert same[2, 1:6].tolist() == naive("1 2 dog 's")
    tokenizer.save(tmp_path / "saved.json")
    again = CLIPTokenizer.load(tmp_path / "saved.json")
    assert torch.equal(again.encode_for_clip("the cat", 9), tokenizer.encode_for_clip("the cat", 9))
    with pytest.warns(UserWarning, match="has 4 tokens and is cut to 3"):
        assert tokenizer.encode_for_clip("the the the cat", 5)[0, -1] == COUNT - 1


def test_vocabulary_errors(tmp_path: Path) -> None:
    """A file that is missing, too short or of another kind, taken for a vocabulary."""
    path = vocabulary(tmp_path / "bpe")
    with pytest.raises(ValueError, match="48894 merges"):
        CLIPTokenizer.from_published(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="bpe"):
        CLIPTokenizer.from_published(path, COUNT)
    with pytest.raises(ValueError, match="nowhere"):
        CLIPTokenizer.from_published(tmp_path / "nowhere", COUNT)
    path.write_bytes(gzip.compress(bytes(2**24 + 1)))
    with pytest.raises(ValueError, match="bpe: unpacks to more than 16,777,216 bytes"):
        CLIPTokenizer.from_published(path, COUNT)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")
    with pytest.raises(ValueError, match="bpe"):
        CLIPTokenizer.from_published(path, COUNT)
    with pytest.raises(ValueError, match=r"saved\.json"):
        CLIPTokenizer.load(tmp_path / "saved.json")


def test_classify(tmp_path: Path) -> None:
    """Probabilities over pictures in place of prompts; the scale forgotten; no tokenizer."""
    torch.manual_seed(0)
    published = PublishedCLIP(SIDE, vocab=COUNT, length=LENGTH).eval()
    torch.save(dict(published.state_dict()), tmp_path / "clip.pt")
    clip = dalle1.clip.load_released(tmp_path / "clip.pt", vocabulary(tmp_path / "bpe"))
    prompts = ["the cat", "the dog", "red"]
    with torch.no_grad():
        cosines = published(normalized(pixels()), clip.ids(prompts))
        expected = (torch.tensor(2.659).exp() * cosines).softmax(dim=1)
    torch.testing.assert_close(clip.classify(pixels(), prompts), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        clip.classify(pixels(), clip.ids(prompts)), expected, rtol=0, atol=1e-4
    )
    with pytest.raises(ValueError, match="at least one"):
        clip.classify(pixels(), [])
    for images in ([], Image.new("RGB", (40, 40))):
        with pytest.raises(ValueError, match="a list of at least one image"):
            clip.classify(images, prompts)  # type: ignore[arg-type]
    for wrong in (torch.full((1, LENGTH), COUNT), torch.zeros(1, LENGTH)):
        with pytest.raises(ValueError, match="text tokens: expected int64 in"):
            clip.classify(pixels(), wrong)
    bare = dalle1.clip.load_released(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.classify(pixels(), prompts)


@pytest.mark.parametrize("size", [(50, 41), (41, 50), (33, 32), (20, 24), (32, 32)])
def test_preprocessing(size: tuple[int, int]) -> None:
    """Nearest or unsmoothed resizing, a crop off the center, PIL and tensors treated unlike."""
    clip = CLIP(CLIPConfig(image_size=32, patch_size=16, vision_layers=1, text_layers=1))
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    # As published: PIL's bicubic to the shorter side, then a center crop.
    w, h = size
    short = min(w, h)
    scaled = picture.resize((32 * w // short, 32 * h // short), Image.Resampling.BICUBIC)
    left, top = round((scaled.width - 32) / 2), round((scaled.height - 32) / 2)
    expected = np.asarray(scaled.crop((left, top, left + 32, top + 32))) / 255.0
    reference = normalized(torch.from_numpy(expected).float().permute(2, 0, 1)[None])
    torch.testing.assert_close(clip.preprocess([picture]), reference, rtol=0, atol=1e-5)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    # PIL rounds to 8 bits; that is 1 / 255 / 0.26 at most after the normalization, twice.
    assert float((clip.preprocess(tensor) - reference).abs().max()) < 2 / 255 / 0.26


def test_model_with_a_published_clip(make_model: ModelMaker, tmp_path: Path) -> None:
    """Captions for a published CLIP that go through the transformer's vocabulary; a folder that
    forgets CLIP's own."""
    published = PublishedCLIP(SIDE, vocab=COUNT, length=LENGTH).eval()
    torch.save(dict(published.state_dict()), tmp_path / "clip.pt")
    clip = dalle1.clip.load_released(tmp_path / "clip.pt", vocabulary(tmp_path / "bpe"))
    plain = make_model(clip=False)
    model = dalle1.Model(plain.tokenizer, plain.transformer, plain.dvae, clip)
    model.save(tmp_path / "model")
    again = dalle1.load(tmp_path / "model")
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = published(normalized(images), clip.ids("the cat"))[:, 0]
    for m in (model, again):
        scores = dalle1.rank("the cat", images, model=m)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
