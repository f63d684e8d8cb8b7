"""What a profiled cluster measured of the model's own layers, in place of the formulas' sum over operators.

Curves of matmul and attention leave out autograd, the allocator and a hundred small operators; on a processor these
are a good part of a step. Where cluster.toml has the tables [[layer]], [[ends]] and [[optimizer]] for this model, their
seconds are used: between measured token counts by interpolation, at other tensor-parallel degrees and lengths by the
ratio of the formulas.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fourfold.layouts.candidates import Candidates
from fourfold.layouts.cluster import Cluster
from fourfold.layouts.layer import Times, saved_bytes
from fourfold.layouts.model import ModelConfig
from fourfold.layouts.stack import Stack

Formula = Callable[[Candidates], Times]


def rows_for(model: ModelConfig, cluster: Cluster, table: str, stack: Stack) -> list[Mapping[str, Any]]:
    """Rows of a table that were measured of this very model, in the training dtype.

    The rows do not name their model; they are its own when the bytes that a layer keeps for backward agree within a
    tenth with the count of operators.
    """
    layers = [row for row in cluster.tables.get("layer", ()) if row.get("dtype") == cluster.device.dtype]
    if not layers:
        return []
    row = layers[0]
    counted = float(saved_bytes(model, _of_row(row), stack)[0][0])
    if abs(float(row.get("activation_bytes", 0)) / counted - 1) > 0.1:
        return []
    return [row for row in cluster.tables.get(table, ()) if row.get("dtype") == cluster.device.dtype]


def _of_row(row: Mapping[str, Any]) -> Candidates:
    columns = {"tp": np.array([row["tp"]]), "micro_batch": np.array([row["micro_batch"]])}
    return Candidates.from_columns(columns, global_batch=row["micro_batch"], seq_len=row["seq_len"])


def corrected(rows: list[Mapping[str, Any]], names: tuple[str, str], formula: Formula, c: Candidates) -> Times:
    """The formula's seconds, times measured over formula at the nearest tp, interpolated over tokens in between."""
    priced = formula(c)
    usable = [row for row in rows if all(name in row for name in names)]
    if not usable:
        return priced
    ratios: dict[int, list[tuple[float, float, float]]] = {}
    for row in usable:
        at = formula(_of_row(row))
        ratio = (float(row[names[0]]) / float(at.forward[0]), float(row[names[1]]) / float(at.backward[0]))
        ratios.setdefault(row["tp"], []).append((float(row["micro_batch"] * row["seq_len"]), *ratio))
    measured = np.array(sorted(ratios))
    nearest = measured[np.abs(np.log2(c.tp[:, None] / measured[None])).argmin(axis=1)]
    forward, backward = np.ones(len(c)), np.ones(len(c))
    tokens = np.log(np.asarray(c.tokens, float))
    for tp in measured:
        points = np.array(sorted(ratios[int(tp)]))
        chosen = nearest == tp
        forward[chosen] = np.interp(tokens[chosen], np.log(points[:, 0]), points[:, 1])
        backward[chosen] = np.interp(tokens[chosen], np.log(points[:, 0]), points[:, 2])
    return Times(priced.forward * forward, priced.backward * backward)


def optimizer_rate(cluster: Cluster) -> float | None:
    """Seconds a parameter of the fused optimizer step and the clipping, or None where they were not measured."""
    rows = [row for row in cluster.tables.get("optimizer", ()) if row.get("fused")]
    if not rows:
        return None
    row = max(rows, key=lambda entry: entry["parameters"])
    return float((row["step_s"] + row["clip_s"]) / row["parameters"])
