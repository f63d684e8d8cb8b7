"""What a profiled cluster measured of the model's own layers, in place of the formulas' sum over operators.

Curves of matmul and attention leave out autograd, the allocator and a hundred small operators; on a processor these
are a good part of a step. Where cluster.toml has the tables [[layer]], [[ends]] and [[optimizer]] for this model, their
seconds are used: between measured token counts by interpolation, at other tensor-parallel degrees and lengths by the
ratio of the formulas. [[tp_layer]], [[tp_ends]] and [[cp_layer]] were measured on several ranks: what they took beyond
the same work on one is the price of splitting it, messages and the host's own work together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.layer import Times, embedding_times, head_times, layer_times, saved_bytes
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.cluster import Cluster

Formula = Callable[[Candidates], Times]
Cost = Callable[[Candidates], Column]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the model that a profile times: its columns, the tables that hold them, and its formula."""

    forward: str
    backward: str
    table: str
    split_table: str
    formula: Callable[[Pricing], Times]


LAYER = Piece("forward_s", "backward_s", "layer", "tp_layer", layer_times)
EMBEDDING = Piece("embedding_forward_s", "embedding_backward_s", "ends", "tp_ends", embedding_times)
HEAD = Piece("head_forward_s", "head_backward_s", "ends", "tp_ends", head_times)


def measured_rows(pricing: Pricing, table: str) -> list[Row]:
    """Rows of a table that were measured of this very model, in the training dtype, and compiled where the software is.

    The rows do not name their model; they are its own when the bytes that a layer keeps for backward agree within a
    tenth with the count of operators.
    """
    cluster, software = pricing.cluster, pricing.software

    def in_dtype(name: str) -> list[Row]:
        return [row for row in cluster.tables.get(name, ()) if row.get("dtype") == cluster.device.dtype]

    # What a layer keeps is counted for layers that no compiler has changed.
    layers = [row for row in in_dtype("layer") if not row.get("compiled")]
    if not layers:
        return []
    counted = float(saved_bytes(pricing.uncompiled.of(_of_row(layers[0])))[0][0])
    if abs(float(layers[0].get("activation_bytes", 0)) / counted - 1) > 0.1:
        return []
    return [row for row in in_dtype(table) if bool(row.get("compiled")) == (software.compiled and table == "layer")]


def lacks_compiled_layers(pricing: Pricing) -> bool:
    """Whether layers run compiled on a cluster whose profile timed this model's layers, but none of them compiled."""
    timed = bool(measured_rows(pricing.uncompiled, LAYER.table))
    return pricing.software.compiled and timed and not measured_rows(pricing, LAYER.table)


def measured_host_s(pricing: Pricing) -> Column | None:
    """Seconds in which a host issues a layer's forward and backward, where a profile timed this model's layers.

    A layer that tp cuts has rows of its own: DTensor's work on the host is a good part of it. Compiled, it has none:
    the compiler has done that work.
    """
    layouts = pricing.layouts
    alone = _host_s(measured_rows(pricing, LAYER.table), layouts)
    if alone is None or pricing.software.compiled:
        return alone
    rows = measured_rows(pricing, LAYER.split_table)
    for cut in (False, True):
        same = [row for row in rows if bool(row.get("sequence_parallel")) == cut] or rows
        split = _host_s(same, layouts)
        if split is not None:
            alone = np.where((layouts.tp > 1) & (layouts.sequence_parallel == cut), split, alone)
    return alone


def _host_s(rows: list[Row], layouts: Candidates) -> Column | None:
    points: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        if "host_s" in row:
            points.setdefault(row["tp"], []).append((float(_of_row(row).tokens[0]), float(row["host_s"])))
    return _interpolated(points, layouts.tp, layouts)[0] if points else None


def _of_row(row: Row) -> Candidates:
    columns = {name: np.array([row.get(name, 1)]) for name in ("tp", "cp", "micro_batch")}
    columns["sequence_parallel"] = np.array([bool(row.get("sequence_parallel", False))])
    return Candidates.from_columns(columns, global_batch=row["micro_batch"], seq_len=row["seq_len"])


