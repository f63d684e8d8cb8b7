"""One way to cut a training step over ranks, and the file that carries it from the planner to the launcher."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.reading import MOST, read_toml, shown
from fourfold.parallel.decoder.limits import CHECKPOINTING as CHECKPOINTING
from fourfold.parallel.decoder.limits import EVERY_SCHEDULE as EVERY_SCHEDULE
from fourfold.parallel.decoder.limits import (
    FORMS,
    FP8,
    RUNTIME,
    SHAPES,
    Choice,
    DecoderFacts,
    as_number,
    broken,
    decoder_facts,
    drains,
    refuse,
)
from fourfold.parallel.decoder.limits import PRECISIONS as OTHER_PRECISIONS
from fourfold.parallel.decoder.limits import SCHEDULES as SCHEDULES
from fourfold.parallel.grid import AXES, Grid, layer_ranges
from fourfold.parallel.pipeline.mitigation import Mitigation

MITIGATION = "lwpv+sc"
PRECISIONS = ("auto", *OTHER_PRECISIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the axes in ranks, batches in sequences, lengths in tokens."""

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    micro_batch: int = 1
    checkpointing: str = "none"
    """none; selective (what is cheap is recomputed: in fourfold all but matrix products and attention, in Megatron the
    attention core); full (a layer's input is kept); stream (StreamBP)."""
    zero_stage: int = 0
    """0: DDP; 1: optimizer states sharded over dp x cp; 2: gradients too; 3: weights too (FSDP)."""
    global_batch: int
    seq_len: int
    vp: int = 1
    """Chunks of layers a pipeline rank holds (interleaving)."""
    ep: int = 1
    """Ranks of dp x cp that share one set of experts."""
    cp_heads: int = 1
    """Of the cp ranks, how many exchange heads (all-to-all) instead of passing keys round the ring."""
    sequence_parallel: bool = False
    """Megatron's: norms and residuals sharded over tp along the sequence."""
    checkpoint_every: int = 1
    """Every how many layers one is checkpointed."""
    stream_chunks: int = 1
    """Into how many chunks StreamBP cuts the sequence."""
    offload: bool = False
    """Checkpointed layer inputs wait in host memory."""
    embedding_counts_as: int = 0
    """Layers that the embedding counts for when stages are cut: the first stage gets so many fewer."""
    head_counts_as: int = 0
    """The same of the head and the loss, for the last stage."""
    schedule: str = SCHEDULES[0]
    """1f1b and zero-bubble drain before every update; lockstep and 1f1b-async update at every micro-batch of a stream
    that never drains, 2bw at every step. What a step is (global_batch sequences) stays."""
    mitigation: str = MITIGATION
    """What an asynchronous schedule does about its delays; Mitigation.named has the words."""
    precision: str = PRECISIONS[0]
    """Of weights and products, never taken from the model's config: auto (fp32 on a CPU, bf16-mixed on CUDA); fp32;
    bf16-mixed (fp32 weights, gradients and optimizer states, products in bf16); bf16 (all of them); fp64; fp8
    (bf16-mixed with the layers' matrix products in fp8); fp8-emulated (the same on any device, slowly)."""
    sharded_accumulation: bool = False
    """ZeRO 3 with several micro-batches: each one's gradients are reduced and sharded, instead of whole ones kept until
    the last. Less memory for more traffic."""
    compile: bool | None = None
    """Whether each layer runs through torch.compile; None: where the runtime does so by itself, on CUDA."""

    def __post_init__(self) -> None:
        for name in (
            "dp", "pp", "cp", "tp", "micro_batch", "global_batch", "seq_len", "vp", "ep", "cp_heads",
            "checkpoint_every", "stream_chunks",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={shown(value)}: a layout's {name} is a whole number of at least 1")
            if value > MOST:
                raise ValueError(f"{name}={shown(value)}: a layout's {name} is at most {MOST}")
        for name in ("embedding_counts_as", "head_counts_as"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={shown(value)}: a number of layers, at least 0")
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing={shown(self.checkpointing)}: choose one of {', '.join(CHECKPOINTING)}")
        if isinstance(self.zero_stage, bool) or self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage={shown(self.zero_stage)}: choose 0, 1, 2 or 3")
        for name in ("sequence_parallel", "offload", "sharded_accumulation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give true or false")
        if self.compile is not None and not isinstance(self.compile, bool):
            raise ValueError(f"compile={shown(self.compile)}: give true or false, or leave it out")
        if self.schedule not in EVERY_SCHEDULE:
            raise ValueError(f"schedule={shown(self.schedule)}: choose one of {', '.join(EVERY_SCHEDULE)}")
        if not isinstance(self.mitigation, str):
            raise ValueError(f"mitigation={shown(self.mitigation)}: a word such as {MITIGATION!r}")
        if self.mitigation != MITIGATION:
            Mitigation.named(self.mitigation)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={shown(self.precision)}: choose one of {', '.join(PRECISIONS)}")
        refuse(FORMS, DecoderFacts(), Choice.of(self))

    @property
    def asynchronous(self) -> bool:
        """Whether the pipeline never drains, and gradients come late."""
        return not drains(as_number("schedule", self.schedule))

    @property
    def rotates(self) -> bool:
        """Whether its mitigation turns whole matrices (basis rotation)."""
        return self.asynchronous and Mitigation.named(self.mitigation).rotate_every > 0

    @property
    def fp8(self) -> bool:
        """Whether the layers' matrix products are in fp8."""
        return self.precision in FP8

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates in `global_batch` sequences."""
        return self.num_micro_batches if self.schedule in ("lockstep", "1f1b-async") else 1

    @property
    def grid(self) -> Grid:
        return Grid(dp=self.dp, pp=self.pp, cp=self.cp, tp=self.tp)

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one replica in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def runnable(self) -> bool:
        """Whether fourfold's own runtime can launch it; the rest is for export to other tools."""
        return not self.unrunnable_reason()

    def unrunnable_reason(self) -> str:
        """Why fourfold's own runtime cannot launch this; empty where it can."""
        anyone, choice = DecoderFacts(), Choice.of(self)
        return ", ".join(limit.counted_as(anyone, choice) for limit in broken(RUNTIME, anyone, choice))

    def __str__(self) -> str:
        """dp2 tp4 mb1 z3 full: what is at its default is left out, the micro-batch never."""
        axes = [f"{axis}{size}" for axis, size in zip(AXES, self.grid.shape, strict=True) if size > 1] or ["dp1"]
        words = [*axes, f"mb{self.micro_batch}"]
        words += [f"less{self.embedding_counts_as}+{self.head_counts_as}"] * (
            self.embedding_counts_as + self.head_counts_as > 0
        )
        words += [f"vp{self.vp}"] * (self.vp > 1) + [f"ep{self.ep}"] * (self.ep > 1)
        words += [f"heads{self.cp_heads}"] * (self.cp_heads > 1) + ["sp"] * self.sequence_parallel
        words += [f"z{self.zero_stage}"] * (self.zero_stage > 0) + ["shardacc"] * self.sharded_accumulation
        if self.checkpointing != "none":
            detail = f"/{self.checkpoint_every}" if self.checkpoint_every > 1 else ""
            detail += f"x{self.stream_chunks}" if self.checkpointing == "stream" else ""
            words.append(self.checkpointing + detail)
        words += ["offload"] * self.offload
        words += [self.schedule] * (self.schedule != SCHEDULES[0] and not self.asynchronous)
        if self.asynchronous:
            words.append(self.schedule + f"/{self.mitigation}" * (self.mitigation != MITIGATION))
        words += [self.precision] * (self.precision != PRECISIONS[0])
        words += {None: [], True: ["compile"], False: ["nocompile"]}[self.compile]
        return " ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """What layout.toml carries: the first nine fields always, the others where they differ from their default."""
        always = ("dp", "pp", "cp", "tp", "micro_batch", "checkpointing", "zero_stage", "global_batch", "seq_len")
        defaults = {entry.name: entry.default for entry in fields(self)}
        return {key: value for key, value in asdict(self).items() if key in always or value != defaults[key]}


def check(layout: Layout, model: ModelConfig) -> None:
    """Refuse a layout that cannot cut this model.

    Raises:
        ValueError: heads not divisible by tp, fewer layers than stages, a sequence that cp cannot cut; names the mend.
    """
    refuse(SHAPES, facts_of(model), Choice.of(layout))
    if layout.embedding_counts_as or layout.head_counts_as:
        layer_ranges(model.num_layers, layout.pp, layout.embedding_counts_as, layout.head_counts_as)
    model.check_length(layout.seq_len)


def check_runnable(layout: Layout, model: ModelConfig) -> None:
    """Refuse what fourfold's own runtime cannot launch of a layout that cuts this model: other tools may.

    Raises:
        ValueError: what `parallelize` would refuse, in its words, before any process starts.
    """
    check(layout, model)
    refuse(RUNTIME, facts_of(model), Choice.of(layout))


def facts_of(model: ModelConfig) -> DecoderFacts:
    """The model as parallel.decoder.limits sees it, with the defaults of its family filled in."""
    return replace(
        decoder_facts(model.config),
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        hidden_size=model.hidden_size,
        head_size=model.head_dim,
        ffn_size=model.ffn_size or model.expert_ffn_size,
        vocab_size=model.vocab_size,
        num_experts=model.num_experts,
        tied_embeddings=model.tied_embeddings,
    )


def write_layout_file(
    path: str | Path, layout: Layout, model: ModelConfig, prediction: Mapping[str, Any] | None = None
) -> None:
    """Write layout.toml: [layout], [model] (the Hugging Face config, whole) and, if given, [prediction].

    TOML has no null: keys of the config whose value is null are left out. Where a model without them is another one (a
    Mistral whose sliding_window is null has none, one that does not state it has 4096), `model_nulls` lists them.
    """
    document: dict[str, Any] = {"layout": layout.as_dict()}
    if prediction:
        document["prediction"] = _without_null(prediction)
    document["model"] = _without_null(model.config)
    nulls = [str(key) for key, value in model.config.items() if value is None]
    if nulls and not _is_model(document["model"], model):
        document["model_nulls"] = nulls
    Path(path).write_text(tomli_w.dumps(document), encoding="utf-8")


def read_layout_file(path: str | Path) -> tuple[Layout, ModelConfig]:
    """Read layout.toml back.

    Raises:
        ValueError: the file is missing or broken, or a value in it makes no sense; names the value and the mend.
    """
    from fourfold.layouts.inputs.huggingface import model_from_config

    document = read_toml(path, "write it with `layout-advisor plan`")
    for table in ("layout", "model"):
        if not isinstance(document.get(table), dict):
            raise ValueError(f"{path}: has no [{table}] table: write it with `layout-advisor plan`")
    entries = document["layout"]
    known = {entry.name for entry in fields(Layout)}
    unknown = sorted(set(entries) - known)
    if unknown:
        raise ValueError(f"{path}: [layout] has {unknown[0]!r}, which no layout has: remove it")
    for needed in ("global_batch", "seq_len"):
        if needed not in entries:
            raise ValueError(f"{path}: [layout] has no {needed!r}: add it")
    nulls = document.get("model_nulls", [])
    if not isinstance(nulls, list) or not all(isinstance(key, str) and key not in document["model"] for key in nulls):
        raise ValueError(f"{path}: model_nulls={shown(nulls)}, but it is a list of keys that [model] leaves out")
    try:
        layout = Layout(**entries)
        model = model_from_config({**document["model"], **dict.fromkeys(nulls)})
        check(layout, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return layout, model


def read_prediction(path: str | Path) -> dict[str, Any]:
    """What the plan that wrote layout.toml said of it, [prediction]; empty where it says nothing.

    Raises:
        ValueError: the file is missing or broken, or [prediction] is no table.
    """
    said = read_toml(path, "write it with `layout-advisor plan`").get("prediction", {})
    if not isinstance(said, dict):
        raise ValueError(f"{path}: 'prediction' is not a table: write it as [prediction]")
    return said


def _is_model(config: Mapping[str, Any], model: ModelConfig) -> bool:
    from fourfold.layouts.inputs.huggingface import model_from_config

    try:
        return model_from_config(config, name=model.name) == model
    except ValueError:
        return False


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_null(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_without_null(entry) for entry in value if entry is not None]
    return value
