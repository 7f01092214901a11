"""Features on disk: computed once, by any number of ranks, never those of another network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle1 import Model
from dalle1.common.images import to_tensor
from dalle1.evaluation import benchmark, features
from dalle1.evaluation.candidates import draw_candidates, path_of, write_or_check_settings
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.features import (
    FeatureFolder,
    measure_chosen,
    measure_true,
    open_folder,
    read_chosen,
    read_true,
    resized,
)
from dalle1.evaluation.metrics import FeatureNetwork, blurred
from dalle1.evaluation.prompts import read_prompts
from tests.evaluation.conftest import SettingsMaker

Opener = Callable[..., FeatureFolder]


def pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and classes that are plain to see: a few pixels."""
    return images[:, 0, ::3, ::2].flatten(1), 9 * images[:, :, 1, 1]


@pytest.fixture
def opened(model: Model) -> Opener:
    """Draws what the settings ask for and opens the folder of its features."""

    def make(settings: RankSettings, network: FeatureNetwork = pixels) -> FeatureFolder:
        prompts = read_prompts(settings)
        write_or_check_settings(model, settings)
        draw_candidates(model, prompts, settings, progress=False)
        return open_folder(model, prompts, network, settings)

    return make


def contents(folder: FeatureFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


def test_features_of_chosen_images(make_settings: SettingsMaker, opened: Opener) -> None:
    """Features of another candidate, blur, caption or N; a blur of larger images than the network
    sees."""
    settings = make_settings(blur=[0, 1, 2], image_size=6)
    folder = opened(settings)
    prompts = read_prompts(settings)
    measure_chosen(folder, prompts)
    model = folder.model
    assert model.ranker is not None
    for prompt in prompts:
        (candidates,) = features.read_candidates([prompt], settings)
        images = model.codec.decode(candidates.tokens.reshape(-1, 4, 4)).clamp(0, 1)
        for i, radius in enumerate((0, 1, 2)):
            found = read_chosen(folder, prompt.caption, i)
            for n, row in zip((1, 2, 4), found.rows.tolist(), strict=True):
                best = int(candidates.scores[:n].argmax())
                wanted = blurred(resized(images[best, None], 6), radius)
                values, logits = pixels(wanted)
                torch.testing.assert_close(found.features[row], values[0])
                torch.testing.assert_close(found.logits[row], logits[0])
                score = model.ranker.score([prompt.caption], wanted)[0, 0]
                torch.testing.assert_close(found.scores[row], score, rtol=1e-4, atol=1e-4)
    assert len(read_chosen(folder, prompts[0].caption, 0).correct) == 0


def test_generated_and_true_images_are_brought_to_one_size_alike(
    make_settings: SettingsMaker, opened: Opener, tmp_path: Path
) -> None:
    """Two ways to resize, cut or round, whose difference an FID takes for one of the images."""
    settings = make_settings(blur=[0], image_size=7)
    folder = opened(settings)
    measure_true(folder)
    (true,) = read_true(folder, 0)
    assert true.samples == len(true.features) == 5
    for i in range(5):
        with Image.open(tmp_path / "pairs" / f"{i}.png") as image:
            generated = to_tensor(image.convert("RGB"))[None]  # as a codec would give it
        torch.testing.assert_close(true.features[i], pixels(resized(generated, 7))[0][0])


@pytest.fixture
def many_pairs(tmp_path: Path) -> str:
    """150 images with captions, two of which cannot be read."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(150):
        values = np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a red cat {i}")
    for i in (3, 149):
        (folder / f"{i:03d}.png").write_bytes(b"no image")
    return str(folder)


def test_true_images_of_all_ranks(
    make_settings: SettingsMaker, opened: Opener, many_pairs: str
) -> None:
    """True images that two ranks count twice or none does, in an order or in files that depend on
    the ranks; those that cannot be read, not counted."""
    folders = []
    for world_size in (1, 2, 3):
        settings = make_settings(data=many_pairs, captions=1, run=f"{many_pairs}-{world_size}")
        folder = opened(settings)
        for rank in reversed(range(world_size)):
            measure_true(folder, rank, world_size)
        folders.append(contents(folder))
        for radius in (0, 1):
            parts = list(read_true(folder, radius))
            assert [part.samples for part in parts] == [64, 64, 22]
            assert [len(part.features) for part in parts] == [63, 64, 21]
    assert folders[0] == folders[1] == folders[2]
    few = make_settings(data=many_pairs, captions=1, reference_images=70)
    folder = opened(few)
    measure_true(folder)
    assert sum(part.samples for part in read_true(folder, 0)) == 70


def test_nothing_is_computed_twice(
    make_settings: SettingsMaker, opened: Opener, many_pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run that begins anew, or that takes the half of a file for all of it; figures that
    differ after it."""
    settings = make_settings(data=many_pairs, captions=6)
    prompts = read_prompts(settings)
    calls = []

    def counting(images: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(images))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return pixels(images)

    def work() -> dict[str, Any]:
        folder = opened(settings, counting)
        measure_true(folder)
        measure_chosen(folder, prompts)
        return benchmark.measure(folder, prompts).results

    stop = 10**9
    expected = work()
    full = contents(opened(settings))
    for stop in range(2, 14):  # the probe, three files at two radii, six captions
        for path in opened(settings).path.iterdir():
            path.unlink()
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            work()
        interrupted = contents(opened(settings))
        assert all(full[name] == content for name, content in interrupted.items())
        kept = len([name for name in interrupted if name.endswith("safetensors")])
        done, stop_here = len(calls) - 1, stop
        stop = 10**9
        calls.clear()
        assert work() == expected
        assert contents(opened(settings)) == full
        # One call for a caption, two for a file of true images, one for the probe.
        missing = 2 * max(0, 3 - (done - 1) // 2) + min(6, max(0, 13 - done))
        assert len(calls) == 1 + missing, (stop_here, kept)
        calls.clear()
        assert work() == expected and len(calls) == 1


def test_more_candidates(make_settings: SettingsMaker, opened: Opener) -> None:
    """The chosen of fewer candidates taken for those of more."""
    few, more = make_settings(candidates=2), make_settings(candidates=16)
    prompts = read_prompts(few)
    measure_chosen(opened(few), prompts)
    folder = opened(more)
    assert folder.path == opened(few).path
    measure_chosen(folder, prompts)
    for prompt in prompts:
        assert len(read_chosen(folder, prompt.caption, 0).rows) == 5


def test_other_settings_have_a_folder_of_their_own(
    make_settings: SettingsMaker, opened: Opener
) -> None:
    """Features of another blur, size or data in one figure; a run that is refused where only they
    changed."""
    paths = {
        opened(make_settings(**changes)).path
        for changes in ({}, {"blur": [0, 2]}, {"image_size": 5}, {"reference_images": 4})
    }
    assert len(paths) == 4


def test_data_that_have_changed(
    make_settings: SettingsMaker, opened: Opener, many_pairs: str
) -> None:
    """True images of data that were written anew under their former name: features of images that
    are not there any more."""
    settings = make_settings(data=many_pairs, captions=1)
    folder = opened(settings)
    assert opened(settings).path == folder.path
    (Path(many_pairs) / "100.png").unlink()
    changed = opened(settings)
    assert changed.path != folder.path
    measure_true(changed)
    assert sum(part.samples for part in read_true(changed, 0)) == 149


def test_features_of_another_network_are_refused(
    make_settings: SettingsMaker, opened: Opener
) -> None:
    """A network of the same name that has changed, and half of the features of each."""
    settings = make_settings()
    opened(settings)
    opened(settings, lambda x: tuple(1.001 * part for part in pixels(x)))  # rounding

    def refused(network: FeatureNetwork, what: str) -> None:
        with pytest.raises(ValueError, match=f"run: .* holds {what} of another network; remove"):
            opened(settings, network)

    refused(lambda x: (pixels(x)[0].flip(1), pixels(x)[1]), "features")
    refused(lambda x: (pixels(x)[0][:, :3], pixels(x)[1]), "features")
    refused(lambda x: (pixels(x)[0], None), "logits")


def test_features_that_are_missing_or_damaged(make_settings: SettingsMaker, opened: Opener) -> None:
    """Figures of a part of the captions, or a traceback that does not name the file."""
    settings = make_settings()
    prompts = read_prompts(settings)
    folder = opened(settings)
    measure_true(folder)
    with pytest.raises(ValueError, match=r"is missing; several machines need a shared run folder"):
        benchmark.compare(folder, prompts)
    measure_chosen(folder, prompts)
    path = path_of(folder.path, prompts[1].caption)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"is damaged, remove it to compute its features again"):
        benchmark.compare(folder, prompts)
    path.unlink()
    measure_chosen(folder, prompts)
    (folder.path / "true-000000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"true-000000.safetensors is missing"):
        benchmark.compare(folder, prompts)
    assert json.loads((folder.path / "settings.json").read_text())["blur"] == [0, 1]
