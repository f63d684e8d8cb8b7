"""Pipelined backpropagation on ranks: one stage a rank, an update wherever the schedule says, no flush.

torch.distributed.pipelining drains the pipeline at every step, refuses fewer micro-batches than stages in 1F1B, and
leaves the update to the caller. Here a stage follows its own list of actions (schedule.py) through a stream of
any length, steps its own optimizer in the middle of it, and reads the weights that the mitigation wants
(mitigation.py). The weights after a run equal PipelinedBackpropEmulator's bit for bit in fp32.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.pipeline.checks import (
    OneRunAtATime,
    check_model_norm,
    check_recomputation,
    check_untied,
    check_whole_backwards,
    evaluating,
    pairs,
)
from fourfold.parallel.pipeline.failure import PipelineError
from fourfold.parallel.pipeline.links import PipeLinks, device_of_stages
from fourfold.parallel.pipeline.norms import ModelNorms
from fourfold.parallel.pipeline.program import Program
from fourfold.parallel.pipeline.report import StageReport
from fourfold.parallel.pipeline.schedule import PipelineSchedule, lag_updates, resolve_schedule
from fourfold.parallel.pipeline.settings import PipelineOptions, PipelineSettings
from fourfold.parallel.pipeline.stage import Flight, PipelineStage, Weights
from fourfold.parallel.pipeline.values import copied, describe, needs_gradient, put_together, take_apart

OnLoss = Callable[[int, Tensor], None]


class PipelinedBackprop:
    """Train a sequence of stages, one on each rank of `group`, without draining the pipeline between updates.

    Args:
        stages: S modules, applied one after another, each to what the one before returned: a tensor, or tuples, lists
            and dicts of tensors (see values.call). This rank uses its own only; the others may be None.
        group: one rank a stage, in order; None for all ranks.
        dp_group: this stage's replicas; their gradients are averaged at every update, and their weights and buffers
            start as those of the group's first rank.
        timeout_s: how long to wait for a stage that is alive but silent; None: the group's timeout.
        options: optimizer and loss_fn, and what else PipelineSettings has: schedule, mitigation, scheduler, seed,
            dtype, clip, ...
    Raises:
        ValueError: the number of stages is not the size of the group; unknown names; a program that does not validate,
            or splits the backward passes of a stage that streams; a weight of two stages; as PipelineSettings.
    Cost: a micro-batch sends one activation and one gradient a link. Extra weights: Mitigation.weight_copies.
    Source: Kosson et al. 2021 (arXiv 2003.11666).

    Attributes:
        reports: with observe=True, every stage's StageReport of the last run, on every rank.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module | None],
        *,
        group: dist.ProcessGroup | None,
        dp_group: dist.ProcessGroup | None = None,
        timeout_s: float | None = None,
        **options: Unpack[PipelineOptions],
    ) -> None:
        ranks = dist.group.WORLD if group is None else group
        assert ranks is not None
        self.group = ranks
        self.num_stages, index = dist.get_world_size(ranks), dist.get_rank(ranks)
        # This rank's module, and whether all stages fit the group, the schedule and one another.
        if len(stages) != self.num_stages:
            raise ValueError(f"{len(stages)} stages on a group of {self.num_stages} ranks: give one stage a rank")
        module = stages[index]
        if module is None:
            raise ValueError(f"this rank runs stage {index}, but stages[{index}] is None")
        settings = PipelineSettings(**options)
        self.schedule = resolve_schedule(settings.schedule, self.num_stages)
        self.mitigation = settings.chosen
        check_whole_backwards(module, self.schedule, index)
        check_untied(stages)
        check_model_norm(settings.clipping, self.schedule)
        delays = self.schedule.delays()
        check_recomputation(module, delays)
        # The stage with its optimizer, and the links to its neighbours.
        own = options if index == self.num_stages - 1 else {**options, "loss_fn": None}
        self.stage = PipelineStage(
            module,
            index=index,
            delay=delays[index],
            lag_updates=lag_updates(delays, index),
            double_buffered=self.schedule.double_buffered,
            dp_group=dp_group,
            **own,  # type: ignore[misc]
        )
        self._device = device_of_stages(next((p.device for p in module.parameters()), None), ranks)
        self._links = PipeLinks(ranks, self._device, timeout_s)
        self._norms = ModelNorms(settings.clipping, self.stage.norms)
        self._alone = OneRunAtATime()
        self._length = 0  # of the stream that ran last
        self.reports: list[StageReport] = []

    @property
    def is_first(self) -> bool:
        return self.stage.index == 0

    @property
    def is_last(self) -> bool:
        return self.stage.index == self.num_stages - 1

    @property
    def reads(self) -> tuple[bool, bool]:
        """Whether this rank reads a stream's inputs, and its targets."""
        return self.is_first, self.is_last

    def run(self, batches: Iterable[tuple[Any, Any]], *, on_loss: OnLoss | None = None) -> list[float]:
        """Train on a stream of (input, target) micro-batches to its end, drained: every sample is used exactly once.

        Args:
            batches: on every rank of the group the same number of micro-batches, of any lengths. The first stage reads
                the inputs, the last the targets; elsewhere they may be anything.
            on_loss: called on the last stage with the number of a micro-batch in this stream and its loss, as soon as
                it is known.
        Returns:
            The loss of each micro-batch as seen in training, on every rank.
        Raises:
            ValueError: this stage's stream is shorter or longer than its neighbour's; as PipelineStage.forward and
                backward. The other stages then raise PipelineError.
            PipelineError: another stage has failed, is gone or silent; names it. The group cannot be used any more.
        """
        with self._alone.running("run"):
            return self._guarded(lambda: self._share(self._train(batches, on_loss)))

    def evaluate(self, batches: Iterable[tuple[Any, Any]]) -> list[float]:
        """The loss of each micro-batch with the present weights, in evaluation mode; arguments as for `run`."""
        with self._alone.running("evaluate"):
            return self._guarded(lambda: self._share(self._evaluate(batches)))

    def state_dict(self) -> dict[str, Any]:
        """This stage's state between two runs. A run may end at any micro-batch, so this is any moment of training."""
        self._alone.check("state_dict")
        return self.stage.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another stage."""
        self._alone.check("load_state_dict")
        self.stage.load_state_dict(state)
        self._norms.known = self.stage.norms

    def _train(self, batches: Iterable[tuple[Any, Any]], on_loss: OnLoss | None) -> list[Tensor]:
        self.stage.begin()
        run = _Run(self, batches, on_loss)
        idle = self._links.idle_s
        # Every action of the schedule in turn; the stream is read as forwards are due.
        for _, kind, micro_batch in self.schedule.actions(self.stage.index, run.stream):
            run.actions[kind](micro_batch)
        # Nothing is in flight any more, and the streams of all stages have ended.
        run.finish()
        self.stage.end()
        if self.stage.settings.observe:
            report = self.stage.meter.report(self.stage.index, self._links.idle_s - idle)
            gathered: list[Any] = [None] * self.num_stages
            self._links.guard(lambda: dist.all_gather_object(gathered, report, group=self.group), "sharing reports")
            self.reports = gathered
        self._length = run.stream.length
        return run.losses

    def _evaluate(self, batches: Iterable[tuple[Any, Any]]) -> list[Tensor]:
        stage, links = self.stage, self._links
        stage.weights.take_changes(for_now=True)
        stream = _Stream(batches, self.reads)
        losses = []
        with evaluating([stage.module]):
            for micro_batch in stream:
                value, target = stream.current
                if not self.is_first:
                    links.expect_activation("evaluate")
                    tensors, (_, structure) = links.take_activation("evaluate", micro_batch)
                    value = put_together(structure, tensors)
                output = stage.evaluate(value, target)
                if self.is_last:
                    losses.append(output)
                    continue
                parts, structure = take_apart(output, f"the output of stage {stage.index}")
                links.send_activation("evaluate", parts, (describe(parts), structure), micro_batch)
            if not self.is_last:
                links.send_end(stream.length)
            if not self.is_first:
                links.take_end("evaluate", stream.length)
            links.confirm()
            links.drain()
        self._length = stream.length
        return losses

    def _share(self, losses: list[Tensor]) -> list[float]:
        """The last stage's losses, on every rank: one broadcast."""
        if not self._length:
            return []
        if self.is_last:
            values = torch.stack([loss.detach().double().reshape(()) for loss in losses])
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
        except PipelineError as error:
            self._links.abort(f"stops because {error}")
            raise
        except BaseException as error:
            self._links.abort(f"raised {type(error).__name__}: {error}")
            raise
        return losses


