"""The images that findings make: dead leaves, and crops of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle1.data.shards.index import raw_samples
from dalle1.data.transforms import read_image
from dalle1.findings.crops import digest_of, missing, photographs_in, unseen_crops, write_crops
from dalle1.findings.leaves import make, unseen_leaves, write_leaves


def test_leaves_are_functions_of_their_place(tmp_path: Path) -> None:
    """Images that a resumed or later run draws anew, and unseen ones that were trained on."""
    assert np.array_equal(make(0, 3).image, make(0, 3).image)
    images = [
        make(s, i, split).image for s in (0, 1) for i in (0, 1) for split in ("train", "test")
    ]
    assert len({image.tobytes() for image in images}) == 8
    write_leaves(tmp_path, 3)
    kept = [read_image(sample["png"]) for sample in raw_samples(str(tmp_path))]
    assert all(np.array_equal(kept[i], make(0, i).image) for i in range(3))
    test = unseen_leaves(2)
    assert np.array_equal((test[1] * 255).round().byte().movedim(0, -1).numpy(), images[3])
    with pytest.raises(ValueError, match="split: expected"):
        make(0, 0, "valid")


def test_leaves_have_detail_everywhere() -> None:
    """Flat backgrounds, on which the paper's dVAE collapses (docs/dvae.md)."""
    images = unseen_leaves(32).numpy()
    squares = images.reshape(32, 3, 8, 4, 8, 4).std(axis=(3, 5)).mean(axis=1)  # of a token
    assert np.median(squares) > 0.02
    flat = (squares < 0.01).mean()
    assert flat < 0.05
    assert 0.3 < images.mean() < 0.7 and images.std() > 0.15


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Ten images, each of one gray of its own and a marked middle."""
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    for i in range(10):
        pixels = np.full((60, 80, 3), 20 * i + 10, np.uint8)
        place = folder / "more" if i % 2 else folder
        Image.fromarray(pixels).save(place / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_unseen_crops_are_of_other_photographs(photographs: Path, tmp_path: Path) -> None:
    """A test on parts of images that were trained on."""
    write_crops(photographs, tmp_path / "crops", 40, 16)
    seen = {int(read_image(s["png"])[0, 0, 0]) for s in raw_samples(str(tmp_path / "crops"))}
    unseen = {round(float(crop[0, 0, 0]) * 255) for crop in unseen_crops(photographs, 8, 16)}
    assert len(seen) == 8 and len(unseen) == 2 and not seen & unseen
    again = unseen_crops(photographs, 8, 16)
    assert again.equal(unseen_crops(photographs, 8, 16)) and again.shape == (8, 3, 16, 16)


def test_a_photograph_that_cannot_be_read_gives_no_crops(photographs: Path, tmp_path: Path) -> None:
    """Hours that end at one damaged or tiny file."""
    (photographs / "0.png").write_bytes(b"\x89PNG damaged")
    Image.new("RGB", (20, 20)).save(photographs / "2.png")
    write_crops(photographs, tmp_path / "crops", 40, 16)
    assert len(list(raw_samples(str(tmp_path / "crops")))) == 30  # of 6 photographs
    with pytest.raises(ValueError, match="--photographs: expected images of at least 2000"):
        unseen_crops(photographs, 8, 1000)


def test_what_the_folder_lacks_is_said(photographs: Path, tmp_path: Path) -> None:
    """A run that starts, and fails after the others, for want of photographs."""
    assert missing(photographs) is None and len(photographs_in(photographs)) == 10
    for folder in (None, tmp_path / "nowhere"):
        text = missing(folder)
        assert text is not None and text.startswith("--photographs: expected a folder")


def test_other_photographs_are_other_settings(photographs: Path) -> None:
    """Results of one folder that are taken for those of another."""
    before = digest_of(photographs)
    assert digest_of(photographs) == before
    (photographs / "3.txt").write_text("no image")
    assert digest_of(photographs) == before
    Image.new("RGB", (64, 64)).save(photographs / "new.jpg")
    assert digest_of(photographs) != before
