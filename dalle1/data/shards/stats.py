"""img2dataset's statistics: `0000_stats.json` says how many samples `0000.tar` holds."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from http.client import HTTPException
from pathlib import Path

from dalle1.common.files import write_text
from dalle1.data.shards.names import TAR, is_tar
from dalle1.data.shards.tar import is_remote

HTTP_TIMEOUT = 30.0  # seconds


def stats_path(shard: Path) -> Path:
    """Where a shard's statistics stand."""
    return shard.with_name(f"{shard.stem}_stats.json")


def write_stats(shard: Path, status: Counter[str]) -> None:
    """Writes img2dataset's statistics of a shard: `success`es, and failures by cause."""
    stats = {
        "count": status.total(),
        "successes": status["success"],
        "failed": status.total() - status["success"],
        "status_dict": dict(status.most_common()),
    }
    write_text(stats_path(shard), json.dumps(stats, indent=2) + "\n")


def counted_samples(address: str) -> int | None:
    """The samples of a shard by its statistics; None where it has none that can be read."""
    if address.startswith("pipe:") or not is_tar(address):
        return None
    stem = address[: -len(TAR)]
    try:
        if is_remote(address):
            with urllib.request.urlopen(f"{stem}_stats.json", timeout=HTTP_TIMEOUT) as answer:
                text = answer.read(2**20)
        else:
            path = Path(f"{stem}_stats.json")
            text = (path if path.is_file() else Path(f"{stem}_STATS.JSON")).read_bytes()
        count: object = json.loads(text)["successes"]
    except (OSError, ValueError, KeyError, TypeError, HTTPException):
        return None
    return int(count) if isinstance(count, int) and count >= 0 else None
