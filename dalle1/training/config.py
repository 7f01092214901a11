"""The settings of a training run: one YAML file an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dalle1.clip.config import CLIPConfig
from dalle1.common.config import Location, Section, load_settings
from dalle1.data.samples import MAX_ASPECT, MAX_PIXELS
from dalle1.data.shards.loader import MAX_BAD
from dalle1.generation.defaults import SamplingDefaults
from dalle1.seq2seq.config import Seq2SeqConfig
from dalle1.training.clip_config import DrawingsSettings
from dalle1.training.vqgan_config import VQGANSettings
from dalle1.transformer.config import Execution, TransformerConfig
from dvae import DVAEConfig, VQGANConfig


class DataSettings(Section):
    """Where images and captions come from, and the size that images are brought to."""

    renamed: ClassVar = {"lanes": "streams", "most_bad": "max_bad"}

    caption_key: str = Field(
        "txt",
        description="txt, or the name of a key of the json; it holds a text, or a list of texts of "
        "which one is drawn each time",
    )
    caption_lines: bool = Field(
        False, description="each line of a txt is a caption, and one is drawn each time"
    )
    image_size: int = Field(256, ge=8, description="side of the training images, in pixels")
    augment: bool = Field(
        True,
        description="crop images by the paper's listing for the stage (1 or 2); false: take "
        "the middle square",
    )
    shuffle_buffer: int = Field(
        4096,
        ge=1,
        description="samples, not decoded yet, that are shuffled at a time, over all ranks",
    )
    streams: int | None = Field(
        None,
        ge=1,
        description="streams of the data order, which are read at the same time; it divides "
        "batch_size and is a multiple of the ranks; null: one for each sample of the batch",
    )
    counts: Location | None = Field(
        None,
        description="a JSON file that says how many samples each shard holds (webdataset's index), "
        "for pipe: addresses; without it, and without _stats.json, the samples are counted",
    )
    max_bad: float = Field(
        MAX_BAD, gt=0, le=1, description="a larger share of bad samples stops the run"
    )
    max_aspect: float | None = Field(
        MAX_ASPECT,
        ge=1,
        description="images whose longer side / shorter side is larger are skipped; null: none is",
    )
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="images of more pixels are skipped")
    workers: int = Field(0, ge=0, description="processes that decode images ahead, for each rank")
    shapes_folder: Location = Field("data/shapes", description="where data=shapes is written")
    shapes_count: int = Field(40000, ge=1, description="training samples of data=shapes")
    shapes_palette: Literal["plain", "earth"] = Field(
        "plain", description="colors of data=shapes; 'earth' are others, for fine-tuning"
    )

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.caption_lines and self.caption_key != "txt":
            raise ValueError(
                f"caption_lines is read with caption_key 'txt', not {self.caption_key!r}: take it "
                "out"
            )
        return self


class OptimizerSettings(Section):
    """AdamW and its learning rate; the defaults are the transformer's (appendix B.2)."""

    renamed: ClassVar = {"warm_up": "warmup_steps"}

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw is the paper's; muon updates the matrices of residual blocks by their "
        "orthogonalized momentum and all else by AdamW. It needs parallel.zero_stage 0",
    )
    momentum: float = Field(
        0.95, ge=0, lt=1, description="decay of muon's running mean of a matrix's gradient"
    )
    learning_rate: float = Field(4.5e-4, gt=0, description="its peak, after the warmup")
    beta1: float = Field(
        0.9, ge=0, lt=1, description="decay of the gradient's running mean (first moment)"
    )
    beta2: float = Field(
        0.96, ge=0, lt=1, description="decay of the running mean of its square (second moment)"
    )
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        4.5e-2, ge=0, description="decoupled: an update subtracts learning rate x this x weight"
    )
    clip_norm: float | None = Field(4.0, gt=0, description="largest gradient norm; null: no limit")
    clip_variance: float | None = Field(
        5.0, gt=0, description="largest second moment; null: no limit"
    )
    warmup_steps: int = Field(5000, ge=0, description="updates of linear warmup")
    schedule: Literal["constant", "cosine", "plateau"] = Field(
        "plateau",
        description="of the learning rate after the warmup; plateau halves it when the mean loss "
        "of a window is not below the one before by a thousandth of its size",
    )
    cosine_end: float = Field(0.0, ge=0, description="learning rate at the end of a cosine")
    cosine_steps: int | None = Field(
        None, ge=1, description="updates of a cosine; null: the full run"
    )
    plateau_patience: int = Field(
        5000, ge=1, description="updates of a window of the plateau schedule"
    )


class EMASettings(Section):
    """The average of the weights over updates, which is what is exported."""

    decay: float = Field(
        0.99, ge=0, lt=1, description="share of the former average that an averaging keeps"
    )
    every: int = Field(25, ge=1, description="updates between two averagings")


