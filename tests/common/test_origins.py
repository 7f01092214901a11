"""Whose a model's parts are, in its folder and its card."""

from __future__ import annotations

import json
from pathlib import Path

from dalle1.common.origins import Origin, add_origins, read_origins, write_origins

ORIGIN = Origin("Fake-E", "nobody", "CC-BY-NC 4.0", ("version 7",))


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_written_and_read(tmp_path: Path) -> None:
    """A section that grows, or that stays when the parts are ours again."""
    (tmp_path / "config.json").write_text('{"format": 2, "codec": {"kind": "dvae"}}')
    before = (tmp_path / "config.json").read_text()
    write_origins(tmp_path, {})
    assert (tmp_path / "config.json").read_text() == before and read_origins(tmp_path) == {}
    write_origins(tmp_path, {"codec": ORIGIN, "prior": ORIGIN})
    write_origins(tmp_path, {"codec": ORIGIN})
    assert read_origins(tmp_path) == {"codec": ORIGIN}
    assert config_of(tmp_path)["codec"] == {"kind": "dvae"}
    write_origins(tmp_path, {})
    assert "origins" not in config_of(tmp_path)


def test_the_card_says_it_once(tmp_path: Path) -> None:
    """A card that loses what else it says, or repeats itself at each save of a run."""
    (tmp_path / "config.json").write_text('{"format": 2}')
    add_origins(tmp_path, {})
    assert not (tmp_path / "README.md").exists()
    for _ in range(2):
        add_origins(tmp_path, {"codec": ORIGIN})
        card = (tmp_path / "README.md").read_text()
        assert card.startswith("# A part of a DALL-E model") and card.count("CC-BY-NC 4.0") == 1
    (tmp_path / "README.md").write_text("# Mine\n\nkept\n")
    add_origins(tmp_path, {"codec": ORIGIN})
    assert (tmp_path / "README.md").read_text().startswith("# Mine\n\nkept\n\n## Origin")
    add_origins(tmp_path, {})
    assert (tmp_path / "README.md").read_text() == "# Mine\n\nkept\n"


def test_sections_of_others(tmp_path: Path) -> None:
    """A traceback for a section that somebody wrote by hand."""
    content = {"origins": {"prior": "me", "codec": {"title": 7, "notes": "none"}}}
    (tmp_path / "config.json").write_text(json.dumps({"format": 2, **content}))
    assert read_origins(tmp_path) == {"codec": Origin("7", "", "")}
