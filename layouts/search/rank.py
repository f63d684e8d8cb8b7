"""Every layout of a space, memory first, then time: exact enumeration over numpy columns, nothing pruned by guess.

What does not fit is priced no further; everything that fits is priced by the same formulas as a single layout, so the
best of the list is the best of the space (a test compares with a loop over single layouts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.memory import memory_of
from fourfold.layouts.cost.price import (
    FITS,
    GIB,
    SAFE,
    PricedLayout,
    by_software,
    price_each,
    software_for,
)
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.time import time_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants, load_constants
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Software
from fourfold.layouts.search.request import SearchRequest
from fourfold.layouts.search.space import enumerate_space
from fourfold.parallel.grid import AXES

BLOCK = 1 << 15
"""Candidates priced at a time: their columns stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The ranked layouts that fit, and what became of the rest."""

    model: ModelConfig
    cluster: Cluster
    software: Software
    """What runs the layouts; each says itself where its layers are compiled unasked."""
    request: SearchRequest
    layouts: list[PricedLayout]
    """Of those that fit the first `top`, by step time over the probability of fitting (`PricedLayout.expected_s`)."""
    num_candidates: int
    num_fitting: int
    slowest: PricedLayout | None
    """The last feasible one."""
    safe: PricedLayout | None
    """The first whose probability of fitting is at least 0.95."""
    infeasible: Mapping[str, int]
    """Reason -> how many combinations it ruled out."""
    nearest: PricedLayout | None
    """Where nothing fits: the layout that comes nearest."""
    synchronous: PricedLayout | None = None
    """Where asynchronous pipelines were asked for: the fastest whose gradients come in time."""

    @property
    def num_devices(self) -> int:
        return self.request.num_devices


def rank_layouts(
    model: ModelConfig,
    cluster: Cluster,
    request: SearchRequest,
    *,
    top: int | None = None,
    software: Software | None = None,
    constants: Constants | None = None,
) -> Plan:
    """Rank the layouts of a request by step time, given the risk that they do not fit.

    Args:
        top: how many of the ranked layouts become objects; None for all.
        software: what runs them; None for the one that the space and the cluster mean.
    Raises:
        ValueError: a fixed value that no layout has, or no layout that can cut the model.
    Cost: some 3 microseconds a candidate.
    """
    cluster.check_links(request.num_devices)
    candidates, reasons = candidates_of(model, request)
    if software is None:
        software = software_for(cluster, request.space, candidates.precision, compiled=bool(candidates.compile))
    pricing = Pricing(
        layouts=candidates, model=model, cluster=cluster, software=software,
        constants=constants or load_constants(),
    )  # fmt: skip
    found = _scan(by_software(pricing))
    reasons["does not fit in memory"] = len(candidates) - len(found.rows)
    common: dict[str, Any] = {
        "model": model, "cluster": cluster, "software": pricing.software, "request": request,
        "num_candidates": len(candidates), "num_fitting": len(found.rows), "infeasible": reasons,
    }  # fmt: skip

    def objects(rows: Column) -> list[PricedLayout]:
        return price_each(pricing.of(candidates.take(rows))) if len(rows) else []

    if not len(found.rows):
        return Plan(**common, layouts=[], slowest=None, safe=None, nearest=objects(np.array([found.nearest]))[0])
    cuts = (candidates.tp * candidates.pp * candidates.cp)[found.rows]
    # Where two cost the same, the one with more room, then the one with fewer cuts.
    order = np.lexsort((cuts, -found.margin, found.step_s / found.fit_probability))
    ranked = objects(found.rows[order if top is None else order[:top]])
    safe = objects(found.rows[order[found.fit_probability[order] >= SAFE][:1]])
    slowest = objects(found.rows[order[-1:]])[0]
    in_time = order[candidates.drains[found.rows[order]]][:1] if candidates.any_asynchronous else order[:0]
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


def candidates_of(model: ModelConfig, request: SearchRequest) -> tuple[Candidates, dict[str, int]]:
    """What there is to rank before anything is known of a cluster; see `enumerate_space`.

    Raises:
        ValueError: as `rank_layouts`, whatever the cluster.
    """
    model.check_length(request.seq_len)
    _check_fixed_axes(request.fix, request.num_devices)
    candidates, reasons = enumerate_space(model, request)
    if not len(candidates):
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items() if count)
        raise ValueError(
            f"no layout of {request.num_devices} devices can cut this model and batch: {why or 'the space is empty'}"
        )
    return candidates, reasons


def _scan(parts: list[tuple[Column, Pricing]]) -> _Found:
    """Memory of every candidate, time of those that fit, a block at a time.

    Args:
        parts: rows of the candidates, and the pricing of all candidates that holds for these.
    """
    rows, steps, margins, chances = [], [], [], []
    nearest, best = 0, -math.inf
    blocks = [
        (members[start : start + BLOCK], pricing)
        for members, pricing in parts
        for start in range(0, len(members), BLOCK)
    ]
    for members, pricing in blocks:
        block = pricing.layouts.take(members)
        memory = memory_of(pricing.of(block))
        margin, chance = memory.margin, memory.fit_probability
        if margin.max() > best:
            best, nearest = float(margin.max()), int(members[margin.argmax()])
        fitting = np.flatnonzero(chance >= FITS)
        if not len(fitting):
            continue
        rows.append(members[fitting])
        margins.append(margin[fitting])
        chances.append(chance[fitting])
        steps.append(time_of(pricing.of(block.take(fitting))).total)
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


def advice(result: Plan) -> str:
    """One line on a plan without any fitting layout: how much is missing, and what would fit.

    Cost: a few further searches, of twice as many devices each, and of half the length.
    """
    nearest, request = result.nearest, result.request
    assert nearest is not None
    short = -nearest.margin_bytes / GIB
    room = (nearest.capacity_bytes - nearest.reserve_bytes) / GIB

    def fits(**changes: Any) -> bool:
        try:
            changed = replace(request, **changes)
            return bool(rank_layouts(result.model, result.cluster, changed, top=1, software=result.software).layouts)
        except ValueError:
            return False

    mends = []
    for name, value in request.fix.items():
        if fits(fix={key: held for key, held in request.fix.items() if key != name}):
            mends.append(f"another {name} than {value}")
    more = next((n for n in (request.num_devices << k for k in range(1, 9)) if fits(num_devices=n)), None)
    if more:
        mends.append(f"{more} devices")
    less = next((n for n in (request.seq_len >> k for k in range(1, 6)) if n and fits(seq_len=n)), None)
    if less:
        mends.append(f"a sequence of {less}")
    if request.space == "runtime" and result.cluster.device.type == "cuda":
        mends.append("--space full (sequence parallelism, ZeRO 1 and 2)")
    return (
        f"nothing fits: the nearest, {nearest.layout}, needs {nearest.peak_bytes / GIB:.3g} of {room:.3g} GiB a "
        f"device, {short:.3g} too many; what may: {' or '.join(mends) or 'a smaller model'}"
    )
