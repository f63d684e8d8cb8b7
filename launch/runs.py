"""runs.csv: a measured run a row, in the schema of the published measurements, so that both calibrate alike."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.parallel.decoder.limits import PRECISIONS

COLUMNS = (
    "model", "params", "hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "seq_len", "gpu_type", "num_gpus",
    "global_batch", "micro_batch", "tp", "pp", "vp", "cp", "ep", "dp", "grad_accum", "zero_stage",
    "activation_checkpointing", "kernel", "sequence_parallel", "precision", "step_time_s", "mfu", "hfu",
    "tflops_per_gpu", "tflops_kind", "tokens_per_s_per_gpu", "mem_gib", "oom", "status", "source", "notes",
    "stream_chunks", "embedding_counts_as", "head_counts_as", "schedule", "mitigation", "software",
    "sharded_accumulation",
)  # fmt: skip

_PRECISIONS = {**{word: word for word in PRECISIONS}, "bf16-mixed": "bf16"}
_CHECKPOINTING = {"none": "disabled", "selective": "selective", "full": "full", "stream": "stream"}


def read_result(folder: Path) -> dict[str, Any]:
    """What a run's rank 0 left in `folder/result.json`. Raises ValueError where there is none."""
    path = folder / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the run did not end") from None
    return result


def typical_step_s(steps_s: Sequence[float]) -> float:
    """The median step, without the first quarter: caches, buffers and optimizer states are made there."""
    return median(steps_s[len(steps_s) // 4 :])


def run_row(
    layout: Layout, model: ModelConfig, cluster: Cluster, result: Mapping[str, Any], *, notes: str = ""
) -> dict[str, Any]:
    """One row of runs.csv.

    Args:
        result: a run's result.json.
    """
    step_s = typical_step_s(result["steps_s"])
    tokens_per_s = layout.global_batch * layout.seq_len / step_s
    flops_per_s = model.flops_per_token(layout.seq_len) * tokens_per_s / layout.world_size
    return {
        "model": model.name, "params": model.num_params, "hidden": model.hidden_size, "layers": model.num_layers,
        "heads": model.num_heads, "kv_heads": model.num_kv_heads, "ffn": model.ffn_size, "vocab": model.vocab_size,
        "seq_len": layout.seq_len, "gpu_type": cluster.device.name, "num_gpus": layout.world_size,
        "global_batch": layout.global_batch, "micro_batch": layout.micro_batch, "tp": layout.tp, "pp": layout.pp,
        "vp": layout.vp, "cp": layout.cp, "ep": layout.ep, "dp": layout.dp, "grad_accum": layout.num_micro_batches,
        "zero_stage": layout.zero_stage, "activation_checkpointing": _CHECKPOINTING[layout.checkpointing],
        "kernel": "torch sdpa" if layout.cp == 1 else "fourfold ring", "sequence_parallel": layout.sequence_parallel,
        "precision": _PRECISIONS.get(result.get("precision", ""), "bf16" if result["device"] == "cuda" else "fp32"),
        "step_time_s": step_s,
        "mfu": flops_per_s / cluster.device.peak_flops_per_s, "tflops_per_gpu": flops_per_s / 1e12,
        "tflops_kind": "model", "tokens_per_s_per_gpu": tokens_per_s / layout.world_size,
        "mem_gib": result["peak_bytes"] / 2**30, "oom": False, "status": "ok",
        "source": f"fourfold, torch {result['torch']}", "notes": notes,
        "stream_chunks": layout.stream_chunks, "embedding_counts_as": layout.embedding_counts_as,
        "head_counts_as": layout.head_counts_as,
        "software": _software(result),
        "schedule": layout.schedule, "mitigation": layout.mitigation if layout.asynchronous else "",
        "sharded_accumulation": layout.sharded_accumulation,
    }  # fmt: skip


def _software(result: Mapping[str, Any]) -> str:
    """The name under which layouts.inputs.software has what ran."""
    if result["device"] != "cuda":
        return "fourfold-cpu"
    bf16, compiled = result.get("precision") == "bf16", result.get("compiled")
    if bf16:
        return "fourfold-bf16-compiled" if compiled else "fourfold-bf16"
    return "fourfold-compiled" if compiled else "fourfold-cuda"


def append_runs(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add `rows` to runs.csv, which is made if need be; what was there stays, whatever happens, other columns too."""
    old: list[list[str]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.reader(file))
    header = old[0] if old else []
    columns = [*header, *(name for name in COLUMNS if name not in header)]
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(old[1:])
        writer.writerows([row.get(name, "") for name in columns] for row in rows)
    os.replace(partial, path)
