"""Hugging Face's dual encoders as rankers, on small random models in folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dalle1
from dalle1 import registry
from dalle1.clip.from_transformers import HuggingFaceConfig, HuggingFaceRanker
from dalle1.common.images import to_tensor
from tests.conftest import ModelMaker

transformers = pytest.importorskip("transformers")
SIDE, LENGTH = 32, 12
CAPTIONS = ["a red cat", "A blue dog", "one small mat"]
WORDS = ["<unk>", "<pad>", "<s>", "</s>", "a", "red", "cat", "blue", "dog", "one", "small", "mat"]


def write_tokenizer(folder: Path, capitals: bool = False) -> None:
    """A tokenizer of whole words; with capitals it knows "A" as another word than "a"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate([*WORDS, "A"] if capitals else WORDS)}
    made = Tokenizer(models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 3)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        model_max_length=LENGTH,
    ).save_pretrained(folder)  # fmt: skip


def write_processor(folder: Path, **settings: Any) -> None:
    content = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], **settings,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 13, "max_position_embeddings": LENGTH, "bos_token_id": 2, "eos_token_id": 3,
    "pad_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
    "image_size": SIDE, "patch_size": 16,
}  # fmt: skip


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, Any]:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    model = randomized(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path / "clip")
    write_tokenizer(tmp_path / "clip")
    sizes: dict[str, Any] = {
        "do_center_crop": True, "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }  # fmt: skip
    write_processor(tmp_path / "clip", **sizes)
    return tmp_path / "clip", model


def pixels(height: int = SIDE, width: int = SIDE) -> Tensor:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    resized = [Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC) for x in coarse]
    return torch.stack([to_tensor(image) for image in resized])


def normalized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    return (images - mean[:, None, None]) / std[:, None, None]


def test_clip(clip: tuple[Path, Any]) -> None:
    """Means of OpenAI's for the model's own, padding that is read, logits for cosines."""
    folder, model = clip
    ranker = registry.open_ranker(f"hf:{folder}")
    assert isinstance(ranker, HuggingFaceRanker)
    with torch.no_grad():
        rows = [[4, 5, 6, 3], [0, 7, 8, 3], [9, 10, 11, 3]]
        out = model(input_ids=torch.tensor(rows), pixel_values=normalized(pixels()))
        expected = out.text_embeds @ out.image_embeds.T
    scores = ranker.score(CAPTIONS, pixels())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ranker.scale(), model.logit_scale.exp())
    torch.testing.assert_close(ranker.score(CAPTIONS[:1], pixels()), scores[:1])
    # Captions of several lengths, which are padded.
    mixed = ranker.score(["cat", "a red cat"], pixels())
    torch.testing.assert_close(mixed[1], scores[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], ranker.score(["cat"], pixels())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 70), (20, 20)])
def test_images_of_other_sizes(clip: tuple[Path, Any], height: int, width: int) -> None:
    """Images that are stretched, cropped at a corner, or resized without antialiasing."""
    ranker = registry.open_ranker(f"hf:{clip[0]}")
    images = pixels(height, width)
    cut = []
    for image in images:
        pil = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        short = min(height, width)
        scaled = pil.resize((SIDE * width // short, SIDE * height // short), 3)
        left, top = round((scaled.width - SIDE) / 2), round((scaled.height - SIDE) / 2)
        cut.append(to_tensor(scaled.crop((left, top, left + SIDE, top + SIDE))))
    got = ranker.preprocessing(images, torch.device("cpu"), torch.float32)
    assert float((got - normalized(torch.stack(cut))).abs().max()) < 2.5 / 255 / 0.2


def test_siglip(tmp_path: Path) -> None:
    """Captions that keep their capitals or are padded to the longest, a mask on the padding;
    images that are cropped where SigLIP resizes each side."""
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model = randomized(transformers.SiglipModel(config))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, capitals=True)
    write_processor(
        tmp_path, image_processor_type="SiglipImageProcessor", resample=2,
        size={"height": SIDE, "width": SIDE},
    )  # fmt: skip
    ranker = registry.open_ranker(f"hf:{tmp_path}")
    assert (ranker.preprocessing.fit, ranker.preprocessing.interpolation) == ("squash", "bilinear")
    rows = [[4, 5, 6, 3], [4, 7, 8, 3], [9, 10, 11, 3]]
    ids = torch.tensor([row + [1] * (LENGTH - 4) for row in rows])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=normalized(pixels()))
        expected = out.text_embeds @ out.image_embeds.T
        logits = out.logits_per_text
    scores = ranker.score(CAPTIONS, pixels())
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    # The bias changes no order.
    torch.testing.assert_close(ranker.scale() * scores + model.logit_bias.detach(), logits)
    stretched = ranker.preprocessing(pixels(40, 70), torch.device("cpu"), torch.float32)
    assert stretched.shape == (2, 3, SIDE, SIDE)
    wide = torch.zeros(1, 3, SIDE, 3 * SIDE)
    wide[:, :, :, :SIDE] = 1  # a crop would lose it
    assert float(ranker.preprocessing(wide, torch.device("cpu"), torch.float32).max()) > 1


