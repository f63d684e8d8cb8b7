"""What the training software does: dtypes, fusion, what it shards and what it overlaps.

The same layout costs differently in different software. A `Software` states those conventions once, so that published
runs of other frameworks, and our own runtime on processors and on GPUs, go through the same formulas. Each is a file,
`data/software/NAME.toml`: [conventions] as its documentation and code say them, [fitted] the few constants that its
measured runs tell, [doubt] how far its predictions were off on runs that had no say in them. A user's own file is read
alike; it may start from a shipped one (`like = "megatron"`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fourfold.layouts.inputs.reading import number, read_toml, shortened, shown

ATTENTION = ("flash2", "flash1", "triton", "fused", "eager")
SELECTIVE = ("attention", "elementwise")
FITTED = (
    "compute_share", "layer_host_s", "layer_host_tp_s", "micro_batch_s", "step_s", "dp_overlap", "sharded_overlap",
    "tp_overlap", "piece_s", "kept_share", "logits_bytes", "bucket_bytes", "extra_peak_bytes", "checkpoint_stall_s",
    "extra_reserve_bytes",
)  # fmt: skip
DOUBT = ("time_spread", "network_spread", "memory_spread", "stall_s", "stall_chance", "devices")


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """Bytes are an element's; `*_overlap` is the share of the neighbouring compute that can hide communication."""

    name: str
    title: str = ""
    """In a line, for people."""
    source: str = ""
    """Where its conventions are read and its constants were measured."""
    compute_bytes: int
    """Activations and matmuls."""
    weight_bytes: int
    """The copy that forward and backward read, held on every rank below ZeRO 3."""
    grad_bytes: int
    state_bytes: int
    """Optimizer states, with the fp32 master copy where weights are not fp32."""
    reduce_bytes: int
    """Gradients on the wire."""
    gather_bytes: int
    """Weights on the wire (ZeRO 1 to 3)."""
    cast_bytes: int = 0
    """A low-precision copy of each weight that autocast makes for a micro-batch, kept by its graph till backward."""
    accumulates_whole: bool = False
    """Whether ZeRO 3 keeps whole gradients between micro-batches, to reduce them once a step (FSDP2 without sync)."""
    fresh_gradients: bool = False
    """Gradients are made in the first backward of a step; DDP's buckets take a copy of them at the last."""
    gathers_below_zero3: bool = False
    """Whether ZeRO 1 and 2 shard weights between steps, and gather them for a step in `gather_bytes` (FSDP2 without
    resharding); else they stay whole on every rank."""
    selective: str = "attention"
    """What selective checkpointing computes again: "attention", its core alone (Megatron), or "elementwise", all but
    matrix products and attention."""
    pipeline_buffers: bool = False
    """Whether a stage has a receive buffer for every micro-batch of the step (torch.distributed.pipelining)."""
    residual_bytes: int = 0
    """Hidden states between layers, which autocast leaves in the weights' dtype; 0: as activations. Where FSDP2 shards
    weights it casts them with these."""
    tp_kept: float = 0.0
    """Hidden states that a layer keeps besides, where tp cuts it (DTensor; traced)."""
    allocator_waste: bool = True
    """Whether the device's allocator fragments; a host's memory is counted tensor by tensor."""
    peak_of_tensors: bool = False
    """Whether its peaks are what tensors hold (torch.cuda.max_memory_allocated), without what the allocator loses
    between them; whether a layout fits counts that all the same."""
    fused_norm: bool = True
    norm_kept_bytes: float = 8.0
    """What an unfused norm keeps an element besides a copy of its input's and one of its output's dtype."""
    fused_ops: bool = True
    """Rotary embedding, activation and residuals as fused kernels."""
    attention: str = "flash2"
    """flash2, flash1, triton, fused (softmax kernel, scores stored) or eager (several copies)."""
    logits_sharded: bool = True
    """Vocabulary-parallel loss; else each tp rank holds all logits."""
    logits_bytes: float = 10.0
    """At the peak of the loss, a token and a vocabulary entry."""
    few_at_once: bool = False
    """Whether 1F1B runs all forwards first where there are fewer micro-batches than stages, as torch's pipelines do."""
    streams_head: bool = False
    """Whether large logits are made some tokens at a time, by the rule of this runtime (DecoderStage.gives_loss)."""
    head_sharded: bool = True
    """Whether tp cuts the output projection."""
    logits_passes: float = 4.0
    """fp32 values read or written a token and a vocabulary entry by the loss, forward and backward."""
    tp_overlap: float = 0.0
    dp_overlap: float = 1.0
    sharded_overlap: float = 1.0
    """Of `dp_overlap`, what is reached where ZeRO 1 or more scatters gradients and gathers weights."""
    piece_s: float = 0.0
    """Host's time to pack and unpack a rank's piece of a layer's gradients and weights, where ZeRO 1 or 2 does so piece
    by piece: a step pays it for every layer and rank."""
    zero3_overlap: float = 1.0
    pp_outermost: bool = True
    """Megatron's order of ranks (tp, cp, dp, pp); else ours (tp, cp, pp, dp)."""
    ends_in_cut: bool = False
    """Whether stages are cut with the embedding and the head as a layer each (stages.ends_in_cut)."""
    pp_scatter: bool = False
    """Tensor-parallel ranks send a slice each between stages, and gather inside the node."""
    accumulation_passes: float = 3.0
    """Gradients read or written a later micro-batch to add its own: two reads, a write; fewer fused into the matmul."""
    optimizer_passes: float = 7.0
    """fp32 values read or written a parameter a step, gradient clipping included."""
    checkpoint_stall_s: float = 0.0
    """What a micro-batch waits on a stage of a pipeline whose tp ranks recompute every layer."""
    extra_reserve_bytes: float = 0.0
    """Device memory outside the allocator besides what any software needs."""
    compute_share: float = 1.0
    """Rate of its operators, relative to what the constants say of the device."""
    layer_host_s: float = 0.0
    """Host's time to issue a layer's forward and backward; a device that is quicker waits for it."""
    layer_host_tp_s: float = 0.0
    """The same besides, where tp cuts the layer."""
    micro_batch_s: float = 0.0
    """Of a micro-batch on a stage, besides what any software needs."""
    step_s: float = 0.0
    """Of a step, besides all else: data, logging, the learning rate."""
    kept_share: float = 1.0
    """Of a layer's activations: what is held, relative to the count of what autograd keeps."""
    bucket_bytes: float = 0.0
    """Held besides weights, gradients and states, a parameter that a rank holds: flat copies and buckets."""
    extra_peak_bytes: float = 0.0
    """What its allocator holds at the peak besides all that is counted."""
    stages_overshoot: bool = False
    """Whether stages take layers until their share of the compute, the head's included, is passed; the first one gets
    one more than its share (nanotron)."""
    time_spread: float = 0.15
    """Standard deviation of the logarithm of measured over predicted step time, on runs that had no say in a fit."""
    network_spread: float = 0.3
    """The same of what the device waits (for ranks, host and pipeline), times its share of the step."""
    memory_spread: float = 0.0
    """Standard deviation of the true peak about the predicted one, as a share of it; 0: as the constants say."""
    stall_s: float = 0.0
    """What each exchange between neighbouring stages waited in a part of its runs, for no cause that a layout tells."""
    stall_chance: float = 0.0
    """The part of its pipelined runs that waited so."""
    devices: str = ""
    """The devices that the doubt was seen on, by the start of their names, comma between; on others it doubles."""
    compiled: bool = False
    """Whether layers run through torch.compile."""
    uncompiled: str = ""
    """Where it compiles them: the same runtime without a compiler."""
    compiled_as: str = ""
    """The software that runs those layouts whose layers this one compiles unasked; "": it compiles none."""
    tied_ends: bool = False
    """Whether two stages' exchange of a tied embedding's gradients is priced by itself. Other software does it too, and
    its constants were fitted to whole steps, the exchange included."""
    launched: bool = True
    """Operators run behind the host (CUDA); else the host itself computes."""

    def seen_on(self, device_name: str) -> bool:
        """Whether its predictions were ever held against runs on such a device."""
        return any(device_name.startswith(name.strip()) for name in self.devices.split(",") if name.strip())


