"""Every layout of a space, memory first, then time: exact enumeration over numpy columns, nothing pruned by guess.

What does not fit is priced no further; everything that fits is priced by the same formulas as a single layout, so the
best of the list is the best of the space (a test compares with a loop over single layouts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourfold.layouts.candidates import FULL, NONE, SELECTIVE, STREAM, Candidates, Column
from fourfold.layouts.cluster import Cluster
from fourfold.layouts.constants import Constants, load_constants
from fourfold.layouts.layout import CHECKPOINTING
from fourfold.layouts.memory import memory_of
from fourfold.layouts.model import ModelConfig
from fourfold.layouts.price import GIB, PricedLayout, priced, stack_for
from fourfold.layouts.stack import Stack
from fourfold.layouts.time import time_of
from fourfold.parallel.grid import AXES

SPACES = ("runtime", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The ranked layouts that fit, and what became of the rest."""

    model: ModelConfig
    cluster: Cluster
    stack: Stack
    num_devices: int
    layouts: list[PricedLayout]
    """Fastest first; the first `top` of those that fit."""
    num_candidates: int
    num_fitting: int
    slowest: PricedLayout | None
    """The last feasible one."""
    safe: PricedLayout | None
    """The fastest whose probability of fitting is at least 0.95."""
    infeasible: Mapping[str, int]
    """Reason -> how many combinations it ruled out."""
    nearest: PricedLayout | None
    """Where nothing fits: the layout that comes nearest."""


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def plan(
    model: ModelConfig,
    cluster: Cluster,
    *,
    num_devices: int,
    global_batch: int,
    seq_len: int,
    space: str = "runtime",
    fix: Mapping[str, Any] | None = None,
    top: int | None = None,
    asynchronous: bool = False,
    stack: Stack | None = None,
    constants: Constants | None = None,
) -> Plan:
    """Rank the layouts of `num_devices` devices by step time.

    Args:
        global_batch: sequences a step.
        seq_len: tokens a sequence.
        space: "runtime", what fourfold itself can launch; "full", also what the export formats can.
        fix: Layout fields held at a value, as {"tp": 8}.
        top: how many of the ranked layouts become objects; None for all.
        asynchronous: price pipelines without a flush.
    Raises:
        ValueError: zero devices or batch, an unknown space, a fixed value that no layout has.
    Cost: some 3 microseconds a candidate.
    """
    for name, value in (("gpus", num_devices), ("global_batch", global_batch), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1")
    if space not in SPACES:
        raise ValueError(f"space={space!r}: choose one of {', '.join(SPACES)}")
    _check_fixed_axes(fix or {}, num_devices)
    constants = constants or load_constants()
    stack = stack or stack_for(cluster, space)
    candidates, reasons = enumerate_space(
        model,
        num_devices,
        global_batch=global_batch,
        seq_len=seq_len,
        space=space,
        fix=fix or {},
        asynchronous=asynchronous,
    )
    if not len(candidates):
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items() if count)
        raise ValueError(
            f"no layout of {num_devices} devices can cut this model and batch: {why or 'the space is empty'}"
        )
    memory = memory_of(model, candidates, cluster, stack, constants)
    fitting = np.flatnonzero(memory.fit_probability >= 0.5)
    reasons["does not fit in memory"] = len(candidates) - len(fitting)
    common = {
        "model": model, "cluster": cluster, "stack": stack, "num_devices": num_devices,
        "num_candidates": len(candidates), "num_fitting": len(fitting), "infeasible": reasons,
    }  # fmt: skip
    if not len(fitting):
        best = candidates.take(np.array([int(np.argmax(memory.margin))]))
        nearest = _objects(model, cluster, best, stack, constants)[0]
        return Plan(**common, layouts=[], slowest=None, safe=None, nearest=nearest)  # type: ignore[arg-type]
    fits = candidates.take(fitting)
    step = time_of(model, fits, cluster, stack, constants).total
    # Where two cost the same, the one with more room, then the one with fewer cuts.
    order = np.lexsort((fits.tp * fits.pp * fits.cp, -memory.margin[fitting], step))
    chosen = order if top is None else order[:top]
    ranked = _objects(model, cluster, fits.take(chosen), stack, constants)
    safe_rows = order[memory.fit_probability[fitting][order] >= 0.95][:1]
    safe = _objects(model, cluster, fits.take(safe_rows), stack, constants)[0] if len(safe_rows) else None
    slowest = _objects(model, cluster, fits.take(order[-1:]), stack, constants)[0]
    return Plan(**common, layouts=ranked, slowest=slowest, safe=safe, nearest=None)  # type: ignore[arg-type]


def _check_fixed_axes(fix: Mapping[str, Any], num_devices: int) -> None:
    axes = [f"{axis}={fix[axis]}" for axis in AXES if axis in fix]
    product = math.prod(fix[axis] for axis in AXES if axis in fix)
    if num_devices % product or (len(axes) == len(AXES) and product != num_devices):
        raise ValueError(
            f"{' x '.join(axes)} makes {product}, which does not divide {num_devices} devices: fix other sizes"
            if num_devices % product
            else f"{' x '.join(axes)} makes {product} ranks, but there are {num_devices} devices: fix other sizes"
        )


