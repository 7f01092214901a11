"""The benchmark's figures against counts by hand, and all of it as a user runs it."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dalle1 import Model
from dalle1.commands import evaluate
from dalle1.common.config import load_settings
from dalle1.evaluation import benchmark
from dalle1.evaluation.candidates import (
    CaptionCandidates,
    draw_candidates,
    read_candidates,
    write_or_check_settings,
)
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.features import measure_chosen, measure_true, open_folder
from dalle1.evaluation.judged import NOT_CLAIMED
from dalle1.evaluation.prompts import read_prompts, true_images
from dalle1.evaluation.run import FILES, prepare, run
from dalle1.evaluation.shapes_data import ATTRIBUTES, HELDOUT, UNSEEN, training_captions
from dalle1.training.run_folder import RunFolder
from tests.conftest import CAPTIONS, ModelMaker
from tests.evaluation.conftest import SettingsMaker
from tests.forks import Forked
from tests.training.worker import free_port

ROOT = Path(__file__).parents[2]


def checked_candidates(seed: int, claimed: list[int]) -> CaptionCandidates:
    """Five random candidates of which the claimed attributes are right or wrong."""
    g = torch.Generator().manual_seed(seed)
    checks = torch.full((5, len(ATTRIBUTES)), NOT_CLAIMED, dtype=torch.int8)
    checks[:, claimed] = torch.randint(2, (5, len(claimed)), generator=g, dtype=torch.int8)
    return CaptionCandidates(torch.zeros(5, 4), torch.rand(5, generator=g), checks)


def test_curves_by_enumeration() -> None:
    """Attributes counted where a caption does not claim them, or of another candidate."""
    claims = [[0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 4]]
    candidates = [checked_candidates(seed, claimed) for seed, claimed in enumerate(claims)]
    curves = benchmark.curves(candidates, [1, 2, 4], resamples=20, attributes=ATTRIBUTES)
    for n in (1, 2, 4):
        subsets = list(itertools.combinations(range(5), n))
        first = [
            [max(s, key=lambda i, c=c: float(c.scores[i])) for s in subsets] for c in candidates
        ]

        def mean(values: list[list[float]]) -> float:
            return sum(sum(v) / len(v) for v in values) / len(values)

        pairs = list(zip(candidates, first, strict=True))
        score = mean([[float(c.scores[i]) for i in best] for c, best in pairs])
        assert curves["clip_score"][n]["mean"] == pytest.approx(score, abs=1e-6)
        right = mean([[float(c.correct[i]) for i in best] for c, best in pairs])
        assert curves["accuracy"][n]["mean"] == pytest.approx(right)
        some = [[float(any(c.correct[i] for i in s)) for s in subsets] for c in candidates]
        assert curves["oracle"][n]["mean"] == pytest.approx(mean(some))
        related = mean([[float(c.checks[i, 4]) for i in best] for c, best in pairs[1:]])
        assert curves["attributes"]["relation"][n]["mean"] == pytest.approx(related)
        low, high = curves["accuracy"][n]["interval"]
        assert low <= curves["accuracy"][n]["mean"] <= high
    assert curves["attributes"]["size"] == {} and curves["attributes"]["background"] == {}


def test_flat_from() -> None:
    """A curve called flat while it still rises."""
    assert benchmark.flat_from({1: 0.2, 2: 0.5, 4: 0.89, 8: 0.9, 16: 0.899}) == 4
    assert benchmark.flat_from({1: 0.2, 2: 0.5, 4: 0.88, 8: 0.9, 16: 0.899}) == 8
    assert benchmark.flat_from({1: 0.9, 2: 0.5}) == 1
    assert benchmark.flat_from({1: 0.1, 2: 0.2, 4: 0.3}) is None
    assert benchmark.flat_from({1: -0.5, 2: -0.4, 4: -0.401}) == 2
    assert benchmark.flat_from({1: 0.92, 2: 0.93, 4: 0.94, 8: 0.94}) == 4
    assert benchmark.flat_from({1: 0.4}) == 1


def test_chosen_pictures(model: Model, make_settings: SettingsMaker) -> None:
    """Images of the first N that are the best of another N, another blur or another caption."""
    settings = make_settings(candidates=4, blur=[0, 2], sheet_captions=2)
    prompts = read_prompts(settings)
    draw_candidates(model, prompts, settings, progress=False)
    network = benchmark.feature_network(model, CAPTIONS, settings)
    write_or_check_settings(model, settings)
    folder = open_folder(model, prompts, network, settings)
    measure_true(folder)
    measure_chosen(folder, prompts)
    measured = benchmark.measure(folder, prompts)
    candidates = list(read_candidates(prompts, settings))
    pictures = measured.results["groups"]["captions"]["pictures"]
    for n in (1, 2, 4):
        best = [float(c.scores[:n].max()) for c in candidates]
        # The benchmark scores the images with 8 bits, as they would be saved.
        assert pictures["0"][n]["clip_score"]["mean"] == pytest.approx(
            sum(best) / len(best), abs=2e-3
        )
        assert pictures["0"][n]["fid"] > 0 and pictures["2"][n]["inception_score"] >= 1
        assert pictures["2"][n]["clip_score"] != pictures["0"][n]["clip_score"]
        assert "accuracy" not in pictures["0"][n]
    assert [p.caption for p in measured.sheet_prompts] == CAPTIONS[:2]
    for row, c in zip(measured.sheet_images, candidates, strict=False):
        expected = [int(c.scores[:n].argmax()) for n in (1, 2, 4)]
        decoded = model.dvae.decode(c.tokens.reshape(-1, 4, 4))
        for image, i in zip(row, expected, strict=True):
            torch.testing.assert_close(image, decoded[i])


def test_page(model: Model, make_settings: SettingsMaker) -> None:
    """A page that shows what is not there, or figures that are no JSON."""
    settings = make_settings()
    page = run(prepare(settings), settings)
    assert page is not None
    folder = page.parent
    assert all((folder / name).is_file() for name in FILES)
    text = page.read_text()
    for name in re.findall(r"(?:src|href)=([\w.]+)", text):
        assert (folder / name).is_file()
    assert "captions: 5 captions, " in text

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    results = json.loads((folder / "ranking.json").read_text(), parse_constant=refuse)
    assert results["counts"] == [1, 2, 4] and results["blur"] == [0, 1]
    assert load_settings(RankSettings, folder / "config.yaml") == settings
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(folder / name) as image:
                assert image.width > 200


def test_captions_alone(model: Model, make_settings: SettingsMaker, tmp_path: Path) -> None:
    """Captions without images refused, or compared with nothing."""
    file = tmp_path / "captions.txt"
    file.write_text("a red cat\n\n  a blue dog  \n", encoding="utf-8")
    settings = make_settings(data=str(file))
    assert [p.caption for p in read_prompts(settings)] == ["a red cat", "a blue dog"]
    assert true_images(settings, 8) is None
    page = run(prepare(settings), settings)
    assert page is not None
    results = json.loads((page.parent / "ranking.json").read_text())
    point = results["groups"]["captions"]["pictures"]["0"]["4"]
    assert point["fid"] is None and point["inception_score"] >= 1


def test_true_images(make_settings: SettingsMaker) -> None:
    """Images of another size than the model's, squeezed, or more than asked for."""
    settings = make_settings(reference_images=3)
    true = true_images(settings, 8)
    assert true is not None
    numbers, images = zip(*true, strict=True)
    assert numbers == (0, 1, 2) and {i.shape for i in images} == {(3, 8, 8)}
    assert all(float(i.min()) >= 0 and 0.2 < float(i.max()) <= 1 for i in images)


