"""Why a layout costs what it costs, and what each neighbouring layout would gain or lose."""

from collections.abc import Iterator, Mapping, Sequence
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
    keeps = {"offload": False} if layout.offload else {}
    for kind in ("none", "selective", "full", "stream"):
        if kind != layout.checkpointing:
            yield f"checkpointing {kind}", {"checkpointing": kind, "checkpoint_every": 1, "stream_chunks": 1, **keeps}
    if layout.checkpointing in ("full", "stream"):
        yield f"offloading {'off' if layout.offload else 'on'}", {"offload": not layout.offload}
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
    if layout.vp > 1:
        other = "1f1b" if layout.schedule == "zero-bubble" else "zero-bubble"
        yield f"schedule {other}", {"schedule": other}
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


Slot = tuple[str, int, int]
"""(kind, stage, micro-batch): F forward, B backward; I and W its halves, of the input and of weights."""


def draw_schedule(
    num_stages: int, num_micro_batches: int, *, vp: int = 1, zero_bubble: bool = False, width: int = 72
) -> list[str]:
    """1F1B as text, a line a rank and a character a forward or backward (a backward takes two).

    With `vp` runs of layers in each of the `num_stages` ranks, a micro-batch comes by once for each (interleaved). With
    `zero_bubble` a backward is two of one character: small letters for the input's gradient, capitals for weights.

    Forwards are digits (the last of the micro-batch's number), backwards letters, idle time dots. Only as many
    micro-batches are drawn as fit into `width`.
    """
    shown = max(1, min(num_micro_batches, (width - 3 * (num_stages - 1)) // (3 * vp)))
    if vp > 1:  # whole rounds of as many micro-batches as ranks
        shown = max(num_stages, shown - shown % num_stages)
    orders: list[list[Slot]] = [
        zero_bubble_order(rank, num_stages, vp, shown)
        if zero_bubble
        else _interleaved(rank, num_stages, vp, shown)
        if vp > 1
        else [(kind, rank, micro) for kind, micro in _one_f_one_b(rank, num_stages, shown)]
        for rank in range(num_stages)
    ]
    lengths = {"F": 1, "B": 2, "I": 1, "W": 1}
    lines = [""] * num_stages
    for rank, timed in enumerate(timed_orders(orders, vp, lengths)):
        for (kind, _, micro), started in timed:
            letter = chr(ord("a") + micro % 26)
            mark = {"F": str(micro % 10), "B": letter * 2, "I": letter, "W": letter.upper()}[kind]
            lines[rank] += "." * (round(started) - len(lines[rank])) + mark
    end = max(map(len, lines))
    return [line + "." * (end - len(line)) for line in lines]


def timed_orders(
    orders: Sequence[Sequence[Slot]], vp: int, seconds: Mapping[str, float]
) -> list[list[tuple[Slot, float]]]:
    """When each rank starts what it does, if it goes by its order, as early as its neighbours allow; links are free.

    Args:
        orders: of the ranks; the c-th stage of rank r is r + c * ranks.
        seconds: of each kind, in one stage.
    """
    done: dict[Slot, float] = {}
    clock = [0.0] * len(orders)
    timed: list[list[tuple[Slot, float]]] = [[] for _ in orders]
    while any(len(timed[rank]) < len(order) for rank, order in enumerate(orders)):
        moved = False
        for rank, order in enumerate(orders):
            if len(timed[rank]) == len(order):
                continue
            slot = kind, stage, micro = order[len(timed[rank])]
            source = stage + {"F": -1, "W": 0}.get(kind, 1)
            ready = 0.0
            if kind != "W" and 0 <= source < len(orders) * vp:
                if (kind, source, micro) not in done:
                    continue
                ready = done[kind, source, micro]
            start = max(clock[rank], ready)
            clock[rank] = done[slot] = start + seconds[kind]
            timed[rank].append((slot, start))
            moved = True
        assert moved, "the schedule waits on itself"
    return timed


def _interleaved(rank: int, num_ranks: int, vp: int, num_micro_batches: int) -> list[Slot]:
    """(kind, stage, micro-batch) of a rank whose c-th stage is rank + c * num_ranks.

    Micro-batches go in rounds of num_ranks through the stages of a rank, forwards from its first and backwards from
    its last. Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
    """
    total = num_micro_batches * vp
    warm = min((num_ranks - rank - 1) * 2 + (vp - 1) * num_ranks, total)
    order: list[Slot] = [("F", *_turn(turn, rank, num_ranks, vp)) for turn in range(warm)]
    for turn in range(total):
        if warm + turn < total:
            order.append(("F", *_turn(warm + turn, rank, num_ranks, vp)))
        order.append(("B", *_turn(turn, rank, num_ranks, vp, last_first=True)))
    return order


def zero_bubble_order(rank: int, num_ranks: int, vp: int, num_micro_batches: int) -> list[Slot]:
    """The same with backwards in halves, of which a rank puts off as many weight gradients as its number says.

    It warms up one forward a rank after it, and holds vp * num_ranks micro-batches' stages at the peak on every rank.

    Args:
        num_micro_batches: a multiple of num_ranks.
    Source: zero-bubble H1 of Qi et al. 2024 (arXiv 2401.10241), interleaved; torch's ScheduleInterleavedZeroBubble.
    """
    total = num_micro_batches * vp
    warm = min(num_ranks - rank - 1 + (vp - 1) * num_ranks, total)
    order: list[Slot] = [("F", *_turn(turn, rank, num_ranks, vp)) for turn in range(warm)]
    for turn in range(total + rank):
        if warm + turn < total:
            order.append(("F", *_turn(warm + turn, rank, num_ranks, vp)))
        if turn < total:
            order.append(("I", *_turn(turn, rank, num_ranks, vp, last_first=True)))
        if turn >= rank:
            order.append(("W", *_turn(turn - rank, rank, num_ranks, vp, last_first=True)))
    return order


def _turn(turn: int, rank: int, num_ranks: int, vp: int, *, last_first: bool = False) -> tuple[int, int]:
    """(stage, micro-batch) of a rank's turn-th forward, or with `last_first` backward, of interleaved stages."""
    whole, inside = divmod(turn, num_ranks * vp)
    chunk, micro = divmod(inside, num_ranks)
    chunk = vp - 1 - chunk if last_first else chunk
    return rank + chunk * num_ranks, whole * num_ranks + micro


def _one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[tuple[str, int]]:
    warm = min(num_stages - stage - 1, num_micro_batches)
    order = [("F", micro) for micro in range(warm)]
    for micro in range(num_micro_batches):
        if warm + micro < num_micro_batches:
            order.append(("F", warm + micro))
        order.append(("B", micro))
    return order
