"""Raw shards to token shards: a frozen dVAE encodes every image once (paper section 2).

    out/00012.safetensors   of 00012.tar the good samples: tokens, keys and all captions
    out/00012_stats.json    how many they are, and the bad ones by cause

A shard is done when its file is there, and files are complete or not there, so that a run which was
stopped resumes. Neither ranks nor workers change what is written, nor does batch_size but for
rounding.

Dimensions: b samples, v views of each, R side of a view in pixels, m tokens of a view.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dalle1 import registry
from dalle1.common.config import Location, differences
from dalle1.common.files import check_writable
from dalle1.common.progress import progress_bar
from dalle1.common.weights import check_finite, device_of, fingerprint, in_32_bits
from dalle1.data.precompute.crops import Decoding, End, ViewSettings
from dalle1.data.samples import CAUSES
from dalle1.data.shards.addresses import raw_shards, size_of
from dalle1.data.shards.addresses import shard_name as shard_name
from dalle1.data.shards.index import (
    TARS,
    Index,
    check_readable,
    no_good,
)
from dalle1.data.shards.names import shards_in
from dalle1.data.shards.stats import stats_path, write_stats
from dalle1.data.shards.tar import is_remote
from dalle1.data.shards.token_shard import (
    END,
    SourceShard,
    TokenSettings,
    TokenShard,
    write_token_shard,
)
from dalle1.data.shards.workers import ending_workers, prepare_worker
from dvae.calls import trusted
from dvae.codec import Codec

LARGEST_CODEBOOK = 2**16
# Of what a token shard keeps, the settings that are called otherwise.
NAMES = {"dvae": "codec", "augmented": "augment", "codebook_size": "codec"}


class TokenizeSettings(ViewSettings):
    """All that token shards depend on, and how they are made."""

    renamed: ClassVar = {"dvae_model": "codec"}

    data: Location = Field(
        description="raw shards: 'path/{0000..0009}.tar', a folder, pipe:, http(s)"
    )
    out: Location = Field(
        description="folder of the token shards; on several machines, a shared one"
    )
    codec: Location = Field(description="folder of the codec that encodes: of stage one, say")
    grid: int = Field(32, ge=1, description="rows of tokens; the dVAE says how many pixels each is")
    batch_size: int = Field(64, ge=1, description="images encoded at once")
    workers: int = Field(0, ge=0, description="processes that decode ahead, each a shard at a time")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the codec's arithmetic")
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank; null: all cores")


@dataclass
class TokenizeReport:
    """What became of a rank's shards; the counts of samples include the skipped shards."""

    done: int = 0  # shards
    skipped: int = 0  # shards that a former run has done
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by cause
    damaged: dict[str, str] = field(default_factory=dict)  # shards of which the rest is lost

    def table(self) -> str:
        """The counts, for people."""
        rows = [("shards done", self.done), ("skipped", self.skipped)]
        rows += [("samples", self.samples), ("kept", self.kept)]
        rows += [(cause, self.dropped[cause]) for cause in CAUSES if self.dropped[cause]]
        lines = [f"{name:<28}{count:>13,}" for name, count in rows]
        lines += [f"damaged, the rest is lost: {name}: {why}" for name, why in self.damaged.items()]
        return "\n".join(lines)