@cache
def software_names() -> list[str]:
    """The software that is shipped, by name."""
    folder = files("fourfold.layouts").joinpath("data/software")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_software(name_or_file: str | Path) -> Software:
    """Software by its name, or from a TOML file of the same form.

    Raises:
        ValueError: neither a name nor a file; a field that no software has, or a value that makes no sense.
    """
    text = str(name_or_file)
    if text in software_names():
        return _shipped(text)
    path = Path(text)
    if not path.is_file():
        known = ", ".join(software_names())
        raise ValueError(f"software {shortened(text)}: neither a file nor one of {known}")
    return software_from(read_toml(path, "see `layout-advisor calibrate --help`"), name=path.stem, where=str(path))


@cache
def _shipped(name: str) -> Software:
    path = str(files("fourfold.layouts").joinpath(f"data/software/{name}.toml"))
    return software_from(read_toml(path, "it is shipped"), name=name, where=path)


def software_from(document: Mapping[str, Any], *, name: str, where: str) -> Software:
    """Software from the tables of its file."""
    start = document.get("like")
    if start is not None and not (isinstance(start, str) and start in software_names()):
        raise ValueError(f"{where}: like={shown(start)}: start from one of {', '.join(software_names())}")
    values: dict[str, Any] = {"name": name}
    kinds = {entry.name: entry.type for entry in fields(Software)}
    for key, value in document.items():
        if key in ("title", "source"):
            values[key] = _checked(value, str, f"{where}: {key}")
        elif key in ("conventions", "fitted", "doubt") and isinstance(value, Mapping):
            for entry, given in value.items():
                if entry not in kinds or entry in ("name", "title", "source"):
                    raise ValueError(f"{where}: [{key}] has {shown(entry)}, which no software has: remove it")
                values[entry] = _checked(given, kinds[entry], f"{where}: [{key}] {entry}")
        elif key not in ("like", "provenance"):
            raise ValueError(f"{where}: has {shown(key)}: write [conventions], [fitted] and [doubt]")
    if values.get("selective", "attention") not in SELECTIVE:
        raise ValueError(f"{where}: selective={shown(values['selective'])}: choose one of {', '.join(SELECTIVE)}")
    if values.get("attention", "flash2") not in ATTENTION:
        raise ValueError(f"{where}: attention={shown(values['attention'])}: choose one of {', '.join(ATTENTION)}")
    for other in ("uncompiled", "compiled_as"):
        if values.get(other, "") not in ("", *software_names()):
            known = ", ".join(software_names())
            raise ValueError(f"{where}: {other}={shown(values[other])}: choose one of {known}")
    for share in ("dp_overlap", "sharded_overlap", "tp_overlap", "zero3_overlap", "stall_chance"):
        if values.get(share, 0) > 1:
            raise ValueError(f"{where}: {share}={values[share]}: a share of at most 1")
    if start is not None:
        return replace(load_software(start), **values)
    missing = [entry.name for entry in fields(Software) if entry.name not in values and entry.name in _NEEDED]
    if missing:
        raise ValueError(f'{where}: has no {missing[0]!r}: add it to [conventions], or start with like = "megatron"')
    return Software(**values)


