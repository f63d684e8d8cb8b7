"""How right the planner is about software that it infers, and how honest its doubt: held-out groups, reliability."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.evidence.environments import environment
from fourfold.layouts.evidence.inference import settle
from fourfold.layouts.evidence.runs import Run, read_runs
from fourfold.layouts.evidence.software_fit import fit_software
from fourfold.layouts.evidence.validation import price_runs, spearman

FILES = (
    "hagemann2023_main_sweep.csv", "llm_foundry_a100_80gb.csv", "megatron_core_h100_weak_scaling.csv",
    "ultrascale_h100.csv", "fourfold_h100_single.csv",
)  # fmt: skip
FOLDS = 3
NEAR = 2.0
"""Layouts of at most so many times the step of the best: those that anybody would run."""
BINS = (0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0)

Row = tuple[str, str, float]
"""(case, metric, figure)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one model on one number of devices."""

    name: str
    runs: list[Run]

    def rows(self, prices: Sequence[PricedLayout]) -> Iterator[Row]:
        """What the prices of its runs are worth."""
        measured = np.array([run.step_s for run in self.runs])
        said = np.array([priced.step_s for priced in prices])
        near = measured <= NEAR * measured.min()
        case = f"nanotron, held out: {self.name} ({len(self.runs)} runs)"
        yield case, "near the best: median error of step time", float(np.median(np.abs(said / measured - 1)[near]))
        yield case, "spearman", spearman(said.tolist(), measured.tolist())
        fitting = [index for index, priced in enumerate(prices) if priced.fits]
        pick = min(fitting, key=lambda index: prices[index].expected_s) if fitting else 0
        yield case, "pick slower than the best by", float(measured[pick] / measured.min() - 1)
        yield case, "step times inside their 80% interval", float(np.mean(_inside(self.runs, prices)))
        peaks = np.array([priced.peak_bytes / GIB for priced in prices])
        errors = np.abs(peaks / np.array([run.memory_gib for run in self.runs]) - 1)
        yield case, "median error of peak", float(np.median(errors))
        yield case, "90th percentile of the error of peak", float(np.quantile(errors, 0.9))
        yield case, "peaks inside their 80% interval", float(np.mean(_inside_memory(self.runs, prices)))


def _inside(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> list[bool]:
    return [p.step_low_s <= run.step_s <= p.step_high_s for run, p in zip(runs, prices, strict=True) if run.step_s]


def _inside_memory(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> list[bool]:
    return [
        p.peak_low_bytes <= run.memory_gib * GIB <= p.peak_high_bytes
        for run, p in zip(runs, prices, strict=True)
        if run.memory_gib
    ]


def held_out(folder: Path) -> Iterator[Row]:
    """Each third of nanotron's groups, predicted by constants of software and network fitted to the other two."""
    nanotron = environment("nanotron")
    members: dict[str, list[Run]] = defaultdict(list)
    for run in read_runs(folder / "ultrascale_h100.csv")[1]:
        bare = replace(run.in_environment(nanotron), cluster=run.cluster)  # without the network that was fitted to all
        members[f"{run.model.name} on {run.layout.world_size}"].append(bare)
    groups = [Group(name, runs) for name, runs in members.items()]
    for fold in range(FOLDS):
        rest = [run for index, group in enumerate(groups) if index % FOLDS != fold for run in group.runs]
        fit = fit_software(rest, network=True)
        for group in groups[fold::FOLDS]:
            fitted = Group(group.name, [fit.priced_as(run) for run in group.runs])
            yield from fitted.rows(price_runs(fitted.runs))


def shipped(folder: Path) -> Iterator[Row]:
    """Every published file as `validate` prices it: what is inferred, how many lie inside their intervals, P(fits)."""
    chances: list[tuple[float, bool]] = []
    for name in FILES:
        runs, told = settle(read_runs(folder / name)[1])
        prices = price_runs(runs)
        for inference in told:
            case = f"{name}: {inference.rows} as {inference.software} ({inference.num_rows} rows)"
            yield case, "probability", inference.probability
            if inference.error is not None:
                yield case, "median error of step time", inference.error
        if inside := _inside(runs, prices):
            yield f"{name} ({len(inside)} runs)", "step times inside their 80% interval", float(np.mean(inside))
        if inside := _inside_memory(runs, prices):
            yield f"{name} ({len(inside)} runs)", "peaks inside their 80% interval", float(np.mean(inside))
        chances += [
            (priced.fit_probability, not run.oom)
            for run, priced in zip(runs, prices, strict=True)
            if run.oom is not None and any(other.oom for other in runs)
        ]
    yield from reliability(chances)


def reliability(chances: Sequence[tuple[float, bool]]) -> Iterator[Row]:
    """P(fits) against how many did fit, bin by bin, and the mean logarithmic loss."""
    said, fitted = np.array([chance for chance, _ in chances]), np.array([fit for _, fit in chances])
    for low, high in pairwise(BINS):
        here = (said >= low) & ((said < high) | (high == BINS[-1]))
        if here.any():
            case = f"P(fits) from {low:g} to {high:g} ({int(here.sum())} runs)"
            yield case, "share that fits", float(fitted[here].mean())
    clipped = np.clip(said, 1e-3, 1 - 1e-3)
    loss = -np.where(fitted, np.log(clipped), np.log(1 - clipped)).mean()
    yield f"P(fits) ({len(said)} runs)", "log loss", float(loss)
