"""Pipelined backpropagation on ranks: one stage a rank, an update wherever the schedule says, no flush.

torch.distributed.pipelining drains the pipeline at every step, refuses fewer micro-batches than stages in 1F1B, and
leaves the update to the caller. Here a stage follows its own list of actions (schedule.py) through a stream of
any length, steps its own optimizer in the middle of it, and reads the weights that the mitigation wants
(mitigation.py). The weights after a run equal PipelinedBackpropEmulator's bit for bit in fp32.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.pipeline.checks import (
    OneRunAtATime,
    check_model_norm,
    check_pause,
    check_pipeline,
    check_recomputation,
    check_untied,
    check_whole_backwards,
    evaluating,
)
from fourfold.parallel.pipeline.failure import PipelineError
from fourfold.parallel.pipeline.links import PipeLinks, device_of_stages
from fourfold.parallel.pipeline.norms import ModelNorms
from fourfold.parallel.pipeline.report import StageReport
from fourfold.parallel.pipeline.schedule import lag_updates, resolve_schedule
from fourfold.parallel.pipeline.settings import PipelineOptions, PipelineSettings
from fourfold.parallel.pipeline.stage import PipelineStage
from fourfold.parallel.pipeline.stream_run import OnLoss, Place, Stream, StreamRun
from fourfold.parallel.pipeline.values import describe, put_together, take_apart


class PipelinedBackprop:
    """Train a sequence of stages, one on each rank of `group`, without draining the pipeline between updates.

    Args:
        stages: S modules, applied one after another, each to what the one before returned: a tensor, or tuples, lists
            and dicts of tensors (see values.call). This rank uses its own only; the others may be None.
        group: one rank a stage, in order; None for all ranks.
        dp_group: this stage's replicas; their gradients are averaged at every update, and their weights and buffers
            start as those of the group's first rank. Ranks that share each sequence (cp) are among them.
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
        settings = PipelineSettings(**options)
        check_pipeline(stages, settings)
        # This rank's module, and whether all stages fit the group, the schedule and one another.
        if len(stages) != self.num_stages:
            raise ValueError(f"{len(stages)} stages on a group of {self.num_stages} ranks: give one stage a rank")
        module = stages[index]
        if module is None:
            raise ValueError(f"this rank runs stage {index}, but stages[{index}] is None")
        self.schedule = resolve_schedule(settings.schedule, self.num_stages)
        self.mitigation = settings.chosen
        check_whole_backwards(module, self.schedule, index)
        check_untied(stages)
        check_model_norm(settings.clipping, self.schedule)
        delays = self.schedule.delays()
        check_recomputation(module, delays, self.mitigation, double_buffered=self.schedule.double_buffered)
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
        self._place = Place(stage=self.stage, links=self._links, schedule=self.schedule, norms=self._norms)
        self._paused: StreamRun | None = None
        self._alone = OneRunAtATime()
        self._length = 0  # of the stream that ran last
        self.reports: list[StageReport] = []

    @property
    def is_first(self) -> bool:
        return self.stage.index == 0

    @property
    def is_last(self) -> bool:
        return self.stage.index == self.num_stages - 1

    def run(
        self, batches: Iterable[tuple[Any, Any]], *, on_loss: OnLoss | None = None, drain: bool = True
    ) -> list[float]:
        """Train on a stream of (input, target) micro-batches to its end, drained: every sample is used exactly once.

        Args:
            batches: on every rank of the group the same number of micro-batches, of any lengths. The first stage reads
                the inputs, the last the targets; elsewhere they may be anything.
            on_loss: called on the last stage with the number of a micro-batch in this stream and its loss, as soon as
                it is known.
            drain: False leaves the last micro-batches in flight: the next run goes on as if its stream were a part of
                this one, with the same weights to the bit, whatever is evaluated or saved in between.
        Returns:
            The loss of each micro-batch as seen in training, on every rank.
        Raises:
            ValueError: this stage's stream is shorter or longer than its neighbour's; as PipelineStage.forward and
                backward. The other stages then raise PipelineError.
            PipelineError: another stage has failed, is gone or silent; names it. The group cannot be used any more.
        Cost: with drain=False every micro-batch in flight also keeps a copy of its input and the weights it read.
        """
        if not drain:
            check_pause(self.stage.settings.clipping, self.schedule)
        with self._alone.running("run"):
            return self._guarded(lambda: self._share(self._train(batches, on_loss, drain)))

    def evaluate(self, batches: Iterable[tuple[Any, Any]]) -> list[float]:
        """The loss of each micro-batch with the present weights, in evaluation mode; arguments as for `run`."""
        # In inference mode DTensor's losses fail.
        with self._alone.running("evaluate"), torch.inference_mode(False), torch.no_grad():
            return self._guarded(lambda: self._share(self._evaluate(batches)))

    def state_dict(self) -> dict[str, Any]:
        """This stage's state between two runs, with what a run of drain=False has left in flight.

        A run may end at any micro-batch, so this is any moment of training.
        """
        self._alone.check("state_dict")
        state, in_flight = self.stage.state_dict(), self.in_flight()
        return state if in_flight is None else {**state, "in_flight": in_flight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another stage."""
        self._alone.check("load_state_dict")
        self.stage.load_state_dict(state)
        self._norms.known, self._norms.parts = self.stage.norms, {}
        self.go_on(state.get("in_flight"))

    def in_flight(self) -> dict[str, Any] | None:
        """What a run of drain=False has left in flight on this stage; None once drained. `state_dict` has it, too."""
        self._alone.check("in_flight")
        return None if self._paused is None else self._paused.state()

    def go_on(self, in_flight: dict[str, Any] | None) -> None:
        """Let the next run go on from what `in_flight` returned, for a stage whose own state came by other ways."""
        self._alone.check("go_on")
        self._paused = None if in_flight is None else StreamRun.restored(self._place, in_flight)

    def _train(self, batches: Iterable[tuple[Any, Any]], on_loss: OnLoss | None, drain: bool) -> list[Tensor]:
        run, self._paused = self._paused or StreamRun(self._place), None
        idle = self._links.idle_s
        self._length = run.train(batches, on_loss, drain=drain)
        if self.stage.settings.observe:
            report = self.stage.meter.report(self.stage.index, self._links.idle_s - idle)
            gathered: list[Any] = [None] * self.num_stages
            self._links.guard(lambda: dist.all_gather_object(gathered, report, group=self.group), "sharing reports")
            self.reports = gathered
        self._paused = None if drain else run
        return run.losses

    def _evaluate(self, batches: Iterable[tuple[Any, Any]]) -> list[Tensor]:
        stage, links = self.stage, self._links
        stage.weights.take_changes(for_now=True)
        stream = Stream(batches, self._place)
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
            lost = self.stage.joint.lost(error)
            if lost is not None:
                self._links.abort(f"stops because {lost}")
                raise lost from error
            self._links.abort(f"raised {type(error).__name__}: {error}")
            raise
        return losses