class DVAESettings(Section):
    """The schedules of the relaxed ELB (appendix A.2) and the warm start (ours, docs/dvae.md)."""

    renamed: ClassVar = {"warm_start_pictures": "warm_start_images"}

    kl_weight: float = Field(
        6.6, ge=0, description="beta, the weight of the KL, at the end of its rise"
    )
    kl_steps: int = Field(5000, ge=0, description="updates over which beta rises from 0")
    temperature_start: float = Field(1.0, gt=0, description="tau at the first update")
    temperature_end: float = Field(1 / 16, gt=0, description="tau at the end of its cosine")
    temperature_steps: int = Field(150_000, ge=0, description="updates of that cosine")
    grain: float = Field(0.0, ge=0, description="sigma of the noise on training images in [0, 1]")
    encoder_rate: float = Field(
        1.0, gt=0, description="learning rate of the encoder / that of the decoder"
    )
    warm_start_steps: int = Field(0, ge=0, description="updates of the warm start; 0: none")
    warm_start_learning_rate: float = Field(
        4e-3, gt=0, description="of the warm start, in place of optimizer's"
    )
    warm_start_bottleneck: int = Field(32, ge=1, description="width of its linear bottleneck")
    warm_start_logit_scale: float = Field(12.0, gt=0, description="s of the k-means logits")
    warm_start_images: int = Field(2048, ge=1, description="images given to k-means")


class TokenizerSettings(Section):
    """Byte-level BPE (section 2.2)."""

    dropout: float = Field(0.1, ge=0, lt=1, description="share of BPE merges skipped in training")
    captions: int = Field(1_000_000, ge=1, description="captions that the merges are learned from")


class ParallelSettings(Section):
    """How the ranks divide a run, and the precision of its arithmetic."""

    renamed: ClassVar = {"shard_ranks": "dp_shard"}

    zero_stage: int = Field(
        0, ge=0, le=3, description="ZeRO: 1 shards moments, 2 gradients too, 3 weights too"
    )
    dp_shard: int | None = Field(
        None,
        ge=1,
        description="ranks that share one copy of the state, such as those of one machine; these "
        "groups are replicas of each other (section 2.5); null: all ranks are one group",
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="largest number of samples in one pass of a rank, which makes as many passes "
        "as its share of the batch needs; null: one pass",
    )
    offload: Literal["none", "optimizer", "weights"] = Field(
        "none", description="what is kept in the CPU's memory: moments, or weights too (ZeRO 3)"
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "fp32",
        description="of matrix products and activations; weights, moments and logits are fp32. "
        "auto is bf16 where the devices of all ranks multiply it in hardware, else fp32",
    )

    @field_validator("offload", mode="before")
    @classmethod
    def _new_name(cls, value: object) -> object:
        return "optimizer" if value == "optimiser" else value  # as the release before wrote it

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: 'optimizer' needs zero_stage 1, 2 or 3, got 0")
        if self.offload == "weights" and self.zero_stage != 3:
            raise ValueError(f"offload: 'weights' needs zero_stage 3, got {self.zero_stage}")
        if self.dp_shard is not None and self.dp_shard > 1 and self.zero_stage == 0:
            raise ValueError(
                f"dp_shard {self.dp_shard} needs zero_stage 1, 2 or 3: stage 0 shards nothing"
            )
        return self


class CompressionSettings(Section):
    """PowerSGD on the gradients that replicas exchange (section 2.5, appendix E)."""

    renamed: ClassVar = {"rank": "approximation_rank"}

    approximation_rank: int = Field(ge=1, description="rank r of the two factors that are sent")
    first_step: int = Field(
        0, ge=0, description="number of the first compressed update; earlier ones are sent in full"
    )


class ValidationSettings(Section):
    """Losses on data that training never sees; no caption is emptied there."""

    data: Location = Field(description="shards or a folder of pairs, as for training")
    every: int = Field(1000, ge=1, description="updates between two validations")
    batches: int = Field(4, ge=1, description="batches of batch_size samples, the same each time")


class FaultSettings(Section):
    """What a run does when a rank, a machine or a number fails."""

    renamed: ClassVar = {"most_skipped": "max_skipped"}

    timeout: float = Field(300.0, gt=0, description="seconds that ranks wait for one another")
    start_timeout: float = Field(600.0, gt=0, description="seconds until all ranks have started")
    save_timeout: float = Field(
        3600.0,
        gt=0,
        description="seconds that ranks wait while one saves, exports or draws a contact sheet",
    )
    bad_update: Literal["stop", "skip"] = Field(
        "stop", description="what to do at a loss or gradient that is not finite, or at a spike"
    )
    max_skipped: int = Field(100, ge=1, description="skipped updates in a row that stop the run")
    spike: float | None = Field(
        None,
        gt=1,
        description="a loss is a spike if it is above its running mean by more than (spike - 1) x "
        "the mean, or x 5 mean deviations of the loss where those are more, as for a loss that is "
        "near zero or negative; null: no loss is",
    )


