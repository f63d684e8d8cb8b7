"""What a stage sees of itself while it runs: realised delay, prediction error, gradient norm, idle time."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fourfold.parallel.pipeline.local_parts import local_parts
from fourfold.parallel.pipeline.masters import MasterWeights
from fourfold.parallel.pipeline.parts import Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """One stage over one run.

    Attributes:
        num_micro_batches, num_updates: of the run.
        delay_mean, delay_max: updates between the weights that a forward read and those that its gradient met, as they
            came about (a short stream has fewer than the schedule's steady delay).
        prediction_error: |weights a forward read - weights its gradient met| / |the latter|, mean over samples: what
            weight prediction leaves of the delay.
        gradient_norm: 2-norm of the stage's gradient before clipping, mean over updates.
        idle_s, total_s: waiting for other stages, and in all.
    """

    stage: int
    num_micro_batches: int
    num_updates: int
    delay_mean: float
    delay_max: int
    prediction_error: float
    gradient_norm: float
    idle_s: float
    total_s: float

    @property
    def bubble(self) -> float:
        """Fraction of the run in which the stage waited."""
        return self.idle_s / self.total_s if self.total_s else 0.0

    def __str__(self) -> str:
        return (
            f"stage {self.stage}: delay {self.delay_mean:.2f} (at most {self.delay_max}) over {self.num_micro_batches} "
            f"micro-batches, prediction error {self.prediction_error:.2e}, gradient norm {self.gradient_norm:.3g}, "
            f"idle {100 * self.bubble:.0f}% of {self.total_s:.2f} s"
        )


class ScalarWriter(Protocol):
    """What TensorBoard's SummaryWriter has."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> object:
        """Record one figure."""


def write_reports(writer: ScalarWriter, reports: Iterable[StageReport], step: int) -> None:
    """Give the figures of all stages to a TensorBoard writer, as "pipeline/FIGURE/stage N".

    Args:
        writer: torch.utils.tensorboard.SummaryWriter, or what has its add_scalar.
        reports: `reports` of a pipeline or emulator with observe=True; the same on every rank, so one rank writes.
        step: the step that they belong to.
    """
    for report in reports:
        for name in ("delay_mean", "prediction_error", "gradient_norm", "bubble", "idle_s"):
            writer.add_scalar(f"pipeline/{name}/stage {report.stage}", getattr(report, name), step)


class Meter:
    """Gathers a stage's report; costs one more copy of the weights, and nothing where it is off."""

    def __init__(self, weights: MasterWeights, on: bool, parts: Parts) -> None:
        self._weights, self._on, self._parts = weights, on, parts
        self.begin()

    def begin(self, num_updates: int = 0) -> None:
        """At the start of a run, after so many updates of the stream that goes on."""
        self.num_updates = self._before = num_updates
        self._start = time.perf_counter()
        self._delays: list[int] = []
        self._errors: list[Tensor] = []  # these and the norms stay where they are until the report
        self._norms: list[Tensor] = []
        self._sampling = False

    def sample(self, weights: list[Tensor] | None) -> list[Tensor] | None:
        """The weights of this forward, if they are to be compared later: of one micro-batch in flight at a time."""
        if not self._on or self._sampling or not self._weights.live:
            return None
        self._sampling = True
        return self._weights.present() if weights is None else weights

    @torch.no_grad()
    def landed(self, seen: int, sample: list[Tensor] | None) -> None:
        """At the backward of a micro-batch whose forward read weights after `seen` updates."""
        if not self._on:
            return
        self._delays.append(self.num_updates - seen)
        if sample is not None:
            live, present = self._weights.live, local_parts(self._weights.held)
            moved = self._parts.norm(torch._foreach_sub(sample, present), live)
            self._errors.append(moved / self._parts.norm(present, live).clamp(min=1e-30))
            self._sampling = False

    def update(self, norm: Tensor) -> None:
        self.num_updates += 1
        if self._on:
            self._norms.append(norm)

    def report(self, stage: int, idle_s: float) -> StageReport:
        return StageReport(
            stage=stage,
            num_micro_batches=len(self._delays),
            num_updates=self.num_updates - self._before,
            delay_mean=_mean(self._delays),
            delay_max=max(self._delays, default=0),
            prediction_error=_mean([float(error) for error in self._errors]),
            gradient_norm=_mean([float(norm) for norm in self._norms]),
            idle_s=idle_s,
            total_s=time.perf_counter() - self._start,
        )


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
