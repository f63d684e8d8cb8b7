"""Pipelined backpropagation on ranks: one stage a rank, an update wherever the schedule says, no flush.

torch.distributed.pipelining drains the pipeline at every step, refuses fewer micro-batches than stages in 1F1B, and
leaves the update to the caller. Here a stage follows its own list of actions (schedule.py) through a stream of
any length, steps its own optimizer in the middle of it, and reads the weights that the mitigation wants
(mitigation.py). The weights after a run equal PipelinedBackpropEmulator's bit for bit in fp32.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.pipeline.links import PipelineError, PipeLinks, device_of_stages
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

Signature = tuple[str, tuple[int, ...], torch.dtype]
OnLoss = Callable[[int, Tensor], None]


class PipelinedBackprop:
    """Train a sequence of stages, one on each rank of `group`, without draining the pipeline between updates.

    Args:
        stages: S modules, applied one after another, each from one tensor to one tensor; this rank uses its own only
            (the others may be None).
        group: one rank a stage, in order; None for all ranks.
        optimizer: parameters -> torch.optim.Optimizer, over the parameters it is called with.
        loss_fn: (output, target) -> scalar mean over the micro-batch; used on the last stage.
        schedule: a name ("lockstep", "1f1b-async", "2bw:8", ...), a PipelineSchedule, or a Program.
        mitigation: names joined by "+" (see Mitigation.named), or a Mitigation.
        dp_group: this stage's replicas; their gradients are averaged at every update, and their weights and buffers
            start as those of the group's first rank.
        scheduler: optimizer -> learning-rate scheduler, stepped after each update of its stage.
        seed: if given, dropout draws from (seed, stage, micro-batch), the same as in the emulator.
        timeout_s: how long to wait for a stage that is alive but silent; None: the group's timeout.
    Raises:
        ValueError: the number of stages is not the size of the group; unknown names; a program that does not validate,
            or splits the backward passes of a stage that streams.
    Cost: a micro-batch sends one activation and one gradient a link. Extra weights: Mitigation.weight_copies.
    Source: Kosson et al. 2021 (arXiv 2003.11666).
    """

    def __init__(
        self,
        stages: Sequence[nn.Module | None],
        *,
        group: dist.ProcessGroup | None,
        optimizer: OptimizerFactory,
        loss_fn: LossFunction,
        schedule: str | PipelineSchedule | Program = "lockstep",
        mitigation: str | Mitigation = "lwpv+sc",
        dp_group: dist.ProcessGroup | None = None,
        scheduler: SchedulerFactory | None = None,
        seed: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        ranks = dist.group.WORLD if group is None else group
        assert ranks is not None
        self.group = ranks
        self.num_stages, index = dist.get_world_size(ranks), dist.get_rank(ranks)
        if len(stages) != self.num_stages:
            raise ValueError(f"{len(stages)} stages on a group of {self.num_stages} ranks: give one stage a rank")
        module = stages[index]
        if module is None:
            raise ValueError(f"this rank runs stage {index}, but stages[{index}] is None")
        self.schedule = resolve_schedule(schedule, self.num_stages)
        if getattr(module, "checkpointing", "none") == "stream":
            _check_whole_backwards(self.schedule, index)
        self.mitigation = Mitigation.named(mitigation) if isinstance(mitigation, str) else mitigation
        delays = self.schedule.delays()
        check_recomputation(module, delays)
        self.stage = PipelineStage(
            module,
            index=index,
            optimizer=optimizer,
            delay=delays[index],
            behind=updates_behind(delays, index),
            mitigation=self.mitigation,
            double_buffered=self.schedule.double_buffered,
            loss_fn=loss_fn if index == self.num_stages - 1 else None,
            scheduler=scheduler,
            dp_group=dp_group,
            seed=seed,
        )
        self._device = device_of_stages(next((p.device for p in module.parameters()), None), ranks)
        self._links = PipeLinks(ranks, self._device, timeout_s)
        self._length = 0  # of the stream that ran last

    @property
    def is_first(self) -> bool:
        return self.stage.index == 0

    @property
    def is_last(self) -> bool:
        return self.stage.index == self.num_stages - 1

    def run(self, batches: Iterable[tuple[Tensor, Any]], *, on_loss: OnLoss | None = None) -> list[float]:
        """Train on a stream of (input, target) micro-batches to its end, drained: every sample is used exactly once.

        Args:
            batches: on every rank of the group the same number of micro-batches with inputs of the same shapes. The
                first stage reads the inputs, the last the targets; elsewhere inputs may be meta tensors.
            on_loss: called on the last stage with the number of a micro-batch in this stream and its loss, as soon as
                it is known.
        Returns:
            The loss of each micro-batch as seen in training, on every rank.
        Raises:
            PipelineError: another stage is gone or silent; names it. The group cannot be used any more.
        """
        return self._guarded(lambda: self._share(self._train(batches, on_loss)))

    def evaluate(self, batches: Iterable[tuple[Tensor, Any]]) -> list[float]:
        """The loss of each micro-batch with the present weights, in evaluation mode; arguments as for `run`."""
        return self._guarded(lambda: self._share(self._evaluate(batches)))

    def state_dict(self) -> dict[str, Any]:
        """This stage's state between two runs. A run may end at any micro-batch, so this is any moment of training."""
        return self.stage.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another stage."""
        self.stage.load_state_dict(state)

    def _train(self, batches: Iterable[tuple[Tensor, Any]], on_loss: OnLoss | None) -> list[Tensor]:
        stage, links = self.stage, self._links
        stream = _Stream(batches, "train")
        flights: dict[int, Flight] = {}
        waiting: deque[int] = deque()  # forwarded, gradient not yet taken
        losses: list[Tensor] = []
        previous: Weights = None
        weights = stage.snapshot()
        updates = 0

        def gradient_of(micro_batch: int) -> Tensor | None:
            if self.is_last:
                return None
            gradient = links.take_gradient(micro_batch)
            assert waiting.popleft() == micro_batch
            if waiting:
                links.expect_gradient(flights[waiting[0]].result)
            return gradient

        def pass_on(gradient: Tensor | None, micro_batch: int) -> None:
            if not self.is_first:
                assert gradient is not None
                links.send_gradient(gradient.contiguous(), micro_batch)

        if not self.is_first and stream.following is not None:
            links.expect_activation(stream.following)
        group_of = self._group_of()
        for _, kind, micro_batch in self.schedule.actions(stage.index, stream):
            if kind == "F":
                (value, target), signature = stream.current, stream.signature
                if not self.is_first:
                    value = links.take_activation(micro_batch)
                    if stream.following is not None:
                        links.expect_activation(stream.following)
                behind = (
                    self.schedule.double_buffered and group_of(micro_batch) > 0 and updates == group_of(micro_batch)
                )
                flight = flights[micro_batch] = stage.forward(value, target, previous if behind else weights)
                if self.is_last:
                    losses.append(flight.result)
                    if on_loss is not None:
                        on_loss(micro_batch, flight.result)
                    continue
                links.send_activation(flight.result, signature, micro_batch)
                waiting.append(micro_batch)
                if len(waiting) == 1:
                    links.expect_gradient(flight.result)
            elif kind == "B":
                gradient = gradient_of(micro_batch)
                pass_on(stage.backward(flights.pop(micro_batch), gradient), micro_batch)
            elif kind == "I":
                gradient = gradient_of(micro_batch)
                pass_on(stage.backward_input(flights[micro_batch], gradient), micro_batch)
            elif kind == "W":
                stage.backward_weight(flights.pop(micro_batch))
            else:
                # No forward reads them again: free before the update makes others.
                previous, weights = (weights if self.schedule.double_buffered else None), None
                stage.update()
                updates += 1
                weights = stage.snapshot()
        links.drain()
        self._length = stream.length
        return losses

    def _group_of(self) -> Any:
        """Micro-batch -> the number of the update that uses it."""
        if isinstance(self.schedule, PipelineSchedule):
            every = self.schedule.update_every
            return lambda micro_batch: micro_batch // every
        own = [own for _, own in self.schedule.versions(self.stage.index)]
        return own.__getitem__

    def _evaluate(self, batches: Iterable[tuple[Tensor, Any]]) -> list[Tensor]:
        stage, links = self.stage, self._links
        mode = stage.module.training
        stage.module.eval()
        stream = _Stream(batches, "evaluate")
        losses = []
        for micro_batch in stream:
            value, target = stream.current
            if not self.is_first:
                links.expect_activation(stream.signature)
                value = links.take_activation(micro_batch)
            output = stage.evaluate(value, target)
            if self.is_last:
                losses.append(output)
            else:
                links.send_activation(output.contiguous(), stream.signature, micro_batch)
        links.drain()
        stage.module.train(mode)
        self._length = stream.length
        return losses

    def _share(self, losses: list[Tensor]) -> list[float]:
        """The last stage's losses, on every rank: one broadcast."""
        if not self._length:
            return []
        if self.is_last:
            values = torch.stack([loss.double().reshape(()) for loss in losses])
        else:
            values = torch.empty(self._length, dtype=torch.float64, device=self._device)
        values = self.broadcast_from_last(values, "sharing the losses")
        return values.tolist()

    def broadcast_from_last(self, values: Tensor, what: str) -> Tensor:
        """The last stage's `values`, in place, on every rank of the group. Raises PipelineError, which names `what`."""
        if self.num_stages > 1:
            last = self.num_stages - 1
            self._links.guard(lambda: dist.broadcast(values, group=self.group, group_src=last), what)
        return values

    def _guarded(self, work: Any) -> list[float]:
        try:
            losses: list[float] = work()
        except PipelineError:
            raise
        except BaseException as error:
            self._links.leave_note(self.stage.index, f"raised {type(error).__name__}: {error}")
            raise
        return losses