class _Run:
    """One run of one stage: what is under way, and what each kind of action does."""

    def __init__(self, pipeline: PipelinedBackprop, batches: Iterable[tuple[Any, Any]], on_loss: OnLoss | None) -> None:
        self.pipeline, self.stage, self.links = pipeline, pipeline.stage, pipeline._links
        self.stream = _Stream(batches, pipeline.reads, self._end_of_stream)
        self.losses: list[Tensor] = []
        self.actions: dict[str, Callable[[int], None]] = {
            "F": self._forward, "B": self._backward, "I": self._backward_input, "W": self._backward_weight,
            "U": self._update,
        }  # fmt: skip
        self._on_loss = on_loss
        self._flights: dict[int, Flight] = {}
        self._waiting: deque[int] = deque()  # forwarded, gradient not yet taken
        self._weights: Weights = self.stage.snapshot()
        self._previous: Weights = None
        self._updates = 0
        self._update_of = _update_of(pipeline.schedule, self.stage.index)
        if not pipeline.is_first and not self.stream.ended:
            self.links.expect_activation("train")

    def finish(self) -> None:
        """After the last action: the stream of the stage before has ended as well, and all messages have left."""
        if not self.pipeline.is_first:
            self.links.take_end("train", self.stream.length)
        self.links.confirm()
        self.pipeline._norms.finish()
        self.links.drain()

    def _end_of_stream(self, length: int) -> None:
        if not self.pipeline.is_last:
            self.links.send_end(length)

    def _forward(self, micro_batch: int) -> None:
        value, target = self.stream.current
        if not self.pipeline.is_first:
            # This activation, and the receive of the next one posted before there is anything to compute.
            tensors, (specs, structure) = self.links.take_activation("train", micro_batch)
            if not self.stream.ended:
                self.links.expect_activation("train")
            marked = [each.requires_grad_(spec.needs_gradient) for each, spec in zip(tensors, specs, strict=True)]
            value = put_together(structure, marked)
        # With double buffering a group reads the weights before the newest update, once there are such.
        group = self._update_of(micro_batch) if self.pipeline.schedule.double_buffered else 0
        use_previous = group > 0 and self._updates == group
        weights = self._previous if use_previous else self._weights
        flight = self.stage.forward(value, target, weights, self._updates - use_previous)
        self._flights[micro_batch] = flight
        if self.pipeline.is_last:
            self.losses.append(flight.outputs[0].detach())
            if self._on_loss is not None:
                self._on_loss(micro_batch, self.losses[-1])
            return
        # On to the next stage, and the receive of its gradient posted if no other is awaited.
        results = flight.results
        description = describe(results), flight.structure
        self.links.send_activation("train", [each.detach() for each in results], description, micro_batch)
        self._waiting.append(micro_batch)
        if len(self._waiting) == 1:
            self._expect_gradient(flight)

    def _expect_gradient(self, flight: Flight) -> None:
        self.links.expect_gradient(describe([output for output in flight.outputs if needs_gradient(output)]))

    def _gradient_of(self, micro_batch: int) -> tuple[list[Tensor] | None, float]:
        """The gradients of a micro-batch's outputs, and its weight; on the last stage there is only the weight."""
        if self.pipeline.is_last:
            return None, self._flights[micro_batch].weight
        gradients, weight = self.links.take_gradient(micro_batch)
        assert self._waiting.popleft() == micro_batch
        if self._waiting:
            self._expect_gradient(self._flights[self._waiting[0]])
        return gradients, weight

    def _pass_on(self, gradients: list[Tensor], weight: float, micro_batch: int) -> None:
        if not self.pipeline.is_first:
            self.links.send_gradient(gradients, weight, micro_batch)

    def _backward(self, micro_batch: int) -> None:
        gradients, weight = self._gradient_of(micro_batch)
        self._pass_on(self.stage.backward(self._flights.pop(micro_batch), gradients, weight), weight, micro_batch)

    def _backward_input(self, micro_batch: int) -> None:
        gradients, weight = self._gradient_of(micro_batch)
        self._pass_on(
            self.stage.backward_input(self._flights[micro_batch], gradients, weight), weight, micro_batch
        )  # fmt: skip

    def _backward_weight(self, micro_batch: int) -> None:
        self.stage.backward_weight(self._flights.pop(micro_batch))

    def _update(self, number: int) -> None:
        # No forward reads them again: free before the update makes others.
        self._previous, self._weights = (self._weights if self.pipeline.schedule.double_buffered else None), None
        norm = self.stage.prepare_update()
        self.stage.update(self.pipeline._norms.of(self.stage.num_updates, norm, self.links))
        self._updates = number + 1
        self._weights = self.stage.snapshot()


