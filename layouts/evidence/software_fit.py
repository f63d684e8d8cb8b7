"""Fits the few constants of one software to runs of it, and the scatter that is left: a dozen runs will do.

Step times and peaks by least squares on log ratios with the weights of Student's t, each constant held near its start
by a Gaussian on its logarithm, so that three runs do not move what they do not tell. The physical constants of devices
and links stay: software shares them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fourfold.layouts.cost.candidates import Candidates, Column
from fourfold.layouts.cost.doubt import TENTH, num_exchanges, waited_share
from fourfold.layouts.cost.memory import memory_of
from fourfold.layouts.cost.price import GIB
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.cost.time import time_of
from fourfold.layouts.evidence.runs import Run
from fourfold.layouts.evidence.validation import price_runs
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import load_constants
from fourfold.layouts.inputs.software import Software

TIME: dict[str, tuple[float, float]] = {
    "compute_share": (1.0, 0.2), "layer_host_s": (1e-3, 0.7), "layer_host_tp_s": (5e-4, 0.7),
    "micro_batch_s": (5e-4, 1.0), "step_s": (2e-2, 1.0), "dp_overlap": (0.5, 0.5),
    "sharded_overlap": (1.0, 0.5), "tp_overlap": (0.5, 0.5), "piece_s": (1e-5, 1.0),
}  # fmt: skip
"""Of each constant of step times: where a fit starts that finds none, and the deviation of its logarithm about that."""
MEMORY: dict[str, tuple[float, float]] = {
    "kept_share": (1.0, 0.2), "logits_bytes": (10.0, 0.3), "bucket_bytes": (1.0, 1.0), "extra_peak_bytes": (3e8, 1.0),
}  # fmt: skip
NETWORK: dict[str, tuple[float, float]] = {
    "share": (0.5, 0.7), "reduction_share": (0.5, 0.7), "pipelined_share": (0.5, 0.7), "pipelined_layer_s": (1e-3, 1.0),
}  # fmt: skip
"""Of the outermost link of the cluster that the runs were on."""
SHARES = ("dp_overlap", "sharded_overlap", "tp_overlap", "share", "reduction_share", "pipelined_share")
NOISE, FREEDOM, ROUNDS, STEP = 0.06, 2.0, 8, 0.03
LEAST_SPREAD = 0.02
"""No prediction is closer than repeated runs are to each other."""
LATE, LEAST_STALL_S, FEWEST_STALLS, ALIKE, STALL_ROUNDS = 1.3, 0.2, 8, 0.8, 3
"""A run stalled where it took LATE times what is predicted and LEAST_STALL_S more an exchange, as FEWEST_STALLS did and
all by about the same: half of them within ALIKE of the median."""
FAR, FAR_WEIGHT = 2.0, 0.3
"""A layout of over FAR times the step of the best of its sweep counts FAR_WEIGHT: nobody would run it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftwareFit:
    """Software with its constants, and what its runs' cluster reached of its outermost link (empty: not fitted)."""

    software: Software
    outer: Mapping[str, float]

    def cluster(self, cluster: Cluster) -> Cluster:
        if not self.outer or not cluster.links:
            return cluster
        *inner, outer = cluster.links
        return replace(cluster, links=(*inner, replace(outer, **self.outer)))  # type: ignore[arg-type]

    def priced_as(self, run: Run) -> Run:
        """A run under this fit: its software but for the attention kernel, which is the row's."""
        kernel = {"attention": run.software.attention, "fused_norm": run.software.fused_norm}
        return replace(run, software=replace(self.software, **kernel), cluster=self.cluster(run.cluster))  # type: ignore[arg-type]


