"""Pipelined backpropagation in one process: the same delays and weights as the runtime's, bit for bit in fp32.

Where every stage runs on a rank of its own, micro-batch i meets on each stage the weights of the update its schedule
says. This file gives it the same weights from a history of past ones, one micro-batch after another, without a rank, a
message or a second micro-batch in flight: an independent statement of what the runtime must compute, and a way to try
170 stages on a laptop or to inject delays into a training loop.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.optimizer import OptimizerFactory
from fourfold.parallel.pipeline.program import Program
from fourfold.parallel.pipeline.schedule import PipelineSchedule, resolve_schedule, updates_behind
from fourfold.parallel.pipeline.stage import (
    Flight,
    LossFunction,
    PipelineStage,
    SchedulerFactory,
    Weights,
    check_recomputation,
)


class PipelinedBackpropEmulator:
    """Train `stages` as PipelinedBackprop would on one rank a stage.

    Args:
        stages: S modules, applied one after another, each from one tensor to one tensor.
        optimizer: parameters -> torch.optim.Optimizer, called once a stage that has parameters.
        loss_fn: (output, target) -> scalar mean over the micro-batch.
        schedule: a name ("lockstep", "1f1b-async", "2bw:8", ...), a PipelineSchedule, or a Program.
        mitigation: names joined by "+" (see Mitigation.named), or a Mitigation.
        delays: D_s in updates for each stage, in place of the schedule's; all 0 is plain training, bit for bit.
        scheduler: optimizer -> learning-rate scheduler, stepped after each update of its stage.
        seed: if given, dropout draws from (seed, stage, micro-batch), the same as in the runtime.
    Raises:
        ValueError: unknown names, delays that do not fit, a program that does not validate.
    Cost: D_s copies of the weights of each stage, at most; the time of training on one process and S graph cuts.
    Source: Kosson et al. 2021 (arXiv 2003.11666), appendix G.2 simulates delays in the same way.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        optimizer: OptimizerFactory,
        loss_fn: LossFunction,
        schedule: str | PipelineSchedule | Program = "lockstep",
        mitigation: str | Mitigation = "lwpv+sc",
        delays: Sequence[int] | None = None,
        scheduler: SchedulerFactory | None = None,
        seed: int | None = None,
    ) -> None:
        self.schedule = resolve_schedule(schedule, len(stages))
        self.mitigation = Mitigation.named(mitigation) if isinstance(mitigation, str) else mitigation
        if delays is not None:
            if isinstance(self.schedule, Program):
                raise ValueError("delays replace those of a named schedule; a Program has its own: leave delays out")
            if len(delays) != len(stages) or min(delays) < 0:
                raise ValueError(
                    f"delays={list(delays)}: one number of updates, at least 0, for each of {len(stages)} stages"
                )
        self._delays = None if delays is None else list(delays)
        steady: list[int | float] = self.schedule.delays() if delays is None else list(delays)
        for module in stages:
            check_recomputation(module, steady)
        buffered = self.schedule.double_buffered and delays is None
        self.stages = [
            PipelineStage(
                module,
                index=index,
                optimizer=optimizer,
                delay=steady[index],
                behind=updates_behind(steady, index),
                mitigation=self.mitigation,
                double_buffered=buffered,
                separate=steady[index] > 0,
                loss_fn=loss_fn if index == len(stages) - 1 else None,
                scheduler=scheduler,
                seed=seed,
            )
            for index, module in enumerate(stages)
        ]

    def run(self, batches: Iterable[tuple[Tensor, Any]]) -> list[float]:
        """Train on (input, target) micro-batches to the end of the stream; returns their losses, seen in training."""
        histories = [_History(stage) for stage in self.stages]
        versions = [self._versions(index) for index in range(len(self.stages))]
        ahead = [next(each, None) for each in versions]
        losses: list[Tensor] = []
        for value, target in batches:
            now = ahead
            ahead = [next(each, None) for each in versions]
            flights: list[Flight] = []
            for stage, history, version in zip(self.stages, histories, now, strict=True):
                if version is None:
                    raise ValueError(f"the program is for {len(losses)} micro-batches; the stream has more")
                flights.append(stage.forward(value, target, history.weights(*version)))
                value = flights[-1].result
            losses.append(value)
            gradient: Tensor | None = None
            for index in reversed(range(len(self.stages))):
                gradient = self.stages[index].backward(flights[index], gradient)
                gradient = None if gradient is None else gradient.contiguous()
                flights.pop()
                version, following = now[index], ahead[index]
                if following is None or version is None or following[1] > version[1]:
                    histories[index].update()
        if isinstance(self.schedule, Program) and len(losses) < self.schedule.num_micro_batches:
            raise ValueError(
                f"the program is for {self.schedule.num_micro_batches} micro-batches; the stream gave {len(losses)}"
            )
        for history in histories:
            history.finish()
        return torch.stack([loss.double() for loss in losses]).tolist() if losses else []

    def evaluate(self, batches: Iterable[tuple[Tensor, Any]]) -> list[float]:
        """The loss of each micro-batch with the present weights, in evaluation mode."""
        losses: list[float] = []
        modes = [stage.module.training for stage in self.stages]
        for stage in self.stages:
            stage.module.eval()
        for value, target in batches:
            for stage in self.stages:
                value = stage.evaluate(value, target)
            losses.append(float(value))
        for stage, mode in zip(self.stages, modes, strict=True):
            stage.module.train(mode)
        return losses

    def state_dict(self) -> list[dict[str, Any]]:
        """One state a stage; entry s is what rank s of PipelinedBackprop saves and loads."""
        return [stage.state_dict() for stage in self.stages]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        for stage, state in zip(self.stages, states, strict=True):
            stage.load_state_dict(state)

    def _versions(self, stage: int) -> Iterator[tuple[int, int]]:
        if self._delays is None:
            return self.schedule.versions(stage)
        assert isinstance(self.schedule, PipelineSchedule)
        every, delay = self.schedule.update_every, self._delays[stage]
        return ((max(0, i // every - delay), i // every) for i in count())


class _History:
    """The weights that forwards read at each update still in use."""

    def __init__(self, stage: PipelineStage) -> None:
        self._stage = stage
        self._first = 0
        self._past: deque[Weights] = deque()
        self._updates = 0
        self._pending = False
        self._newest = stage.snapshot()

    def weights(self, seen: int, own: int) -> Weights:
        """The weights after `seen` updates, for a micro-batch whose gradient comes after `own`."""
        assert own == self._updates
        self._pending = True
        while self._first < seen and self._past:
            self._past.popleft()
            self._first += 1
        if seen == own or self._stage.optimizer is None:
            return self._newest
        return self._past[seen - self._first]

    def update(self) -> None:
        if self._stage.optimizer is not None and self._stage.optimizer.delay:
            self._past.append(self._newest if self._newest is not None else self._stage.present())
        else:
            self._first += 1
        self._stage.update()
        self._updates += 1
        self._pending = False
        self._newest = self._stage.snapshot()

    def finish(self) -> None:
        if self._pending:
            self.update()