def tokenize(
    settings: TokenizeSettings,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> TokenizeReport:
    """Writes the token shards of every `world_size`-th raw shard from number `rank` on; those that
    are done are skipped. Ranks need not know of each other.

    Args:
        settings: what is encoded, and how.
        rank: of this process.
        world_size: number of ranks.
        device: where the images are encoded.
        progress: whether a bar is shown.

    Raises:
        ValueError: data that are missing or of another kind, a dVAE that does not fit, an `out`
            with other shards or with those of other settings, not one usable sample.
        OSError: a shard cannot be read; the disk is full, and how much is missing.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} ranks: RANK and WORLD_SIZE do not fit")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    codec = _load(settings)
    side = settings.grid * codec.stride
    made_with = _made_with(settings, codec)
    addresses, out = raw_shards(settings.data), Path(settings.out)
    targets = _targets(addresses, out)
    own = range(rank, len(addresses), world_size)
    _check_others(out, targets, own, made_with)
    report = TokenizeReport()
    missing = [i for i in own if not _skipped(addresses[i], targets[i], made_with, report)]
    if missing:
        check_writable(out, "out")
        _check_captions(settings, addresses)
        out.mkdir(parents=True, exist_ok=True)
        if isinstance(codec, nn.Module):
            codec.to(device)
    text_keys = Counter[str]()  # where a caption is missing
    bar = progress_bar(total=len(own), initial=report.skipped, unit="shard", disable=not progress)
    with bar:
        for number, made, end in _encoded(codec, settings, [addresses[i] for i in missing], side):
            _write(targets[missing[number]], made, end, made_with, report)
            text_keys.update(end.there)
            bar.update()
    if own and not report.kept:
        keys = ", ".join(key for key, _ in text_keys.most_common())
        raise ValueError(
            no_good(settings.data, settings.caption_key, report.dropped)
            + (f"; keys that are there: {keys}" if keys else "")
            + f". Before another try remove {settings.out!r}"
        )
    return report


# Before work.


def _load(settings: TokenizeSettings) -> Codec:
    """The codec, tried on one image; ValueError where it cannot encode what is asked for."""
    codec: Codec = in_32_bits(registry.load("codec", settings.codec))
    if codec.vocab_size > LARGEST_CODEBOOK:
        raise ValueError(
            f"codec: {settings.codec!r} has {codec.vocab_size:,} codes, and token shards hold 16 "
            f"bits: at most {LARGEST_CODEBOOK:,}"
        )
    check_finite(codec, f"codec: {settings.codec!r}")
    side = settings.grid * codec.stride
    try:
        tokens = codec.encode(torch.zeros(1, 3, side, side, device=device_of(codec)))
    except ValueError as error:
        raise ValueError(
            f"codec: {settings.codec!r} cannot encode images of {side}x{side} pixels, which a grid "
            f"of {settings.grid} is: {error}"
        ) from error
    if tokens.shape != (1, settings.grid, settings.grid):
        raise ValueError(
            f"codec: {settings.codec!r} makes {list(tokens.shape[1:])} tokens of {side}x{side} "
            f"pixels, not {settings.grid}x{settings.grid}"
        )
    return codec


def _made_with(settings: TokenizeSettings, codec: Codec) -> TokenSettings:
    return TokenSettings(
        codebook_size=codec.vocab_size,
        grid=settings.grid,
        views=settings.views,
        augmented=settings.augment,
        dvae=fingerprint(codec),
        precision=settings.precision,
        seed=settings.seed,
        caption_key=settings.caption_key,
        caption_lines=settings.caption_lines,
        max_aspect=settings.max_aspect,
        max_pixels=settings.max_pixels,
    )


def _targets(addresses: Sequence[str], out: Path) -> list[Path]:
    """Where the token shard of each raw one goes."""
    if not os.path.isdir(out):  # one with all shards may be for reading alone
        check_writable(out, "out")
    targets: dict[Path, str] = {}
    for i, address in enumerate(addresses):
        if not is_remote(address) and Path(address).parent.resolve() == out.resolve():
            raise ValueError(f"out: {str(out)!r} is where {address} is; give another folder")
        target = out / f"{shard_name(address) or f'{i:05d}'}{END}"
        if target in targets:
            raise ValueError(
                f"data: {targets[target]} and {address} have one name, and so would what is made "
                "of them; tokenize them one after the other into different folders"
            )
        targets[target] = address
    return list(targets)


def _check_others(
    out: Path, targets: Sequence[Path], own: Sequence[int], made_with: TokenSettings
) -> None:
    """ValueError where `out` holds what is not of this data, or other ranks' shards of other
    settings: this rank may have none yet."""
    there = [Path(path) for path in shards_in(out, END)]
    if foreign := set(there) - set(targets):
        raise ValueError(
            f"out: {str(out)!r} holds {min(foreign).name}, which is of none of the shards of data: "
            "a reader would mix two data sets; give another folder"
        )
    mine = {targets[i] for i in own}
    for path in islice((path for path in there if path not in mine), 1):
        _opened(path, made_with)


def _opened(path: Path, made_with: TokenSettings) -> TokenShard | None:
    """A token shard of an earlier run, None where there is none that is intact; ValueError for one
    of other settings."""
    if not path.is_file():
        return None
    try:
        shard = TokenShard(path)
    except ValueError:
        return None
    found = differences(asdict(shard.settings), asdict(made_with), NAMES)
    if found:
        raise ValueError(
            f"out: {path} was made with other settings: {'; '.join(found)}. Give another folder, "
            "or remove it"
        )
    return shard


def _skipped(address: str, target: Path, made_with: TokenSettings, report: TokenizeReport) -> bool:
    """Whether a former run has done a shard, which is then in the report."""
    shard = _opened(target, made_with)
    if (
        shard is None
        or shard.source.bytes != size_of(address)
        or (shard.source.damage and is_remote(address))  # it may be undamaged today
    ):
        return False
    report.skipped += 1
    _add(report, shard.count, shard.source)
    if not stats_path(target).is_file():  # stopped between the two
        _write_stats(target, shard.count, shard.source)
    return True


def _source_name(target: Path) -> str:
    # Not the address, which may hold a password.
    return target.name.removesuffix(END) + ".tar"


def _check_captions(settings: TokenizeSettings, addresses: list[str]) -> None:
    try:
        check_readable(Index(settings.data, TARS, addresses, []), settings.caption_key)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("reader.")) from error


# Encoding.


@dataclass
class _Made:
    """What there is of a token shard."""

    keys: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)  # uint16 [b, v, m]

    def all_tokens(self, s: TokenSettings) -> np.ndarray:
        """uint16 [b, v, m]."""
        return np.concatenate([np.empty((0, s.views, s.grid**2), np.uint16), *self.tokens])


def _encoded(
    codec: Codec, settings: TokenizeSettings, addresses: Sequence[str], side: int
) -> Iterator[tuple[int, _Made, End]]:
    """Shards by number, each when it is done: with several workers, several are in work."""
    chunks = DataLoader(
        Decoding(addresses, settings, settings.batch_size, side),
        batch_size=None,
        num_workers=min(settings.workers, len(addresses)),
        collate_fn=_unchanged,
        worker_init_fn=prepare_worker,
    )
    in_work: dict[int, _Made] = {}
    for chunk in ending_workers(iter(chunks)):
        made = in_work.setdefault(chunk.shard, _Made())
        if chunk.keys:
            tokens = _encode(codec, chunk.images, settings)
            made.tokens.append(rearrange(tokens, "(b v) m -> b v m", v=settings.views))
            made.keys += chunk.keys
            made.captions += chunk.captions
        if chunk.end is not None:
            if chunk.end.failure:
                raise OSError(chunk.end.failure)
            yield chunk.shard, in_work.pop(chunk.shard), chunk.end


def _unchanged(chunk: Any) -> Any:
    return chunk


def _encode(codec: Codec, images: Tensor, settings: TokenizeSettings) -> np.ndarray:
    """uint16 [n, m] of uint8 [n, 3, R, R]."""
    device = device_of(codec)
    found = []
    for some in images.split(settings.batch_size):
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        with trusted(), autocast:
            tokens = codec.encode(some.to(device).float() / 255)
        rows = rearrange(tokens, "n r c -> n (r c)")
        found.append(rows.to("cpu", torch.int32).numpy().astype(np.uint16))
    return np.concatenate(found)


# After a shard.


def _write(
    target: Path, made: _Made, end: End, made_with: TokenSettings, report: TokenizeReport
) -> None:
    """Writes a token shard and then its statistics."""
    source = SourceShard(_source_name(target), end.bytes, dict(+end.dropped), end.damage)
    tokens = made.all_tokens(made_with)
    write_token_shard(target, made.keys, made.captions, tokens, made_with, source)
    _write_stats(target, len(made.keys), source)
    _add(report, len(made.keys), source)
    report.done += 1


def _add(report: TokenizeReport, kept: int, source: SourceShard) -> None:
    report.kept += kept
    report.samples += kept + sum(source.dropped.values())
    report.dropped.update(source.dropped)
    if source.damage:
        report.damaged[source.name] = source.damage


def _write_stats(target: Path, kept: int, source: SourceShard) -> None:
    write_stats(target, Counter({"success": kept}) + Counter(source.dropped))
