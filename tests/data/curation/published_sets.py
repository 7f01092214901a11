"""Small trees in the layouts of MS-COCO and CUB-200-2011, made up by the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COCO_CAPTIONS = [
    ["A red cat on a mat.", "The cat is red", "a cat"],
    ["A dog runs.", "A bright dog"],
    ["Two birds\n", " Two birds in a tree"],
    ["One small boat"],
]
# (id of the picture, file name); neither is in order, as in the published files.
COCO_IMAGES = [
    (391895, "COCO_val2014_000000391895.jpg"),
    (42, "COCO_val2014_000000000042.jpg"),
    (203564, "COCO_val2014_000000203564.jpg"),
    (7, "COCO_val2014_000000000007.jpg"),
]
BIRDS = [
    "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg",
    "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg",
    "002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg",
    "200.Common_Yellowthroat/Common_Yellowthroat_0055_190967.jpg",
]
TRAINING = ["0", "1", "1", "0"]


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 14)) -> None:
    """Writes a JPEG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco_content(
    images: Sequence[tuple[int, str]] = COCO_IMAGES,
    captions: Sequence[Sequence[str]] = COCO_CAPTIONS,
) -> dict[str, Any]:
    """The annotations; those of all pictures are mixed, as in the published files."""
    annotations = []
    for place in range(max(map(len, captions))):
        for (identity, _), texts in reversed(list(zip(images, captions, strict=True))):
            if place < len(texts):
                entry = {"image_id": identity, "id": 1000 + 7 * len(annotations)}
                annotations.append({**entry, "caption": texts[place]})
    described = [
        {"license": 3, "file_name": name, "height": 14, "width": 20, "id": identity}
        for identity, name in images
    ]
    licenses = [{"id": 3, "name": "a license", "url": "nowhere"}]
    return {
        "info": {"year": 2014},
        "images": described,
        "licenses": licenses,
        "annotations": annotations,
    }


def write_coco(folder: Path, content: dict[str, Any] | None = None, count: int = 4) -> Path:
    """val2014/ with the first pictures, and annotations/; returns the json."""
    for seed, (_, name) in enumerate(COCO_IMAGES[:count]):
        picture(folder / "val2014" / name, seed)
    path = folder / "annotations" / "captions_val2014.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco_content() if content is None else content), encoding="utf-8")
    return path


def write_cub(folder: Path) -> Path:
    """CUB_200_2011/ and the captions' download beside it; returns the latter's folder."""
    top, texts = folder / "CUB_200_2011", folder / "cvpr2016_cub" / "text_c10"
    for seed, path in enumerate(BIRDS):
        picture(top / "images" / path, seed)
        file = (texts / path).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "".join(f"bird {seed} has caption {i} .\n" for i in range(10)), encoding="utf-8"
        )
    classes = sorted({path.split("/")[0] for path in BIRDS})
    lists = {
        "images.txt": BIRDS,
        "train_test_split.txt": TRAINING,
        "bounding_boxes.txt": [f"{i}.0 2.0 5.5 6.0" for i in range(len(BIRDS))],
        "image_class_labels.txt": [str(1 + classes.index(path.split("/")[0])) for path in BIRDS],
        "classes.txt": classes,
    }
    for name, values in lists.items():
        text = "".join(f"{i} {value}\n" for i, value in enumerate(values, 1))
        (top / name).write_text(text, encoding="utf-8")
    (folder / "cvpr2016_cub" / "testclasses.txt").write_text(
        "200.Common_Yellowthroat\n", encoding="utf-8"
    )
    return folder / "cvpr2016_cub"
