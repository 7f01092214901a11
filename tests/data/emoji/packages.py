"""Small packages in the layouts of the published ones: flat discs of a color for each emoji."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dalle1.data.emoji import STYLES, Emoji
from dalle1.data.emoji.packages import NAMES, PACKAGES

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


def draw_patterns(listed: Iterable[Emoji]) -> None:
    """Other pictures for the emoji, which can be told apart by eye and by the judge: each is a
    pattern of 4 x 4 colors; a tone changes four of them, a style the outline."""
    for e in listed:
        base, _, tone = e.code.partition("-")
        colors = np.random.default_rng(int(base, 16)).integers(0, 256, (4, 4, 3))
        if tone:
            colors[1:3, 1:3] += (np.array([40, -30, 30]) * (1 if tone == "1f3fb" else -1)).astype(
                int
            )
        for style, path in e.pictures.items():
            pattern = Image.fromarray(colors.clip(0, 255).astype(np.uint8)).resize((64, 64), 0)
            outline = Image.new("L", (64, 64))
            draw = ImageDraw.Draw(outline)
            if style == "noto":
                draw.ellipse((2, 2, 61, 61), fill=255)
            elif style == "twemoji":
                draw.rounded_rectangle((4, 4, 59, 59), 12, fill=255)
            else:
                draw.polygon([(32, 0), (63, 32), (32, 63), (0, 32)], fill=230)
            pattern.putalpha(outline)
            pattern.save(path, lossless=True)


def write_tarballs(folder: Path, packages: dict[str, Path], names: Path) -> None:
    """The packages as npm packs them: everything in `package/`, the version in package.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for use, package in PACKAGES.items():
        root = names if use == NAMES else packages[use]
        manifest = json.dumps({"name": package.name, "version": package.version}).encode()
        files = [("package/package.json", manifest), ("package/index.js", b"process.exit(1)")]
        files += [
            (f"package/{path.relative_to(root).as_posix()}", path.read_bytes())
            for path in sorted(root.rglob("*"))
            if path.is_file()
        ]
        write_tarball(folder / package.tarball, ((entry(n, len(d)), d) for n, d in files))


def write_tarball(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """A gzipped tar of any members."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return path


def entry(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    """A member of a tar, as bad as one likes."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member
