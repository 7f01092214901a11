"""`Model.push_to_hub` and `dalle1 push`: files, card, branches, refusals."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load

import dalle1
from dalle1 import Model
from dalle1.commands import main as cli
from dalle1.hub.card import card_for_hub, split_card
from tests.conftest import CAPTIONS
from tests.hub.server import Files, Hub

NAME = "me/model"


@pytest.fixture(autouse=True)
def _logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_owner")


def test_files_and_card(hub: Hub, model: Model, saved: Files) -> None:
    """Weights changed on the way; a card that the Hub does not find, or without its picture."""
    image = Image.new("RGB", (2000, 1000), "red")
    images = {"a red | [x]": image, "noise: 1": np.zeros((8, 8, 3), np.uint8)}
    address = model.push_to_hub(NAME, license="mit", widget=images)
    assert address == f"{hub.endpoint}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    assert not hub.repositories[NAME].private
    files = hub.files(NAME)
    names = [f"images/widget-{i}.png" for i in range(2)]
    assert files.keys() == {*saved, *names, ".gitattributes"}
    card = files.pop("README.md").decode()
    assert all(files[name] == data for name, data in saved.items() if name != "README.md")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "license": "mit",
        "library_name": "dalle1",
        "pipeline_tag": "text-to-image",
        "tags": ["dall-e", "text-to-image"],
        "widget": [
            {"text": caption, "output": {"url": name}}
            for caption, name in zip(images, names, strict=True)
        ],
    }
    assert f'dalle1.load("{NAME}")' in card and "# A DALL-E model of dalle1" in card
    assert "![a red |  x ](images/widget-0.png) ![noise: 1](images/widget-1.png)" in card
    assert Image.open(io.BytesIO(files[names[0]])).size == (512, 256)
    commits = [path for path in hub.asked("POST") if "/commit/" in path]
    assert len(commits) == 1  # nobody sees half of a model


def test_sixteen_bits(hub: Hub, model: Model) -> None:
    """An upload of twice the size that was asked for."""
    model.push_to_hub(NAME, dtype=torch.float16)
    weights = load(hub.files(NAME)["transformer.safetensors"])
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}
    assert next(dalle1.load(NAME).prior.parameters()).dtype == torch.float16


def test_branches_and_pull_requests(hub: Hub, model: Model, make_model: type) -> None:
    """A main branch that is overwritten by what was meant for another one."""
    first = hub.add(NAME, {"a": b"b"})
    model.push_to_hub(NAME, revision="v2", commit_message="second")
    assert hub.repositories[NAME].branches["main"] == first
    assert torch.equal(
        dalle1.load(NAME, revision="v2").tokenizer.encode(CAPTIONS),
        model.tokenizer.encode(CAPTIONS),
    )
    address = model.push_to_hub(NAME, create_pr=True)
    assert address == f"{hub.endpoint}/{NAME}/discussions/1"
    assert hub.files(NAME) == {"a": b"b"}
    dalle1.load(NAME, revision="refs/pr/1")


def test_what_an_earlier_upload_had(hub: Hub, make_model: type) -> None:
    """A ranker of another model that stays in the repository; a user's own file that does not."""
    make_model().push_to_hub(NAME)
    hub.files(NAME)["notes.md"] = b"mine"
    make_model(clip=False).push_to_hub(NAME)
    files = hub.files(NAME)
    assert "clip.safetensors" not in files and files["notes.md"] == b"mine"
    assert dalle1.load(NAME).ranker is None
    make_model(clip=False).push_to_hub(NAME)  # the same again


def test_private(hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the whole world reads."""
    model.push_to_hub(NAME, private=True)
    assert hub.repositories[NAME].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="got none of this name that may be read"):
        dalle1.load(NAME)


def test_refusals(
    hub: Hub, model: Model, make_model: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, or an upload that ends after gigabytes, for what is known before."""
    for arguments, message in {
        ("a",): "repository: expected OWNER/NAME, got 'a'",
        ("a/b/c",): "repository: expected OWNER/NAME",
        (None,): "repository: expected OWNER/NAME, got None",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.push_to_hub(*arguments)
    image = Image.new("RGB", (8, 8))
    for options, message in (
        ({"license": "MIT License"}, "license: expected one of the Hub's names, such as mit"),
        ({"revision": "../x"}, "revision: expected a branch"),
        ({"commit_message": " "}, "commit_message: expected a text"),
        ({"widget": [image]}, "widget: expected images by their captions"),
        ({"widget": {"a": "no.png"}}, "no.png"),
        ({"widget": {str(i): image for i in range(9)}}, "widget: expected at most 8 images, got 9"),
        ({"widget": {"a": [image, image]}}, "widget: expected one image for 'a', got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.push_to_hub(NAME, **options)
    assert hub.requests == []
    with pytest.raises(ValueError, match=r'me/model: Invalid metadata .* "license" must be known'):
        model.push_to_hub(NAME, license="mine")
    with pytest.raises(ValueError, match=r"token: expected one that .* knows"):
        model.push_to_hub(NAME, token="hf_wrong")
    with pytest.raises(ValueError, match="token: expected one with the right to do this"):
        model.push_to_hub("me/new", token="hf_reader")
    hub.failing = 503
    with pytest.raises(ConnectionError, match=r"me/model: .* cannot be reached"):
        model.push_to_hub(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; unset it to upload"):
        model.push_to_hub(NAME)


def test_the_command(hub: Hub, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that leaves out what it was given, or loses the folder's own card."""
    model.save("folder")
    card = Path("folder", "README.md")
    own = "---\nlicense: other\ntags: [mine]\nlanguage: en\n---\n\n" + card.read_text()
    card.write_text(own + "\nMy notes.\n")
    options = ["--private", "--widget", CAPTIONS[0], "--candidates", "2", "--dtype", "bfloat16"]
    assert cli.main(["push", "folder", NAME, *options, "--message", "hello"]) == 0
    told = capsys.readouterr()
    assert told.out == f"{hub.endpoint}/{NAME}/commit/{hub.repositories[NAME].branches['main']}\n"
    files = hub.files(NAME)
    metadata, body = split_card(files["README.md"].decode())
    assert metadata["license"] == "other" and metadata["language"] == "en"
    assert metadata["tags"] == ["mine", "dall-e", "text-to-image"]
    assert body.endswith("\nMy notes.\n") and f'dalle1.load("{NAME}")' in body
    assert metadata["widget"][0]["text"] == CAPTIONS[0]
    expected = dalle1.sample(CAPTIONS[0], model, candidates=2, keep=1, progress=False).images[0][0]
    picture = Image.open(io.BytesIO(files["images/widget-0.png"]))
    assert picture.tobytes() == expected.tobytes()
    assert hub.repositories[NAME].private
    assert cli.main(["push", "folder", "nowhere"]) == 2
    assert "OWNER/NAME: expected OWNER/NAME, got 'nowhere'" in capsys.readouterr().err
    assert cli.main(["push", "none", NAME]) == 2
    assert cli.main(["push", "folder", NAME, "--license", "mine"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\n- a\n---\n\n# T\n", "expected names and values"),
        ("---\na: [\n---\n\n# T\n", "expected YAML"),
    ],
)
def test_cards_that_cannot_be_read(text: str, message: str) -> None:
    """A traceback of a parser, or metadata that is thrown away."""
    with pytest.raises(ValueError, match=rf"README\.md: {message}"):
        card_for_hub(text, None, [], [])


def test_a_card_twice() -> None:
    """Metadata that grows with every upload."""
    once = card_for_hub("# T\n\nText.\n", "mit", [], [])
    assert card_for_hub(once, None, [], []) == once