def _check_whole_backwards(schedule: PipelineSchedule | Program, stage: int) -> None:
    """A streamed layer makes both gradients at once and overwrites its output's: it cannot go back a second time."""
    num_micro_batches = schedule.num_micro_batches if isinstance(schedule, Program) else 1
    if any(action.kind == "I" for action in schedule.actions(stage, iter(range(num_micro_batches)))):
        name = "a Program" if isinstance(schedule, Program) else repr(schedule.name)
        raise ValueError(
            f"schedule: {name} splits backward passes, and stage {stage} streams (checkpointing='stream'): choose a "
            "schedule of whole backward passes, or checkpointing='full'"
        )


class _Stream(Iterator[int]):
    """Numbers the micro-batches of an iterable and looks one ahead, so that the next receive can be posted."""

    def __init__(self, batches: Iterable[tuple[Tensor, Any]], purpose: str) -> None:
        self._batches = iter(batches)
        self._numbers = count()
        self._purpose = purpose
        self._next = next(self._batches, None)
        self.current: tuple[Tensor, Any] = (torch.empty(0), None)
        self.signature: Signature = (purpose, (), torch.float32)
        self.length = 0

    @property
    def following(self) -> Signature | None:
        """The signature of the next micro-batch; None at the end of the stream."""
        if self._next is None:
            return None
        value = self._next[0]
        return self._purpose, tuple(value.shape), value.dtype

    def __next__(self) -> int:
        following = self.following
        if following is None or self._next is None:
            raise StopIteration
        self.current, self.signature = self._next, following
        self._next = next(self._batches, None)
        self.length += 1
        return next(self._numbers)
