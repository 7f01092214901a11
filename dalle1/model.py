"""A full model as one folder: tokenizer, prior, codec and ranker.

    config.json  tokenizer.json  transformer.safetensors  dvae.safetensors  clip.safetensors
    clip_tokenizer.json  README.md (the model card)

`config.json` says of which kind each part is (`dalle1.registry`), and so which files there are.
Nothing in a folder is a pickle. Each file is written under a temporary name and then renamed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from dalle1 import models, registry
from dalle1.common.arguments import as_caption, as_captions
from dalle1.common.files import expand_home, make_folder, write_text
from dalle1.common.image_inputs import ImageLike, image_batches, read_images
from dalle1.common.origins import CARD, Origin, origins_text, read_origins, write_origins
from dalle1.common.weights import check_finite, device_of, in_32_bits, quick_fingerprint
from dalle1.generation.defaults import SamplingDefaults, read_sampling, write_sampling
from dalle1.generation.generator import complete_text
from dalle1.generation.images import image_size
from dalle1.generation.options import SamplingOptions, candidate_uniforms
from dalle1.generation.ranking import score_images
from dalle1.hub.access import HubAccess
from dalle1.hub.finding import find_folder
from dalle1.hub.uploading import push
from dalle1.protocols import (
    NeedsModel,
    NeedsTokenizer,
    Prior,
    Ranker,
    TextPrior,
    TextTokenizer,
    cuts_told_once,
    cuts_untold,
    end_of_caption,
)
from dalle1.tokenizer import TOKENIZER
from dvae.calls import isolated
from dvae.codec import Codec
from dvae.storage import CONFIG, Kind, has_part, read_config, save_part, write_section

NO_RANKER = "none"


class Model:
    """Tokenizer, prior, codec and, for ranking, a ranker, under these names.

    `transformer`, `dvae` and `clip` are names for the paper's parts: prior, codec and ranker. The
    prior's weights may be in 16 bits. Codec and ranker are put into 32: they cost little, and
    images and scores should not change.

    Raises ValueError when the parts do not fit each other.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prior: Prior, codec: Codec, ranker: Ranker | None = None
    ) -> None:
        for name, value, setting, expected in (
            ("tokenizer's vocabulary", tokenizer.vocab_size, "text_vocab", prior.text_vocab),
            ("tokenizer's text_length", tokenizer.text_length, "text_length", prior.text_length),
            ("codec's vocabulary", codec.vocab_size, "image_vocab", prior.image_vocab),
        ):
            if value != expected:
                raise ValueError(
                    f"the {name} is {value}, but the prior's {setting} is {expected}: "
                    "the parts come from different runs"
                )
        self.tokenizer, self.prior, self.codec = tokenizer, prior, in_32_bits(codec)
        self.origins: dict[str, Origin] = {}  # of parts that others have trained, by role
        self.sampling = SamplingDefaults()  # where a caller says nothing; `save` keeps it
        self.ranker = ranker
        for part in (prior, codec):
            if isinstance(part, nn.Module):
                part.eval()

    @property
    def transformer(self) -> Prior:
        """The prior."""
        return self.prior

    @property
    def dvae(self) -> Codec:
        """The codec."""
        return self.codec

    @property
    def ranker(self) -> Ranker | None:
        """What scores images; another one may be put in its place.

        Of one that scores by the model itself, the model gets a copy of its own. Raises ValueError
        for one that needs a tokenizer and does not fit the model's.
        """
        return self._ranker

    @ranker.setter
    def ranker(self, ranker: Ranker | None) -> None:
        if isinstance(ranker, NeedsTokenizer):
            ranker.adopt_tokenizer(self.tokenizer)
        if isinstance(ranker, NeedsModel):
            ranker = ranker.bound_to(self)
        if isinstance(ranker, nn.Module):
            ranker.eval()
        self._ranker = in_32_bits(ranker)
        self.origins.pop("ranker", None)  # of the former one

    @property
    def clip(self) -> Ranker | None:
        """The ranker."""
        return self.ranker

    @clip.setter
    def clip(self, ranker: Ranker | None) -> None:
        self.ranker = ranker

    @property
    def image_size(self) -> int:
        """Side of the images in pixels; the height where they are not square."""
        return image_size(self.codec, self.prior.grid)[0]

    @property
    def device(self) -> torch.device:
        """Where the prior's weights are."""
        return device_of(self.prior)

    @isolated()
    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Model:
        """Moves all parts; returns the model itself.

        dtype: of the prior's weights and caches, such as torch.bfloat16. Codec and ranker stay in
        32 bits.
        """
        for part in (self.prior, self.codec, self.ranker):
            if isinstance(part, nn.Module):
                part.to(device=device, dtype=dtype if part is self.prior else None)
        return self

    def check_finite(self) -> None:
        """Raises ValueError that names the part and the weight when one is NaN or infinite."""
        for role in ("prior", "codec", "ranker"):
            part = getattr(self, role)
            check_finite(part, f"{role} ({type(part).__name__})")

    @isolated()
    def fingerprint(self) -> str:
        """16 digits of what draws the images: tokenizer, prior and codec, weights included.

        Models of other digits draw other images. A copy in another type has others, too.
        """
        reader = getattr(self.tokenizer, "fingerprint", None)
        drawing = quick_fingerprint(self.prior, self.codec)
        digits = f"{drawing} {reader() if reader is not None else ''}"
        return hashlib.sha256(digits.encode()).hexdigest()[:16]

    @isolated()
    @torch.no_grad()
    def log_prob(self, caption: str, image_tokens: Tensor) -> Tensor:
        """ln p(image tokens | caption) in nats, float32: [] of [rows, columns], [b] of [b, ...].

        image_tokens: int64, a full grid; another type of whole numbers, or an array, will do.
        Raises ValueError when shape or values do not fit.
        """
        caption = as_caption(caption)
        rows, columns = self.prior.grid
        image_tokens = _as_tokens(image_tokens)
        fits = image_tokens.ndim in (2, 3) and image_tokens.shape[-2:] == (rows, columns)
        if not fits or not len(image_tokens):
            raise ValueError(
                f"image_tokens: expected int64 [{rows}, {columns}] or [b, {rows}, {columns}], got "
                f"{list(image_tokens.shape)}"
            )
        low, high = int(image_tokens.min()), int(image_tokens.max())
        if not 0 <= low <= high < self.prior.image_vocab:  # a device would not name the mistake
            raise ValueError(
                f"image_tokens: expected values in [0, {self.prior.image_vocab - 1}], got "
                f"[{low}, {high}]"
            )
        flat = rearrange(image_tokens, "... r c -> ... (r c)").reshape(-1, rows * columns)
        text = self.tokenizer.encode(caption).expand(len(flat), -1)
        total = self.prior.log_prob(text.to(self.device), flat.to(self.device)).cpu()
        return total[0] if image_tokens.ndim == 2 else total

    @isolated()
    def complete_caption(
        self,
        text: str = "",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """A caption that begins with the text, drawn from the text side (section 2.2).

        Lower case, as the transformer reads captions; an empty text is a caption from nothing.
        Depends on (seed, text) alone.

        Raises ValueError when the text fills the text positions, or the prior models no text.
        """
        if not isinstance(self.prior, TextPrior):
            raise ValueError(f"prior: {type(self.prior).__name__} models images, not captions")
        text = as_caption(text, "text")
        ids = self._beginning(self.prior, text)
        length = self.prior.text_length
        if len(ids) >= length - 1:
            raise ValueError(
                f"text: {len(ids)} tokens leave no room in the {length} text positions: {text!r}"
            )
        uniforms = candidate_uniforms(seed, text, 0, 1, length)[0]
        options = SamplingOptions(temperature, top_k, top_p)
        return self.tokenizer.decode(complete_text(self.prior, ids, uniforms, options))

    def _beginning(self, prior: TextPrior, text: str) -> list[int]:
        """The ids of a caption that begins with the text, without its end and its padding; with no
        text, those that stand before every caption."""
        with cuts_untold():  # it is refused later
            ids = self.tokenizer.encode(text)[0] if text else self.prior.empty_caption()
        end, vocab = end_of_caption(prior), self.tokenizer.vocab_size
        return list(takewhile(lambda i: i < vocab and i != end, ids.tolist()))

    @isolated()
    def rank(
        self, captions: str | Iterable[str], images: ImageLike | Iterable[ImageLike]
    ) -> Tensor:
        """The ranker's scores of images for a caption or captions; see `dalle1.rank`."""
        if self.ranker is None:
            raise ValueError("the model has no ranker to score with; its folder names none")
        return _scores(partial(score_images, self, self.ranker), captions, images)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the model's folder; `dalle1.load` opens it.

        dtype: of all weights in the files; torch.float16 halves a folder that is to be handed on.
        None: as they are. Raises ValueError, before anything is written, for a part of a kind that
        is not registered; and where a weight is too large for `dtype`.
        """
        folder = Path(expand_home(folder))
        parts = {"prior": self.prior, "codec": self.codec, "ranker": self.ranker}
        kinds = {r: registry.kind_of(r, part) for r, part in parts.items() if part is not None}
        tokenizer = {"kind": registry.tokenizer_kind(self.tokenizer)}
        make_folder(folder)
        self.tokenizer.save(folder / TOKENIZER)
        write_section(folder, "tokenizer", tokenizer)
        for role, kind in kinds.items():
            save_part(kind, parts[role], folder, dtype)
        if self.ranker is None:
            write_section(folder, "ranker", None)
        write_sampling(folder, self.sampling)
        write_origins(folder, self.origins)
        _remove_files_of_others(folder, kinds)
        write_text(folder / CARD, self.card())

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a model of dalle1",
        license: str | None = None,
        dtype: torch.dtype | None = None,
        create_pr: bool = False,
        widget: Mapping[str, ImageLike] | None = None,
        card: str | None = None,
    ) -> str:
        """Uploads the model to the Hugging Face Hub; `dalle1.load(repository)` opens it there.

        The files are those of `save`, in one commit. The card gets the metadata that the Hub finds
        models by. The repository and the branch are made where they are missing. Files of parts
        that an earlier upload had and this model has not are removed.

        Args:
            repository: OWNER/NAME.
            private: whether a new repository is; None: as its owner's settings say.
            revision: a branch; None: the main one.
            token: with the right to write; None: HF_TOKEN's, or the one of `hf auth login`.
            commit_message: what the commit is called.
            license: of the weights, by the Hub's name of it, such as "mit"; None: not stated.
            dtype: of all weights in the files, see `save`.
            create_pr: whether a pull request is opened, and nothing else is changed.
            widget: images by their captions, for the card: any that `dalle1.rank` takes. They are
                made small.
            card: the text of the card; None: that of `save`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            ValueError: an argument does not fit, huggingface_hub is not installed, or the Hub
                refuses: the token, the repository, the branch or the card.
            ConnectionError: the Hub cannot be reached.
        """
        return push(
            repository,
            lambda folder: self.save(folder, dtype),
            self.card(repository) if card is None else card,
            HubAccess(token),
            private=private,
            revision=revision,
            message=commit_message,
            license=license,
            create_pr=create_pr,
            widget=widget,
        )

    def card(self, name: str = "this folder") -> str:
        """The text of the folder's README.md; name: what `dalle1.load` opens."""
        height, width = image_size(self.codec, self.prior.grid)
        rows, columns = self.prior.grid
        weights = self.prior.parameters() if isinstance(self.prior, nn.Module) else ()
        count = sum(p.numel() for p in weights)
        ranker = type(self.ranker).__name__ if self.ranker is not None else "none"
        return (
            "# A DALL-E model of dalle1\n\n"
            f"Draws {width}x{height} images from captions of up to {self.prior.text_length - 1} "
            "tokens.\n\n"
            f"- prior: {type(self.prior).__name__}, {count:,} parameters, {rows}x{columns} image "
            "tokens\n"
            f"- codec: {type(self.codec).__name__}, {self.codec.vocab_size:,} codes\n"
            f"- ranker: {ranker}\n\n"
            f'```python\nimport dalle1\n\nmodel = dalle1.load("{name}")\n'
            'result = dalle1.sample("a caption", model=model, candidates=64, keep=4)\n'
            'result.save("out")\n```\n' + origins_text(self.origins)
        )


def _remove_files_of_others(folder: Path, kinds: Mapping[str, Kind]) -> None:
    """Files of parts that an earlier save wrote and this one did not."""
    written = {name for kind in kinds.values() for name in kind.files}
    for name in registry.files_of_parts() - written:
        (folder / name).unlink(missing_ok=True)


def _as_tokens(tokens: Tensor) -> Tensor:
    """Whole numbers of any type, in a tensor or an array, as int64."""
    try:
        found = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"image_tokens: expected a tensor of int64, got {type(tokens).__name__}"
        ) from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"image_tokens: expected int64, got {found.dtype}")
    return found.to(torch.int64)


