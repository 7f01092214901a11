"""The findings about emoji, from the command line, with a model that knows the images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dalle1.commands import findings
from dalle1.evaluation.judged import Prompt
from dalle1.findings.base import Options
from dalle1.findings.emoji_benchmark import digest_of, missing, prompts_of, read_group
from tests.findings.conftest import Written, write_model

pytestmark = pytest.mark.usefixtures("kinds")


def results(out: Path, name: str) -> dict[str, dict[str, float]]:
    """The means of the arms' measures."""
    report = json.loads((out / f"{name}-scale-0.05" / "report.json").read_text())
    return {
        arm: {measure: figure["mean"] for measure, figure in found.items()}
        for arm, found in report["arms"].items()
    }


@pytest.mark.slow
def test_a_model_that_knows_is_right(written: Written, tmp_path: Path) -> None:
    """Captions judged against images of others; an upper half that is not given."""
    data, packages, dataset = written
    out = tmp_path / "out"
    # A prior that begins with a wrong image is right where the upper half is given.
    for name, right, least, most in (
        ("completion", 1e-6, 100, 100),
        ("style-by-words", 0.999, 100, 100),
        ("style-by-words", 1e-6, 0, 50),
    ):
        model = write_model(tmp_path / f"model-{right}", dataset, right)
        given = ["--model", model, "--emoji", data, "--packages", packages, "--out", out]
        status = findings.main([name, *map(str, given), "--seeds", "0", "--scale", "0.05"])
        assert status == 0
        for arm in ("seen", "held out"):
            found = results(out, name)[arm]
            assert least <= found["all"] <= most, (name, right, arm)
            assert found["all"] <= min(found["top1"], found["style"])
    # Another model has results of its own, and each run a contact sheet.
    assert len(list((out / "style-by-words-scale-0.05" / "pictures").glob("*.png"))) == 4


def test_seeds_ask_for_other_captions() -> None:
    """An interval over seeds that knows nothing of the captions; scenes of two different emoji,
    of which no style is held out."""
    kinds = ("single", "pair")
    prompts = [Prompt(f"caption {i}", "test", kinds[i % 2]) for i in range(24)]
    chosen = [{p.caption for p in prompts_of(seed, prompts, 4)} for seed in (0, 1, 2, 3)]
    assert set.union(*chosen) == {f"caption {i}" for i in range(0, 24, 2)}
    assert sum(map(len, chosen[:3])) == 12 and chosen[3] == chosen[0]
    with pytest.raises(ValueError, match="--emoji: expected 15 captions"):
        prompts_of(0, prompts, 5)


def test_what_is_missing_is_named(written: Written, tmp_path: Path) -> None:
    """A traceback in place of the flag that is missing."""
    data, _, dataset = written
    assert "--model" in (missing(Options()) or "")
    assert "--model" in (missing(Options(model=tmp_path, emoji=data)) or "")
    model = write_model(tmp_path / "model", dataset, 0.5)
    assert "--emoji" in (missing(Options(model=model)) or "")
    assert "--emoji" in (missing(Options(model=model, emoji=tmp_path)) or "")
    assert missing(Options(model=model, emoji=data)) is None


def test_another_model_has_another_digest(written: Written, tmp_path: Path) -> None:
    """Results of the former model that are shown for a newer one in the same folder."""
    folder = write_model(tmp_path / "model", written[2], 0.5)
    before = digest_of(folder)
    assert digest_of(write_model(folder, written[2], 0.5)) == before
    assert digest_of(write_model(folder, written[2], 0.6)) != before


def test_the_last_count_is_the_largest() -> None:
    """Counts that are sorted as text, by which 8 comes behind 16."""
    points = {n: {"mean": int(n) / 100} for n in ("1", "2", "4", "8", "16")}
    attributes = {"top-1": points, "style": points}
    found = read_group({"curves": {"accuracy": points, "attributes": attributes}})
    assert found.values == {
        "top1": 1, "style": 1, "all": 1, "best_top1": 16, "best_all": 16
    }  # fmt: skip
    assert [n for n, _ in found.curves["all"]] == [1, 2, 4, 8, 16]