class RunConfig(Section):
    """Everything a run depends on."""

    renamed: ClassVar = {
        "optimiser": "optimizer",
        "sheet_every": "contact_sheet_every",
        "dvae_model": "codec",
        "clip_model": "ranker",
    }

    stage: Literal["dvae", "vqgan", "clip", "dalle"] = Field(
        description="what is trained: a codec (dvae or vqgan), the ranker (clip) or the prior "
        "(dalle)"
    )
    run: Location = Field(description="folder of the run")
    data: Location = Field(description="training data: shards, a folder of pairs, or 'shapes'")
    seed: int = Field(0, ge=0, description="of all random numbers of the run")
    init: Location | None = Field(
        None,
        description="model folder, or the name of a model that comes with the library, whose "
        "weights a new run begins with, with a fresh optimizer and schedule; it also gives the "
        "settings of its parts that are left out (docs/finetuning.md)",
    )
    train_only: list[str] | None = Field(
        None,
        min_length=1,
        description="names of the modules or weights of the model that are trained, such as "
        "'layers.3' or 'image_head', ends of names, such as 'attention' for that of all layers, or "
        "patterns, such as 'layers.1?'; all others stay as they are; null: all are trained",
    )
    steps: int = Field(ge=1, description="updates in all")
    batch_size: int = Field(ge=1, description="samples of an update, over all ranks")
    log_every: int = Field(50, ge=1, description="updates between two lines of metrics")
    contact_sheet_every: int | None = Field(
        1000,
        ge=1,
        description="updates between two contact sheets, which need a full model on the first "
        "rank; null: none are drawn",
    )
    save_every: int = Field(1000, ge=1, description="updates between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay")
    keep_every: int | None = Field(
        None,
        ge=1,
        description="checkpoints whose update is a multiple of it stay too; null: none do",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank; null: all cores")
    reader: DataSettings = Field(DataSettings(), description="how the data are read")
    optimizer: OptimizerSettings = Field(
        OptimizerSettings(), description="AdamW and its learning rate"
    )
    ema: EMASettings = Field(EMASettings(), description="the averaged weights")
    parallel: ParallelSettings = Field(
        ParallelSettings(), description="how the ranks divide the run, and its precision"
    )
    compression: CompressionSettings | None = Field(
        None, description="PowerSGD on gradients; null: they are sent in full"
    )
    faults: FaultSettings = Field(
        FaultSettings(), description="what the run does when something fails"
    )
    validation: ValidationSettings | None = Field(
        None, description="losses on held-out data; null: none are computed"
    )
    wandb: str | None = Field(
        None, description="project of Weights & Biases to report to as well; null: none"
    )
    # Stage one.
    dvae: DVAEConfig | None = Field(None, description="shape of the dVAE; stage dvae needs it")
    dvae_training: DVAESettings | None = Field(
        None, description="schedules of its loss, and its warm start; stage dvae needs it"
    )
    vqgan: VQGANConfig | None = Field(None, description="shape of a VQGAN; stage vqgan needs it")
    vqgan_training: VQGANSettings | None = Field(
        None, description="losses of a VQGAN; stage vqgan needs it"
    )
    # CLIP.
    clip: CLIPConfig | None = Field(None, description="shape of CLIP; stage clip needs it")
    drawings: DrawingsSettings | None = Field(
        None,
        description="images that a model draws for the captions, as wrong examples of stage clip; "
        "null: it learns from the training images alone",
    )
    # CLIP and stage two.
    tokenizer: TokenizerSettings | Location | None = Field(
        None,
        description="a tokenizer's file, or the folder of a run or a model that holds one; or, as "
        "a section, how one is learned from the captions; stages clip and dalle need it",
    )
    # Stage two.
    transformer: TransformerConfig | None = Field(
        None, description="shape of the transformer; stage dalle needs it, or seq2seq"
    )
    seq2seq: Seq2SeqConfig | None = Field(
        None, description="shape of an encoder-decoder, which stage dalle trains in its place"
    )
    execution: Execution | None = Field(
        None, description="how the prior is run; null: the section's defaults"
    )
    codec: Location | None = Field(
        None, description="folder of the trained codec; stage dalle needs it"
    )
    ranker: Location | None = Field(
        None, description="folder of the trained ranker; null: no ranking"
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the captions of stage dalle that are emptied, for guidance",
    )
    sampling: SamplingDefaults | None = Field(
        None,
        description="what the model of stage dalle is drawn with where nobody says; null: as "
        "`init` has it, or else the paper's",
    )

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """In the release before, stage two took its tokenizer from the ranker's folder."""
        if values.get("clip_model") is not None and values.get("tokenizer") is None:
            return {**values, "tokenizer": values["clip_model"]}
        return values

    @property
    def prior(self) -> TransformerConfig | Seq2SeqConfig | None:
        """Shape of the prior that stage dalle trains; None where `init` gives it."""
        return self.transformer or self.seq2seq

    @model_validator(mode="after")
    def _sections(self) -> RunConfig:
        needed = {
            "dvae": {"dvae", "dvae_training"},
            "vqgan": {"vqgan", "vqgan_training"},
            "clip": {"clip", "tokenizer"},
            "dalle": {"transformer", "codec", "tokenizer"},
        }
        own, optional = needed[self.stage], set()
        if self.stage == "clip":
            optional = {"drawings"}
        if self.stage == "dalle":
            optional = {"ranker", "execution", "seq2seq", "sampling"}
            if self.seq2seq is not None:
                own = own - {"transformer"}
            if self.seq2seq is not None and self.transformer is not None:
                raise ValueError("transformer and seq2seq: one prior is trained, take one out")
            if self.prior is None and self.init is None:
                raise ValueError("transformer is needed by stage 'dalle', or seq2seq")
        others = {"drawings", "ranker", "execution", "seq2seq", "sampling"}
        every = set().union(*needed.values(), others)
        for name in sorted(every):
            given = getattr(self, name) is not None
            if given and name not in own | optional:
                raise ValueError(f"{name} is not read by stage {self.stage!r}: take it out")
            if not given and name in own and (self.init is None or name.endswith("_training")):
                raise ValueError(f"{name} is needed by stage {self.stage!r}")
        if self.seq2seq is not None and self.execution and self.execution.attention != "auto":
            raise ValueError(
                f"execution.attention {self.execution.attention!r} is not read for seq2seq, which "
                "has no sparse patterns: take it out"
            )
        if self.parallel.precision == "fp16" and self.stage != "dalle":
            raise ValueError(
                f"parallel.precision 'fp16' needs a prior's gradient scales; stage "
                f"{self.stage!r} takes 'bf16' or 'fp32'"
            )
        parallel = self.parallel
        if self.optimizer.kind == "muon" and parallel.zero_stage:
            raise ValueError(
                f"optimizer.kind: 'muon' needs whole matrices, but parallel.zero_stage "
                f"{parallel.zero_stage} shards them; set it to 0, or optimizer.kind to adamw"
            )
        if self.compression is not None and parallel.zero_stage in (1, 2):
            raise ValueError(
                f"compression: needs whole matrices or rows of them, but parallel.zero_stage "
                f"{parallel.zero_stage} cuts all weights as one; take 0, or 3 with dp_shard"
            )
        if self.compression is not None and parallel.zero_stage and parallel.dp_shard is None:
            raise ValueError(
                "compression: is for gradients that replicas exchange, and with "
                "parallel.zero_stage 3 all ranks share one copy; set parallel.dp_shard to the "
                "ranks of a machine, or zero_stage to 0"
            )
        if parallel.offload != "none" and parallel.dp_shard is not None:
            raise ValueError(
                f"parallel.offload {parallel.offload!r} does not go with parallel.dp_shard "
                f"{parallel.dp_shard}: take one of the two out"
            )
        if self.stage == "clip" and self.parallel.micro_batch is not None:
            raise ValueError(
                "parallel.micro_batch is not read by stage 'clip', whose loss compares all pairs "
                "of a batch: take it out, or use more ranks"
            )
        if self.stage != "dalle" and self.caption_dropout:
            raise ValueError(f"caption_dropout is not read by stage {self.stage!r}: take it out")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a training run's YAML file; see `dalle1.common.config.load_settings`."""
    given = dict(override.partition("=")[::2] for override in overrides)
    former = given.get("clip_model", "null")
    # As in `RunConfig.upgraded`: under its former name the ranker's folder gave the tokenizer too.
    if former != "null" and not any(key.partition(".")[0] == "tokenizer" for key in given):
        overrides = [*overrides, f"tokenizer={former}"]
    return load_settings(RunConfig, path, overrides)


def with_precision(config: RunConfig, bfloat16: bool) -> RunConfig:
    """The config with `parallel.precision: auto` replaced by what it stands for.

    bfloat16: whether all ranks multiply it in hardware.
    """
    if config.parallel.precision != "auto":
        return config
    chosen = {"precision": "bf16" if bfloat16 else "fp32"}
    parallel = config.parallel.model_copy(update=chosen)
    return config.model_copy(update={"parallel": parallel})
