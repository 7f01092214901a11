"""DALL-E mini's published layouts: flax with stacked layers and without, min-dalle's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dalle1
from dalle1 import Model
from dalle1.published import dalle_mini, min_dalle
from dalle1.published.dalle_bart import config_of
from dalle1.seq2seq.config import Seq2SeqConfig
from tests.parity.dalle_mini import Restated, Shape, random_weights, unscanned
from tests.seq2seq.test_model import MEGA, captions, images
from tests.text.files import write_bart

from .dalle_mini_files import built, config_json, write_hub_folder, write_min_dalle
from .test_vqgan import CONFIG as CODEC
from .test_vqgan import weights_of

S = Shape(d=128, heads=2)  # heads of 64, as published
WEIGHTS = random_weights(S)


def hub(folder: Path) -> Path:
    return write_hub_folder(folder, S, WEIGHTS)


def hub_unscanned(folder: Path) -> Path:
    return write_hub_folder(folder, S, unscanned(WEIGHTS))


def hub_as_a_training_state(folder: Path) -> Path:
    return write_hub_folder(folder, S, {f"params.{name}": w for name, w in WEIGHTS.items()})


def hub_in_16_bits(folder: Path) -> Path:
    return write_hub_folder(folder, S, {n: w.astype("float16") for n, w in WEIGHTS.items()})


def min_dalle_local(folder: Path) -> Path:
    return write_min_dalle(folder, S, WEIGHTS, config=False)


def min_dalle_hub(folder: Path) -> Path:
    write_min_dalle(folder, Shape(d=64, heads=1), random_weights(Shape(d=64, heads=1)))
    return write_min_dalle(folder, S, WEIGHTS, "_mini") / "decoder_mini.pt"


@pytest.mark.parametrize(
    ("write", "reader", "narrow"),
    [
        (hub, dalle_mini, False),
        (hub_unscanned, dalle_mini, False),
        (hub_as_a_training_state, dalle_mini, False),
        (hub_in_16_bits, dalle_mini, True),
        (min_dalle_local, min_dalle, True),
        (min_dalle_hub, min_dalle, True),
    ],
)
def test_layouts(write: Callable[[Path], Path], reader: Any, narrow: bool, tmp_path: Path) -> None:
    """A kernel that is not turned, layers or projections in another order, 16 bits made 32."""
    source = write(tmp_path / "source")
    other = min_dalle if reader is dalle_mini else dalle_mini
    assert reader.FAMILY.recognizes(source) and not other.FAMILY.recognizes(source)
    part = reader.FAMILY.read(source).prior
    assert part is not None and part.config == Seq2SeqConfig(
        width=128, heads=2, encoder_layers=2, decoder_layers=3, ffn_width=27, text_vocab=50,
        text_length=9, image_vocab=40, image_rows=41, grid=4,
    )  # fmt: skip
    types = {weight().dtype for weight in part.weights.values()}
    assert types == {torch.float16 if narrow else torch.float32}
    prior = built(part).float()
    rounded = {n: w.astype("float16").astype("float32") for n, w in WEIGHTS.items()}
    restated = Restated(S, rounded if narrow else WEIGHTS, torch.float64)
    with torch.no_grad():
        logits = prior(captions(), images())
    expected = restated.logits(captions(), images())[..., :40]
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(1024, 16, 12, 12, 2730, 50264, 64, 0, 16385, 16384, 256), Seq2SeqConfig()),
        (Shape(2048, 32, 24, 24, 4096, 50272, 64, 0, 16416, 16384, 256), MEGA),
    ],
    ids=["mini", "mega"],
)
def test_published_configs(shape: Shape, expected: Seq2SeqConfig) -> None:
    """Codes that the codec does not have, or a start that is another row than the weights'."""
    found = config_of(Path("config.json"), config_json(shape, init_std=expected.init_std))
    assert found.model_copy(update={"image_rows": expected.image_rows}) == expected
    assert (found.image_vocab, found.start_row) == (16384, 16384)
    assert found.image_embeddings == shape.rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "use_bias: expected False, as DALL-E mini and mega have it, got True"),
        ({"ln_positions": "preln"}, "ln_positions: expected 'normformer'"),
        ({"ln_type": "rmsnorm"}, "ln_type: expected 'layernorm'"),
        ({"sinkhorn_iters": 2}, "sinkhorn_iters: expected 1"),
        ({"force_ln_scale": True}, "force_ln_scale"),
        ({"d_model": None}, "d_model: expected a whole number, got None"),
        ({"encoder_layers": "2"}, "encoder_layers: expected a whole number"),
        ({"decoder_ffn_dim": 28}, "decoder_ffn_dim: expected encoder_ffn_dim's 27, got 28"),
        ({"image_length": 15}, "image_length: expected a square number"),
        ({"decoder_start_token_id": 41}, "decoder_start_token_id: expected 1 to 40, got 41"),
        ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "multiple of heads 3"),
        ({"encoder_layers": 3}, "expected 3 layers, got a shape of \\[2, 128\\]"),
        ({"d_model": 126}, r"embed_tokens.embedding' has shape \[50, 128\]"),
        ({"image_vocab_size": 47}, r"decoder.embed_tokens.embedding' has shape \[41, 128\]"),
    ],
)
def test_configs_of_another_model(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A variant of the family that opens, and draws noise."""
    write_hub_folder(tmp_path, S, WEIGHTS, **changes)
    with pytest.raises(ValueError, match=message):
        dalle_mini.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_layers": 10**12}, "expected 1000000000000 layers, got a shape of"),
        ({"decoder_layers": 10**12}, "expected 1000000000000 layers, got a shape of"),
        ({"d_model": 2**40}, "its config is of no model that could be built"),
        ({"image_length": 10**36}, "its config is of no model that could be built"),
    ],
)
@pytest.mark.parametrize("stacked", [True, False])
def test_configs_that_claim_too_much(
    changes: dict[str, Any], message: str, stacked: bool, tmp_path: Path
) -> None:
    """A model of any size that is built before the file has shown that it has the weights."""
    write_hub_folder(tmp_path, S, WEIGHTS if stacked else unscanned(WEIGHTS), **changes)
    if not stacked and "layers" in message:
        message = "has no weight 'model.*Layer_[23]"
    with pytest.raises(ValueError, match=message):
        dalle_mini.read(tmp_path)


def test_weights_that_are_missing_or_not_known(tmp_path: Path) -> None:
    """A KeyError, or a file of another model that is half read."""
    name = "model.decoder.layers.FlaxBartDecoderLayers.LayerNorm_2.bias"
    less = {key: value for key, value in WEIGHTS.items() if key != name}
    write_hub_folder(tmp_path, S, less)
    with pytest.raises(ValueError, match=f"flax_model.msgpack: has no weight '{name}'"):
        dalle_mini.read(tmp_path)
    write_hub_folder(tmp_path, S, {**WEIGHTS, "model.head_scale": np.ones(3, "float32")})
    with pytest.raises(ValueError, match=r"has an unexpected weight 'model\.head_scale'"):
        dalle_mini.read(tmp_path)
    write_min_dalle(tmp_path / "pt", S, WEIGHTS)
    state = torch.load(tmp_path / "pt" / "decoder.pt")
    state["layers.0.glu.fc0.weight"] = state["layers.0.glu.fc0.weight"][:-1]
    torch.save(state, tmp_path / "pt" / "decoder.pt")
    with pytest.raises(ValueError, match=r"'decoder\.layers\.0\.glu\.fc0\.weight' has shape \[26"):
        min_dalle.read(tmp_path / "pt")
    del state["lm_head.weight"]
    state["layers.0.glu.fc0.weight"] = state["layers.1.glu.fc0.weight"]
    torch.save(state, tmp_path / "pt" / "decoder.pt")
    with pytest.raises(ValueError, match=r"has no weight 'decoder\.lm_head\.weight'"):
        min_dalle.read(tmp_path / "pt")


def test_which_of_two_models(tmp_path: Path) -> None:
    """The Hub's folder, of which the smaller or the larger model is taken without a word."""
    min_dalle_hub(tmp_path)
    with pytest.raises(ValueError, match=r"expected one model, got two; give .*decoder_mini\.pt"):
        min_dalle.read(tmp_path)
    with pytest.raises(ValueError, match=r"expected encoder\.pt and decoder\.pt"):
        min_dalle.read(tmp_path / "nothing" / "decoder.pt")


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", json.dumps({"model_type": "bart"})])
def test_folders_of_others_are_not_recognized(content: str, tmp_path: Path) -> None:
    """Any folder with a flax file that is taken for DALL-E mini's; an error while looking."""
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    assert not dalle_mini.FAMILY.recognizes(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert not dalle_mini.FAMILY.recognizes(tmp_path)
    assert not min_dalle.FAMILY.recognizes(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        dalle_mini.read(tmp_path)


def drawn(model: Model, **options: Any) -> torch.Tensor:
    settings = {"candidates": 3, "keep": 3, "guidance": 3.0, "progress": False, **options}
    return dalle1.sample("a red cat", model, **settings).tokens


def test_min_dalles_folder_is_a_model(tmp_path: Path) -> None:
    """Captions or empty captions of other ids than the vocabulary's, or another codec's tokens."""
    codes = CODEC.codebook_size
    s = Shape(
        d=64, heads=1, text_vocab=320, text_length=12, image_vocab=codes, rows=codes + 1,
        start=codes,
    )  # fmt: skip
    folder = write_min_dalle(tmp_path / "pretrained" / "dalle_bart_mini", s, random_weights(s))
    write_bart(folder)
    (tmp_path / "pretrained" / "vqgan").mkdir()
    detokenizer = {
        name.removeprefix("quantize."): weight
        for name, weight in weights_of().items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    torch.save(detokenizer, tmp_path / "pretrained" / "vqgan" / "detoker.pt")

    found = min_dalle.read(folder)
    assert found.prior is not None and found.codec is not None and len(found.notes) == 2
    codec = found.codec.kind.module(found.codec.config)
    codec.load_state_dict({name: weight() for name, weight in found.codec.weights.items()})
    model = Model(found.tokenizer, built(found.prior), codec)
    text = model.tokenizer.encode("a red cat")[0]
    assert text[0] == 0 and text[-1] == 1 and 2 in text.tolist() and text.max() < 320
    assert model.prior.empty_caption().tolist() == [0, 2] + 10 * [1]
    tokens = drawn(model)
    assert tokens.shape == (1, 3, 4, 4) and not torch.equal(tokens[0, 0], tokens[0, 1])
    model.save(tmp_path / "saved")
    again = dalle1.load(tmp_path / "saved")
    assert {p.dtype for p in again.prior.parameters()} == {torch.float16}  # type: ignore[attr-defined]
    assert torch.equal(drawn(again), tokens)


def test_the_hubs_folder_has_a_tokenizer(tmp_path: Path) -> None:
    """Captions that are normalized although the settings say no, or not although they say yes."""
    s = Shape(text_vocab=320, text_length=12)
    for name, normalize in (("plain", False), ("normalized", True)):
        folder = tmp_path / name
        write_hub_folder(folder, s, random_weights(s), normalize_text=normalize)
        write_bart(folder)
        found = dalle_mini.read(folder)
        assert found.codec is None and found.prior is not None
        config = found.prior.config
        assert isinstance(config, Seq2SeqConfig) and config.empty_caption == (0, 2)
        upper, lower = (found.tokenizer.encode(text)[0] for text in ("A CAT!", " a cat"))
        assert torch.equal(upper, lower) == normalize
    (folder / "vocab.json").unlink()
    assert dalle_mini.read(folder).tokenizer is None
