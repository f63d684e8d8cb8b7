"""Pipelined backpropagation in one process: the same delays and weights as the runtime's, bit for bit in fp32.

Where every stage runs on a rank of its own, micro-batch i meets on each stage the weights of the update its schedule
says. This file gives it the same weights from a history of past ones, one micro-batch after another, without a rank, a
message or a second micro-batch in flight: an independent statement of what the runtime must compute, and a way to try
170 stages on a laptop or to inject delays into a training loop.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fourfold.parallel.pipeline.checks import (
    OneRunAtATime,
    check_model_norm,
    check_pause,
    check_pipeline,
    check_recomputation,
    check_untied,
    evaluating,
    pairs,
)
from fourfold.parallel.pipeline.norms import forget, joined
from fourfold.parallel.pipeline.program import Program
from fourfold.parallel.pipeline.report import StageReport
from fourfold.parallel.pipeline.schedule import PipelineSchedule, lag_updates, resolve_schedule
from fourfold.parallel.pipeline.settings import PipelineOptions, PipelineSettings
from fourfold.parallel.pipeline.stage import Flight, PipelineStage
from fourfold.parallel.pipeline.values import copied
from fourfold.parallel.pipeline.versions import Weights

Versions = tuple[int, int]  # updates that a micro-batch's forward has seen, updates before its own


class PipelinedBackpropEmulator:
    """Train `stages` as PipelinedBackprop would on one rank a stage.

    Args:
        stages: S modules, applied one after another, as for PipelinedBackprop.
        delays: D_s in updates for each stage, in place of the schedule's; all 0 is plain training, bit for bit.
        options: as for PipelinedBackprop.
    Raises:
        ValueError: unknown names, delays that do not fit, a program that does not validate, a weight of two stages.
    Cost: D_s copies of the weights of each stage, at most; the time of training on one process and S graph cuts.
    Source: Kosson et al. 2021 (arXiv 2003.11666), appendix G.2 simulates delays in the same way.

    Attributes:
        reports: with observe=True, every stage's StageReport of the last run; nobody waits here.
    """

    def __init__(
        self, stages: Sequence[nn.Module], *, delays: Sequence[int] | None = None, **options: Unpack[PipelineOptions]
    ) -> None:
        settings = PipelineSettings(**options)
        check_pipeline(stages, settings)
        self.schedule = resolve_schedule(settings.schedule, len(stages))
        self.mitigation = settings.chosen
        # Delays from the schedule, or those given.
        if delays is not None:
            if isinstance(self.schedule, Program):
                raise ValueError("delays replace those of a named schedule; a Program has its own: leave delays out")
            if len(delays) != len(stages) or min(delays) < 0 or any(delay != int(delay) for delay in delays):
                raise ValueError(
                    f"delays={list(delays)}: one number of updates, at least 0, for each of {len(stages)} stages"
                )
        self._delays = None if delays is None else list(map(int, delays))
        steady: list[int | float] = self.schedule.delays() if self._delays is None else list(self._delays)
        buffered = self.schedule.double_buffered and delays is None
        for module in stages:
            check_recomputation(module, steady, self.mitigation, double_buffered=buffered)
        check_untied(stages)
        check_model_norm(settings.clipping, self.schedule)
        # The stages, with masters of their own wherever past weights must not be overwritten.
        last = len(stages) - 1
        self.stages = [
            PipelineStage(
                module,
                index=index,
                delay=steady[index],
                lag_updates=lag_updates(steady, index),
                double_buffered=buffered,
                separate=steady[index] > 0,
                **(options if index == last else {**options, "loss_fn": None}),  # type: ignore[misc]
            )
            for index, module in enumerate(stages)
        ]
        self._clips_model = settings.clipping if settings.clipping and settings.clipping.scope == "model" else None
        self.reports: list[StageReport] = []
        self._alone = OneRunAtATime()
        self._paused: _Paused | None = None

    def run(self, batches: Iterable[tuple[Any, Any]], *, drain: bool = True) -> list[float]:
        """Train on (input, target) micro-batches to the end of the stream; returns their losses, seen in training.

        Args:
            drain: False: the next run goes on as if its stream were a part of this one. Here the weights in between are
                those after all backwards of this stream, where stages on ranks have made fewer: they are not evaluated
                or saved.
        """
        if not drain:
            check_pause(self.stages[0].settings.clipping, self.schedule)
        with self._alone.running("run"):
            return self._run(batches, drain)

    def _run(self, batches: Iterable[tuple[Any, Any]], drain: bool) -> list[float]:
        paused, self._paused = self._paused, None
        for index, stage in enumerate(self.stages):
            if paused is None:
                stage.begin()
            else:
                stage.begin(paused.under_way[index], paused.histories[index].num_updates)
                stage.weights.set_gradients(paused.sums[index])
        if paused is None:
            histories = [_History(stage) for stage in self.stages]
            versions = [self._versions(index) for index in range(len(self.stages))]
            ahead = [next(each, None) for each in versions]
        else:
            histories, versions, ahead = paused.histories, paused.versions, paused.ahead
        losses: list[Tensor] = []
        for value, target in map(copied, pairs(batches)):
            now = ahead
            ahead = [next(each, None) for each in versions]
            # Forward through all stages, each with the weights of its own past.
            flights: list[Flight] = []
            for stage, history, version in zip(self.stages, histories, now, strict=True):
                if version is None:
                    raise ValueError(f"the program is for {len(losses)} micro-batches; the stream has more")
                flights.append(stage.forward(value, target, history.weights(*version), version[0]))
                value = flights[-1].value
            losses.append(flights[-1].outputs[0].detach())
            # Backward through all stages, each with its present weights.
            gradients: list[Tensor] | None = None
            weight = flights[-1].weight
            for index in reversed(range(len(self.stages))):
                gradients = self.stages[index].backward(flights.pop(), gradients, weight)
            # Updates, where this micro-batch ends a group.
            due = [_ends_group(version, following) for version, following in zip(now, ahead, strict=True)]
            self._update([history for history, is_due in zip(histories, due, strict=True) if is_due])
        if isinstance(self.schedule, Program) and len(losses) < self.schedule.num_micro_batches:
            raise ValueError(
                f"the program is for {self.schedule.num_micro_batches} micro-batches; the stream gave {len(losses)}"
            )
        if drain:
            self._update([history for history in histories if history.pending])
        for stage in self.stages:
            stage.end(drained=drain)
        if not drain:
            self._paused = _Paused(
                histories=histories,
                versions=versions,
                ahead=ahead,
                under_way=[stage.gradients.under_way for stage in self.stages],
                sums=[stage.weights.take_gradients() for stage in self.stages],
            )
        self.reports = [stage.meter.report(stage.index, 0.0) for stage in self.stages if stage.settings.observe]
        return torch.stack([loss.double().reshape(()) for loss in losses]).tolist() if losses else []

    def evaluate(self, batches: Iterable[tuple[Any, Any]]) -> list[float]:
        """The loss of each micro-batch with the present weights, in evaluation mode."""
        self._check_drained("evaluate")
        losses: list[float] = []
        with self._alone.running("evaluate"), evaluating([stage.module for stage in self.stages]):
            for stage in self.stages:
                stage.weights.take_changes(for_now=True)
            for value, target in map(copied, pairs(batches)):
                for stage in self.stages:
                    value = stage.evaluate(value, target)
                losses.append(float(value))
        return losses

    def state_dict(self) -> list[dict[str, Any]]:
        """One state a stage; entry s is what rank s of PipelinedBackprop saves and loads."""
        self._alone.check("state_dict")
        self._check_drained("state_dict")
        return [stage.state_dict() for stage in self.stages]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        self._alone.check("load_state_dict")
        if any("in_flight" in state for state in states):
            raise ValueError(
                "these states have micro-batches in flight, which only PipelinedBackprop can hold: save after a run "
                "with drain=True"
            )
        if len(states) != len(self.stages):
            raise ValueError(f"{len(states)} states for {len(self.stages)} stages: give what state_dict returned")
        self._paused = None
        for stage, state in zip(self.stages, states, strict=True):
            stage.load_state_dict(state)

    def _check_drained(self, what: str) -> None:
        if self._paused is not None:
            raise ValueError(
                f"{what} after a run with drain=False: one process has nothing in flight, so that its weights are not "
                "those that stages on ranks would have now; use PipelinedBackprop, or end with a run of drain=True"
            )

    def _versions(self, stage: int) -> Iterator[Versions]:
        if self._delays is None:
            return self.schedule.versions(stage)
        assert isinstance(self.schedule, PipelineSchedule)
        every, delay = self.schedule.update_every, self._delays[stage]
        return ((max(0, i // every - delay), i // every) for i in count())

    def _update(self, histories: Sequence["_History"]) -> None:
        if not histories:
            return
        norms = [history.stage.prepare_update() for history in histories]
        norm = self._norm(norms)
        for history in histories:
            history.update(norm)

    def _norm(self, norms: Sequence[Tensor]) -> float | None:
        """The whole model's norm to clip by; None where stages clip by their own."""
        if self._clips_model is None:
            return None
        update, lag = self.stages[0].num_updates, self._clips_model.lag_updates
        for stage in self.stages:
            stage.norms[update] = float(norms[0]) if len(norms) == 1 else joined(map(float, norms))
        known = self.stages[0].norms
        norm = known.get(update - lag, known[update] if self._clips_model.first_wait else None)
        for stage in self.stages:
            forget(stage.norms, lag)
        return norm


