"""How right the model is about runs that happened: accuracy of time, of order, of what fits, and of the pick."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.price import PricedLayout, price
from fourfold.layouts.evidence.fit import Fit, load_fit
from fourfold.layouts.evidence.runs import Run
from fourfold.layouts.inputs.layout import Layout

LEAST_RUNS = 5
"""A sweep with fewer finished runs has no order worth a correlation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Accuracy on some runs; None where they do not tell."""

    num_runs: int
    mape: float | None
    """Mean absolute percentage error of the step time, as a share."""
    spearman: float | None
    """Rank correlation of predicted and measured step time inside a sweep, mean over sweeps."""
    oom_accuracy: float | None
    oom_precision: float | None
    """Of those predicted not to fit, how many did not."""
    oom_recall: float | None
    """Of those that did not fit, how many were predicted."""
    top1: float | None
    """Measured speed of the predicted best of a sweep over that of its best, mean over sweeps; 0 for an OOM."""
    num_oom_picks: int
    num_sweeps: int


def price_runs(runs: Sequence[Run], fit: Fit | None = None) -> list[PricedLayout]:
    """Every run's price, in order; where a row leaves options open, that of the fastest that fits.

    Args:
        fit: the constants; None for those that are shipped.
    """
    fit = fit or load_fit()
    runs = [run.under(fit.study) for run in runs]
    groups: dict[object, list[tuple[int, Layout]]] = defaultdict(list)
    for index, run in enumerate(runs):
        key = (run.model, run.cluster.name, run.software, run.layout.global_batch, run.layout.seq_len)
        groups[key] += [(index, layout) for layout in run.alternatives]
    best: dict[int, PricedLayout] = {}
    for members in groups.values():
        first = runs[members[0][0]]
        layouts = [layout for _, layout in members]
        prices = price(first.model, first.cluster, layouts, software=first.software, constants=fit.constants)
        for (index, _), priced in zip(members, prices, strict=True):
            before = best.get(index)
            if before is None or (not priced.fits, priced.step_s) < (not before.fits, before.step_s):
                best[index] = priced
    return [best[index] for index in range(len(runs))]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    ranks = [_ranks(np.asarray(values, float)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


def score(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> Scores:
    """Score predictions against what happened."""
    pairs = list(zip(runs, prices, strict=True))
    errors = [abs(p.step_s / run.step_s - 1) for run, p in pairs if run.step_s]
    told = [(run.oom, not p.fits) for run, p in pairs if run.oom is not None]
    # Where no run failed, or none is told to have, there is nothing to be accurate about.
    flags = told if any(oom for oom, _ in told) else []
    hits = sum(oom and predicted for oom, predicted in flags)
    predicted_oom, actual_oom = sum(p for _, p in flags), sum(bool(o) for o, _ in flags)
    sweeps: dict[str, list[tuple[Run, PricedLayout]]] = defaultdict(list)
    for run, priced in pairs:
        sweeps[run.sweep].append((run, priced))
    correlations, picks, oom_picks = [], [], 0
    for members in sweeps.values():
        done = [(run.step_s, p.step_s) for run, p in members if run.step_s]
        if len(done) < LEAST_RUNS:
            continue
        measured, predicted = zip(*done, strict=True)
        if len(set(measured)) > 1:  # else there is no order to be right about
            correlations.append(spearman(measured, predicted) if len(set(predicted)) > 1 else 0.0)
        fitting = [(p.expected_s, run) for run, p in members if p.fits]
        if fitting:
            chosen = min(fitting, key=lambda pair: pair[0])[1]
            oom_picks += bool(chosen.oom)
            picks.append(min(a for a, _ in done) / chosen.step_s if chosen.step_s else 0.0)
    return Scores(
        num_runs=len(runs),
        mape=float(np.mean(errors)) if errors else None,
        spearman=float(np.mean(correlations)) if correlations else None,
        oom_accuracy=float(np.mean([a == b for a, b in flags])) if flags else None,
        oom_precision=hits / predicted_oom if predicted_oom else None,
        oom_recall=hits / actual_oom if actual_oom else None,
        top1=float(np.mean(picks)) if picks else None,
        num_oom_picks=oom_picks,
        num_sweeps=len(picks),
    )
