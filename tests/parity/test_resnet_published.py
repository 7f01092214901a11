"""CLIP's five ResNets: sizes, names, embeddings, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dalle1
from dalle1 import CLIP, CLIPConfig, registry
from dalle1.training.config import RunConfig
from dalle1.training.stages.clip import CLIPStage
from dvae.storage import load_part, save_part
from dvae.weights import read_safetensors
from tests.parity.published_clip import PublishedCLIP
from tests.parity.published_resnet import PUBLISHED, random_state, resnet_embedding, resnet_shapes
from tests.parity.test_clip_published import LENGTH, VOCAB, ids, normalized

SIDE, WIDTH, LAYERS, OUT, HEADS = 64, 8, (2, 1, 3, 2), 32, 4


def config(**changes: Any) -> CLIPConfig:
    return CLIPConfig(patch_size=32, **changes)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_sizes_of_the_published_resnets(name: str) -> None:
    """A block too many, a bias that is not there, a shape told wrong by the weights."""
    layers, width, side, embedding, text, count = PUBLISHED[name]
    made = config(
        vision_layers=layers, vision_width=width, vision_heads=width // 2, image_size=side,
        embedding=embedding, text_width=text, text_heads=text // 64,
    )  # fmt: skip
    with torch.device("meta"):
        clip = CLIP(made)
    assert sum(p.numel() for p in clip.parameters()) == count
    state = clip.state_dict()
    image = {key: tuple(w.shape) for key, w in state.items() if key.startswith("visual.")}
    assert image == resnet_shapes(layers, width, side, embedding)
    assert CLIPConfig(**dalle1.clip.published_shape(dict(state))) == made


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, Tensor], PublishedCLIP]:
    """Weights of a small CLIP in OpenAI's layout, and what restates its text side."""
    torch.manual_seed(0)
    text = PublishedCLIP(32, out=OUT, vocab=VOCAB, length=LENGTH).eval()
    text.visual = nn.Identity()
    state = {**random_state(resnet_shapes(LAYERS, WIDTH, SIDE, OUT)), **text.state_dict()}
    return state, text


def pixels(count: int = 3) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["state", "half", "no counters", "archive"])
def test_embeddings_and_files(
    published: tuple[dict[str, Tensor], PublishedCLIP], tmp_path: Path, form: str
) -> None:
    """A stride before its convolution, batch statistics in place of the running ones, the mean
    behind the positions, heads cut otherwise; a file without counters that is refused."""
    state, text = published
    path = tmp_path / "RN.pt"
    if form == "half":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        state |= {"input_resolution": torch.tensor(SIDE), "vocab_size": torch.tensor(VOCAB)}
    if form == "no counters":
        state = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    if form == "archive":
        torch.jit.script(_as_modules(state)).save(path)
    else:
        torch.save(state, path)
    clip = dalle1.clip.load_released(path, vision_heads=HEADS)
    assert not clip.training and clip.config.vision_layers == LAYERS
    assert (clip.config.image_size, clip.config.vision_width) == (SIDE, WIDTH)
    with torch.no_grad():
        wide = {k: v.float() for k, v in state.items()}
        embedding = resnet_embedding(wide, normalized(pixels()), HEADS)
        torch.testing.assert_close(
            clip.visual(clip.preprocess(pixels())), embedding, rtol=1e-5, atol=1e-5
        )
        if form != "half":
            image = embedding / embedding.norm(dim=1, keepdim=True)
            expected = text(image, ids())
            torch.testing.assert_close(clip(pixels(), ids()), expected, rtol=0, atol=1e-5)


def _as_modules(state: dict[str, Tensor]) -> nn.Module:
    """A tree of modules that holds a state dictionary, as OpenAI's archives have one."""
    root = nn.Module()
    for key, value in state.items():
        *path, name = key.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        running = "running" in name or "tracked" in name
        if running or not value.is_floating_point():
            node.register_buffer(name, value)
        else:
            node.register_parameter(name, nn.Parameter(value))
    return root


