"""Exported files read back as layouts: what was asked must be what another tool is told.

Only what an export writes is read; a test holds each export of each layout against the layout itself.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.output.megatron import stage_sizes


def layout_of_megatron(arguments: Sequence[str], model: ModelConfig, *, num_devices: int) -> Layout:
    """The layout that Megatron-LM's arguments mean on so many devices.

    Raises:
        ValueError: no layout has such stages.
    """
    pairs = dict(itertools.pairwise([*arguments, ""]))
    given = set(arguments)

    def size(name: str, default: int = 1) -> int:
        return int(pairs[f"--{name}"]) if f"--{name}" in pairs else default

    tp, pp, cp = (size(f"{axis}-parallel-size") for axis in ("tensor-model", "pipeline-model", "context"))
    chunk = size("num-layers-per-virtual-pipeline-stage", 0)
    layout = Layout(
        dp=num_devices // (tp * pp * cp), pp=pp, cp=cp, tp=tp, micro_batch=size("micro-batch-size"),
        checkpointing=pairs.get("--recompute-granularity", "none"), ep=size("expert-model-parallel-size"),
        zero_stage=int("--use-distributed-optimizer" in given), vp=model.num_layers // (pp * chunk) if chunk else 1,
        sequence_parallel="--sequence-parallel" in given, global_batch=size("global-batch-size"),
        seq_len=size("seq-length"),
    )  # fmt: skip
    ends = [size(f"decoder-{end}-pipeline-num-layers", 0) for end in ("first", "last")]
    return _with_ends(layout, model, ends)


def _with_ends(layout: Layout, model: ModelConfig, ends: Sequence[int]) -> Layout:
    """The layout whose first and last stage have so many layers; 0: as many as the others."""
    if layout.pp < 2 or layout.vp > 1 or not any(ends):
        return layout
    for counts in sorted(itertools.product(range(model.num_layers), repeat=2), key=sum):
        try:
            sizes = stage_sizes(cut := _cut(layout, counts), model)
        except ValueError:
            continue
        if [sizes[0], sizes[-1]] == list(ends):
            return cut
    raise ValueError(f"no layout of {model.num_layers} layers in {layout.pp} stages has {ends} in the first and last")


def _cut(layout: Layout, counts: Sequence[int]) -> Layout:
    return Layout(**{**layout.as_dict(), "embedding_counts_as": counts[0], "head_counts_as": counts[1]})


def layout_of_deepspeed(config: Mapping[str, Any], *, seq_len: int) -> Layout:
    """The layout that DeepSpeed's JSON means; it does not say the length."""
    batch, micro_batch = config["train_batch_size"], config["train_micro_batch_size_per_gpu"]
    checkpointing = config.get("activation_checkpointing")
    return Layout(
        dp=batch // (micro_batch * config["gradient_accumulation_steps"]), micro_batch=micro_batch,
        zero_stage=config["zero_optimization"]["stage"], checkpointing="full" if checkpointing else "none",
        offload=bool(checkpointing and checkpointing["cpu_checkpointing"]), global_batch=batch, seq_len=seq_len,
    )  # fmt: skip


def layout_of_torchtitan(config: Mapping[str, Any], model: ModelConfig) -> Layout:
    """The layout that torchtitan's TOML means."""
    axes, training, checkpoint = config["parallelism"], config["training"], config["activation_checkpoint"]
    replicas, shards = axes["data_parallel_replicate_degree"], axes["data_parallel_shard_degree"]
    option = str(checkpoint.get("selective_ac_option", ""))
    every = int(option) if option.isdecimal() else 1
    pp, tp = axes["pipeline_parallel_degree"], axes["tensor_parallel_degree"]
    dp = replicas * shards
    mode = "full" if option.isdecimal() else checkpoint["mode"]
    layout = Layout(
        dp=dp, pp=pp, cp=axes["context_parallel_degree"], tp=tp, ep=axes["expert_parallel_degree"],
        micro_batch=axes.get("pipeline_parallel_microbatch_size", training["local_batch_size"]),
        zero_stage=3 if shards > 1 or axes["context_parallel_degree"] > 1 else 0, checkpointing=mode,
        checkpoint_every=every, sequence_parallel=tp > 1, global_batch=training["global_batch_size"],
        seq_len=training["seq_len"],
    )  # fmt: skip
    less = [axes.get(f"pipeline_parallel_{end}_stage_less_layers", 0) for end in ("first", "last")]
    # torchtitan adds these to the layers, shares out, gives the first stages what is left over and takes them off.
    base, extra = divmod(model.num_layers + sum(less), pp)
    ends = [base + (extra > 0) - less[0], base - less[1]] if pp > 1 else [0, 0]
    chunk = axes.get("pipeline_parallel_layers_per_stage")
    if chunk:
        kinds = {"InterleavedZeroBubble": "zero-bubble", "Interleaved1F1B": "1f1b"}
        said = {"vp": model.num_layers // (pp * chunk), "schedule": kinds[axes["pipeline_parallel_schedule"]]}
        return Layout(**{**layout.as_dict(), **said})
    return _with_ends(layout, model, ends)