def fit_software(runs: Sequence[Run], *, network: bool = False) -> SoftwareFit:
    """The constants of the software of some runs, near what it has where the runs do not tell.

    Args:
        runs: all of one software; those with a step time fit the time, those with a peak the memory.
        network: also fit what the cluster's outermost link reached; for runs over several nodes of one cluster.
    Raises:
        ValueError: neither a step time nor a peak.
    Cost: some hundred pricings of all runs.
    """
    # A run that streams without saying in how many chunks tells nothing of either.
    told = [run for run in runs if run.layout.checkpointing != "stream" or run.layout.stream_chunks > 1]
    timed, held = [run for run in told if run.step_s], [run for run in told if run.memory_gib]
    if not timed and not held:
        raise ValueError("no run tells a step time or a peak: nothing to fit a software to")
    fit = SoftwareFit(software=runs[0].software, outer={})
    if timed:
        fit = _fit_times(fit, timed, {**TIME, **(NETWORK if network else {})})
    if held:
        peaks = np.log([run.memory_gib * GIB for run in held if run.memory_gib])
        predicted = _predictor(held, _peak_bytes)
        fit = _solve(fit, MEMORY, peaks, np.ones(len(held)), predicted)
        scatter = _scatter(predicted(fit) - peaks)
        fit = replace(fit, software=replace(fit.software, memory_spread=scatter))
    return fit


def _fit_times(fit: SoftwareFit, runs: Sequence[Run], starts: Mapping[str, tuple[float, float]]) -> SoftwareFit:
    """The constants of step times, and the doubt; runs that stalled have no say but in how many they are."""
    times = np.log([run.step_s for run in runs if run.step_s])
    weights, predicted = _weights(runs), _predictor(runs, _step_s)
    exchanges = np.exp(_predictor(runs, _exchanges)(fit))
    stalled, stall_s, chance = np.zeros(len(runs), bool), 0.0, 0.0
    for _ in range(STALL_ROUNDS):
        fit = _solve(fit, starts, times, weights * ~stalled, predicted)
        before = stalled
        stalled, stall_s, chance = stalls(np.exp(times), np.exp(predicted(fit)), exchanges)
        if (stalled == before).all():
            break
    residual, waited = predicted(fit) - times, np.exp(_predictor(runs, _waited)(fit))
    own, network_spread = doubt_of(residual[~stalled], waited[~stalled])
    doubt = {"time_spread": own, "network_spread": network_spread, "devices": _devices(runs)}
    doubt |= {"stall_s": stall_s, "stall_chance": chance}
    return replace(fit, software=replace(fit.software, **doubt))  # type: ignore[arg-type]


def stalls(measured: Column, predicted: Column, exchanges: Column) -> tuple[Column, float, float]:
    """(which runs stalled, seconds an exchange, share of the pipelined runs): many that are late by the same, or none.

    Args:
        measured: seconds a step, and `predicted` the same.
        exchanges: of a stage with its neighbours in a step; below 1 without a pipeline.
    """
    piped = exchanges >= 1
    late = (measured - predicted) / np.maximum(exchanges, 1)
    stalled = piped & (measured > LATE * predicted) & (late > LEAST_STALL_S)
    if stalled.sum() < FEWEST_STALLS:
        return np.zeros(len(measured), bool), 0.0, 0.0
    low, middle, high = np.quantile(late[stalled], (0.25, 0.5, 0.75))
    if high - low > ALIKE * middle:
        return np.zeros(len(measured), bool), 0.0, 0.0
    return stalled, float(middle), float(stalled.sum() / piped.sum())


def _devices(runs: Sequence[Run]) -> str:
    return ", ".join(sorted({run.cluster.device.name.split("-")[0] for run in runs}))


def doubt_of(residual: Column, waited: Column) -> tuple[float, float]:
    """(time_spread, network_spread) whose middle 80% fits logarithmic residuals best, by the pinball loss on a grid.

    Args:
        residual: log predicted - log measured, a run.
        waited: `waited_share` of each.
    """
    miss = np.abs(residual)
    best, chosen = np.inf, (0.15, 0.3)
    for own in np.geomspace(LEAST_SPREAD, 1.0, 24):
        for network in (0.0, *np.geomspace(0.05, 8.0, 24)):
            over = miss - TENTH * np.hypot(own, network * waited)
            loss = float(np.maximum(0.8 * over, -0.2 * over).mean())
            if loss < best - 1e-9:
                best, chosen = loss, (float(own), float(network))
    return chosen