def test_heads_of_the_published_size(
    published: tuple[dict[str, Tensor], PublishedCLIP], tmp_path: Path
) -> None:
    """Heads of another size than OpenAI's 64."""
    torch.save(published[0], tmp_path / "RN.pt")
    assert dalle1.clip.load_released(tmp_path / "RN.pt").config.vision_heads == 32 * WIDTH // 64


def test_a_folder_holds_the_running_statistics(
    published: tuple[dict[str, Tensor], PublishedCLIP], tmp_path: Path
) -> None:
    """Statistics that are not saved: other scores after loading."""
    torch.save(published[0], tmp_path / "RN.pt")
    clip = dalle1.clip.load_released(tmp_path / "RN.pt", vision_heads=HEADS)
    kind = registry.kind_of("ranker", clip)
    save_part(kind, clip, tmp_path / "folder")
    again = load_part("ranker", {"clip": kind}, tmp_path / "folder")
    assert again.config == clip.config
    assert "visual.layer4.1.bn2.running_var" in read_safetensors(
        tmp_path / "folder" / "clip.safetensors"
    )
    with torch.no_grad():
        assert torch.equal(again.embed_images(pixels()), clip.embed_images(pixels()))


def test_scores_of_a_resnet_whatever_is_scored_at_once(
    published: tuple[dict[str, Tensor], PublishedCLIP], tmp_path: Path
) -> None:
    """Statistics of the batch, by which an image's score depends on its neighbors."""
    torch.save(published[0], tmp_path / "RN.pt")
    clip = dalle1.clip.load_released(tmp_path / "RN.pt", vision_heads=HEADS)
    with torch.no_grad():
        together = clip.embed_images(pixels(3))
        alone = torch.cat([clip.embed_images(image[None]) for image in pixels(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert clip.images_at_once == 32  # of 256 for a ViT: the maps are larger
    large = CLIP(config(vision_layers=(1, 1, 1, 1), vision_width=8, vision_heads=1, image_size=448))
    assert large.images_at_once == 8


def test_initialization() -> None:
    """Blocks that do not begin as their shortcuts, so that deep ones cannot be trained."""
    clip = CLIP(config(vision_layers=(1, 1, 1, 1), vision_width=8, vision_heads=1, image_size=32))
    for name, weight in clip.visual.named_parameters():
        if name.endswith("bn3.weight") and "layer" in name:
            assert not bool(weight.any()), name
    std = clip.visual.attnpool.q_proj.weight.std().item()
    assert std == pytest.approx(256**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_layers": (3, 4, 6)}, "vision_layers"),
        ({"vision_layers": (3, 4, 6, 0)}, "vision_layers"),
        ({"patch_size": 16}, "patch_size: expected 32 of a ResNet, got 16"),
        ({"vision_width": 33}, "vision_width: expected an even number of a ResNet, got 33"),
        ({"image_size": 225}, "image_size 225 must be a multiple of patch_size 32"),
        ({"vision_heads": 3}, "32 times vision_width 64 must be a multiple of vision_heads 3"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    """Settings that no ResNet has, found after the weights are made."""
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**{"vision_layers": (3, 4, 6, 3), "vision_width": 64, **changes})


def test_a_resnet_is_not_trained(tmp_path: Path) -> None:
    """A run whose running statistics are lost by its averages and checkpoints."""
    run = RunConfig(
        stage="clip", run=str(tmp_path), data="nowhere", steps=1, batch_size=2,
        reader={"image_size": 32}, tokenizer={"captions": 8},
        clip={"vision_layers": [1, 1, 1, 1], "vision_width": 8, "vision_heads": 1,
              "image_size": 32, "text_vocab": 302, "text_length": 48},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"clip\.vision_layers: expected a number of layers"):
        CLIPStage(run)
