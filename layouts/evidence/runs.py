"""Published or measured runs as layouts of models on clusters: reads the CSV that validate and calibrate work on.

The schema is that of runs.csv (one row a run; blank: not given). A row that cannot be priced is kept, with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fourfold.layouts.cost.stages import ends_in_cut
from fourfold.layouts.evidence.environments import Environment, attention_of
from fourfold.layouts.evidence.study import KERNELS, STUDY, StudyConstants, shipped_study
from fourfold.layouts.inputs.cluster import Cluster, load_cluster, preset_for_gpu
from fourfold.layouts.inputs.layout import MITIGATION, SCHEDULES, Layout, check
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.reading import BEYOND, number_text, read_csv, shortened, shown, whole_text
from fourfold.layouts.inputs.software import FSDP, MEGATRON, RUNTIME_CPU, Software

_BLANK = ("", "nan", "none", "null", "-", "n/a", "?")
COLUMNS = ("hidden", "layers", "heads", "vocab", "seq_len", "gpu_type", "num_gpus", "global_batch")
_CHECKPOINTING = {
    "": ("none", 1), "none": ("none", 1), "disabled": ("none", 1), "false": ("none", 1), "every_layer": ("full", 1),
    "full": ("full", 1), "true": ("full", 1), "selective": ("selective", 1), "stream": ("stream", 1),
}  # fmt: skip


AGREES = 0.01
"""Relative difference up to which counts of parameters agree: some leave norms or biases out."""
_FORMER = {"first_less": "embedding_counts_as", "last_less": "head_counts_as"}
"""Columns by the name that published files have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One row: what was run, and what came of it."""

    number: int
    """The row's line in the file."""
    row: Mapping[str, str]
    model: ModelConfig
    cluster: Cluster
    layout: Layout
    alternatives: tuple[Layout, ...]
    """All that the row may mean where it leaves the micro-batch or the interleaving open; `layout` is the first."""
    software: Software
    sweep: str
    """Runs of one model, length, batch and number of devices, which compete with each other."""
    step_s: float | None
    oom: bool | None
    memory_gib: float | None
    note: str = ""
    """How the row was read where it contradicts itself."""

    def under(self, study: StudyConstants) -> "Run":
        """The same run with other constants of the study's cluster and software, where it is one of its runs."""
        cluster = study.cluster(self.cluster) if self.software.name == STUDY.name else self.cluster
        return replace(self, software=study.applied_to(self.software), cluster=cluster)

    def in_environment(self, environment: Environment) -> "Run":
        """The same row as run by other software. Raises ValueError where that has no such layout."""
        return _run(self.number, self.row, environment)

    @property
    def names_its_software(self) -> bool:
        """Whether the row's kernel is one that only this software's sheets name so."""
        return self.row.get("kernel", "").lower() in KERNELS and "+" in self.row["kernel"]

    @property
    def vague(self) -> bool:
        """Whether the row leaves open what a price depends on: micro-batch, interleaving, or the attention kernel."""
        return len(self.alternatives) > 1 or "not stated" in self.row.get("kernel", "").lower()


def read_runs(path: str | Path) -> tuple[list[dict[str, str]], list[Run], dict[int, str]]:
    """Read a CSV of runs.

    Returns:
        (all rows, the runs that can be priced, line number -> why a row cannot).
    Raises:
        ValueError: no such file, not a CSV, or no column that a run needs.
    """
    header, rows = read_csv(path, "give a CSV of runs")
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{path}: has no column {missing[0]!r}: the schema is that of runs.csv")
    if not rows:
        raise ValueError(f"{path}: holds no rows: give a CSV of runs")
    runs, refused = [], {}
    for number, row in enumerate(rows, start=2):
        given = {k: "" if v.lower() in _BLANK and k != "mitigation" else v for k, v in row.items()}
        given |= {name: given[old] for old, name in _FORMER.items() if old in given and not given.get(name)}
        try:
            runs.append(_run(number, given))
        except ValueError as error:
            refused[number] = str(error)
    return rows, runs, refused


