"""What a profiled cluster measured of the model's own layers, in place of the formulas' sum over operators.

Curves of matmul and attention leave out autograd, the allocator and a hundred small operators; on a processor these
are a good part of a step. Where cluster.toml has the tables [[layer]], [[ends]] and [[optimizer]] for this model, their
seconds are used: between measured token counts by interpolation, at other tensor-parallel degrees and lengths by the
ratio of the formulas. [[tp_layer]], [[tp_ends]] and [[cp_layer]] were measured on several ranks: what they took beyond
the same work on one is the price of splitting it, messages and the host's own work together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.layer import Times, saved_bytes
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Stack

Formula = Callable[[Candidates], Times]
Cost = Callable[[Candidates], Column]


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
    columns = {name: np.array([row.get(name, 1)]) for name in ("tp", "cp", "micro_batch")}
    return Candidates.from_columns(columns, global_batch=row["micro_batch"], seq_len=row["seq_len"])


def corrected(rows: list[Mapping[str, Any]], names: tuple[str, str], formula: Formula, c: Candidates) -> Times:
    """The formula's seconds, times measured over formula at the nearest tp, interpolated over tokens in between."""
    priced = formula(c)
    usable = [row for row in rows if all(name in row for name in names)]
    if not usable:
        return priced
    points: dict[int, list[tuple[float, ...]]] = {}
    for row in usable:
        at = _of_row(row)
        alike = formula(at)
        ratio = (float(row[names[0]]) / float(alike.forward[0]), float(row[names[1]]) / float(alike.backward[0]))
        points.setdefault(row["tp"], []).append((float(at.tokens[0]), *ratio))
    forward, backward = _interpolated(points, c.tp, c)
    return Times(priced.forward * forward, priced.backward * backward)


def beyond(
    rows: list[Mapping[str, Any]], axis: str, names: tuple[str, str], apart: Formula, formula: Cost, c: Candidates
) -> Column:
    """Seconds, forward and backward, that splitting a piece of the model over ranks adds to its work.

    The formula's seconds, times what the rows took beyond `apart` over the formula, at the nearest degree of `axis`
    and interpolated over tokens. A row quicker than `apart` is noise, not a free exchange: there the formula holds.

    Args:
        rows: of a table measured on groups of `axis` ("tp" or "cp") ranks; those of fewer than 2 tell nothing.
        apart: the seconds of the same work where nothing is communicated.
        formula: a cost of the communication, above 0 for every row.
    """
    points: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        if row[axis] < 2:
            continue
        at = _of_row(row)
        alone = apart(at)
        more = float(row[names[0]]) + float(row[names[1]]) - float(alone.forward[0]) - float(alone.backward[0])
        ratio = more / float(formula(at)[0]) if more > 0 else 1.0
        points.setdefault(row[axis], []).append((float(at.tokens[0]), ratio))
    if not points:
        return formula(c)
    (ratios,) = _interpolated(points, getattr(c, axis), c)
    return formula(c) * ratios


def _interpolated(points: Mapping[int, list[tuple[float, ...]]], degree: Column, c: Candidates) -> list[Column]:
    """Each value of the points (tokens, value, ...) at the nearest measured degree, interpolated over log tokens."""
    measured = np.array(sorted(points))
    nearest = measured[np.abs(np.log2(degree[:, None] / measured[None])).argmin(axis=1)]
    tokens = np.log(np.asarray(c.tokens, float))
    values = [np.ones(len(c)) for _ in points[int(measured[0])][0][1:]]
    for at in measured:
        table = np.array(sorted(points[int(at)]))
        chosen = nearest == at
        for index, value in enumerate(values, start=1):
            value[chosen] = np.interp(tokens[chosen], np.log(table[:, 0]), table[:, index])
    return values


def optimizer_rate(cluster: Cluster, *, clipped: bool = True) -> float | None:
    """Seconds a parameter of the fused optimizer step, and of clipping; None where they were not measured."""
    rows = [row for row in cluster.tables.get("optimizer", ()) if row.get("fused")]
    if not rows:
        return None
    row = max(rows, key=lambda entry: entry["parameters"])
    return float((row["step_s"] + (row["clip_s"] if clipped else 0.0)) / row["parameters"])
