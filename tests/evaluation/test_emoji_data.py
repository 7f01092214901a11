"""Emoji data in benchmarks: what is drawn, what is right, what is completed, on tiny packages."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle1 import Model, Tokenizer, registry
from dalle1.commands import evaluate
from dalle1.common.images import to_tensor
from dalle1.data.emoji import EmojiDataset, EmojiSample
from dalle1.data.emoji.dataset import Scene
from dalle1.data.emoji.export import write_emoji
from dalle1.data.emoji.judge import FoundEmoji, Judgement
from dalle1.data.emoji.packages import PACKAGES, find_packages
from dalle1.data.emoji.pictures import BACKGROUNDS
from dalle1.evaluation.best_of_n import Judged, choose_judged, estimate_best_of_n
from dalle1.evaluation.candidates import (
    NOT_JUDGED,
    draw_candidates,
    read_candidates,
    upper_tokens,
    write_or_check_settings,
)
from dalle1.evaluation.config import CopySettings, RankSettings
from dalle1.evaluation.emoji_data import EmojiData
from dalle1.evaluation.judged import NOT_CLAIMED, Prompt
from dalle1.evaluation.run import FILES, prepare, run
from dalle1.evaluation.tables import ranking_lines
from tests.data.emoji.packages import BASES
from tests.evaluation.emoji import (
    COUNT,
    KINDS,
    SEED,
    SIDE,
    KnowingPrior,
    KnowingRanker,
    KnownConfig,
    QuarterCodec,
    write_data,
)

ALL = ["test", "heldout_styles", "heldout_pairs"]
Written = tuple[Path, Path, EmojiDataset]
Opener = Callable[..., EmojiData]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_data(tmp_path_factory.mktemp("emoji"))


@pytest.fixture
def make_settings(written: Written, tmp_path: Path) -> Callable[..., RankSettings]:
    """Settings of a benchmark of the data; keywords change them."""

    def make(**changes: Any) -> RankSettings:
        settings: dict[str, Any] = {
            "model": str(tmp_path / "model"),
            "run": str(tmp_path / "run"),
            "data": str(written[0]),
            "packages": str(written[1]),
            "judge": "emoji",
            "splits": ALL,
            "captions": 6,
            "candidates": 8,
            "blur": [0],
            "inception_splits": 1,
            "bootstrap": 20,
        }
        return RankSettings(**{**settings, **changes})

    return make


@pytest.fixture(scope="module")
def judging(written: Written) -> EmojiData:
    """Data whose judge is made once; what changes with the settings is made anew in `opened`."""
    data, packages, _ = written
    return EmojiData(
        CopySettings(
            measure="copies", codec="c", run="r", data=str(data), judge="emoji",
            packages=str(packages),
        )
    )  # fmt: skip


@pytest.fixture
def opened(judging: EmojiData, make_settings: Callable[..., RankSettings]) -> Opener:
    def make(**changes: Any) -> EmojiData:
        data = EmojiData(make_settings(**changes))
        data.judge = judging.judge
        return data

    return make


def samples(written: Written, split: str, count: int = COUNT) -> list[EmojiSample]:
    return [written[2].make(SEED, i, split, SIDE) for i in range(count)]


def drawn(written: Written, scene: Scene) -> Tensor:
    return to_tensor(written[2].render(scene, SIDE))


def test_captions_are_those_that_training_does_not_show(written: Written, opened: Opener) -> None:
    """A caption drawn twice, or one that the model has seen with its image; kinds mixed up."""
    prompts = opened(captions=1000).prompts()
    trained = {s.caption for s in samples(written, "train")}
    expected = []
    for split in ALL:
        for caption, sample in {s.caption: s for s in reversed(samples(written, split))}.items():
            if caption not in trained:
                relation = sample.scene.relation
                kind = {None: "single", "twice": "twice"}.get(relation, "pair")
                expected.append((caption, split, kind))
    assert {(p.caption, p.group, p.kind) for p in prompts} == set(expected)
    assert len(prompts) == len(expected) > 2 * COUNT
    groups = [p.group for p in opened(captions=5).prompts()]
    assert groups == [split for split in ALL for _ in range(5)]


def test_captions_of_the_training_split_are_left_out(
    written: Written, tmp_path: Path, opened: Opener
) -> None:
    """A share of unseen captions that counts seen ones; a report that does not say so."""
    data = tmp_path / "data"
    shutil.copytree(written[0], data)
    few = samples(written, "test", 20)
    with tarfile.open(data / "train" / "train-00000.tar", "w") as tar:
        for sample in few:
            path = tmp_path / "caption"
            path.write_text(sample.caption)
            tar.add(path, f"{sample.key}.txt")
    kept = opened(data=str(data), splits=["test"], captions=100)
    captions = [p.caption for p in kept.prompts()]
    assert not {s.caption for s in few} & set(captions) and captions
    left_out = [s for s in samples(written, "test") if s.caption in {f.caption for f in few}]
    assert kept.notes() == [
        f"test: {len(left_out)} captions that the training split has too were left out."
    ]
    shutil.rmtree(data / "train")
    kept = opened(data=str(data), splits=["test"], captions=100)
    assert {s.caption for s in few} <= {p.caption for p in kept.prompts()}
    assert "no training split" in kept.notes()[0]


def test_true_images_show_their_captions_and_others_do_not(opened: Opener) -> None:
    """Verdicts under another attribute's name; a true image of another caption."""
    data = opened(captions=15)
    prompts = data.prompts()
    names = list(data.attributes)
    for prompt in prompts:
        checks = data.check(data.image(prompt, SIDE), prompt.caption)
        assert len(checks) == len(names) and 0 not in checks, (prompt, checks)
        said = any(f"on {b}" in prompt.caption or f"{b} background" in prompt.caption
                   for b in BACKGROUNDS)  # fmt: skip
        assert (checks[names.index("background")] == 1) == said
        assert (checks[names.index("relation")] == NOT_CLAIMED) == (prompt.kind == "single")
    singles = [p for p in prompts if p.kind == "single" and p.group == "test"]
    first, other = singles[0], next(p for p in singles if p.caption != singles[0].caption)
    assert data.check(data.image(other, SIDE), first.caption)[names.index("top-1")] == 0


