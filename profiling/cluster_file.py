"""cluster.toml: the tables a profile writes and the planner reads, schema 1.

    schema, name, provenance, num_devices, devices_per_node
    [device]         name, type, dtype, memory_bytes, peak_flops_per_s, memory_bandwidth_bytes_per_s,
                     operator_overhead_s; on CUDA reserve_bytes: of memory_bytes, what groups of ranks and
                     libraries took outside of torch's allocator
    [[matmul]]       dtype, m, n, k, operands, seconds       operands: nt, nn or tn (see compute.matmul_case)
    [[attention]]    dtype, batch, heads, kv_heads, seq_len, head_dim, causal, forward_s, backward_s
    [[elementwise]]  dtype, bytes, seconds                   bytes read and written
    [[copy]]         dtype, bytes, seconds
    [[layer]], [[ends]], [[tp_layer]], [[tp_ends]], [[cp_layer]], [[optimizer]]   see layer.py
    [[link]]         name, num_ranks                         one a tier, innermost first
    [[link.operation]]  operation, group_size, latency_s, bandwidth_bytes_per_s   the five operations of OPERATIONS
    [[link.sample]]     operation, group_size, bytes, seconds   bytes: see links.py

Every sample also has `spread`, the (80th - 20th percentile) / median over its repetitions, and `rounds`, their number.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fourfold.profiling.fitting import fit_latency_bandwidth

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

OPERATIONS = ("send", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SAMPLE_TABLES = (
    "matmul", "attention", "elementwise", "copy", "layer", "ends", "tp_layer", "tp_ends", "cp_layer", "optimizer"
)  # fmt: skip


def cluster_table(
    header: Mapping[str, Any], device: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The whole file as a table.

    Args:
        header: name, provenance, num_devices, devices_per_node.
        device: name, type, dtype and memory_bytes; the speeds are added from the rows.
        rows: samples by table name; "link" rows carry their tier's name and number of ranks.
    """
    dtype = device["dtype"]
    matmuls = [row for row in rows.get("matmul", ()) if row["dtype"] == dtype]
    copies = [row for row in rows.get("copy", ()) if row["dtype"] == dtype]
    largest = max(copies, key=lambda row: row["bytes"])
    measured = {
        "peak_flops_per_s": max(2 * row["m"] * row["n"] * row["k"] / row["seconds"] for row in matmuls),
        "memory_bandwidth_bytes_per_s": largest["bytes"] / largest["seconds"],
        "operator_overhead_s": rows["overhead"][0]["seconds"],
    }
    tables: dict[str, Any] = {"schema": 1, **header, "device": {**device, **measured}}
    tables |= {name: list(rows[name]) for name in SAMPLE_TABLES if rows.get(name)}
    return {**tables, "link": _links(rows.get("link", ()))}


def _links(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    tiers = list(dict.fromkeys((row["tier"], row["num_ranks"]) for row in samples))
    return [_link(name, num_ranks, [row for row in samples if row["tier"] == name]) for name, num_ranks in tiers]


def _link(name: str, num_ranks: int, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in samples:
        curves.setdefault((row["operation"], row["group_size"]), []).append(row)
    operations = []
    for (operation, group_size), curve in curves.items():
        if operation not in OPERATIONS:  # ring_shift: schema 1 keeps its samples only
            continue
        latency, bandwidth = fit_latency_bandwidth([row["bytes"] for row in curve], [row["seconds"] for row in curve])
        operations.append(
            {
                "operation": operation,
                "group_size": group_size,
                "latency_s": latency,
                "bandwidth_bytes_per_s": bandwidth,
            }
        )
    kept = [{key: value for key, value in row.items() if key not in ("tier", "num_ranks")} for row in samples]
    return {"name": name, "num_ranks": num_ranks, "operation": operations, "sample": kept}


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: a reader sees the old file or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_cluster(path: Path, table: Mapping[str, Any]) -> None:
    """Write `table` as TOML, atomically."""
    write_atomically(path, tomli_w.dumps(table))
