"""CLIP's and ruCLIP's files as rankers of ours, in the layouts in which they are published."""

# ruff: noqa: RUF001 -- captions and sentences in Russian

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dalle1.clip.ruclip import RuCLIP, RuCLIPConfig
from dalle1.common.images import to_tensor
from dalle1.model import rank_images
from dalle1.published import clip, ruclip
from dalle1.published.parts import PublishedPart
from dvae.storage import load_part, save_part
from tests.parity.published_clip import PublishedCLIP
from tests.parity.published_resnet import random_state, resnet_shapes
from tests.parity.test_clip_published import COUNT, LENGTH, SIDE, normalized, pixels, vocabulary

CAPTIONS = ["the cat", "the red dog"]


def built(part: PublishedPart) -> Any:
    """The part with its weights and tokenizer, as an importer makes it."""
    made = part.kind.module(part.config)
    made.load_state_dict({name: weight() for name, weight in part.weights.items()})
    made.tokenizer = part.tokenizer
    return made.eval()


@pytest.fixture
def published() -> PublishedCLIP:
    torch.manual_seed(0)
    return PublishedCLIP(SIDE, vocab=COUNT, length=LENGTH).eval()


def write_open_clip(folder: Path, state: dict[str, Tensor], **vision: Any) -> None:
    """A folder as those of open_clip's authors on the hub."""
    config = {
        "model_cfg": {
            "embed_dim": 32, "quick_gelu": True,
            "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 128, "patch_size": 16,
                           **vision},
            "text_cfg": {"context_length": LENGTH, "vocab_size": COUNT, "width": 64, "heads": 1,
                         "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.3, 0.3]},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    vocabulary(folder / "bpe_simple_vocab_16e6.txt.gz")


def test_open_clip(published: PublishedCLIP, tmp_path: Path) -> None:
    """A mean that is not the file's; an activation that is guessed."""
    write_open_clip(tmp_path, dict(published.state_dict()))
    assert clip.recognizes(tmp_path) and not ruclip.recognizes(tmp_path)
    assert clip.recognizes(tmp_path / "open_clip_model.safetensors")
    found = clip.read(tmp_path)
    assert found.ranker is not None and found.prior is None and found.notes
    ranker = built(found.ranker)
    assert ranker.config.mean == (0.5, 0.4, 0.3) and ranker.config.activation == "quick_gelu"
    mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    with torch.no_grad():
        expected = published((pixels() - mean) / 0.3, ranker.ids(CAPTIONS)).T
    torch.testing.assert_close(ranker.score(CAPTIONS, pixels()), expected, rtol=0, atol=1e-5)
    content = json.loads((tmp_path / "open_clip_config.json").read_text())
    del content["model_cfg"]["quick_gelu"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    part = clip.read(tmp_path).ranker
    assert part is not None and part.config.activation == "gelu"  # type: ignore[attr-defined]


def test_a_resnet_of_open_clip(published: PublishedCLIP, tmp_path: Path) -> None:
    """Heads of the transformer for those of the pooling."""
    state = {k: v for k, v in published.state_dict().items() if not k.startswith("visual.")}
    state |= random_state(resnet_shapes((1, 1, 2, 1), 8, 32, 32))
    write_open_clip(tmp_path, state, layers=[1, 1, 2, 1], width=8)
    part = clip.read(tmp_path).ranker
    assert part is not None
    ranker = built(part)
    assert ranker.config.vision_layers == (1, 1, 2, 1) and ranker.config.vision_heads == 4
    assert bool(ranker.score(CAPTIONS, pixels()).isfinite().all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_openai(published: PublishedCLIP, tmp_path: Path) -> None:
    """OpenAI's archive that is asked for settings which it never had."""
    path = tmp_path / "ViT-B-32.pt"
    ids = torch.tensor([[COUNT - 2, 3, COUNT - 1]]).repeat(2, 1)
    ids = F.pad(ids, (0, LENGTH - 3))
    with torch.no_grad():
        torch.jit.trace(published, (normalized(pixels()), ids)).save(path)
    assert clip.recognizes(path) and clip.recognizes(tmp_path)
    with pytest.raises(ValueError, match="expected bpe_simple_vocab_16e6"):
        clip.read(path)
    vocabulary(tmp_path / "merges.txt", zipped=False)
    part = clip.read(path).ranker
    assert part is not None
    ranker = built(part)
    with torch.no_grad():
        expected = published(normalized(pixels()), ranker.ids(CAPTIONS)).T
    torch.testing.assert_close(ranker.score(CAPTIONS, pixels()), expected, rtol=0, atol=1e-5)
    # Settings of another model in the folder, by which a wrong activation was taken.
    write_open_clip(tmp_path, dict(published.state_dict()))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    part = clip.read(path).ranker
    assert part is not None and part.config.activation == "quick_gelu"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"hf_tokenizer_name": "bert-base-uncased"}),
        ("preprocess_cfg", {"interpolation": "bilinear"}),
        ("preprocess_cfg", {"resize_mode": "squash"}),
    ],
)
def test_settings_of_open_clip_that_are_not_read(
    section: str, change: dict[str, Any], published: PublishedCLIP, tmp_path: Path
) -> None:
    """A network of the same weights that computes something else, whose scores are noise."""
    write_open_clip(tmp_path, dict(published.state_dict()))
    path = tmp_path / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["preprocess_cfg"] |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    content["model_cfg"]["text_cfg"] |= {"no_causal_mask": False, "pool_type": "argmax"}
    path.write_text(json.dumps(content))
    clip.read(tmp_path)
    (content if section in content else content["model_cfg"])[section] |= change
    path.write_text(json.dumps(content))
    (name,) = change
    with pytest.raises(ValueError, match=rf"{section}\.{name}: expected .*open_clip:local-dir:"):
        clip.read(tmp_path)