def test_true_images_of_fid_are_those_of_the_first_split(written: Written, opened: Opener) -> None:
    """FID against images of another split."""
    data = opened(splits=["heldout_pairs", "test"])
    found = dict(data.true_images(4, SIDE, lambda index: index != 2))
    assert list(found) == [0, 1, 3]
    for i, image in found.items():
        assert image is not None
        assert torch.equal(image, to_tensor(written[2].make(SEED, i, "heldout_pairs", SIDE).image))


def test_the_lower_emoji_alone_is_judged_in_completion(written: Written, opened: Opener) -> None:
    """The given half counted as drawn: its emoji, or its style."""
    data = opened(completion=True, splits=["test", "heldout_styles"], captions=6)
    prompts = data.prompts()
    assert {p.kind for p in prompts} == {None} and len({p.group for p in prompts}) == 2
    by_caption = {s.caption: s.scene for split in ALL for s in samples(written, split)}
    for prompt in prompts:
        scene = by_caption[prompt.caption]
        upper, lower = scene.pieces
        assert 0 not in data.check(drawn(written, scene), prompt.caption)
        copied = replace(scene, pieces=(upper, replace(lower, style=upper.style)))
        top1, top5, style, *_ = data.check(drawn(written, copied), prompt.caption)
        assert (top1, top5, style) == (1, 1, 0)
        others = [
            e.code
            for e in written[2].by_code.values()
            if lower.style in e.pictures and e.name not in prompt.caption and "-" not in e.code
        ]
        wrong = replace(scene, pieces=(upper, replace(lower, code=others[0])))
        top1, _, style, *_ = data.check(drawn(written, wrong), prompt.caption)
        assert (top1, style) == (0, 1)
        # An upper half that the codec spoils is not the prior's mistake.
        spoilt = replace(scene, pieces=(replace(upper, code=others[0]), lower))
        top1, _, style, *_ = data.check(drawn(written, spoilt), prompt.caption)
        assert (top1, style) == (1, 1)


def test_halves_that_are_read_the_other_way_round_are_wrong(opened: Opener) -> None:
    """An upper emoji that is named as the lower one, and counts as drawn."""
    data = opened(completion=True, splits=["test"], captions=1)
    (prompt,) = data.prompts()
    upper, lower = (
        FoundEmoji("1f300", style, "thing 0", 0.25, y, 0.4375)
        for style, y in (("noto", 0.0625), ("fluent", 0.5))
    )

    class Judge:
        found = (upper, lower)

        def judge(self, image: Tensor, caption: str) -> Judgement:
            ordered = self.found[0] is upper
            return Judgement(True, True, True, None, ordered, self.found, (0, 0), (True, True), "")

    data.judge = judge = Judge()  # type: ignore[assignment]
    assert data.check(torch.zeros(3, SIDE, SIDE), prompt.caption) == [1, 1, 1, NOT_CLAIMED, 1]
    judge.found = (lower, upper)
    assert data.check(torch.zeros(3, SIDE, SIDE), prompt.caption) == [0, 0, 0, NOT_CLAIMED, 0]