def piece_times(pricing: Pricing, piece: Piece) -> Times:
    """Seconds of a piece on one rank, without communication: measured where the cluster has it, else its formula."""
    rows = measured_rows(pricing, piece.table)
    return scaled_to_measurement(rows, piece, lambda layouts: piece.formula(pricing.of(layouts)), pricing.layouts)


def scaled_to_measurement(rows: list[Row], piece: Piece, formula: Formula, layouts: Candidates) -> Times:
    """The formula's seconds, times measured over formula at the nearest tp, interpolated over tokens in between."""
    priced = formula(layouts)
    usable = [row for row in rows if piece.forward in row and piece.backward in row]
    if not usable:
        return priced
    points: dict[int, list[tuple[float, ...]]] = {}
    for row in usable:
        same = _of_row(row)
        alike = formula(same)
        forward = float(row[piece.forward]) / float(alike.forward[0])
        backward = float(row[piece.backward]) / float(alike.backward[0])
        points.setdefault(row["tp"], []).append((float(same.tokens[0]), forward, backward))
    forward_ratio, backward_ratio = _interpolated(points, layouts.tp, layouts)
    return Times(priced.forward * forward_ratio, priced.backward * backward_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A piece of the model cut over the ranks of an axis ("tp" or "cp"), and what is known of it.

    `alone` prices the same work where nothing is communicated; `communication` is above 0 for every row.
    """

    piece: Piece
    axis: str
    alone: Formula
    communication: Cost


def extra_seconds_of_splitting(rows: list[Row], split: Split, layouts: Candidates) -> Column:
    """Seconds, forward and backward, that splitting a piece of the model over ranks adds to its work.

    The formula of the communication, times what the rows took beyond their work alone over that formula, at the
    nearest degree of the axis and interpolated over tokens. A row quicker than its work alone is noise, not a free
    exchange: there the formula holds.

    Layouts with sequence parallelism have rows of their own. Without such rows the others tell what the host does
    besides sending, which is the same with either kind of message, so that only the messages are exchanged: a ratio
    would price the host's work as if it grew with them.

    Args:
        rows: of a table measured on groups of the axis' ranks; those of fewer than 2 tell nothing.
    """
    whole = _ratios([row for row in rows if not row.get("sequence_parallel")], split, layouts)
    messages = split.communication(layouts)
    priced: Column = messages * whole
    cut = layouts.sequence_parallel
    if not np.any(cut):
        return priced
    rows_of_cut = [row for row in rows if row.get("sequence_parallel")]
    if rows_of_cut:
        return np.where(cut, messages * _ratios(rows_of_cut, split, layouts), priced)
    other = split.communication(replace(layouts, sequence_parallel=np.zeros_like(cut)))
    return np.where(cut, messages * np.minimum(whole, 1.0) + other * np.maximum(whole - 1.0, 0.0), priced)


def _ratios(rows: list[Row], split: Split, layouts: Candidates) -> Column:
    """What rows took beyond their work alone, over the formula of their communication; 1 where no row tells."""
    points: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        if row[split.axis] < 2:
            continue
        same = _of_row(row)
        alone = split.alone(same)
        together = float(row[split.piece.forward]) + float(row[split.piece.backward])
        more = together - float(alone.forward[0]) - float(alone.backward[0])
        ratio = more / float(split.communication(same)[0]) if more > 0 else 1.0
        points.setdefault(row[split.axis], []).append((float(same.tokens[0]), ratio))
    if not points:
        return np.ones(len(layouts))
    (ratios,) = _interpolated(points, getattr(layouts, split.axis), layouts)
    return ratios


def _interpolated(points: Mapping[int, list[tuple[float, ...]]], degree: Column, layouts: Candidates) -> list[Column]:
    """Each value of the points (tokens, value, ...) at the nearest measured degree, interpolated over log tokens."""
    measured = np.array(sorted(points))
    nearest = measured[np.abs(np.log2(degree[:, None] / measured[None])).argmin(axis=1)]
    tokens = np.log(np.asarray(layouts.tokens, float))
    values = [np.ones(len(layouts)) for _ in points[int(measured[0])][0][1:]]
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