@dataclass(frozen=True, kw_only=True, slots=True)
class _Paused:
    """Where a stream was left that another goes on with: for every stage."""

    histories: list["_History"]
    versions: list[Iterator[Versions]]
    ahead: list[Versions | None]
    under_way: list[tuple[float, float]]
    sums: list[list[Tensor | None]]


def _ends_group(version: Versions | None, following: Versions | None) -> bool:
    return following is None or version is None or following[1] > version[1]


class _History:
    """The weights that forwards read at each update still in use.

    Attributes:
        pending: whether gradients wait for an update.
        num_updates: made in this stream.
    """

    def __init__(self, stage: PipelineStage) -> None:
        self.stage = stage
        self.pending = False
        self._first = 0
        self._past: deque[Weights] = deque()
        self.num_updates = 0
        self._newest = stage.snapshot()

    def weights(self, seen: int, own: int) -> Weights:
        """The weights after `seen` updates, for a micro-batch whose gradient comes after `own`."""
        assert own == self.num_updates
        self.pending = True
        while self._first < seen and self._past:
            self._past.popleft()
            self._first += 1
        if seen == own or self.stage.optimizer is None:
            return self._newest
        return self._past[seen - self._first]

    def update(self, norm: float | None) -> None:
        """Step, and keep the weights before for the forwards that still read them."""
        if self.stage.optimizer is not None and self.stage.optimizer.delay:
            self._past.append(self._newest if self._newest is not None else self.stage.weights.present())
        else:
            self._first += 1
        self.stage.update(norm)
        self.num_updates += 1
        self.pending = False
        self._newest = self.stage.snapshot()