def test_nothing_of_the_lower_half_is_given(written: Written, opened: Opener) -> None:
    """An answer that the codec reads over the border of the halves."""
    data = opened(completion=True, splits=["test"], captions=3)
    for prompt in data.prompts():
        half, true = data.upper_half(prompt, SIDE), data.image(prompt, SIDE)
        assert torch.equal(half[:, : SIDE // 2], true[:, : SIDE // 2])
        (color,) = half[:, SIDE // 2 :].flatten(1).unique(dim=1).T
        assert torch.equal(color, true[:, 0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ["valid"]}, r"splits: expected some of train, test, .* got 'valid'"),
        ({"splits": ["heldout_emoji"]}, "got 'heldout_emoji'; `dalle1 data emoji` writes others"),
        ({"data": "nowhere"}, r"data: nowhere.emoji.json cannot be read"),
        ({"packages": "nowhere"}, "--packages: expected emoji-datasource-google"),
    ],
)
def test_data_that_cannot_be_judged(
    make_settings: Callable[..., RankSettings], changes: dict[str, Any], message: str
) -> None:
    """Hours of drawing before it shows."""
    with pytest.raises(ValueError, match=message):
        EmojiData(make_settings(**changes))


def test_other_packages_are_refused(
    written: Written, tmp_path: Path, make_settings: Callable[..., RankSettings]
) -> None:
    """Images judged by pictures that are not theirs."""
    shutil.copytree(written[1], tmp_path / "packages")
    next((tmp_path / "packages").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"packages: expected those that .* was made of"):
        EmojiData(make_settings(packages=str(tmp_path / "packages")))


def test_data_without_skin_tones_are_judged_by_such_emoji(
    written: Written, tmp_path: Path, make_settings: Callable[..., RankSettings]
) -> None:
    """Data that are refused as made of other packages, or emoji that no image shows."""
    found = find_packages(PACKAGES, written[1])
    write_emoji(tmp_path / "data", found, ["test"], 4, skin_tones=False)
    data = EmojiData(make_settings(data=str(tmp_path / "data"), splits=["test"]))
    assert len(data.emoji) == len(BASES)
    assert all(e.code in BASES for e in data.emoji)


def test_damaged_samples_are_skipped(written: Written, tmp_path: Path, opened: Opener) -> None:
    """A run that dies of one sample, or draws a scene that cannot be."""
    data = tmp_path / "data"
    shutil.copytree(written[0], data)
    members: dict[str, bytes] = {}
    shard = data / "test" / "test-00000.tar"
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            members[member.name] = file.read()
    keys = list(dict.fromkeys(name.partition(".")[0] for name in members))

    def change(key: str, **scene: Any) -> None:
        details = json.loads(members[f"{key}.json"])
        details["scene"] |= scene
        members[f"{key}.json"] = json.dumps(details).encode()

    change(keys[0], background="mauve")
    change(keys[1], pieces=[])
    change(keys[2], pieces=[{"code": "none", "style": "noto", "x": 0, "y": 0, "side": 1}])
    change(keys[3], pieces=[{"x": 1}])
    change(keys[4], relation=["left of"])
    members[f"{keys[5]}.json"] = b"[" * 5000
    members[f"{keys[6]}.png"] = b"no image"
    del members[f"{keys[7]}.txt"]
    with tarfile.open(shard, "w") as tar:
        for name, content in members.items():
            path = tmp_path / "member"
            path.write_bytes(content)
            tar.add(path, name)
    whole = opened(splits=["test"], captions=100).prompts()
    kept = opened(splits=["test"], captions=100, data=str(data)).prompts()
    damaged = {s.caption for s in samples(written, "test", 8)}
    later = {s.caption for s in samples(written, "test")[8:]}
    assert {p.caption for p in kept} == {p.caption for p in whole} - (damaged - later)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": None}, "packages is read with a judge"),
        ({"judge": None, "packages": None}, "splits is read with a judge"),
        ({"data": "shapes"}, "judge is not read with data=shapes"),
        ({"caption_seed": 1}, "caption_seed is not read with a judge"),
        ({"caption_key": "caption"}, "caption_key is not read with a judge"),
        ({"splits": ["test", "test"]}, "splits: expected different ones"),
        ({"judged_candidates": 1}, "judged_candidates"),
        (
            {"judge": None, "packages": None, "splits": None, "completion": True},
            "completion is read with data that are judged alone",
        ),
    ],
)
def test_settings_errors(
    make_settings: Callable[..., RankSettings], changes: dict[str, Any], message: str
) -> None:
    """A setting that nothing reads, taken without a word."""
    with pytest.raises(ValueError, match=message):
        make_settings(**changes)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kinds of the fakes, for one test."""
    for kind in KINDS:
        kinds = registry.KINDS[kind.role]
        monkeypatch.setitem(registry.KINDS, kind.role, {**kinds, kind.name: kind})
    yield


def knowing_model(data: EmojiData, prompts: list[Prompt], right: float = 0.5) -> Model:
    """A model that knows the true images of all captions."""
    captions = [p.caption for p in prompts]
    images = torch.stack([data.image(p, SIDE) for p in prompts])
    tokenizer = Tokenizer.train(captions, vocab_size=400, text_length=48)
    texts = torch.cat([tokenizer.encode(caption) for caption in captions])
    config = KnownConfig(
        count=len(prompts), text_vocab=tokenizer.vocab_size, text_length=48, right=right
    )
    codec, prior, ranker = QuarterCodec(config), KnowingPrior(config), KnowingRanker(config)
    codec.images.copy_(images)
    ranker.images.copy_(images)
    prior.texts.copy_(texts)
    ranker.captions = captions
    return Model(tokenizer, prior, codec, ranker)


def test_right_candidates_are_counted(
    opened: Opener, make_settings: Callable[..., RankSettings]
) -> None:
    """Candidates judged by another's caption, a best of N of another order, attributes or kinds
    mixed up."""
    settings = make_settings()
    data = opened()
    prompts = data.prompts()
    model = knowing_model(data, prompts)
    write_or_check_settings(model, settings, judged=data)
    draw_candidates(model, prompts, settings, progress=False, judged=data)
    for i, (prompt, found) in enumerate(
        zip(prompts, read_candidates(prompts, settings), strict=True)
    ):
        assert bool(found.judged.all())
        # The images of all captions differ, and so a candidate is right where it is this one's.
        own = (found.tokens == i).all(dim=1)
        assert torch.equal(own | found.correct, found.correct), prompt
        names = list(data.attributes)
        for row, image in zip(found.checks, found.tokens[:, 0].tolist(), strict=True):
            shown = prompts[image]
            if shown.kind == "single" == prompt.kind:
                same = data.judge.reader.read(shown.caption), data.judge.reader.read(prompt.caption)
                assert int(row[names.index("style")]) == (same[0].styles == same[1].styles)
                assert int(row[names.index("top-1")]) == (same[0].emoji == same[1].emoji)


@pytest.mark.usefixtures("known")
def test_report_and_page(opened: Opener, make_settings: Callable[..., RankSettings]) -> None:
    """A report without kinds, or whose figures are not those of the candidates."""
    settings = make_settings(bootstrap=20, sheet_captions=4)
    data = opened()
    prompts = data.prompts()
    model = knowing_model(data, prompts)
    prepared = replace_judge(prepare_known(model, settings), data)
    page = run(prepared, settings)
    assert page is not None and all((page.parent / name).is_file() for name in FILES)
    results = json.loads((page.parent / "ranking.json").read_text())
    assert list(results["groups"]) == ALL
    for split, group in results["groups"].items():
        of_group = [p for p in prompts if p.group == split]
        found = list(read_candidates(of_group, settings))
        single = float(torch.cat([c.correct.float() for c in found]).mean())
        any_right = float(torch.stack([c.correct.any() for c in found]).float().mean())
        curves = group["curves"]
        assert curves["accuracy"]["1"]["mean"] == pytest.approx(single)
        assert curves["accuracy"]["8"]["mean"] == pytest.approx(any_right)
        assert curves["oracle"]["8"]["mean"] == pytest.approx(any_right)
        kinds = {p.kind for p in of_group}
        assert set(group["kinds"]) == kinds
        assert sum(k["captions"] for k in group["kinds"].values()) == group["captions"] == 6
        for kind, figures in group["kinds"].items():
            pairs = zip(found, of_group, strict=True)
            right = [c.correct.float().mean() for c, p in pairs if p.kind == kind]
            expected = float(torch.stack(right).mean())
            assert figures["curves"]["accuracy"]["1"]["mean"] == pytest.approx(expected)
        lines = list(ranking_lines(results))
        (row,) = (i for i, line in enumerate(lines) if line.startswith("first of 8"))
        at = next(line for line in lines[:row] if line.startswith(f"{split} "))
        assert at.split()[1:3] == ["6", f"{100 * single:.1f}%"]
        at = next(line for line in lines[row:] if line.startswith(f"{split} "))
        assert at.split()[1:3] == ["6", f"{100 * any_right:.1f}%"]
    text = page.read_text()
    for split in ALL:
        assert f"{split}: 6 captions" in text
    assert "<tr><td>twice<td>" in text and "top-1, %" in text


@pytest.mark.usefixtures("known")
def test_report_of_some_verdicts(
    opened: Opener, make_settings: Callable[..., RankSettings]
) -> None:
    """Candidates that were not judged counted as wrong ones, and no word of it."""
    settings = make_settings(splits=["test"], judged_candidates=4)
    data = opened(splits=["test"])
    prompts = data.prompts()
    model = knowing_model(data, prompts)
    page = run(replace_judge(prepare_known(model, settings), data), settings)
    assert page is not None
    curves = json.loads((page.parent / "ranking.json").read_text())["groups"]["test"]["curves"]
    assert "oracle" not in curves
    found = list(read_candidates(prompts, settings))
    for n in (1, 2, 4, 8):
        estimates = [
            estimate_best_of_n(c.scores, c.correct, n, choose_judged(c.scores, 4)) for c in found
        ]
        assert curves["accuracy"][str(n)]["mean"] == pytest.approx(np.mean(estimates))
    # All are judged here for comparison. The ranker knows the best, so both agree on all of N.
    every = make_settings(splits=["test"])
    draw_candidates(model, prompts, every, progress=False, judged=data)
    best = [bool(c.correct[c.scores.argmax()]) for c in read_candidates(prompts, every)]
    assert curves["accuracy"]["8"]["mean"] == pytest.approx(np.mean(best))
    assert "Of each caption 4 candidates are judged" in page.read_text()


def prepare_known(model: Model, settings: RankSettings) -> Any:
    """`prepare` of a model that is saved first; its ranker keeps the captions."""
    model.save(settings.model)
    prepared = prepare(settings)
    assert isinstance(prepared.model.ranker, KnowingRanker)
    prepared.model.ranker.captions = model.ranker.captions  # type: ignore[union-attr]
    return prepared


def replace_judge(prepared: Any, data: EmojiData) -> Any:
    return replace(prepared, judged=data)


def test_some_candidates_are_judged(
    opened: Opener, make_settings: Callable[..., RankSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates judged that nobody asked for, or judged again; a rise of the number that draws
    again, or more candidates whose best are not judged."""
    data = opened()
    prompts = data.prompts()
    model = knowing_model(data, prompts)
    judged: list[str] = []
    plain = EmojiData.check

    def counted(self: EmojiData, image: Tensor, caption: str) -> list[int]:
        judged.append(caption)
        return plain(self, image, caption)

    monkeypatch.setattr(EmojiData, "check", counted)
    few = make_settings(judged_candidates=4)
    draw_candidates(model, prompts, few, progress=False, judged=data)
    assert len(judged) == 4 * len(prompts)
    draw_candidates(model, prompts, few, progress=False, judged=data)
    assert len(judged) == 4 * len(prompts)
    first = list(read_candidates(prompts, few))
    for found in first:
        order = found.scores.argsort(descending=True, stable=True).tolist()
        wanted = {*order[:2], *sorted(order[2:])[:2]}
        assert {i for i, known in enumerate(found.judged.tolist()) if known} == wanted
        assert bool((found.checks[~found.judged] == NOT_JUDGED).all())
        assert not bool(found.correct[~found.judged].any())
    more = make_settings(judged_candidates=6, candidates=12)
    draw_candidates(model, prompts, more, progress=False, judged=data)
    for before, found in zip(first, read_candidates(prompts, more), strict=True):
        assert torch.equal(found.tokens[:8], before.tokens)
        assert bool((found.judged[:8] >= before.judged).all())
        order = found.scores.argsort(descending=True, stable=True).tolist()
        assert {*order[:3], *sorted(order[3:])[:3]} <= set(found.judged.nonzero()[:, 0].tolist())
    every = make_settings(candidates=12)
    draw_candidates(model, prompts, every, progress=False, judged=data)
    assert len(judged) == 12 * len(prompts)  # each candidate once in all
    assert all(bool(c.judged.all()) for c in read_candidates(prompts, every))
    fresh = make_settings(candidates=12, run=every.run + "-fresh")
    draw_candidates(model, prompts, fresh, progress=False, judged=data)
    pairs = zip(read_candidates(prompts, every), read_candidates(prompts, fresh), strict=True)
    assert all(torch.equal(a.checks, b.checks) for a, b in pairs)


