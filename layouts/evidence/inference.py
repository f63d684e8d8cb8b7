"""Which software ran the rows that do not say: the one whose predictions come nearest, and how surely it is that one.

Rows of one device, precision and family of models are taken to be of one software. Each candidate is scored by the
likelihood of its residuals: of step times and of peaks Student's t (sheets have outliers), of out-of-memory flags its
P(fits). Rows of one sheet share what is not stated, so a hundred of them count as ten.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.evidence.environments import Environment, environment, environments
from fourfold.layouts.evidence.runs import Run
from fourfold.layouts.evidence.validation import price_runs

MOST_ROWS = 10
"""Rows that a group of rows counts as."""
LOOKED_AT = 60
"""Rows of a group that are priced in every software, spread evenly over it."""
TIME_SPREAD, MEMORY_SPREAD, FREEDOM = 0.1, 0.1, 3.0
"""Of the residuals of the right software, the same for all: what was measured less often is no less likely for it."""
FAR = 0.35
"""Median error of step times beyond which no known software is said to fit."""
NAMED, GUESSED = 3.0, 1.0
"""What it counts for, in logarithms of probability, that the row's source or kernel names a software, and that kernel
and ZeRO stage are as in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """What was chosen for some rows."""

    rows: str
    """Which rows, in words."""
    num_rows: int
    software: str
    stated: bool
    probability: float
    """Of this software among the known ones; 1 where it was stated."""
    error: float | None
    """Median error of its step times, as a share; None without any."""

    @property
    def fits(self) -> bool:
        return self.error is None or self.error <= FAR

    def __str__(self) -> str:
        error = "" if self.error is None else f", median error of step times {self.error:.0%}"
        if self.stated:
            return f"{self.rows}: {self.num_rows} rows priced as {self.software}, as stated{error}"
        if not self.fits:
            return f"{self.rows}: {self.num_rows} rows fit none of the known software; nearest {self.software}{error}"
        return f"{self.rows}: {self.num_rows} rows priced as {self.software} (P {self.probability:.2f}){error}"


def settle(runs: Sequence[Run], software: str | None = None) -> tuple[list[Run], list[Inference]]:
    """The runs in the software that is stated, in their `software` column or for all, else in the likeliest.

    Args:
        software: a name or a file, for every run.
    Raises:
        ValueError: no such software.
    Cost: a pricing of all runs for each known software.
    """
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        family = re.split(r"[^A-Za-z]", run.model.name)[0] or run.model.name
        precision = run.row.get("precision", "")
        key = (
            software or run.row.get("software", ""), run.cluster.name, family,
            precision if "weights" in precision else "",
        )  # fmt: skip
        groups[key].append(index)
    settled, told = list(runs), []
    for (stated, cluster, family, precision), members in groups.items():
        group = [runs[index] for index in members]
        chosen, inference = _stated(group, stated) if stated else _likeliest(group)
        told.append(replace(inference, rows=f"{family} on {cluster}" + f", {precision}" * bool(precision)))
        for index, run in zip(members, chosen, strict=True):
            settled[index] = run
    return settled, told


def _stated(group: Sequence[Run], name: str) -> tuple[list[Run], Inference]:
    runs = [run.in_environment(environment(name)) for run in group]
    error = _error(runs, price_runs(runs))
    return runs, Inference(
        rows="", num_rows=len(runs), software=environment(name).name, stated=True, probability=1.0, error=error
    )


def _likeliest(group: Sequence[Run]) -> tuple[list[Run], Inference]:
    found: list[tuple[float, Environment, float | None]] = []
    some = [group[row * len(group) // LOOKED_AT] for row in range(LOOKED_AT)] if len(group) > LOOKED_AT else group
    for option in environments(group[0].cluster.device.type):
        try:
            runs = [run.in_environment(option) for run in some]
        except ValueError:
            continue  # a layout that this software has not
        prices = price_runs(runs)
        score = _score(runs, prices)
        score += NAMED * _is_named(group[0], option.name) + GUESSED * (option.name == group[0].software.name)
        found.append((score, option, _error(runs, prices)))
    scores = np.array([score for score, *_ in found])
    best = int(scores.argmax())
    probability = float(1.0 / np.exp(scores - scores[best]).sum())
    _, option, error = found[best]
    runs = [run.in_environment(option) for run in group]
    return runs, Inference(
        rows="", num_rows=len(runs), software=option.name, stated=False, probability=probability, error=error
    )


def _is_named(run: Run, name: str) -> bool:
    """Whether the row's source names the software, or its kernel is one that only this software's sheets name so."""
    source = run.row.get("source", "").lower()
    return name.split("-")[0] in source or (name == run.software.name and run.names_its_software)


def _score(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> float:
    """Log likelihood of all that was measured, as if of MOST_ROWS rows at most."""
    total = 0.0
    for kind in (_time_scores(runs, prices), _memory_scores(runs, prices), _flag_scores(runs, prices)):
        if kind:
            total += float(np.mean(kind)) * min(len(kind), MOST_ROWS)
    return total


def _time_scores(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> list[float]:
    return [
        _student(np.log(priced.step_s / run.step_s), TIME_SPREAD)
        for run, priced in zip(runs, prices, strict=True)
        if run.step_s
    ]


def _memory_scores(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> list[float]:
    return [
        _student(np.log(priced.peak_bytes / GIB / run.memory_gib), MEMORY_SPREAD)
        for run, priced in zip(runs, prices, strict=True)
        if run.memory_gib
    ]


def _flag_scores(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> list[float]:
    pairs = [(run.oom, priced.fit_probability) for run, priced in zip(runs, prices, strict=True) if run.oom is not None]
    return [float(np.log(np.clip(1 - chance if oom else chance, 0.01, 0.99))) for oom, chance in pairs]


def _student(residual: float, spread: float) -> float:
    """Log density of Student's t of FREEDOM degrees, up to a constant."""
    return float(-(FREEDOM + 1) / 2 * np.log1p((residual / spread) ** 2 / FREEDOM) - np.log(spread))


def _error(runs: Sequence[Run], prices: Sequence[PricedLayout]) -> float | None:
    errors = [abs(priced.step_s / run.step_s - 1) for run, priced in zip(runs, prices, strict=True) if run.step_s]
    return float(np.median(errors)) if errors else None
