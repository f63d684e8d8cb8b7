"""Fits the model's few physical constants to measured runs, and says how well the fit carries over.

Step times: least squares on log ratios with the weights of Student's t (published sheets have outliers), each constant
held near its prior by a Gaussian on its logarithm. Memory: the likelihood of the out-of-memory flags, by coordinate
search.
Cross-validation leaves out whole sweeps, because rows of one sweep share what is not stated about it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.memory import memory_of
from fourfold.layouts.cost.price import PricedLayout
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.time import time_of
from fourfold.layouts.evidence.fit import Fit
from fourfold.layouts.evidence.runs import Run
from fourfold.layouts.evidence.validation import price_runs
from fourfold.layouts.inputs.layout import Layout

NOISE = 0.04
"""Relative scatter that counts as agreement: repeated runs differ by under 1%, unstated settings by more."""
VAGUE_NOISE = 0.12
"""The same of runs whose micro-batch, interleaving or kernel is not told."""
FREEDOM = 2.0
"""Of Student's t: how soon a residual counts as an outlier of the sheet."""

PRIOR_SPREAD = {
    "matmul_peaks.A100": 0.05, "matmul_peaks.H100": 0.02, "matmul_peaks.V100": 0.05, "matmul_half": 0.7,
    "attention_forward": 0.15, "attention_backward": 0.15, "flash1": 0.2, "triton": 0.2, "attention_half": 0.5,
    "memory_efficiency": 0.05, "kernel_gap_s": 0.7, "sync_s": 1.0, "norm_bytes": 0.3, "inner_link": 0.1,
    "outer_link": 0.05, "study.sends_share": 1.0, "study.reduction_share": 1.0,
    "study.checkpoint_stall_s": 1.5, "step_overhead_s": 0.7, "straggler": 0.7,
}  # fmt: skip
"""Standard deviation of each constant's logarithm about its prior."""
MEMORY_SPREAD = {
    "fragmentation": 0.7,
    "reserve_bytes": 0.4,
    "study.flash1_bytes": 0.4,
    "memory_spread": 0.5,
    "memory_spread_bytes": 0.7,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """One held-out group of runs and its predictions by constants fitted on the others."""

    name: str
    runs: list[Run]
    prices: list[PricedLayout]


def calibrate(runs: Sequence[Run], prior: Fit, *, report: Callable[[str], None] | None = None) -> Fit:
    """A fit that explains the runs best, near the prior where the runs do not tell.

    Args:
        runs: what was measured; those with a step time fit the time, those with an out-of-memory flag the memory.
        report: called with a line a stage of the fit.
    Cost: some 150 pricings of all runs.
    """
    tell = report or (lambda line: None)
    timed = [run for run in runs if run.step_s and run.software.attention not in ("eager", "fused")]
    fitted = _fit_time(timed, prior) if timed else prior
    tell(f"fitted time on {len(timed)} runs")
    # The work space of kernels that store scores is not modelled: their flags would bend what is.
    flagged = [run for run in runs if run.oom is not None and run.software.attention in ("flash2", "flash1")]
    if any(run.oom for run in flagged):
        fitted = _fit_memory(flagged, fitted)
        tell(f"fitted memory on {len(flagged)} runs, {sum(bool(run.oom) for run in flagged)} out of memory")
    return fitted


def _fit_time(runs: Sequence[Run], prior: Fit, *, rounds: int = 5) -> Fit:
    names = list(PRIOR_SPREAD)
    start = np.array([prior.get(name) for name in names])
    spread = np.array([PRIOR_SPREAD[name] for name in names])
    measured = np.log([run.step_s for run in runs if run.step_s])
    # What a run leaves open is settled once, by the prior: a choice that flips has no derivative.
    groups = _grouped(runs, [priced.layout for priced in price_runs(runs, prior)])

    def residual(offsets: Column) -> Column:
        values = dict(zip(names, (start * np.exp(offsets)).tolist(), strict=True))
        fit = prior.with_values(values)
        steps = np.empty(len(runs))
        for first, rows, candidates in groups:
            steps[rows] = time_of(_pricing(first, candidates, fit)).total
        return np.log(steps) - measured

    noise = np.array([VAGUE_NOISE if run.vague else NOISE for run in runs])
    offsets = np.zeros(len(names))
    for _ in range(rounds):
        here = residual(offsets)
        step = 0.02
        columns = [(residual(offsets + step * unit) - here) / step for unit in np.eye(len(names))]
        jacobian = np.stack(columns, axis=1)
        weights = 1.0 / (1.0 + (here / noise) ** 2 / FREEDOM) / noise**2
        normal = (jacobian * weights[:, None]).T @ jacobian + np.diag(1 / spread**2)
        slope = (jacobian * weights[:, None]).T @ here + offsets / spread**2
        offsets = offsets - np.clip(np.linalg.solve(normal, slope), -0.5, 0.5)
    return prior.with_values(dict(zip(names, (start * np.exp(offsets)).tolist(), strict=True)))


def _pricing(run: Run, layouts: Candidates, fit: Fit) -> Pricing:
    """Layouts of a run's model on its cluster, in its software, under a fit's constants."""
    run = run.under(fit.study)
    return Pricing(
        layouts=layouts, model=run.model, cluster=run.cluster, software=run.software, constants=fit.constants
    )


def _grouped(runs: Sequence[Run], layouts: Sequence[Layout]) -> list[tuple[Run, list[int], Candidates]]:
    """Runs of one model, cluster, software and batch together: (one of them, their rows, their layouts)."""
    members: dict[object, list[int]] = {}
    for row, run in enumerate(runs):
        key = (run.model, run.cluster.name, run.software, run.layout.global_batch, run.layout.seq_len)
        members.setdefault(key, []).append(row)
    return [(runs[rows[0]], rows, Candidates.of([layouts[row] for row in rows])) for rows in members.values()]


def _fit_memory(runs: Sequence[Run], prior: Fit, *, rounds: int = 5) -> Fit:
    names = list(MEMORY_SPREAD)
    fits = np.array([not run.oom for run in runs])

    groups = _grouped(runs, [run.layout for run in runs])

    def loss(offsets: Sequence[float]) -> float:
        values = {n: prior.get(n) * float(np.exp(o)) for n, o in zip(names, offsets, strict=True)}
        fit = prior.with_values(values)
        probability = np.empty(len(runs))
        for first, rows, candidates in groups:
            probability[rows] = memory_of(_pricing(first, candidates, fit)).fit_probability
        chance = np.clip(probability, 1e-4, 1 - 1e-4)
        away = sum((o / MEMORY_SPREAD[n]) ** 2 for n, o in zip(names, offsets, strict=True)) / 2
        return float(-np.where(fits, np.log(chance), np.log(1 - chance)).sum() + away)

    offsets, step = [0.0] * len(names), 0.3
    best = loss(offsets)
    for _ in range(rounds):
        for index in range(len(names)):
            for sign in (1, -1):
                moved = offsets.copy()
                moved[index] += sign * step
                value = loss(moved)
                if value < best:
                    best, offsets = value, moved
                    break
        step *= 0.6
    values = {n: prior.get(n) * float(np.exp(o)) for n, o in zip(names, offsets, strict=True)}
    return prior.with_values(values)


def folds_of(runs: Sequence[Run]) -> list[str]:
    """The fold of each run: its sweep, or for small sweeps the family of its model (MPT, GPT)."""
    counts = Counter(run.sweep for run in runs)
    return [
        run.sweep if counts[run.sweep] >= 10 else re.split(r"[^A-Za-z]", run.model.name)[0] or run.model.name
        for run in runs
    ]


def cross_validate(runs: Sequence[Run], prior: Fit) -> Iterator[Fold]:
    """Each fold predicted by constants that were fitted without it."""
    folds = folds_of(runs)
    for name in sorted(set(folds)):
        rest = [run for run, fold in zip(runs, folds, strict=True) if fold != name]
        held = [run for run, fold in zip(runs, folds, strict=True) if fold == name]
        yield Fold(name=name, runs=held, prices=price_runs(held, calibrate(rest, prior)))