def test_the_best_of_fewer_candidates_are_judged(
    opened: Opener, make_settings: Callable[..., RankSettings]
) -> None:
    """Of a folder with more candidates than are asked for, the best of all judged and those of the
    few not: they would count as wrong."""
    data = opened(splits=["test"])
    prompts = data.prompts()
    model = knowing_model(data, prompts, right=0.1)  # the best of 12 are not among the first 5
    for settings in (
        make_settings(splits=["test"], candidates=12, judged_candidates=2),
        make_settings(splits=["test"], candidates=5, judged_candidates=2),
    ):
        draw_candidates(model, prompts, settings, progress=False, judged=data)
        for found in read_candidates(prompts, settings):
            judged = choose_judged(found.scores, 2).all
            assert bool(found.judged[judged].all())
            ranks = Judged(judged[:1], judged[1:])
            first = estimate_best_of_n(found.scores, found.correct, len(found.scores), ranks)
            assert first == float(found.correct[judged[0]])


def test_completion_begins_with_the_given_half(
    opened: Opener, make_settings: Callable[..., RankSettings]
) -> None:
    """A half of another caption, or one that is drawn anew; a folder that mixes the two."""
    changes: dict[str, Any] = {"completion": True, "splits": ["test"], "captions": 6}
    settings, data = make_settings(**changes), opened(**changes)
    prompts = data.prompts()
    model = knowing_model(data, prompts, right=0.01)  # never by itself
    write_or_check_settings(model, settings, judged=data)
    draw_candidates(model, prompts, settings, progress=False, judged=data)
    for i, (prompt, found) in enumerate(
        zip(prompts, read_candidates(prompts, settings), strict=True)
    ):
        assert upper_tokens(model, data, prompt).tolist() == [i, i]
        assert bool((found.tokens == i).all())  # the prior goes on with what it was given
        assert bool(found.correct.all())
    with pytest.raises(ValueError, match="completion was True and is False"):
        write_or_check_settings(model, make_settings(), judged=data)
    with pytest.raises(ValueError, match="judged was True and is False"):
        write_or_check_settings(model, settings)