_NEEDED = (
    "compute_bytes", "weight_bytes", "grad_bytes", "state_bytes", "reduce_bytes", "gather_bytes",
)  # fmt: skip


def _checked(value: object, kind: Any, where: str) -> Any:
    if kind is bool or kind is str:
        if not isinstance(value, kind):
            raise ValueError(f"{where}={shown(value)}, but it is {'true or false' if kind is bool else 'a text'}")
        return value
    result = number(value, where, zero=True)
    if kind is int and result != int(result):
        raise ValueError(f"{where}={shown(value)}, but it is a whole number of bytes")
    return int(result) if kind is int else result


def as_document(software: Software, *, provenance: str, like: str = "") -> dict[str, Any]:
    """The tables of a software's file; what is at its default, or as in the software that it is `like`, is left out."""
    start = load_software(like) if like else None
    tables: dict[str, Any] = {"title": software.title, "source": software.source, "provenance": provenance}
    if like:
        tables["like"] = like
    for entry in fields(Software):
        if entry.name in ("name", "title", "source"):
            continue
        value = getattr(software, entry.name)
        if value == (getattr(start, entry.name) if start else entry.default):
            continue
        table = "fitted" if entry.name in FITTED else "doubt" if entry.name in DOUBT else "conventions"
        tables.setdefault(table, {})[entry.name] = value
    return tables


RUNTIME_CPU = load_software("fourfold-cpu")
RUNTIME_CUDA = load_software("fourfold-cuda")
"""No layer compiled."""
RUNTIME_COMPILING = replace(RUNTIME_CUDA, compiled_as="fourfold-compiled")
"""The runtime as it is on CUDA: layers are compiled where its limits allow it."""
MEGATRON = load_software("megatron")
FSDP = load_software("llm-foundry")
