"""The page docs/hub.md: all of its snippets, on a Hub of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from glob import glob
from itertools import chain
from pathlib import Path

import pytest
import torch

from dalle1 import Model
from dalle1.commands import main as cli
from tests.hub.server import Hub
from tests.published.every_family import CASES
from tests.published.test_fetching import contents

PAGE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page(
    hub: Hub, make_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command or a snippet that a reader copies and that fails."""
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    model = make_model()
    model.save("runs/shapes/dalle/model")
    for revision in (None, "v1"):
        model.push_to_hub("me/shapes", revision=revision)
    torch.manual_seed(0)
    mini = next(case for case in CASES if case.family == "dalle_mini")
    source, (_, codec) = mini.write(tmp_path / "mini")
    taming = next(case for case in CASES if case.family == "vqgan")
    weights = next(taming.write(tmp_path / "taming")[0].rglob("*.ckpt")).read_bytes()
    hub.add("them/dalle-mini", contents(source))
    hub.add("them/vqgan", contents(Path(codec)))
    hub.add("them/utils", {"vqgan.ckpt": weights, "other.ckpt": b"x"})
    run = 0
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "docs/hub.md", "exec"), {})
            run += 1
            continue
        for line in text.splitlines():
            words = [glob(word) if "*" in word else [word] for word in shlex.split(line)]
            verb, *arguments = chain.from_iterable(words)
            assert verb == "dalle1" and cli.main(arguments) == 0, line
            run += 1
    assert run == 9
    assert {"half", "v1", "main"} <= hub.repositories["me/shapes"].branches.keys()


def test_messages_of_the_page() -> None:
    """A message that is explained and no longer told."""
    told = re.findall(
        r"^\| `([^`]+)`(?=[^|]*\|[^|]*\|$)", PAGE.split("## When it")[1], re.MULTILINE
    )
    assert len(told) == 9
    root = Path(__file__).parents[2] / "dalle1"
    sources = [*(root / "hub").glob("*.py"), root / "common" / "extras.py"]
    # As the messages are written: over several lines, with names in braces.
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    text = re.sub(r'"\s*f?"', "", text)
    text = re.sub(r"\{[^}]*\}", "...", text)
    for message in told:
        for part in re.split(r"\.\.\.", message.replace("dalle1[hub]", "dalle1[...]")):
            assert part.strip() in text, message