def _run(number: int, row: Mapping[str, str], environment: Environment | None = None) -> Run:
    if row.get(BEYOND):
        raise ValueError(f"goes on beyond its columns with {shortened(row[BEYOND])}: quote cells that hold commas")
    if "fp8" in row.get("precision", "").lower():
        raise ValueError(f"precision={row['precision']}: only 16-bit and 32-bit training is priced")
    model, note = _model(row)
    device = row["gpu_type"]
    cluster = load_cluster(preset_for_gpu(device))
    cluster = environment.cluster(cluster) if environment else cluster
    checkpointing = row.get("activation_checkpointing", "").lower()
    if checkpointing not in _CHECKPOINTING:
        raise ValueError(
            f"activation_checkpointing={checkpointing!r}: none of {', '.join(filter(None, _CHECKPOINTING))}"
        )
    kind, every = _CHECKPOINTING[checkpointing]
    status = row.get("status", "").lower()
    oom = _flag(row, "oom")
    if status and status != "ok" and oom is not True:
        raise ValueError(f"status={row['status']!r}: neither a run nor out of memory")
    tp, pp, cp = (_whole(row, key, default=1) for key in ("tp", "pp", "cp"))
    gpus = _whole(row, "num_gpus")
    if gpus % (tp * pp * cp):
        raise ValueError(f"num_gpus={gpus} is no multiple of tp={tp} x pp={pp} x cp={cp}")
    dp = gpus // (tp * pp * cp)
    zero = _whole(row, "zero_stage", default=1, least=0)
    software = environment.software_for(row.get("kernel", "").lower()) if environment else _software(row, zero)
    sequence = _flag(row, "sequence_parallel")
    # Where a 3D-parallel run does not tell, it is on: Megatron-LM's recommendation since it has it.
    parallel = tp > 1 and (software.name == MEGATRON.name if sequence is None else sequence)
    vp = _whole(row, "vp", default=1)
    embedding_counts_as, head_counts_as = (0, 0)
    if software.ends_in_cut and pp > 1 and vp == 1 and model.num_layers >= 2 * pp:
        embedding_counts_as, head_counts_as = ends_in_cut(model.num_layers, pp)
    layout = Layout(
        dp=dp, pp=pp, cp=cp, tp=tp, micro_batch=_whole(row, "micro_batch", default=1), checkpointing=kind,
        checkpoint_every=every, zero_stage=zero, vp=vp, ep=_whole(row, "ep", default=1),
        sequence_parallel=parallel, stream_chunks=_whole(row, "stream_chunks", default=1),
        embedding_counts_as=_whole(row, "embedding_counts_as", default=embedding_counts_as, least=0),
        head_counts_as=_whole(row, "head_counts_as", default=head_counts_as, least=0),
        schedule=row.get("schedule") or SCHEDULES[0], mitigation=row.get("mitigation") or MITIGATION,
        sharded_accumulation=bool(_flag(row, "sharded_accumulation")),
        global_batch=_whole(row, "global_batch"), seq_len=_whole(row, "seq_len"),
    )  # fmt: skip
    check(layout, model)
    alternatives = _alternatives(row, layout, model)
    step = _number(row, "step_time_s")
    # An MFU counts where it is all there is; beside a step time it is another's arithmetic, right or wrong.
    mfu = _number(row, "mfu") if step is None else None
    if mfu is not None and mfu > 1:
        raise ValueError(f"mfu={mfu:g}: a share of the peak, so at most 1")
    if mfu is not None:
        flops = layout.global_batch * layout.seq_len * model.flops_per_token(layout.seq_len)
        step = flops / (mfu * cluster.device.peak_flops_per_s * gpus)
    if step is None and oom is None:
        raise ValueError("gives neither a step time, an MFU, nor whether it ran out of memory")
    return Run(
        number=number, row=row, model=model, cluster=cluster, layout=layout,
        alternatives=alternatives, software=software, note=note,
        sweep=f"{model.name} seq{layout.seq_len} {gpus}x{device} gbs{layout.global_batch}"
        + (" sp" if sequence else ""),
        step_s=None if oom else step, oom=oom, memory_gib=_number(row, "mem_gib"),
    )  # fmt: skip


