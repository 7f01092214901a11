"""A run's data: kept to, counted, resumed; nothing lost and nothing twice."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1.data import shapes
from dalle1.data.precompute.encode import TokenizeSettings, tokenize
from dalle1.data.shards.token_shard import TokenShard, write_token_shard
from dalle1.training.metrics_logger import read_metrics
from dalle1.training.trainer import Trainer

from .conftest import run_until, tiny
from .test_trainer import losses
from .worker import finish, keys_trained_on, start


def write_shard(path: Path, keys: Iterator[str], count: int, bad: int = 0) -> None:
    """Pictures of 16 x 16; the first `bad` of them are none."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(buffer, "PNG")
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            key = next(keys)
            picture = b"no picture" if i < bad else buffer.getvalue()
            for name, data in ((f"{key}.png", picture), (f"{key}.txt", b"a grey square")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def numbers() -> Iterator[str]:
    return (f"{i:06d}" for i in range(10**6))


def test_bad_samples_and_epochs_are_in_the_metrics(
    tmp_path: Path, parts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bad samples that nobody hears of; counts that begin anew with each report or resumption."""
    keys = numbers()
    for i in range(3):
        write_shard(tmp_path / f"{i:05d}.tar", keys, 16, bad=2 * (i == 1))
    config = tiny("dvae", str(tmp_path), tmp_path / "run", parts, steps=24)
    run_until(config, 10)
    Trainer(config, resume=True).run()
    lines = [line for line in read_metrics(tmp_path / "run") if "epoch" in line]
    dropped = [line.get("dropped/unreadable image", 0) for line in lines]
    # 24 x 8 good samples are 4 epochs of 46 and a little.
    assert dropped == sorted(dropped) and 7 <= dropped[-1] <= 10
    assert lines[-1]["epoch"] == pytest.approx((192 + dropped[-1]) / 48)
    assert "data: 48 samples in 3 tars of" in capfd.readouterr().err


def test_a_run_keeps_to_its_shards(tmp_path: Path, parts: Path) -> None:
    """A shard that arrives while a run trains, so that going on takes another order."""
    data = tmp_path / "data"
    shapes.write_shards(data, "train", 96, side=16, samples_per_shard=48)
    settings = {"steps": 20}
    Trainer(tiny("dvae", str(data), tmp_path / "whole", parts, **settings)).run()
    config = tiny("dvae", str(data), tmp_path / "run", parts, **settings)
    run_until(config, 10)
    write_shard(data / "train-00002.tar", numbers(), 30)
    Trainer(config, resume=True).run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    (tmp_path / "run" / "data.json").unlink()
    with pytest.raises(ValueError, match=r"3 shards, 126 samples\) is not what the run"):
        Trainer(config.model_copy(update={"steps": 30}), resume=True)


def test_a_run_keeps_to_its_tokenizer(tmp_path: Path, parts: Path) -> None:
    """A vocabulary learned anew of captions that have arrived, so that tokens change their meaning
    when a run goes on; or one of a start that failed, with other captions."""
    data = tmp_path / "data"
    shapes.write_shards(data, "train", 96, side=16, samples_per_shard=48)
    config = tiny("clip", str(data), tmp_path / "run", parts)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text("of another start")
    stopped = run_until(config, 5)
    caption = "a big red circle to the left of a small blue square"
    ids = stopped.stage._tokens([caption])  # type: ignore[operator]
    shard = data / "train-00000.tar"
    with tarfile.open(shard, "a") as more:
        for i in range(400):
            text = b"zzyzx quux " * 3
            entry = tarfile.TarInfo(f"zz{i}.txt")
            entry.size = len(text)
            more.addfile(entry, io.BytesIO(text))
    resumed = Trainer(config, resume=True)
    assert torch.equal(resumed.stage._tokens([caption]), ids)  # type: ignore[operator]
    resumed.run()


def test_too_many_bad_samples_end_a_run(tmp_path: Path, parts: Path) -> None:
    """Shards that are gone, so that a run goes round and round in what is left."""
    data, keys = tmp_path / "data", numbers()
    data.mkdir()
    for i in range(4):
        write_shard(data / f"{i:05d}.tar", keys, 30)
        (data / f"{i:05d}_stats.json").write_text('{"successes": 30}')
    config = tiny("dvae", str(data), tmp_path / "run", parts, steps=400, save_every=10)
    run_until(config, 10)
    for i in range(3):
        (data / f"{i:05d}.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match=r"x missing from its shard.*max_bad is 0.5"):
        Trainer(config, resume=True).run()
    assert read_metrics(tmp_path / "run")[-1]["step"] < 60


def test_order_settings_stay(tmp_path: Path, shards: str, parts: Path) -> None:
    """Another shuffle after a resumption: samples of the epoch lost or seen twice."""
    config = tiny("dvae", shards, tmp_path / "run", parts)
    run_until(config, 5)
    reader = config.reader.model_copy(update={"shuffle_buffer": 21})
    with pytest.raises(ValueError, match=r"reader.shuffle_buffer: .* trained with 20, .* 21"):
        Trainer(config.model_copy(update={"reader": reader}), resume=True)


@pytest.mark.parametrize("stage", ["dvae", "clip"])
def test_captions_are_looked_for_before_anything_is_done(
    tmp_path: Path, shards: str, parts: Path, stage: str
) -> None:
    """A run's folder, or a tokenizer, made for data without captions."""
    reader = {"image_size": 16, "caption_key": "alt"}
    config = tiny(stage, shards, tmp_path / "run", parts, reader=reader)
    with pytest.raises(ValueError, match=r"caption_key: 'alt' .* keys that are there: txt"):
        Trainer(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_three_times_each_sample_is_trained_on_once(tmp_path: Path) -> None:
    """Samples lost or repeated over an epoch's end, shards fewer than workers, or kills."""
    keys, data = numbers(), tmp_path / "data"
    data.mkdir()
    for i, count in enumerate((500, 425, 75, 625, 375, 300, 200)):
        write_shard(data / f"{i:05d}.tar", keys, count)
    reader = {"image_size": 16, "workers": 2, "shuffle_buffer": 1000}
    config = tiny(
        *("dvae", str(data), tmp_path / "run", tmp_path),
        **{"steps": 168, "batch_size": 30, "save_every": 7, "log_every": 20, "reader": reader},
    )
    rng = np.random.default_rng(int(os.environ.get("KILL_SEED", "0")))
    order = tmp_path / "order-0.txt"
    for _ in range(3):
        options = ("--resume",) if (tmp_path / "run").exists() else ()
        lines = len(order.read_text().splitlines()) if order.exists() else 0
        ranks = start(config, 3, tmp_path, *options)
        until = lines + int(rng.integers(8, 60))
        while not order.exists() or len(order.read_text().splitlines()) < until:
            assert all(process.poll() is None for process in ranks), "a rank ended by itself"
            time.sleep(0.01)
        for i in rng.permutation(3):
            ranks[i].kill()
        for process in ranks:
            process.wait()
        for path in tmp_path.glob("order-*.txt"):
            with path.open("a") as file:  # a line that was cut off stays one
                file.write("\n")
    finish(start(config, 3, tmp_path, "--resume"), tmp_path)
    found = keys_trained_on(tmp_path)
    assert len(found) == 168 * 30
    for epoch in (found[:2500], found[2500:5000]):
        assert Counter(epoch) == Counter(f"{i:06d}" for i in range(2500))
    assert found[:2500] != found[2500:5000]
    done = json.loads(order.read_text().splitlines()[-1])
    assert done[0] == 167


def token_settings(shards: str, parts: Path, out: Path, **settings: object) -> TokenizeSettings:
    common = {"data": shards, "out": str(out), "codec": str(parts / "dvae" / "model")}
    return TokenizeSettings(**(common | {"grid": 4} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_token_shards_give_the_losses_of_their_pictures(
    tmp_path: Path, shards: str, parts: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tokens of another picture, row order or dVAE; captions or an order that differ."""
    tokenize(token_settings(shards, parts, tmp_path / "tokens"))
    reader = {"image_size": 16, "augment": False, "workers": workers}
    raw = tiny("dalle", shards, tmp_path / "raw", parts, reader=reader)
    tokens = tiny("dalle", str(tmp_path / "tokens"), tmp_path / "tokens-run", parts, reader=reader)
    tokens = tokens.model_copy(update={"contact_sheet_every": 10})
    Trainer(raw).run()
    assert "images that the dVAE encodes as they come" in capfd.readouterr().err
    run_until(tokens, 9)
    assert "the dVAE's tokens of 1 crop(s) of the middle" in capfd.readouterr().err
    Trainer(tokens, resume=True).run()
    found, wanted = losses(tmp_path / "tokens-run"), losses(tmp_path / "raw")
    assert len(found) == 20 and found == pytest.approx(wanted, rel=1e-6)
    assert (tmp_path / "tokens-run" / "sheets" / "step-0000020.png").is_file()


def test_views_of_token_shards_are_drawn(tmp_path: Path, shards: str, parts: Path) -> None:
    """The first view alone, or one that is always the same for a picture."""
    tokenize(token_settings(shards, parts, tmp_path / "tokens", views=3, augment=True))
    trainer = Trainer(tiny("dalle", str(tmp_path / "tokens"), tmp_path / "run", parts))
    seen: dict[str, set[bytes]] = {}
    batches = trainer.data.batches()
    for _ in range(12 * 12):
        batch = next(batches)
        assert batch.tokens is not None
        for key, row in zip(batch.keys, batch.tokens, strict=True):
            seen.setdefault(key, set()).add(row.numpy().tobytes())
    assert len(seen) == 96
    # Of 12 draws of 3 views; some pictures' views are the same tokens.
    whole = {
        sample.key: {row.astype(np.int32).tobytes() for row in sample.tokens}
        for path in sorted((tmp_path / "tokens").glob("*.safetensors"))
        for sample in TokenShard(path).read(0, 10**6)
    }
    assert sum(seen[key] == whole[key] for key in whole) > 85
    assert all(seen[key] <= whole[key] for key in whole)


def test_token_shards_of_another_model_are_refused(
    tmp_path: Path, shards: str, parts: Path
) -> None:
    """A grid, vocabulary or dVAE that differs from the model's, trained on without a word."""
    settings = token_settings(shards, parts, tmp_path / "tokens")
    tokenize(settings)
    paths = sorted((tmp_path / "tokens").glob("*.safetensors"))
    held = [TokenShard(path) for path in paths]

    def written(**changes: object) -> str:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for path, shard in zip(paths, held, strict=True):
            made = replace(shard.settings, **changes)  # type: ignore[arg-type]
            tokens = np.zeros((shard.count, 1, made.grid**2), np.uint16)
            write_token_shard(folder / path.name, shard.keys(), shard.captions(), tokens, made)
        return str(folder)

    for changes, message in (
        ({"grid": 5}, "a grid of 5, the prior one of 4"),
        ({"codebook_size": 64}, "a vocabulary of 64, the prior one of 32"),
        ({"dvae": "0123"}, "of the codec 0123, codec .* is "),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(tiny("dalle", written(**changes), tmp_path / "run", parts))
    write_token_shard(
        Path(written()) / paths[0].name,
        held[0].keys(),
        held[0].captions(),
        np.zeros((held[0].count, 1, 25), np.uint16),
        replace(held[0].settings, grid=5),
    )
    with pytest.raises(ValueError, match=r"grid=5.* was made with .*grid=4|grid=5"):
        Trainer(tiny("dalle", str(tmp_path / "changed"), tmp_path / "run", parts))
    for stage in ("dvae", "clip"):
        with pytest.raises(ValueError, match=f"token shards, but stage '{stage}'"):
            Trainer(tiny(stage, str(tmp_path / "tokens"), tmp_path / "run", parts))
    assert not (tmp_path / "run").exists()