def test_prompts_of_the_built_in_data() -> None:
    """Captions that the model was trained on, or the splits mixed up."""
    settings = RankSettings(
        model="m", run="r", data="shapes", captions=20, heldout_captions=5, training_captions=3000
    )
    prompts = read_prompts(settings)
    assert [p.group for p in prompts] == [UNSEEN] * 20 + [HELDOUT] * 5
    captions = [p.caption for p in prompts]
    assert len(set(captions)) == 25
    assert not set(captions) & training_captions(3000)
    assert read_prompts(settings.model_copy(update={"captions": 7}))[:7] == prompts[:7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 0}, "candidates"),
        ({"blur": [0, -1]}, "blur: expected different radii"),
        ({"blur": [1, 1]}, "blur: expected different radii"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"heldout_captions": 3}, "heldout_captions is read with data=shapes alone"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_settings_errors(
    make_settings: SettingsMaker, changes: dict[str, object], message: str
) -> None:
    """A setting out of its range, or that nothing reads, taken without a word."""
    with pytest.raises(ValueError, match=message):
        make_settings(**changes)


def test_former_names_of_settings(make_settings: SettingsMaker) -> None:
    """A file of settings of the release before that is refused, or read without its value."""
    with pytest.warns(FutureWarning, match="'shown' is called 'sheet_captions' now"):
        assert make_settings(shown=3).sheet_captions == 3


