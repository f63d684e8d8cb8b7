"""Every layout of a space, memory first, then time: exact enumeration over numpy columns, nothing pruned by guess.

What does not fit is priced no further; everything that fits is priced by the same formulas as a single layout, so the
best of the list is the best of the space (a test compares with a loop over single layouts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import FLUSHED, Candidates, Column
from fourfold.layouts.cost.memory import memory_of
from fourfold.layouts.cost.price import FITS, GIB, SAFE, PricedLayout, priced, stack_for
from fourfold.layouts.cost.time import time_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants, load_constants
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Stack
from fourfold.layouts.search.space import SPACES, enumerate_space
from fourfold.parallel.grid import AXES

BLOCK = 1 << 15
"""Candidates priced at a time: their columns stay in the processor's cache."""


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
    synchronous: PricedLayout | None = None
    """Where asynchronous pipelines were asked for: the fastest whose gradients come in time."""


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
        asynchronous: price pipelines that never drain as well; `fix` of their schedule asks for one of them.
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
    found = _scan(model, cluster, candidates, stack, constants)
    reasons["does not fit in memory"] = len(candidates) - len(found.rows)
    common: dict[str, Any] = {
        "model": model, "cluster": cluster, "stack": stack, "num_devices": num_devices,
        "num_candidates": len(candidates), "num_fitting": len(found.rows), "infeasible": reasons,
    }  # fmt: skip

    def objects(rows: Column) -> list[PricedLayout]:
        chosen = candidates.take(rows)
        memory = memory_of(model, chosen, cluster, stack, constants)
        return priced(model, cluster, chosen, memory, time_of(model, chosen, cluster, stack, constants))

    if not len(found.rows):
        return Plan(**common, layouts=[], slowest=None, safe=None, nearest=objects(np.array([found.nearest]))[0])
    cuts = (candidates.tp * candidates.pp * candidates.cp)[found.rows]
    # Where two cost the same, the one with more room, then the one with fewer cuts.
    order = np.lexsort((cuts, -found.margin, found.step_s))
    ranked = objects(found.rows[order if top is None else order[:top]])
    safe = objects(found.rows[order[found.fit_probability[order] >= SAFE][:1]])
    slowest = objects(found.rows[order[-1:]])[0]
    in_time = order[candidates.schedule[found.rows[order]] == FLUSHED][:1] if candidates.any_asynchronous else order[:0]
    drained = objects(found.rows[in_time])
    return Plan(
        **common, layouts=ranked, slowest=slowest, safe=safe[0] if safe else None, nearest=None,
        synchronous=drained[0] if drained else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Found:
    """Columns over the candidates that fit, and the row that comes nearest to fitting."""

    rows: Column
    step_s: Column
    margin: Column
    fit_probability: Column
    nearest: int


def _scan(model: ModelConfig, cluster: Cluster, candidates: Candidates, stack: Stack, constants: Constants) -> _Found:
    """Memory of every candidate, time of those that fit, a block at a time."""
    rows, steps, margins, chances = [], [], [], []
    nearest, best = 0, -math.inf
    for start in range(0, len(candidates), BLOCK):
        block = candidates.take(np.arange(start, min(start + BLOCK, len(candidates))))
        memory = memory_of(model, block, cluster, stack, constants)
        margin, chance = memory.margin, memory.fit_probability
        if margin.max() > best:
            best, nearest = float(margin.max()), start + int(margin.argmax())
        fitting = np.flatnonzero(chance >= FITS)
        if not len(fitting):
            continue
        rows.append(start + fitting)
        margins.append(margin[fitting])
        chances.append(chance[fitting])
        steps.append(time_of(model, block.take(fitting), cluster, stack, constants).total)
    if not rows:
        nothing = np.array([], dtype=int)
        return _Found(nothing, nothing, nothing, nothing, nearest)
    together = [np.concatenate(parts) for parts in (rows, steps, margins, chances)]
    return _Found(together[0], together[1], together[2], together[3], nearest)


def _check_fixed_axes(fix: Mapping[str, Any], num_devices: int) -> None:
    axes = [f"{axis}={fix[axis]}" for axis in AXES if axis in fix]
    product = math.prod(fix[axis] for axis in AXES if axis in fix)
    if num_devices % product or (len(axes) == len(AXES) and product != num_devices):
        raise ValueError(
            f"{' x '.join(axes)} makes {product}, which does not divide {num_devices} devices: fix other sizes"
            if num_devices % product
            else f"{' x '.join(axes)} makes {product} ranks, but there are {num_devices} devices: fix other sizes"
        )


def advice(
    result: Plan, *, global_batch: int, seq_len: int, space: str = "runtime", fix: Mapping[str, Any] | None = None
) -> str:
    """One line on a plan without any fitting layout: how much is missing, and what would fit.

    Cost: a few further searches, of twice as many devices each, and of half the length.
    """
    nearest = result.nearest
    assert nearest is not None
    short = -nearest.margin_bytes / GIB
    room = (nearest.capacity_bytes - nearest.reserve_bytes) / GIB

    def fits(num_devices: int, length: int, held: Mapping[str, Any]) -> bool:
        try:
            return bool(
                plan(
                    result.model, result.cluster, num_devices=num_devices, global_batch=global_batch, seq_len=length,
                    space=space, fix=held, top=1, stack=result.stack,
                ).layouts
            )  # fmt: skip
        except ValueError:
            return False

    held = dict(fix or {})
    mends = []
    for name, value in held.items():
        if fits(result.num_devices, seq_len, {key: held[key] for key in held if key != name}):
            mends.append(f"another {name} than {value}")
    more = next((n for n in (result.num_devices << k for k in range(1, 9)) if fits(n, seq_len, held)), None)
    if more:
        mends.append(f"{more} devices")
    less = next((n for n in (seq_len >> k for k in range(1, 6)) if n and fits(result.num_devices, n, held)), None)
    if less:
        mends.append(f"a sequence of {less}")
    if space == "runtime" and result.cluster.device.type == "cuda":
        mends.append("--space full (sequence parallelism, StreamBP)")
    return (
        f"nothing fits: the nearest, {nearest.layout}, needs {nearest.peak_bytes / GIB:.3g} of {room:.3g} GiB a "
        f"device, {short:.3g} too many; what may: {' or '.join(mends) or 'a smaller model'}"
    )
