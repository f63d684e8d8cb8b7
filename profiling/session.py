"""Times many cases on all ranks at once, in interleaved rounds, within a time budget.

Why not one case after the other: clocks drift and neighbours come and go, so a figure taken in one stretch carries that
stretch's luck. Here every round visits every case in a new order, and a case's figure is the median over rounds and
ranks. Why all ranks at once: cores of a host share caches, memory and power, and a training step keeps all of them
busy; so all ranks time the same case at the same moment.
"""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from fourfold.profiling.clock import Clock
from fourfold.profiling.fitting import spread

BATCH_S = 4e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to time.

    Attributes:
        table: the table of cluster.toml it belongs to.
        fields: what identifies it there.
        columns: names of the times it yields.
        run: (clock, iterations) -> seconds a call for each column. Every rank calls it; one with nothing to do in it
            answers zeros, which are left out of the medians.
        essential: kept, whatever the budget.
    """

    table: str
    fields: Mapping[str, Any]
    columns: tuple[str, ...] = ("seconds",)
    run: Callable[[Clock, int], tuple[float, ...]]
    essential: bool = False

    @property
    def key(self) -> str:
        """The same for the same case in any process."""
        return json.dumps([self.table, dict(self.fields)], sort_keys=True)


@dataclass(slots=True)
class Timings:
    """rounds[key]: one list a round, of each rank's times (one a column)."""

    rounds: dict[str, list[list[list[float]]]] = field(default_factory=dict)

    def row(self, case: Case) -> dict[str, Any]:
        """The case's fields, the median of each column over rounds and ranks, spread and number of rounds."""
        rounds = self.rounds[case.key]
        samples = [times for ranks in rounds for times in ranks if any(times)]
        columns = {name: median(times[i] for times in samples) for i, name in enumerate(case.columns)}
        totals = [median(sum(times) for times in ranks if any(times)) for ranks in rounds]
        return {**case.fields, **columns, "spread": round(spread(totals), 4), "rounds": len(rounds)}


def measure(
    cases: Sequence[Case],
    clock: Clock,
    *,
    seconds: float,
    taken: Timings | None = None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    keep: Callable[[Timings], None] = lambda timings: None,
) -> tuple[Timings, list[Case]]:
    """Time `cases` on every rank of the world; every rank must call with the same cases.

    Args:
        seconds: budget. Where it is too short for MIN_ROUNDS of all, the costliest cases that are not essential are
            left out; the essential ones are measured even beyond the budget.
        taken: (rank 0) what an earlier, interrupted call had measured; those cases are not repeated.
        progress: called on rank 0 with the finished fraction.
        keep: called on rank 0 after each round with all timings so far.
    Returns:
        On rank 0 the timings and the cases left out; on other ranks empty timings.
    Cost: one warm-up of every case, then rounds of about BATCH_S a case; two small collectives a case and round.
    """
    start = time.perf_counter()
    timings = taken or Timings()
    finished = _from_rank_0([1.0 if case.key in timings.rounds else 0.0 for case in cases])
    todo = [case for case, known in zip(cases, finished, strict=True) if not known]
    estimates = []
    for index, case in enumerate(todo):
        case.run(clock, 1)  # the first call loads kernels and opens connections
        _agree([0.0])
        estimates.append(max(sum(case.run(clock, 1)), 1e-7))
        progress(0.0, f"warming up {index + 1} of {len(todo)}")
    estimates = _agree(estimates)
    iterations = [min(500, max(1, ceil(BATCH_S / estimate))) for estimate in estimates]
    costs = [count * estimate + 5e-4 for count, estimate in zip(iterations, estimates, strict=True)]
    remaining = seconds - _agree([time.perf_counter() - start])[0]
    chosen, left_out = _within(remaining / MIN_ROUNDS, todo, costs)
    cost = sum(costs[index] for index in chosen)
    planned = max(MIN_ROUNDS, min(MAX_ROUNDS, int(remaining / cost) if cost else 0))
    taken_now: dict[str, list[list[list[float]]]] = {todo[index].key: [] for index in chosen}
    for turn in range(planned if chosen else 0):
        order = list(chosen)
        random.Random(turn).shuffle(order)  # the same order on every rank
        for index in order:
            _agree([0.0])
            times = todo[index].run(clock, iterations[index])
            gathered = _gather(times)
            if gathered:
                taken_now[todo[index].key].append(gathered)
        elapsed = _agree([time.perf_counter() - start])[0]
        progress(max((turn + 1) / planned, elapsed / seconds), f"round {turn + 1} of {planned}")
        if turn + 1 >= MIN_ROUNDS and elapsed * (turn + 2) / (turn + 1) > seconds:
            break
    if dist.get_rank() == 0:
        timings.rounds.update(taken_now)
        keep(timings)
    return timings, [todo[index] for index in left_out]


def _within(round_s: float, cases: Sequence[Case], costs: Sequence[float]) -> tuple[list[int], list[int]]:
    """Indices of the cases that fit a round of `round_s`, and of those left out: the costliest first."""
    chosen, left_out = list(range(len(cases))), []
    for index in sorted(chosen, key=lambda index: -costs[index]):
        if sum(costs[kept] for kept in chosen) <= round_s:
            break
        if not cases[index].essential:
            chosen.remove(index)
            left_out.append(index)
    return chosen, left_out


def _agree(values: Sequence[float]) -> list[float]:
    """The largest of all ranks' values, the same everywhere. Also the barrier: it runs on the CPU on any backend."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if len(values):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _from_rank_0(values: Sequence[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    if len(values):
        dist.broadcast(tensor, 0)
    return tensor.tolist()


def _gather(times: Sequence[float]) -> list[list[float]]:
    """Every rank's times on rank 0; empty elsewhere."""
    mine = torch.tensor(times, dtype=torch.float64)
    if dist.get_rank():
        dist.gather(mine, None, 0)
        return []
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.gather(mine, parts, 0)
    return [part.tolist() for part in parts]