def test_mistakes_before_anything_is_drawn(
    make_model: ModelMaker, make_settings: SettingsMaker, tmp_path: Path
) -> None:
    """Mistakes that show after hours of drawing."""
    make_model(clip=False).save(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no ranker"):
        prepare(make_settings(model=str(tmp_path / "bare")))
    with pytest.raises(ValueError, match=r"config.json is missing"):
        prepare(make_settings(model=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot be read"):
        prepare(make_settings(data=str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no captions"):
        prepare(make_settings(data=str(tmp_path / "empty.txt")))
    with pytest.raises(ValueError, match=r"no caption.*captions in 'title'"):
        prepare(make_settings(caption_key="title"))
    with pytest.raises(ValueError, match="features: 'nowhere:made' cannot be imported"):
        prepare(make_settings(features="nowhere:made"))


@pytest.mark.slow
def test_two_ranks_and_one(model: Model, make_settings: SettingsMaker, tmp_path: Path) -> None:
    """Ranks that report before the others are done, or figures that depend on their number."""
    results = {}
    for world_size in (1, 2):
        settings = make_settings(run=str(tmp_path / f"run-{world_size}"))
        file = tmp_path / f"rank-{world_size}.yaml"
        file.write_text(yaml.safe_dump(settings.model_dump()))
        port = free_port()
        logs = [tmp_path / f"log-{world_size}-{rank}.txt" for rank in range(world_size)]
        processes = []
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            processes.append(Forked(evaluate.main, [str(file)], log=logs[rank], environment=place))
        codes = [process.wait() for process in processes]
        outputs = [log.read_text() for log in logs]
        assert codes == [0] * world_size, outputs
        assert "index.html" in outputs[0] and "index.html" not in "".join(outputs[1:])
        results[world_size] = json.loads(
            (tmp_path / f"run-{world_size}" / "ranking.json").read_text()
        )
    assert results[1]["groups"] == results[2]["groups"]


def test_second_benchmark_is_refused_while_the_first_lives(
    make_settings: SettingsMaker, tmp_path: Path
) -> None:
    """The same command started twice, whose two processes draw into one folder."""
    file, log = tmp_path / "rank.yaml", tmp_path / "log.txt"
    file.write_text(yaml.safe_dump(make_settings().model_dump()))
    folder = RunFolder(tmp_path / "run")
    assert Forked(evaluate.main, [str(file)], log=log).wait() == 2
    assert "error: run: expected a folder that no other run writes" in log.read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    folder.release()


def test_launch_names_mistakes(tmp_path: Path) -> None:
    """A traceback for a setting that does not exist."""
    command = ["launch/rank.py", "configs/shapes/rank.yaml", "candidate=3"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "candidate" in done.stderr
    assert "Traceback" not in done.stderr
