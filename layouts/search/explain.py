"""Why a layout costs what it costs, and what each neighbouring layout would gain or lose."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fourfold.layouts.cost.price import GIB, PricedLayout, price
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants
from fourfold.layouts.inputs.layout import SCHEDULES, Layout
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.software import Software
from fourfold.layouts.search.space import check_in_space

TERMS = {
    "compute": "compute", "recompute": "recomputation", "tp_communication": "tensor-parallel communication",
    "cp_communication": "context-parallel communication", "ep_communication": "expert communication",
    "pp_communication": "pipeline sends", "dp_communication": "gradient and weight communication",
    "bubble": "pipeline bubble", "optimizer": "optimizer", "launch": "waiting for launches",
    "overhead": "overhead and stragglers",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """One step away from a layout."""

    change: str
    layout: Layout | None
    priced: PricedLayout | None
    reason: str
    """Why it is worse or better, or why it cannot be."""


EVEN = {"embedding_counts_as": 0, "head_counts_as": 0}


def _moves(layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what changes, the changed fields); the axes trade with dp at the same number of devices."""
    for axis in ("tp", "pp", "cp"):
        size = getattr(layout, axis)
        if layout.dp % 2 == 0:
            yield f"{axis} x2", {axis: size * 2, "dp": layout.dp // 2}
        if size % 2 == 0:
            even = EVEN if axis == "pp" and size == 2 else {}
            yield f"{axis} /2", {axis: size // 2, "dp": layout.dp * 2, **even}
    yield "micro-batch x2", {"micro_batch": layout.micro_batch * 2}
    if layout.micro_batch % 2 == 0:
        yield "micro-batch /2", {"micro_batch": layout.micro_batch // 2}
    for kind in ("none", "selective", "full"):
        if kind != layout.checkpointing:
            yield f"checkpointing {kind}", {"checkpointing": kind, "checkpoint_every": 1, "stream_chunks": 1}
    if layout.checkpointing == "stream":
        yield "chunks x2", {"stream_chunks": layout.stream_chunks * 2}
        if layout.stream_chunks % 2 == 0:
            yield "chunks /2", {"stream_chunks": layout.stream_chunks // 2}
    for stage in (0, 1, 2, 3):
        if stage != layout.zero_stage:
            yield f"ZeRO {stage}", {"zero_stage": stage, "sharded_accumulation": False}
    if layout.zero_stage == 3 and layout.num_micro_batches > 1:
        when = "once a step" if layout.sharded_accumulation else "at every micro-batch"
        yield f"gradients sharded {when}", {"sharded_accumulation": not layout.sharded_accumulation}
    if layout.tp > 1:
        yield (
            f"sequence parallelism {'off' if layout.sequence_parallel else 'on'}",
            {"sequence_parallel": not layout.sequence_parallel},
        )
    if layout.asynchronous:
        for schedule in SCHEDULES:
            if schedule != layout.schedule:
                yield f"schedule {schedule}", {"schedule": schedule}
    if layout.pp > 1:
        yield "interleaving x2", {"vp": layout.vp * 2, **EVEN}
        if layout.vp == 1:
            yield "the head counts for a layer more", {"head_counts_as": layout.head_counts_as + 1}
            if layout.head_counts_as:
                yield "the head counts for a layer less", {"head_counts_as": layout.head_counts_as - 1}
        if layout.vp % 2 == 0:
            yield "interleaving /2", {"vp": layout.vp // 2}


def neighbours(
    best: PricedLayout,
    model: ModelConfig,
    cluster: Cluster,
    *,
    software: Software | None = None,
    constants: Constants | None = None,
    space: str = "full",
) -> list[Neighbour]:
    """Every layout one change away, fastest first, then those that do not fit, then those that cannot be.

    Args:
        software: what runs them; None for this runtime, which compiles layers on CUDA where it can.
        space: whose limits decide what cannot be.
    """
    found = []
    for change, fields in _moves(best.layout):
        try:
            layout = replace(best.layout, **fields)
            check_in_space(layout, model, space)
        except ValueError as error:
            found.append(Neighbour(change=change, layout=None, priced=None, reason=str(error)))
            continue
        priced = price(model, cluster, [layout], software=software, constants=constants)[0]
        found.append(Neighbour(change=change, layout=layout, priced=priced, reason=difference(best, priced)))
    return sorted(found, key=_order)


def _order(neighbour: Neighbour) -> tuple[int, float]:
    if neighbour.priced is None:
        return 2, 0.0
    return (0 if neighbour.priced.fits else 1), neighbour.priced.step_s


def difference(first: PricedLayout, second: PricedLayout) -> str:
    """What the second costs more or less than the first: the terms that make at least a fifth of the change."""
    words = []
    if not second.fits:
        words.append(f"does not fit: {-second.margin_bytes / GIB:.3g} GiB too many, P {second.fit_probability:.2f}")
    changes = {name: second.time_parts_s[name] - first.time_parts_s[name] for name in TERMS}
    total = sum(abs(change) for change in changes.values())
    for name, change in sorted(changes.items(), key=lambda item: -abs(item[1])):
        if total and abs(change) >= 0.2 * total and abs(change) > 0.002 * first.step_s:
            words.append(f"{TERMS[name]} {change / first.step_s:+.1%}")
    memory = second.peak_bytes - first.peak_bytes
    if second.fits and abs(memory) > 0.02 * first.capacity_bytes:
        words.append(f"{memory / GIB:+.3g} GiB")
    return ", ".join(words) or "about the same"


def draw_schedule(num_stages: int, num_micro_batches: int, *, vp: int = 1, width: int = 72) -> list[str]:
    """1F1B as text, a line a rank and a character a forward or backward (a backward takes two).

    With `vp` runs of layers in each of the `num_stages` ranks, a micro-batch comes by once for each (interleaved).

    Forwards are digits (the last of the micro-batch's number), backwards letters, idle time dots. Only as many
    micro-batches are drawn as fit into `width`.
    """
    shown = max(1, min(num_micro_batches, (width - 3 * (num_stages - 1)) // (3 * vp)))
    if vp > 1:  # whole rounds of as many micro-batches as ranks
        shown = max(num_stages, shown - shown % num_stages)
        orders = [_interleaved(rank, num_stages, vp, shown) for rank in range(num_stages)]
    else:
        orders = [
            [(kind, stage, micro) for kind, micro in _one_f_one_b(stage, num_stages, shown)]
            for stage in range(num_stages)
        ]
    done: dict[tuple[str, int, int], int] = {}
    position, clock = [0] * num_stages, [0] * num_stages
    lines = [""] * num_stages
    while any(position[rank] < len(orders[rank]) for rank in range(num_stages)):
        moved = False
        for rank in range(num_stages):
            if position[rank] == len(orders[rank]):
                continue
            kind, stage, micro = orders[rank][position[rank]]
            needed = (kind, stage - 1 if kind == "F" else stage + 1, micro)
            ready = 0
            if 0 <= needed[1] < num_stages * vp:
                if needed not in done:
                    continue
                ready = done[needed]
            start = max(clock[rank], ready)
            length = 1 if kind == "F" else 2
            mark = str(micro % 10) if kind == "F" else chr(ord("a") + micro % 26) * 2
            lines[rank] += "." * (start - len(lines[rank])) + mark
            clock[rank] = start + length
            done[kind, stage, micro] = clock[rank]
            position[rank] += 1
            moved = True
        assert moved, "the schedule waits on itself"
    end = max(map(len, lines))
    return [line + "." * (end - len(line)) for line in lines]


def _interleaved(rank: int, num_ranks: int, vp: int, num_micro_batches: int) -> list[tuple[str, int, int]]:
    """(kind, stage, micro-batch) of a rank whose c-th stage is rank + c * num_ranks.

    Micro-batches go in rounds of num_ranks through the stages of a rank, forwards from its first and backwards from
    its last. Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
    """
    total = num_micro_batches * vp

    def at(turn: int, *, last_first: bool) -> tuple[int, int]:
        whole, inside = divmod(turn, num_ranks * vp)
        chunk, micro = divmod(inside, num_ranks)
        chunk = vp - 1 - chunk if last_first else chunk
        return rank + chunk * num_ranks, whole * num_ranks + micro

    warm = min((num_ranks - rank - 1) * 2 + (vp - 1) * num_ranks, total)
    order: list[tuple[str, int, int]] = [("F", *at(turn, last_first=False)) for turn in range(warm)]
    for turn in range(total):
        if warm + turn < total:
            order.append(("F", *at(warm + turn, last_first=False)))
        order.append(("B", *at(turn, last_first=True)))
    return order


def _one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[tuple[str, int]]:
    warm = min(num_stages - stage - 1, num_micro_batches)
    order = [("F", micro) for micro in range(warm)]
    for micro in range(num_micro_batches):
        if warm + micro < num_micro_batches:
            order.append(("F", warm + micro))
        order.append(("B", micro))
    return order
