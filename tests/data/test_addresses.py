"""Every tool of the product with every kind of data: taken, or refused in one line."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dalle1.commands import tokenize as tokenize_command
from dalle1.commands.command_line import exit_status
from dalle1.commands.data import filter as filter_command
from dalle1.commands.data import inspect as inspect_command
from dalle1.commands.data import shard as shard_command
from dalle1.data.curation import filter_shards as filtering
from dalle1.data.curation.filter_shards import filter_shards
from dalle1.data.curation.filters import FilterSettings
from dalle1.data.curation.inspect import describe, inspect
from dalle1.data.curation.write_shards import write_shards
from dalle1.data.shards.index import check_readable, make_index, raw_samples
from dalle1.data.shards.loader import Batches
from dalle1.data.shards.token_shard import TokenSettings, write_token_shard
from dalle1.data.transforms import no_augmentation
from dalle1.evaluation.config import RankSettings
from dalle1.evaluation.prompts import read_prompts, true_images
from dvae import DVAE, DVAEConfig
from tests.data.images import encoded, good, write_tar

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
CAPTIONS = [f"a red circle {i}" for i in range(6)]


def table_of_the_page() -> dict[tuple[str, str], bool]:
    """Of the table in docs/data.md: whether a kind of data is taken by a tool."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if "|" in line]
    head = next(i for i, row in enumerate(rows) if row[0] == "given")
    tools = rows[head][1:]
    found = {}
    for row in rows[head + 2 :]:
        if len(row) != 1 + len(tools):
            break
        assert all(re.match("yes|no", cell) for cell in row[1:]), row
        found |= {(row[0], t): c.startswith("yes") for t, c in zip(tools, row[1:], strict=True)}
    return found


TABLE = table_of_the_page()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *values: object) -> None:
        pass


@dataclass
class Given:
    """All kinds of data, in a folder, and what the tools need besides."""

    folder: Path
    codec: str
    kinds: dict[str, str]


