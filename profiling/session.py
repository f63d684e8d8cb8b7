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
from math import ceil, inf
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from fourfold.profiling.clock import Clock
from fourfold.profiling.fitting import spread

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

BATCH_S = 4e-3  # a short case is called as often as fills this, once a round
LONG_S = 5e-2  # a case whose first call takes this long is not called a second time to warm up
MIN_ROUNDS, MAX_ROUNDS = 5, 40
LATE, LATE_ROUNDS = 1.5, 3  # once LATE times the budget is spent, LATE_ROUNDS have to do in place of MIN_ROUNDS
AGREEING_S = 5e-4  # of the two small collectives beside a case


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
        facts: more fields of the row, found once on rank 0 after the timing; no communication in it.
        prepare: called once on every rank before anything is timed, and no part of the time budget (compiling).
    """

    table: str
    fields: Mapping[str, Any]
    columns: tuple[str, ...] = ("seconds",)
    run: Callable[[Clock, int], tuple[float, ...]]
    essential: bool = False
    facts: Callable[[], Mapping[str, Any]] = dict
    prepare: Callable[[], object] = lambda: None

    @property
    def key(self) -> str:
        """The same for the same case in any process."""
        return json.dumps([self.table, dict(self.fields)], sort_keys=True)


@dataclass(slots=True)
class Timings:
    """What has been timed so far, on rank 0.

    Attributes:
        rounds: by case key, one entry a round: the median over the ranks, of each column.
        elapsed_s: time spent on them.
    """

    rounds: dict[str, list[list[float]]] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def row(self, case: Case) -> dict[str, Any]:
        """The case's fields, the median of each column over the rounds, its spread and the number of rounds."""
        rounds = self.rounds[case.key]
        columns = {name: median(times[i] for times in rounds) for i, name in enumerate(case.columns)}
        deviation = round(spread([sum(times) for times in rounds]), 4)
        return {**case.fields, **columns, **case.facts(), "spread": deviation, "rounds": len(rounds)}

    def add(self, case: Case, ranks: Sequence[Sequence[float]]) -> None:
        """A further round: every rank's times. Ranks that had nothing to do (zeros) do not count."""
        busy = [times for times in ranks if any(times)]
        self.rounds.setdefault(case.key, []).append([median(column) for column in zip(*busy, strict=True)])


def measure(
    cases: Sequence[Case],
    clock: Clock,
    *,
    seconds: float,
    timings: Timings | None = None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    keep: Callable[[Timings], None] = lambda timings: None,
) -> tuple[Timings, list[Case]]:
    """Time `cases` on every rank of the world; every rank must call with the same cases.

    Args:
        seconds: budget; rank 0's counts. Where it is too short for MIN_ROUNDS of all, the costliest cases that are not
            essential are left out; the essential ones are measured even beyond the budget.
        timings: (rank 0) what an earlier, interrupted call had measured: its rounds and its time count.
        progress: called on rank 0 with the finished fraction.
        keep: called on rank 0 after each round with all timings so far.
    Returns:
        On rank 0 the timings, on other ranks empty ones; and the cases left out.
    Cost: one or two warm-up calls of every case, then rounds of about BATCH_S a case, with two small collectives each.
    """
    timings = timings or Timings()
    for case in cases:
        case.prepare()
    start = time.perf_counter() - timings.elapsed_s
    # Each rank has counted its own time: with budgets of their own, two ranks could choose other cases and wait for
    # each other in different ones.
    (seconds,) = _from_rank_0([seconds])
    past = _from_rank_0([float(len(timings.rounds.get(case.key, ()))) for case in cases])
    # What a call of each case takes, by the slowest rank. Once the budget is spent, what is not essential is not tried.
    estimates = [inf] * len(cases)
    for tried, index in enumerate(sorted(range(len(cases)), key=lambda index: not cases[index].essential)):
        case = cases[index]
        if not case.essential and _from_rank_0([time.perf_counter() - start])[0] > seconds:
            break
        # The first call loads kernels and opens connections: it tells the cost of long cases only.
        (estimate,) = _agree([sum(case.run(clock, 1))])
        if estimate < LONG_S:
            estimate = sum(case.run(clock, 1))
        estimates[index] = max(estimate, 1e-7)
        progress(0.0, f"warming up {tried + 1} of {len(cases)}")
    estimates = _agree(estimates)
    # How often a case is called in a round, which cases fit the budget, and for how many rounds it lasts.
    iterations = [min(500, max(1, ceil(BATCH_S / estimate))) for estimate in estimates]  # 1 where none is known
    costs = [count * estimate + AGREEING_S for count, estimate in zip(iterations, estimates, strict=True)]
    remaining = seconds - _from_rank_0([time.perf_counter() - start])[0]
    chosen, left_out = _within(remaining / MIN_ROUNDS, cases, costs)
    least = MIN_ROUNDS - int(min((past[index] for index in chosen), default=0.0))
    affordable = int(remaining / max(1e-9, sum(costs[index] for index in chosen)))
    planned = max(least, min(MAX_ROUNDS, affordable))
    # The rounds. After each, rank 0 has something that an interrupted profile can go on from.
    for turn in range(planned):
        order = list(chosen)
        random.Random(turn).shuffle(order)  # the same order on every rank
        for index in order:
            _agree([0.0])  # all ranks start the case together
            ranks = _gather(cases[index].run(clock, iterations[index]))
            if ranks:
                timings.add(cases[index], ranks)
        (elapsed,) = _from_rank_0([time.perf_counter() - start])
        if dist.get_rank() == 0:
            timings.elapsed_s = elapsed
            keep(timings)
            progress(max((turn + 1) / planned, elapsed / seconds), f"round {turn + 1} of {planned}")
        enough = turn + 1 >= least and elapsed * (turn + 2) / (turn + 1) > seconds
        if enough or (turn + 1 >= least - MIN_ROUNDS + LATE_ROUNDS and elapsed > LATE * seconds):
            break
    return timings, [cases[index] for index in left_out if cases[index].key not in timings.rounds]


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