def test_hugging_face(tmp_path: Path) -> None:
    """Heads or activation of the defaults where the file says others; half of the precision lost;
    weights that are all made before they are asked for."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu"}
    text = {
        "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": COUNT,
        "max_position_embeddings": LENGTH, "bos_token_id": COUNT - 2, "eos_token_id": COUNT - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "image_size": SIDE,
        "patch_size": 16,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text | shared, vision_config=vision | shared, projection_dim=32
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    vocabulary(tmp_path / "merges.txt", zipped=False)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    assert clip.recognizes(tmp_path)
    part = clip.read(tmp_path).ranker
    assert part is not None
    ranker = built(part)
    assert (ranker.config.vision_heads, ranker.config.text_heads) == (4, 2)
    assert ranker.config.activation == "gelu" and ranker.config.mean == (0.1, 0.2, 0.3)
    with torch.no_grad():
        out = model(input_ids=ranker.ids(CAPTIONS), pixel_values=ranker.preprocess(pixels()))
        expected = out.text_embeds @ out.image_embeds.T
    torch.testing.assert_close(ranker.score(CAPTIONS, pixels()), expected, rtol=0, atol=1e-4)
    model.half().save_pretrained(tmp_path)
    part = clip.read(tmp_path).ranker
    assert part is not None
    assert {weight().dtype for weight in part.weights.values()} == {torch.float16}
    (tmp_path / "preprocessor_config.json").write_text('{"resample": 2, "do_resize": true}')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: resample: expected 3, got 2"):
        clip.read(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    settings = json.loads((tmp_path / "config.json").read_text())
    other = {**settings, "text_config": {**settings["text_config"], "layer_norm_eps": 1e-6}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"text_config\.layer_norm_eps: expected 1e-05, got 1e-06"):
        clip.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "siglip"}))
    assert not clip.recognizes(tmp_path)
    with pytest.raises(ValueError, match=r"expected 'clip', got 'siglip'; .*hf:FOLDER"):
        clip.read(tmp_path)


def test_clip_errors(published: PublishedCLIP, tmp_path: Path) -> None:
    """A file that is read without what tells its activation; weights of another shape."""
    torch.save(dict(published.state_dict()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: expected open_clip_config\.json or config\.json"):
        clip.read(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"expected one of open_clip_model\.safetensors"):
        clip.read(tmp_path)
    state = dict(published.state_dict())
    for name, weight in (("ln_final.bias", None), ("ln_final.bias", torch.zeros(3))):
        state.pop(name)
        if weight is not None:
            state[name] = weight
        write_open_clip(tmp_path, state)
        with pytest.raises(ValueError, match=r"open_clip_model\.safetensors: .*ln_final\.bias"):
            clip.read(tmp_path)
        state[name] = torch.zeros(64)
    state = {**published.state_dict(), "token_embedding.weight": torch.zeros(2**60, 0)}
    write_open_clip(tmp_path, state)
    with pytest.raises(ValueError, match=r"model\.safetensors: such a CLIP cannot be built"):
        clip.read(tmp_path)
    for text in ("[]", "{", '{"model_cfg": {}}', '{"model_cfg": {"vision_cfg": 3, "text_cfg": 1}}'):
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"open_clip_config\.json: "):
            clip.read(tmp_path)
    assert not clip.recognizes(tmp_path / "missing") and not ruclip.recognizes(tmp_path)


# A bpe.model: the mark of words and letters from 4 on, then two merges.
LETTERS = "\u2581абвгдекзинорстуфхьщ,"
END = 4 + len(LETTERS)
RULES = [(4, 4 + LETTERS.index("к"), END), (END, 4 + LETTERS.index("о"), END + 1)]


def write_ruclip(folder: Path, published: PublishedCLIP, **settings: Any) -> None:
    """A folder as those of ai-forever/ruclip-vit-*."""
    lines = [f"{len(LETTERS)} {len(RULES)}"]
    lines += [f"{ord(letter)} {4 + i}" for i, letter in enumerate(LETTERS)]
    lines += [" ".join(map(str, rule)) for rule in RULES]
    (folder / "bpe.model").write_text("\n".join([*lines, "1 0 2 3"]) + "\n")
    config = {
        "embed_dim": 32, "image_resolution": SIDE, "vision_layers": 2, "vision_width": 128,
        "vision_patch_size": 16, "context_length": LENGTH, "vocab_size": COUNT,
        "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2, **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(published.state_dict(), folder / "pytorch_model.bin")


def restated_ids(sentence: str) -> list[int]:
    """Words from the left, merge by merge, between start and end."""
    ids = [2]
    for word in sentence.split():
        parts = [
            4 + LETTERS.index(letter) if letter in LETTERS else 1 for letter in "\u2581" + word
        ]
        for left, right, made in RULES:
            for i in reversed(range(len(parts) - 1)):
                if parts[i : i + 2] == [left, right]:
                    parts[i : i + 2] = [made]
        kept = [p for i, p in enumerate(parts) if p != 1 or i == 0 or parts[i - 1] != 1]
        ids += kept
    return [*ids[: LENGTH - 1], 3]


def restated_text(published: PublishedCLIP, caption: str) -> Tensor:
    """The mean of six raw encodings, each read where the 3 stands, then of unit length."""
    sentences = (
        "{}", "фото, на котором изображено {}", "изображение с {}",
        "картинка с {}", "фото с {}", "на фото видно {}",
    )  # fmt: skip
    features = []
    for sentence in sentences:
        ids = restated_ids(sentence.replace("{}", caption.lower().strip()))
        padded = torch.tensor([ids + [0] * (LENGTH - len(ids))])
        x = published.token_embedding(padded) + published.positional_embedding
        x = published.ln_final(published.transformer(x))
        features.append(x[0, len(ids) - 1] @ published.text_projection)
    mean = torch.stack(features).mean(0)
    return mean / mean.norm()


@pytest.mark.filterwarnings("ignore::dalle1.protocols.CaptionCut")
def test_ruclip(published: PublishedCLIP, tmp_path: Path) -> None:
    """The feature of the highest id, which is none of ruCLIP's; sentences that are normalized
    before their mean; a sentence that loses its end."""
    write_ruclip(tmp_path, published)
    assert ruclip.recognizes(tmp_path) and not clip.recognizes(tmp_path)
    part = ruclip.read(tmp_path).ranker
    assert part is not None
    ranker = built(part)
    assert isinstance(ranker, RuCLIP) and ranker.config.vision_heads == 2
    captions = ["кот", "  Рыба и КРАН ", "аист"]
    with torch.no_grad():
        rows = published.visual(normalized(pixels()))
        expected = torch.stack([restated_text(published, c) for c in captions])
        torch.testing.assert_close(ranker.embed_captions(captions), expected, rtol=0, atol=1e-5)
        scores = expected @ F.normalize(rows, dim=1).T
    torch.testing.assert_close(ranker.score(captions, pixels()), scores, rtol=0, atol=1e-5)
    # As a part of a model folder.
    save_part(part.kind, ranker, tmp_path / "model")
    again = load_part("ranker", {"ruclip": part.kind}, tmp_path / "model")
    assert torch.equal(again.score(captions, pixels()), ranker.score(captions, pixels()))
    assert rank_images(again, "кот", [Image.new("RGB", (50, 40))]).shape == (1,)


@pytest.mark.parametrize("size", [(40, 40), (70, 40), (33, 64), (20, 31)])
def test_images_of_ruclip(size: tuple[int, int]) -> None:
    """Bicubic for bilinear; a side that is resized before the square is cut out."""
    config = RuCLIPConfig(image_size=32, patch_size=16, vision_layers=1, text_layers=1)
    picture = Image.effect_noise(size, 90).convert("RGB")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    expected = to_tensor(square.resize((32, 32), Image.Resampling.BILINEAR))[None]
    ranker = RuCLIP(config)
    torch.testing.assert_close(ranker.preprocess([picture]), normalized(expected))
    got = ranker.preprocess(to_tensor(picture)[None])
    assert float((got - normalized(expected)).abs().max()) < 2 / 255 / 0.26


def test_ruclip_errors(published: PublishedCLIP, tmp_path: Path) -> None:
    """Settings of other weights, a missing file, another tokenizer's end."""
    with pytest.raises(ValueError, match=r"expected bpe\.model of a ruCLIP, got none"):
        ruclip.read(tmp_path)
    write_ruclip(tmp_path, published, vision_layers=3)
    with pytest.raises(ValueError, match=r"config\.json: vision_layers: expected 2, .*got 3"):
        ruclip.read(tmp_path)
    write_ruclip(tmp_path, published, transformer_heads="two")
    with pytest.raises(ValueError, match=r"text_heads"):
        ruclip.read(tmp_path)
    write_ruclip(tmp_path, published)
    text = (tmp_path / "bpe.model").read_text()
    (tmp_path / "bpe.model").write_text(text.replace("1 0 2 3", "1 0 3 2"))
    with pytest.raises(ValueError, match=r"bpe\.model: expected 3 as the end of text, got 2"):
        ruclip.read(tmp_path)
    with pytest.raises(ValueError, match=r"ruCLIP reads captions by its own bpe\.model, got none"):
        RuCLIP(RuCLIPConfig(vision_layers=1, text_layers=1)).ids("кот")
    with pytest.raises(ValueError, match="expected a sentence with one"):
        RuCLIPConfig(templates=("{} {}",))