def rank_images(
    ranker: Ranker, captions: str | Iterable[str], images: ImageLike | Iterable[ImageLike]
) -> Tensor:
    """A ranker's own scores of images for a caption, float32 [images], or for captions, [captions,
    images].

    images: see `read_images`. Raises ValueError where there are none, or they or the captions do
    not fit.
    """
    return _scores(ranker.score, captions, images)


def _scores(
    score: Callable[[Sequence[str], Tensor], Tensor],
    captions: str | Iterable[str],
    images: ImageLike | Iterable[ImageLike],
) -> Tensor:
    """`rank_images` by a function of captions and pixels, [b, 3, H, W], as `Ranker.score` is."""
    texts, one = as_captions(captions)
    found = read_images(images)
    with cuts_told_once():
        parts = [score(texts, batch) for batch in image_batches(found)]
    scores = torch.cat(parts, dim=1)
    return scores[0] if one else scores


@isolated()
def load(
    folder: str | Path,
    ranker: Ranker | str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Model:
    """Opens a model folder that `Model.save` or training wrote; on the CPU, in eval mode.

    Weights are read from the mapped files where they are used. A prior that was saved in 16 bits
    stays in them; `Model.to(device, torch.float32)` converts it. A model that comes with the
    library is opened in 32 bits: it has 16 in its files to be small, and they are inexact.

    Args:
        folder: with `config.json`; or the name of a model that comes with the library, such as
            "emoji" (`dalle1.models`); or OWNER/NAME[@REVISION] of a model on the Hugging Face Hub,
            which is fetched into the Hub's cache. A folder that exists wins over a name; `hub:` in
            front of a name says that no folder is meant.
        ranker: in place of the folder's own, which is then not opened. A ranker; or the name of
            one, see `registry.open_ranker`: another folder, "open_clip:ViT-B-32/laion2b_s34b_b79k",
            "hf:google/siglip-base-patch16-224", "likelihood" or "perplexity", or one with its
            weight, "runs/clip/model+0.002*likelihood"; or "none". Weights
            that a name stands for are downloaded by the package that knows the name, and by
            nothing else.
        revision: of a name on the Hub: a branch, a tag or a commit; None: the newest.
        token: to read a private repository; None: HF_TOKEN's, or the one of `hf auth login`.
        cache_dir: where fetched files lie; None: HF_HUB_CACHE, or HF_HOME, or the usual place.
        local_files_only: whether the cache alone is looked into, as HF_HUB_OFFLINE=1 says too.

    Raises:
        ValueError: a file is missing, truncated or does not fit, and is named; the ranker is not
            known, not installed, or not to be had; or the Hub has no such model.
        ConnectionError: the Hub cannot be reached, and its cache does not hold the model.
    """
    access = HubAccess(token, cache_dir, local_files_only)
    folder = find_folder(folder, access, revision, () if ranker is None else ("ranker",))
    config = read_config(folder)
    if "prior" not in config:
        raise ValueError(f"{folder / CONFIG}: has no 'prior' section")
    opened = _ranker(folder, ranker)
    prior = registry.load("prior", folder)
    kind = config.get("tokenizer", {}).get("kind", "bpe")
    tokenizer = registry.load_tokenizer(folder / TOKENIZER, kind)
    model = Model(tokenizer, prior, registry.load("codec", folder), opened)
    model.sampling = read_sampling(folder)
    origins = read_origins(folder)
    model.origins = {r: o for r, o in origins.items() if r != "ranker" or ranker is None}
    if folder.resolve().parent == models.folder().resolve():
        model.to("cpu", torch.float32)
    return model


def _ranker(folder: Path, given: Ranker | str | Path | None) -> Ranker | None:
    """What `load` is given, or else the folder's own ranker, where it has one."""
    if given is None:
        return registry.load("ranker", folder) if has_part("ranker", folder) else None
    if isinstance(given, str | os.PathLike):
        return None if str(given) == NO_RANKER else registry.open_ranker(given)
    if not hasattr(given, "score"):
        raise ValueError(f"ranker: expected a ranker or its name, got {type(given).__name__}")
    return given