def test_a_model_folder_names_it(
    clip: tuple[Path, Any], make_model: ModelMaker, tmp_path: Path
) -> None:
    """A folder that cannot be opened again, or that holds a copy of the weights."""
    make_model(clip=False).save(tmp_path / "model")
    model = dalle1.load(tmp_path / "model", ranker=f"hf:{clip[0]}")
    scores = dalle1.rank(CAPTIONS, pixels(), model)
    model.save(tmp_path / "again")
    section = json.loads((tmp_path / "again" / "config.json").read_text())["ranker"]
    assert section == {"kind": "hugging_face", "name": str(clip[0])}
    assert not list((tmp_path / "again").glob("clip*"))
    assert torch.equal(dalle1.rank(CAPTIONS, pixels(), dalle1.load(tmp_path / "again")), scores)
    result = dalle1.sample("a red cat", model, candidates=4, keep=2, progress=False)
    assert bool(result.scores.isfinite().all())


def test_weights_follow_the_model(clip: tuple[Path, Any], make_model: ModelMaker) -> None:
    """A ranker that stays in 64 bits or trains; one that is scored in parts of other numbers."""
    ranker = registry.open_ranker(f"hf:{clip[0]}")
    assert not any(p.requires_grad for p in ranker.parameters()) and not ranker.training
    expected = ranker.score(CAPTIONS, pixels())
    one = torch.cat([ranker.score(CAPTIONS, image[None]) for image in pixels()], dim=1)
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    double = ranker.double().score(CAPTIONS, pixels())
    torch.testing.assert_close(double, expected, rtol=1e-4, atol=1e-5)


def test_folders_that_are_none(
    clip: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of transformers; a request to the hub for a folder that was mistyped."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, _ = clip
    cases = {
        "hf:": "expected hf:FOLDER or hf:OWNER/NAME",
        f"hf:{tmp_path / 'nowhere'}": "expected a folder, got .*nowhere",
        f"hf:{tmp_path}": "ranker: hf:",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            registry.open_ranker(name)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    write_processor(folder, size={"shortest_edge": 64}, do_center_crop=True, crop_size={
        "height": SIDE, "width": SIDE})  # fmt: skip
    with pytest.raises(ValueError, match="expected images of one size"):
        registry.open_ranker(f"hf:{folder}")
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8,
        )
    )  # fmt: skip
    bert.save_pretrained(tmp_path / "bert")
    write_tokenizer(tmp_path / "bert")
    write_processor(tmp_path / "bert", size={"shortest_edge": SIDE})
    with pytest.raises(ValueError, match="expected a dual encoder, got BertModel"):
        registry.open_ranker(f"hf:{tmp_path / 'bert'}")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback where a line would say what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="transformers is not installed") as raised:
        HuggingFaceRanker(HuggingFaceConfig(name="a/b"))
    expected = "ranker: transformers is not installed; pip install 'dalle1[hf]'"
    assert str(raised.value) == expected