def write_tokens(path: Path, captions: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = TokenSettings(codebook_size=5, grid=2, views=1, augmented=False, dvae="abc")
    tokens = np.zeros((len(captions), 1, 4), np.uint16)
    write_token_shard(path, [f"k{i}" for i in captions], [[c] for c in captions], tokens, settings)
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    folder = tmp_path_factory.mktemp("given")
    rows = [row | {"txt": text.encode()} for row, text in zip(good(6), CAPTIONS, strict=True)]
    for name in ("tars/00000", "tars/00001"):
        path = folder / f"{name}.tar"
        path.parent.mkdir(exist_ok=True)
        first = 3 * int(name[-1])
        write_tar(path, rows[first : first + 3])
        (folder / "zipped").mkdir(exist_ok=True)
        (folder / "zipped" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        write_tokens(folder / "tokens" / f"{path.stem}.safetensors", CAPTIONS[first : first + 3])
    (folder / "pairs").mkdir()
    for i, text in enumerate(CAPTIONS):
        (folder / "pairs" / f"{i}.png").write_bytes(encoded(i))
        (folder / "pairs" / f"{i}.txt").write_text(text)
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    rows_of_table = [f"pairs/{i}.png,{text}" for i, text in enumerate(CAPTIONS)]
    (folder / "table.csv").write_text("\n".join(["path,caption", *rows_of_table]))
    codec = folder / "codec"
    small = DVAEConfig(width=8, bottleneck=6, groups=2, blocks_per_group=1, codebook_size=20)
    DVAE(small).save(codec)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        kinds = {
            "a folder of tars": f"{folder}/tars",
            "a brace pattern of tars": f"{folder}/tars/{{00000..00001}}.tar",
            "several tars": f"{{{folder}/tars/00000,{folder}/tars/00001}}.tar",
            "compressed tars": f"{folder}/zipped/{{00000..00001}}.tar.gz",
            "a pipe": f"pipe:cat {folder}/tars/{{00000..00001}}.tar",
            "an http(s) address": f"{address}/tars/{{00000..00001}}.tar",
            "a folder of pairs": f"{folder}/pairs",
            "token shards": f"{folder}/tokens",
            "remote token shards": f"{address}/tokens/{{00000..00001}}.safetensors",
            "a .txt of captions": f"{folder}/captions.txt",
            "a table": f"{folder}/table.csv",
        }
        yield Given(folder, str(codec), kinds)
        server.shutdown()
        thread.join()


def train(data: str, out: Path, given: Given) -> int:
    def read() -> int:
        index = make_index(data)
        check_readable(index, "txt")
        batches = Batches(index, 6, 8, no_augmentation, 0, streams=1)
        assert sorted(next(batches.loader()).captions) == CAPTIONS
        return 0

    return exit_status(read)


def run_inspect(data: str, out: Path, given: Given) -> int:
    return inspect_command.main([data])


def run_filter(data: str, out: Path, given: Given) -> int:
    status = filter_command.main([data, str(out)])
    if status == 0:
        assert [s["txt"].decode() for s in raw_samples(str(out))] == CAPTIONS
        assert filter_command.main([data, str(out)]) == 0  # all is done
    return status


def run_tokenize(data: str, out: Path, given: Given) -> int:
    path = given.folder / "tokens.yaml"
    path.write_text(json.dumps({"data": data, "out": str(out), "codec": given.codec, "grid": 4}))
    return tokenize_command.main([str(path)])


def evaluate(data: str, out: Path, given: Given) -> int:
    def read() -> int:
        settings = RankSettings(model="m", run="r", data=data)
        assert [p.caption for p in read_prompts(settings)] == CAPTIONS
        images = true_images(settings, 8)
        alone = "tokens" in data or data.endswith(".txt")
        assert (images is None) if alone else len(list(images or ())) == 6
        return 0

    return exit_status(read)


def run_shard(data: str, out: Path, given: Given) -> int:
    status = shard_command.main([data, str(out)])
    if status == 0:
        assert [s["txt"].decode() for s in raw_samples(str(out))] == CAPTIONS
    return status


TOOLS: dict[str, Callable[[str, Path, Given], int]] = {
    "train": train,
    "inspect": run_inspect,
    "filter": run_filter,
    "tokenize": run_tokenize,
    "evaluate": evaluate,
    "shard": run_shard,
}


def test_the_table_has_all_tools_and_kinds(given: Given) -> None:
    """A tool or a kind of data that is documented nowhere, or tried nowhere."""
    assert set(TABLE) == {(kind, tool) for kind in given.kinds for tool in TOOLS}


@pytest.mark.parametrize(("kind", "tool"), TABLE)
def test_every_tool_with_every_kind(
    kind: str, tool: str, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, good data that are called damaged, work that is done and thrown away, or advice
    that does not help: for `pipe:`, say, to make shards of a folder first."""
    data = given.kinds[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "is damaged, its rest is lost"
        status = TOOLS[tool](data, tmp_path / "out", given)
    printed = capsys.readouterr()
    if TABLE[kind, tool]:
        assert status == 0 and not printed.err
        assert "damaged shards    0" in printed.out or tool != "inspect"
        return
    assert status == 2 and not printed.out and not (tmp_path / "out").exists()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert "damaged" not in printed.err and data.rpartition("/")[2][:5] in printed.err


@pytest.mark.parametrize("kind", ["a pipe", "an http(s) address", "compressed tars"])
def test_a_report_of_what_is_read_twice(kind: str, given: Given) -> None:
    """Samples of an address that are counted, but not looked at; sizes of nothing."""
    report, plain = inspect(given.kinds[kind]), inspect(given.kinds["a folder of tars"])
    for name in ("shards", "samples", "parts", "duplicates", "damaged", "good", "formats"):
        assert getattr(report, name) == getattr(plain, name), name
    assert report.quantiles == plain.quantiles and 0 < report.bytes <= plain.bytes
    assert len(inspect(given.kinds[kind], images=4).images) == 4


def test_a_report_of_token_shards(given: Given, tmp_path: Path) -> None:
    """Token shards whose captions, keys and settings nobody can see, or a sheet without images."""
    data = given.kinds["token shards"]
    report = inspect(data)
    assert (report.shards, report.samples, report.good) == (2, 6, 6)
    assert report.quantiles["words"] == [4] * 5 and not report.damaged
    assert report.bytes == sum(p.stat().st_size for p in Path(data).iterdir())
    text = describe(report)
    assert "2 x 2 of 5, views 1, codec abc" in text and "formats" not in text
    assert inspect(f"{{{data},{data}}}/00000.safetensors").duplicates == 3
    with pytest.raises(ValueError, match="holds token shards"):
        inspect(data, images=1)
    (tmp_path / "00000.safetensors").write_bytes(b"no tokens")
    write_tokens(tmp_path / "00001.safetensors", ["a"])
    assert inspect(str(tmp_path)).damaged == [str(tmp_path / "00000.safetensors")]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "data",
    [
        *("pipe:false", "pipe:exit 3 # 0.tar", "pipe:echo no tar", "http://127.0.0.1:9/0.tar"),
        *("nowhere", "nowhere/{0..3}.tar", "s3://bucket/0.tar", "table.parquet", "shapes.d"),
        *("a {b", "one/{0..1}.safetensors", "x.tar y.tar"),
    ],
)
def test_addresses_of_nothing(
    tool: str,
    data: str,
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback where nothing can be read, or a report of nothing that counts as done."""
    monkeypatch.setattr(filtering, "RETRIES", ())
    monkeypatch.setattr("dalle1.data.precompute.crops.RETRIES", ())
    monkeypatch.setattr("dalle1.data.shards.tar.CURL", "exec curl -f -s -L")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = TOOLS[tool](data, tmp_path / "out", given)
    said = capsys.readouterr().err
    assert status in (1, 2) and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("tool", ["inspect", "filter", "tokenize"])
def test_the_built_in_data_by_name(
    tool: str, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file called `shapes` that is missed, where the setting of a run takes the word."""
    assert TOOLS[tool]("shapes", tmp_path / "out", given) == 2
    assert "data/shapes" in capsys.readouterr().err


def test_files_that_are_no_shards(given: Given, tmp_path: Path) -> None:
    """A list or an image that is called a damaged shard; a tar of any name that is refused."""
    tar = given.folder / "tars" / "00000.tar"
    for name in ("noext", "a.dat", "b.TAR", "c.tar.1"):
        (tmp_path / name).write_bytes(tar.read_bytes())
        assert make_index(str(tmp_path / name)).samples == 3
    for name, data in (
        ("list.TXT", b"a cat\n"),
        ("a.json", b"{}"),
        ("b.png", encoded(1)),
        ("empty", b""),
        ("c.zip", b"PK\3\4"),
    ):
        (tmp_path / name).write_bytes(data)
        message = f"^data: expected tars .*{name}' ?, which is neither.* a .zip is unpacked"
        with pytest.raises(ValueError, match=message):
            make_index(str(tmp_path / name))


# Filtering what is remote.


def test_filtering_what_is_remote(given: Given, tmp_path: Path) -> None:
    """Shards of a pipe that differ from those of a folder, or that are filtered at each start;
    passwords of an address in the records; another address under the same name."""
    plain = filter_shards(given.kinds["a folder of tars"], tmp_path / "plain", FilterSettings())
    opened = tmp_path / "opened"
    data = f"pipe:cat {given.folder}/tars/{{00000..00001}}.tar; echo secret >> {opened}"
    report = filter_shards(data, tmp_path / "out", FilterSettings())
    assert report == plain
    for path in sorted((tmp_path / "plain").glob("*.tar")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    times = opened.read_text().count("secret")
    again = filter_shards(data, tmp_path / "out", FilterSettings(), workers=1)
    assert again == report and opened.read_text().count("secret") == times + 1  # one sample
    held = b"".join(p.read_bytes() for p in (tmp_path / "out" / "filtering").iterdir())
    assert b"secret" not in held
    with pytest.raises(ValueError, match=r"made of a remote 00000\.tar .*, which is not"):
        filter_shards(given.kinds["a pipe"], tmp_path / "out", FilterSettings())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_remote_shard_that_breaks_off(
    workers: int, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a shard lost for good to a break of the network; a shard that changed between
    its two readings written with others' samples."""
    monkeypatch.setattr(filtering, "RETRIES", (0.0,))
    tar, count = given.folder / "tars" / "00000.tar", tmp_path / "count"
    script = tmp_path / "give.sh"
    script.write_text(
        f"echo >> {count}; case $(wc -l < {count}) in\n"
        f"$1) head -c 4000 {tar};;\n*) cat {tar};;\nesac"
    )
    settings = FilterSettings()
    # The first opening looks for captions; each of the other two may break off once.
    for broken in ("2", "3"):
        count.unlink(missing_ok=True)
        out = tmp_path / broken
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = filter_shards(f"pipe:sh {script} {broken} # 0.tar", out, settings, workers)
        assert (report.kept, report.damaged) == (3, {})
    count.unlink()
    data = f"pipe:sh {script} '[2-9]' # 0.tar"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = filter_shards(data, tmp_path / "out", settings, workers)
        assert list(report.damaged) == ["0.tar"] and report.kept < 3
        count.write_text("\n" * 20)  # from now on it is sound
        report = filter_shards(data, tmp_path / "out", settings, workers)
    assert (report.kept, report.damaged) == (3, {})
    assert len(list(raw_samples(str(tmp_path / "out")))) == 3


def test_a_shard_that_changes_while_it_is_filtered(given: Given, tmp_path: Path) -> None:
    """Samples that were never filtered under the name of others that were."""
    count = tmp_path / "count"
    first, second = (given.folder / "tars" / f"0000{i}.tar" for i in range(2))
    either = f"test $(wc -l < {count}) -lt 3 && cat {first} || cat {second}"
    data = f"pipe:echo >> {count}; {either} # 0.tar"
    with pytest.raises(OSError, match="changed while it was read"):
        filter_shards(data, tmp_path / "out", FilterSettings())
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_a_source_of_pairs_that_holds_shards(given: Given, tmp_path: Path) -> None:
    """Advice to write captions beside images for what is packed already."""
    for kind in ("a folder of tars", "a pipe", "a brace pattern of tars", "an http(s) address"):
        with pytest.raises(ValueError, match=r"^source: .*take them as `data`"):
            write_shards(given.kinds[kind], tmp_path / "out")


@pytest.mark.parametrize("tool", TOOLS)
def test_no_data_is_not_the_working_folder(
    tool: str,
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A variable that is not set, by which all that lies in the working folder is read."""
    monkeypatch.chdir(given.kinds["a folder of tars"])
    assert TOOLS[tool]("", tmp_path / "out", given) == 2
    assert re.search("got ('|an empty text)", capsys.readouterr().err)


def test_a_source_that_is_an_address_is_named_as_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """http:/host for http://host, which is then said not to exist."""
    for source in ("http://host/0.tar", "pipe:cat 0.tar"):
        assert shard_command.main([source, str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert repr(source) in said and "take them as `data`" in said


@pytest.mark.parametrize("name", ["part/0.tar", "0.tar.gz", "part/0.TGZ"])
def test_shards_that_only_a_pattern_finds(name: str, given: Given, tmp_path: Path) -> None:
    """A folder of shards said to hold none, without a word on how they are given."""
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    for read in (make_index, inspect):
        with pytest.raises(ValueError, match=rf"{name}.*given by a pattern"):
            read(str(tmp_path / "in"))