def _alternatives(row: Mapping[str, str], layout: Layout, model: ModelConfig) -> tuple[Layout, ...]:
    """The layouts that a row with a blank micro-batch, or a blank interleaving under a pipeline, may mean."""
    local = layout.global_batch // layout.dp
    sizes = [size for size in (1, 2, 4, 8, 16) if local % size == 0] if not row.get("micro_batch") else [0]
    chunks = [1, 2, 4, 8] if not row.get("vp") and layout.pp > 1 and not layout.asynchronous else [0]
    found = [layout]
    for size in sizes:
        for vp in chunks:
            option = replace(layout, micro_batch=size or layout.micro_batch)
            if vp > 1:
                option = replace(option, vp=vp, embedding_counts_as=0, head_counts_as=0)
            whole = option.vp == 1 or (
                model.num_layers >= option.pp * option.vp and option.num_micro_batches % option.pp == 0
            )
            if whole and option not in found:
                found.append(option)
    return tuple(found)


def _model(row: Mapping[str, str]) -> tuple[ModelConfig, str]:
    """A model of the row's widths, and a word where its stated parameters asked for another reading.

    Gated (Llama) where the feed-forward is not four times as wide, else GPT; where the parameters that the row states
    are not what that makes, and another reading of the same widths makes them, that one.
    """
    hidden, heads = _whole(row, "hidden"), _whole(row, "heads")
    ffn = _whole(row, "ffn", default=4 * hidden)
    name = row.get("model") or "unnamed"
    kv_heads = _whole(row, "kv_heads", default=heads)
    gated = ffn != 4 * hidden or kv_heads != heads or any(word in name.lower() for word in ("llama", "mistral", "qwen"))

    def reading(*, gated: bool, tied: bool, llama: bool) -> ModelConfig:
        return ModelConfig(
            name=name, hidden_size=hidden, num_layers=_whole(row, "layers"), num_heads=heads, num_kv_heads=kv_heads,
            head_dim=max(1, hidden // heads), ffn_size=ffn, vocab_size=_whole(row, "vocab"), gated_mlp=gated,
            norm_params=1 if llama else 2, rotary=llama, learned_positions=0 if llama else _whole(row, "seq_len"),
            tied_embeddings=tied, qkv_bias=not llama, out_bias=not llama, mlp_bias=not llama,
        )  # fmt: skip

    usual = reading(gated=gated, tied=not gated, llama=gated)
    stated = _number(row, "params")
    if stated is None or abs(usual.num_params / stated - 1) <= AGREES:
        return usual, ""
    others = [reading(gated=up, tied=tied, llama=gated) for up in (gated, not gated) for tied in (False, True)]
    best = min(others, key=lambda model: abs(model.num_params / stated - 1))
    if abs(best.num_params / stated - 1) > AGREES:
        return usual, f"states {stated:.4g} parameters, its dimensions make {usual.num_params:.4g}: priced by these"
    kind = ("gated" if best.gated_mlp else "not gated") + (", embeddings tied" if best.tied_embeddings else "")
    return best, f"read as {kind}, which makes the {stated:.4g} parameters that it states"


def _software(row: Mapping[str, str], zero: int) -> Software:
    """The software of a row, from its kernel and ZeRO stage."""
    kernel = row.get("kernel", "").lower()
    study = shipped_study()
    if row["gpu_type"].lower() == "cpu":
        return RUNTIME_CPU
    if kernel in KERNELS:
        return study.software(kernel)
    return study.applied_to(replace(FSDP if zero == 3 else MEGATRON, attention=attention_of(kernel)))


_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": None}


def _flag(row: Mapping[str, str], key: str) -> bool | None:
    """A cell that is true or false, or blank."""
    text = row.get(key, "").lower()
    if text not in _FLAGS:
        raise ValueError(f"{key}={shown(row[key])}: neither true nor false")
    return _FLAGS[text]


def _whole(row: Mapping[str, str], key: str, *, default: int | None = None, least: int = 1) -> int:
    text = row.get(key, "")
    if not text:
        if default is None:
            raise ValueError(f"{key} is blank")
        return default
    return whole_text(text, key, least=least)


def _number(row: Mapping[str, str], key: str) -> float | None:
    text = row.get(key, "")
    return number_text(text, key) if text else None
