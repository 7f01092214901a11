"""What the filters dropped and why, for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dalle1.data.curation.filters import CAUSES

EXAMPLES = 3  # of each cause
Examples = dict[str, list[dict[str, str]]]  # by cause: shard, key and caption of some samples


@dataclass
class FilterReport:
    """What was dropped and why; the same whether or not the run was stopped in between."""

    settings: dict[str, Any]
    shards: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, str] = field(default_factory=dict)  # shards of which the rest is lost
    examples: Examples = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of a file with all of it."""
        content = asdict(self) | {"dropped": {c: self.dropped[c] for c in CAUSES}}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The counts by cause, with an example of each, for people."""
        rows = [("samples", self.samples, ""), ("kept", self.kept, "")]
        for cause in CAUSES:
            if self.dropped[cause]:
                example = self.examples[cause][0]
                text = example["caption"] or f"{example['key']} of {example['shard']}"
                rows.append((cause, self.dropped[cause], repr(text[:60])))
        lines = [
            f"{name:<20}{count:>13,}{count / max(1, self.samples):>8.1%}  {example}".rstrip()
            for name, count, example in rows
        ]
        lines += [f"damaged, the rest is lost: {name}: {why}" for name, why in self.damaged.items()]
        return "\n".join(lines)
