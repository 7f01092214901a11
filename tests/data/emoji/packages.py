"""Small packages in the layouts of the published ones: flat discs of a color for each emoji."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from dalle1.data.emoji import STYLES

BASES = [f"1f{300 + i}" for i in range(60)]
TONES = ["1f3fb", "1f3ff"]
SIDES = {"noto": 64, "twemoji": 64, "fluent": 256}


def write_packages(folder: Path) -> tuple[dict[str, Path], Path]:
    """The packages of all styles and that of the names."""
    packages = {style: folder / style for style in STYLES}
    entries = []
    for i, base in enumerate(BASES):
        skins = [f"{base}-{tone}" for tone in TONES] if i % 5 == 0 else []
        for code in (base, *skins):
            for style, package in packages.items():
                if style == "fluent" and i % 7 == 3:
                    continue  # two styles are enough
                write_picture(package, style, code, i)
        entries.append(
            {
                "label": f"thing {i}",
                "hexcode": base.upper(),
                "group": i % 9,
                "tags": ["object", f"tag {i}"],
                "skins": [
                    {"hexcode": s.upper(), "label": f"thing {i}: {tone} skin tone"}
                    for s, tone in zip(skins, ("light", "dark"), strict=False)
                ],
            }
        )
    names = folder / "names"
    (names / "en").mkdir(parents=True)
    (names / "en" / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    return packages, names


def write_picture(package: Path, style: str, code: str, number: int) -> Path:
    """A disc on nothing, whose color tells the number and whose shade the style."""
    where = package / STYLES[style].folders[0]
    where.mkdir(parents=True, exist_ok=True)
    side = SIDES[style]
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    color = (40 + 3 * number, 200 - 3 * number, 60 * list(STYLES).index(style), 255)
    ImageDraw.Draw(image).ellipse((4, 4, side - 5, side - 5), fill=color)
    path = where / f"{code}{STYLES[style].suffix}"
    image.save(path, lossless=True)
    return path