def test_verdicts_of_another_judge_are_refused(
    opened: Opener, make_settings: Callable[..., RankSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts of two judges in one curve."""
    settings, data = make_settings(), opened()
    model = knowing_model(data, data.prompts())
    write_or_check_settings(model, settings, judged=data)
    monkeypatch.setattr(data, "_digest", "0" * 64)
    with pytest.raises(ValueError, match="other settings, judge was"):
        write_or_check_settings(model, settings, judged=data)


@pytest.mark.usefixtures("known")
def test_an_image_that_the_judge_cannot_read(
    opened: Opener, make_settings: Callable[..., RankSettings], make_model: Any
) -> None:
    """Hours of drawing images that are too small for the judge."""
    make_model().save(make_settings().model)
    with pytest.raises(ValueError, match=r"image: expected .* of at least 32 pixels"):
        prepare(make_settings(captions=1))


def test_command_says_what_is_wrong(
    make_settings: Callable[..., RankSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback for a config of emoji."""
    (tmp_path / "model").mkdir()
    (tmp_path / "rank.yaml").write_text(f"model: m\nrun: {tmp_path}/run\ndata: x\njudge: emojis\n")
    assert evaluate.main([str(tmp_path / "rank.yaml")]) == 2
    assert re.search(r"m is no folder", capsys.readouterr().err)
    (tmp_path / "rank.yaml").write_text("measure: everything\n")
    assert evaluate.main([str(tmp_path / "rank.yaml")]) == 2
    assert "measure: Input should be 'ranking', 'copies' or" in capsys.readouterr().err