def _objects(
    model: ModelConfig, cluster: Cluster, c: Candidates, stack: Stack, constants: Constants
) -> list[PricedLayout]:
    return priced(
        model, cluster, c, memory_of(model, c, cluster, stack, constants), time_of(model, c, cluster, stack, constants)
    )


def enumerate_space(
    model: ModelConfig,
    num_devices: int,
    *,
    global_batch: int,
    seq_len: int,
    space: str,
    fix: Mapping[str, Any],
    asynchronous: bool = False,
) -> tuple[Candidates, dict[str, int]]:
    """All combinations of a space that can cut the model, and for each rule how many it turned away.

    Returns:
        (candidates, reason -> count); a combination is counted under the first rule that refuses it.
    """
    full = space == "full"
    axes = [
        (dp, pp, cp, tp)
        for tp in divisors(num_devices)
        for cp in divisors(num_devices // tp)
        for pp in divisors(num_devices // tp // cp)
        for dp in [num_devices // tp // cp // pp]
    ]
    grid = np.array(axes)
    reasons: dict[str, int] = {}

    def keep(rows: Column, allowed: Column, reason: str) -> Column:
        refused = int((~allowed).sum())
        if refused:
            reasons[reason] = reasons.get(reason, 0) + refused
        return rows[allowed]

    ffn = model.ffn_size or model.expert_ffn_size
    grid = keep(grid, model.num_heads % grid[:, 3] == 0, f"tp does not divide {model.num_heads} attention heads")
    grid = keep(grid, model.num_kv_heads % grid[:, 3] == 0, f"tp does not divide {model.num_kv_heads} key-value heads")
    grid = keep(grid, ffn % grid[:, 3] == 0, f"tp does not divide the feed-forward width {ffn}")
    grid = keep(grid, grid[:, 1] <= model.num_layers, f"pp is more than {model.num_layers} layers")
    pieces = np.where(grid[:, 2] > 1, 2 * grid[:, 2], 1)
    grid = keep(grid, seq_len % pieces == 0, f"2 cp does not divide the sequence of {seq_len}")
    grid = keep(grid, global_batch % grid[:, 0] == 0, f"dp does not divide the global batch {global_batch}")
    for axis, name in enumerate(AXES):
        if name in fix:
            grid = keep(grid, grid[:, axis] == fix[name], f"{name} is not the fixed {fix[name]}")
    columns = dict(zip(AXES, grid.T, strict=True))

    def expand(name: str, values: list[Any]) -> None:
        if name in fix:
            values = [fix[name]]
            if name == "checkpointing":
                values = [CHECKPOINTING.index(fix[name])] if fix[name] in CHECKPOINTING else []
            if not values:
                raise ValueError(f"--fix {name}={fix[name]}: choose one of {', '.join(CHECKPOINTING)}")
        length = len(columns["dp"])
        for key in columns:
            columns[key] = np.repeat(columns[key], len(values))
        columns[name] = np.tile(np.array(values), length)

    def restrict(allowed: Column, reason: str) -> None:
        refused = int((~allowed).sum())
        if refused:
            reasons[reason] = reasons.get(reason, 0) + refused
            for key in columns:
                columns[key] = columns[key][allowed]

    expand("micro_batch", [size for size in divisors(global_batch) if size <= 64 or global_batch == size])
    restrict(
        global_batch // columns["dp"] % columns["micro_batch"] == 0, "the micro-batch does not divide a replica's batch"
    )
    expand("checkpointing", [NONE, SELECTIVE, FULL, STREAM] if full else [NONE, FULL])
    expand("zero_stage", [0, 1, 2, 3] if full else [0, 3])
    restrict((columns["zero_stage"] == 0) | (columns["dp"] * columns["cp"] > 1), "ZeRO needs dp x cp of at least 2")
    if full:
        expand("sequence_parallel", [False, True])
        restrict(~columns["sequence_parallel"] | (columns["tp"] > 1), "sequence parallelism needs tp of at least 2")
        expand("vp", [1, 2, 4])
        restrict((columns["vp"] == 1) | (columns["pp"] > 1), "interleaving needs pp of at least 2")
    if asynchronous:
        columns["asynchronous"] = columns["pp"] > 1
    for name in fix:
        if name not in columns and name not in AXES:
            expand(name, [fix[name]])
    return Candidates.from_columns(columns, global_batch=global_batch, seq_len=seq_len), reasons


def advice(result: Plan) -> str:
    """What would make a plan without any fitting layout fit."""
    nearest = result.nearest
    assert nearest is not None
    short = -nearest.margin_bytes / GIB
    return (
        f"nothing fits: the nearest, {nearest.layout}, needs {nearest.peak_bytes / GIB:.3g} GiB of "
        f"{(nearest.capacity_bytes - nearest.reserve_bytes) / GIB:.3g} GiB a device, {short:.3g} GiB too many: "
        "use more devices, a shorter sequence, or a smaller model"
    )