def _scatter(residual: Column) -> float:
    """The deviation of a normal distribution with as many in its middle 80%; no less than repeated runs differ by."""
    return max(LEAST_SPREAD, float(np.quantile(np.abs(residual), 0.8)) / TENTH)


def _weights(runs: Sequence[Run]) -> Column:
    best: dict[str, float] = {}
    for run in runs:
        if run.step_s:
            best[run.sweep] = min(best.get(run.sweep, np.inf), run.step_s)
    return np.array([1.0 if (run.step_s or 0) <= FAR * best[run.sweep] else FAR_WEIGHT for run in runs])


def _step_s(pricing: Pricing) -> Column:
    return time_of(pricing).total


def _exchanges(pricing: Pricing) -> Column:
    return np.maximum(num_exchanges(pricing.layouts), 1e-6)


def _waited(pricing: Pricing) -> Column:
    return np.maximum(waited_share(time_of(pricing)), 1e-6)


def _peak_bytes(pricing: Pricing) -> Column:
    return memory_of(pricing).peak


def _predictor(runs: Sequence[Run], quantity: Callable[[Pricing], Column]) -> Callable[[SoftwareFit], Column]:
    """Logarithms of a quantity of every run, as a function of the fit; what a row leaves open is settled once."""
    layouts = [priced.layout for priced in price_runs(runs)]
    members: dict[object, list[int]] = {}
    for index, run in enumerate(runs):
        kernel = (run.software.attention, run.software.fused_norm)
        key = (run.model, run.cluster.name, kernel, run.layout.global_batch, run.layout.seq_len)
        members.setdefault(key, []).append(index)
    groups = [(rows, Candidates.of([layouts[row] for row in rows])) for rows in members.values()]

    def predicted(fit: SoftwareFit) -> Column:
        values = np.empty(len(runs))
        for rows, candidates in groups:
            run = fit.priced_as(runs[rows[0]])
            values[rows] = quantity(
                Pricing(
                    layouts=candidates,
                    model=run.model,
                    cluster=run.cluster,
                    software=run.software,
                    constants=load_constants(),
                )
            )
        return np.log(values)

    return predicted


def _solve(
    fit: SoftwareFit,
    starts: Mapping[str, tuple[float, float]],
    measured: Column,
    weights: Column,
    predicted: Callable[[SoftwareFit], Column],
) -> SoftwareFit:
    """Gauss-Newton on the logarithms of the constants, re-weighted by the residuals."""
    outer_start = {name: fit.outer.get(name, 0.0) for name in NETWORK}
    start = np.array([(outer_start.get(n) or getattr(fit.software, n, 0.0)) or starts[n][0] for n in starts])
    spread = np.array([starts[name][1] for name in starts])

    def at(offsets: Column) -> SoftwareFit:
        values = {name: float(value) for name, value in zip(starts, start * np.exp(offsets), strict=True)}
        values |= {name: min(values[name], 1.0) for name in SHARES if name in values}
        own = {name: value for name, value in values.items() if name not in NETWORK}
        outer = {name: value for name, value in values.items() if name in NETWORK}
        software = replace(fit.software, **own)  # type: ignore[arg-type]
        return SoftwareFit(software=software, outer={**fit.outer, **outer})

    offsets = np.zeros(len(start))
    for _ in range(ROUNDS):
        residual = predicted(at(offsets)) - measured
        columns = [(predicted(at(offsets + STEP * unit)) - measured - residual) / STEP for unit in np.eye(len(start))]
        jacobian = np.stack(columns, axis=1)
        weight = weights / (1.0 + (residual / NOISE) ** 2 / FREEDOM) / NOISE**2
        normal = (jacobian * weight[:, None]).T @ jacobian + np.diag(1 / spread**2)
        slope = (jacobian * weight[:, None]).T @ residual + offsets / spread**2
        offsets = offsets - np.clip(np.linalg.solve(normal, slope), -0.5, 0.5)
    return at(offsets)