def _update_of(schedule: PipelineSchedule | Program, stage: int) -> Callable[[int], int]:
    """Micro-batch -> the number of the update that uses it."""
    if isinstance(schedule, PipelineSchedule):
        every = schedule.update_every
        return lambda micro_batch: micro_batch // every
    return [own for _, own in schedule.versions(stage)].__getitem__


class _Stream(Iterator[int]):
    """Numbers the micro-batches of an iterable and looks one ahead, so that the next receive can be posted.

    What this rank reads is copied when it is pulled: the iterable may fill the same tensors again.

    Args:
        reads: whether this rank reads the inputs, and the targets.
        on_end: called with the length as soon as the last micro-batch has been used, before anything else is asked.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Any, Any]],
        reads: tuple[bool, bool],
        on_end: Callable[[int], None] | None = None,
    ) -> None:
        self._batches, self._reads = pairs(batches), reads
        self._numbers = count()
        self._on_end = on_end
        self._next = self._pull()
        self.current: tuple[Any, Any] = (None, None)
        self.length = 0

    @property
    def ended(self) -> bool:
        """Whether there is no micro-batch after the current one."""
        return self._next is None

    def __next__(self) -> int:
        if self._next is None:
            if self._on_end is not None:
                self._on_end(self.length)
                self._on_end = None
            raise StopIteration
        self.current = self._next
        self._next = self._pull()
        self.length += 1
        return next(self._numbers)

    def _pull(self) -> tuple[Any, Any] | None:
        pulled = next(self._batches, None)
        if pulled is None:
            return None
        value, target = (copied(each) if read else None for each, read in zip(pulled, self._reads, strict=True))
        return value, target
