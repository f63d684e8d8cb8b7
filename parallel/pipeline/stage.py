"""One stage of an asynchronous pipeline: a module, its optimizer, and which weights each forward and backward reads.

Activation checkpointing and StreamBP recompute inside the backward, hence with the backward's weights: what is stale
then is only the stage's input. Under autocast without either, the graph keeps the forward's weights as low-precision
casts, and the backward computes input gradients with those: in effect stashed, whatever the mitigation says.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fourfold.parallel.gradients import copy_weights
from fourfold.parallel.pipeline import saving
from fourfold.parallel.pipeline.accumulation import GradientSum
from fourfold.parallel.pipeline.checks import check_gradients, check_module, check_passable, measured_loss
from fourfold.parallel.pipeline.graphs import check_graph
from fourfold.parallel.pipeline.halves import input_half, weight_half
from fourfold.parallel.pipeline.masters import MasterWeights
from fourfold.parallel.pipeline.optimizer import DelayedOptimizer
from fourfold.parallel.pipeline.parts import Parts, no_norm
from fourfold.parallel.pipeline.randomness import seeded
from fourfold.parallel.pipeline.report import Meter
from fourfold.parallel.pipeline.settings import PipelineOptions, PipelineSettings
from fourfold.parallel.pipeline.values import (
    Structure,
    apart,
    call,
    copied,
    needs_gradient,
    put_together,
    received,
    resolved,
    take_apart,
)
from fourfold.parallel.pipeline.versions import Weights, attach, weights_to_read


@dataclass(slots=True)
class Flight:
    """A micro-batch between its forward and its backward."""

    inputs: list[Tensor]  # those that need a gradient
    outputs: list[Tensor]  # of the module, or the loss on the last stage
    structure: Structure  # of the outputs
    weights: Weights  # that the backward reads, where they are kept for it
    weight: float = 1.0  # of the micro-batch in its update
    seen: int = 0  # updates of this run that its forward's weights had seen
    sample: Weights = None  # those weights, where their error is to be measured
    halves: list[dict[str, Any]] = field(default_factory=list)  # between the two halves of a backward
    rest: tuple[list[Tensor], list[Tensor] | None] = ([], None)  # where the second half starts by itself

    @property
    def results(self) -> list[Tensor]:
        """The outputs without their graph, marked (requires_grad) where the next stage is to give a gradient back."""
        # In one order of memory, as they would arrive from another rank: kernels may differ in the last bit by it.
        return [resolved(output.detach()).requires_grad_(needs_gradient(output)) for output in self.outputs]

    @property
    def value(self) -> Any:
        """A copy of the results, as the module returned them and as another rank would receive them."""
        results = self.results
        copies = [copied(each.detach()).requires_grad_(each.requires_grad) for each in results]
        return put_together(self.structure, copies)


class PipelineStage:
    """What a rank of the runtime, or the emulator for each stage, does with a micro-batch.

    Args:
        module: from what the stage before returned to what the next one takes; see values.call. Where its weights are
            DTensors, all ranks of their mesh run this stage, on the same micro-batches.
        index: its number, from 0.
        delay: D, in updates; with `lag_updates` as DelayedOptimizer's.
        double_buffered: a micro-batch's forward and backward read the same version of the weights, not the present one.
        separate: keep the masters apart from the module's storage even where no mitigation asks for it (the emulator).
        dp_group: replicas of this stage; gradients are averaged over it, and with shard_optimizer=True each of it has
            the optimizer of a part of the weights. Among them are those of the module's cp_group (RingRanks).
        options: the keywords of PipelineSettings; `loss_fn` on the last stage only.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        index: int,
        delay: float,
        lag_updates: int = 0,
        double_buffered: bool = False,
        separate: bool = False,
        dp_group: dist.ProcessGroup | None = None,
        **options: Unpack[PipelineOptions],  # type: ignore[misc]
    ) -> None:
        self.module, self.index, self.dp_group = module, index, dp_group
        self.settings = PipelineSettings(**options)  # type: ignore[misc]
        self.loss_fn = self.settings.loss_fn
        self.num_forwards = 0
        self.num_updates = 0  # due so far, also those without a gradient
        self.norms: dict[int, float] = {}  # of the whole model's gradient, by update
        mitigation = self.settings.chosen
        self.stashes = (mitigation.stash and delay > 0) or double_buffered
        self._checked_graph, self._replica = False, 0
        self._corrected: Weights = None  # what backwards read, where only its owners can make it
        check_module(module, index, dp_group)
        self.parts = Parts.of(module, index)
        self.joint = self.parts.or_ring(module)
        if dp_group is not None:
            self._replica = dist.get_rank(dp_group)
            copy_weights((*module.parameters(), *module.buffers()), dp_group)
        sharded = self.settings.shard_optimizer and dp_group is not None and dp_group.size() > 1
        self.weights = MasterWeights(module, index, self.settings.master_dtype, dp_group if sharded else None)
        self.gradients = GradientSum(self.weights, self.settings, index, dp_group, self.parts, self.joint)
        self.optimizer: DelayedOptimizer | None = None
        self.schedulers: list[LRScheduler] = []
        if self.weights.live:
            delayed = {"delay": delay, "mitigation": mitigation, "lag_updates": lag_updates}
            self.optimizer = attach(
                self.weights, self.settings.optimizer, delayed=delayed, separate=separate or self.stashes
            )
            self.parts.check_optimizers(self.optimizer.optimizers, mitigation)
            made = map(self.settings.make_scheduler, self.optimizer.optimizers)
            self.schedulers = [scheduler for scheduler in made if scheduler is not None]
        self.meter = Meter(self.weights, self.settings.observe, self.parts)
        if self.settings.dtype is not None:
            self._check_autocast()

    @property
    def scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler (of the first optimizer, where there are several)."""
        return self.schedulers[0] if self.schedulers else None

    def begin(self, under_way: tuple[float, float] | None = None, num_updates: int = 0) -> None:
        """At the start of a run: take weights that the user has set since the last. Raises ValueError, see masters.

        Args:
            under_way: GradientSum's, of the stream that goes on.
            num_updates: made in it so far.
        """
        if not torch.is_grad_enabled():
            raise ValueError("run trains, but gradients are off (torch.no_grad or inference_mode): use evaluate there")
        self.weights.take_all_changes()
        self.weights.drop_gradients()  # of the user's own backwards, or of a run that failed
        self.gradients.begin(under_way)
        if self.optimizer is not None:
            self.optimizer.begin()
        self.meter.begin(num_updates)
        self._checked_graph = False

    def end(self, *, drained: bool = True) -> None:
        """At the end of a run. Once drained, replicas' buffers become those of the first, as under torch's DDP."""
        self.gradients.end()
        if self.dp_group is not None and drained:
            copy_weights(tuple(self.module.buffers()), self.dp_group)
        self.weights.check_untouched()
        self.weights.note()

    def snapshot(self) -> Weights:
        """What forwards should read from now to the next update; new tensors where later reads may see an update."""
        weights, self._corrected = None, None  # those before make room
        if self.optimizer is not None:
            weights, self._corrected = weights_to_read(self.weights, self.optimizer, stashes=self.stashes)
        return self.weights.present() if weights is None and self.stashes else weights

    def forward(self, value: Any, target: Any, weights: Weights, seen: int) -> Flight:
        """Run the module on `value` (detached from its sender) with `weights`, keeping the graph.

        A tensor of the value needs a gradient where the stage before says so (requires_grad); the first stage's never.

        Args:
            target: for the loss, on the last stage.
            weights: from `snapshot`, after `seen` updates of this run.

        Raises:
            ValueError: an output that is no tensor, tuple, list or dict of tensors, or has no gradient to give; a loss
                that is no scalar or does not depend on the output; weights changed in mid-stream.
        """
        self.weights.check_untouched()
        tensors, structure = take_apart(value, f"the input of stage {self.index}")
        wanted = [self.index > 0 and needs_gradient(tensor) for tensor in tensors]
        leaves = [each.detach().requires_grad_(want) for each, want in zip(tensors, wanted, strict=True)]
        with self._computing(leaves), self._holding(weights):
            output = call(self.module, put_together(structure, list(map(received, leaves))))
            weight = 1.0
            if self.loss_fn is not None:
                output, weight = measured_loss(self.settings, output, target)
            outputs, structure = take_apart(output, f"the output of stage {self.index}")
            outputs = apart(check_passable(outputs, self.index), self.module)
        self.num_forwards += 1
        inputs = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        trained = any(p.requires_grad for p in self.weights.live)
        check_gradients(self.index, outputs, wanted=trained or bool(inputs), loss=self.loss_fn is not None)
        if not self._checked_graph:
            casts = self.optimizer is not None and self.optimizer.corrects
            check_graph(outputs, inputs, self.weights.live, self.index, casts=casts)
            self._checked_graph = True
        kept = weights if self.stashes else None
        return Flight(inputs, outputs, structure, kept, weight, seen, self.meter.sample(weights))

    @torch.no_grad()
    def evaluate(self, value: Any, target: Any) -> Any:
        """The module's output, or the loss on the last stage, with the present weights."""
        tensors, structure = take_apart(value, f"the input of stage {self.index}")
        with self._computing(tensors, trains=False):
            here = [tensor.detach().contiguous() if self.index else tensor.detach() for tensor in tensors]
            output = call(self.module, put_together(structure, here))
            return output if self.loss_fn is None else measured_loss(self.settings, output, target)[0]

    def backward(self, flight: Flight, gradients: Sequence[Tensor] | None, weight: float) -> list[Tensor]:
        """Add the parameters' gradients to those since the last update; returns those of the inputs that need one.

        Args:
            gradients: of the outputs that need one, in order; None on the last stage.
            weight: of the micro-batch in its update.
        Raises:
            ValueError: an output that does not depend on the stage's input.
        """
        relative = self.gradients.relative(weight)
        with self._reading(flight), self.gradients.adding(relative):
            roots, seeds = self._roots(flight, gradients, relative)
            if roots:
                torch.autograd.backward(roots, seeds)
        self.meter.landed(flight.seen, flight.sample)
        return self._input_gradients(flight)

    def backward_input(self, flight: Flight, gradients: Sequence[Tensor] | None, weight: float) -> list[Tensor]:
        """The first half of a backward: only the inputs' gradients. `backward_weight` must follow."""
        flight.weight = self.gradients.relative(weight)
        roots, seeds = self._roots(flight, gradients, flight.weight)
        if not flight.inputs:
            # Nothing comes before this stage that needs a gradient: all is the weights' half.
            flight.rest = roots, seeds
            return []
        with self._reading(flight):
            flight.halves, flight.rest = input_half(roots, seeds, flight.inputs, self.weights.live, self.index)
        return self._input_gradients(flight)

    def backward_weight(self, flight: Flight) -> None:
        """The second half: only the parameters' gradients."""
        with self._reading(flight), self.gradients.adding(flight.weight):
            if flight.inputs:
                with self.weights.accumulating():
                    weight_half(flight.halves, self.weights.live)
            if flight.rest[0]:
                torch.autograd.backward(*flight.rest)
        self.meter.landed(flight.seen, flight.sample)

    def prepare_update(self) -> Tensor:
        """Average the gradients since the last update over micro-batches and replicas; returns their 2-norm, a scalar.

        It is 0 where nothing (clipping, observing) asks for it.
        """
        self._steps = self.optimizer is not None and self.gradients.average()
        if self._steps and self.settings.on_gradients is not None:
            self.weights.show_gradients(self.settings.on_gradients)
        wanted = self._steps and (self.settings.clipping is not None or self.settings.observe)
        self._norm = self.gradients.norm() if wanted else no_norm()
        return self._norm

    @torch.no_grad()
    def update(self, norm: float | None = None) -> None:
        """Clip and step, after `prepare_update`.

        Args:
            norm: of the whole model's gradient, to clip by; None for this stage's own.
        """
        self.num_updates += 1
        self.meter.update(self._norm)
        if self.optimizer is None:
            return
        if self._steps and (clipping := self.settings.clipping) is not None:
            self.gradients.clip(clipping.max_norm, self._norm if norm is None else self._norm.clamp(min=norm))
        if self._steps:
            self.weights.hand_over_gradients()
            shown = self.weights.restore if self.weights.apart else None
            self.optimizer.step(after_hooks=self.weights.take_gradient_changes, after_step=shown)
        self.weights.drop_gradients()
        self.weights.exchange()
        if self.weights.separate:
            self.weights.restore()
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """All that the next run depends on; the pipeline is drained between runs, so nothing is in flight."""
        return saving.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another stage."""
        saving.load(self, state)

    def remembered(self, *, blank: bool = False) -> dict[str, Tensor]:
        """DelayedOptimizer.remembered, by the names of the parameters: "before.NAME"; and the norms to clip by."""
        return saving.remembered(self, blank=blank)

    def go_on(self, *, num_updates: int, num_forwards: int, remembered: dict[str, Tensor]) -> None:
        """Set what weights and optimizer states do not tell, for state that came by name instead of load_state_dict.

        Args:
            remembered: as `remembered` returns it. A kind that lacks some parameters, as under another cut of the
                model into stages (the last keeps none), is left out: its prediction starts afresh.
        """
        self.num_forwards, self.num_updates = num_forwards, num_updates
        saving.take_norms(self, remembered)
        if self.optimizer is not None:
            self.optimizer.go_on(num_updates, saving.by_kind(remembered, self.weights.own_names))

    @contextmanager
    def optimizer_parameters(self) -> Iterator[torch.optim.Optimizer | None]:
        """While it lasts, the module's parameters are those that the optimizer owns; yields the optimizer.

        For torch.distributed.checkpoint, which finds an optimizer's state by the names of a module's parameters. None
        where this replica owns no parameter.
        """
        with self.weights.in_place():
            yield self.optimizer.optimizer if self.optimizer is not None and self.optimizer.optimizers else None

    def _roots(
        self, flight: Flight, gradients: Sequence[Tensor] | None, relative: float
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Where a backward starts, with which gradients; None for ones."""
        if gradients is not None:
            return [output for output in flight.outputs if needs_gradient(output)], list(gradients)
        roots = [output for output in flight.outputs if output.requires_grad]
        return roots, None if relative == 1 else [torch.full_like(root, relative) for root in roots]

    def _input_gradients(self, flight: Flight) -> list[Tensor]:
        found = [leaf.grad for leaf in flight.inputs]
        if found and all(gradient is None for gradient in found):
            raise ValueError(
                f"stage {self.index} gives stage {self.index - 1} no gradient: its output does not need its input, "
                "so the stages before would not train (is the input detached, or used as an integer?)"
            )
        pairs = zip(flight.inputs, found, strict=True)
        return [torch.zeros_like(leaf) if gradient is None else resolved(gradient) for leaf, gradient in pairs]

    @contextmanager
    def _reading(self, flight: Flight) -> Iterator[None]:
        """Around a backward: the weights that it reads in the module, and casts of others forgotten."""
        weights = flight.weights
        if weights is None and self.optimizer is not None:
            weights = self.optimizer.backward_weights() if self.weights.shards is None else self._corrected
        torch.clear_autocast_cache()  # a recomputation must cast the weights that are there now
        with self._holding(weights):
            yield

    @contextmanager
    def _holding(self, weights: Weights) -> Iterator[None]:
        """While it lasts the module has `weights`; afterwards, also after an error, the present ones."""
        if weights is None:
            yield
            return
        try:
            self.weights.load(weights)
            yield
        finally:
            self.weights.restore()

    @contextmanager
    def _computing(self, tensors: Sequence[Tensor], *, trains: bool = True) -> Iterator[None]:
        """Around a forward: its random numbers, its precision, and no casts of weights of another version."""
        own = next((tensor.device for tensor in (*self.weights.live[:1], *tensors)), torch.device("cpu"))
        if trains and torch.is_autocast_enabled(own.type):
            self._check_autocast()
        # The cache of casts does not see that weights were written, and outlives this forward under an outer autocast.
        torch.clear_autocast_cache()
        precision = nullcontext() if (dtype := self.settings.dtype) is None else torch.autocast(own.type, dtype)
        with self._randomness(own) if trains else nullcontext(), precision:
            yield
        torch.clear_autocast_cache()

    def _check_autocast(self) -> None:
        if self.optimizer is not None and self.optimizer.corrects:
            raise ValueError(
                f"stage {self.index}: spectrain and pipemare-dc compute backwards with weights of their own, but under "
                "autocast the graph keeps the forward's as casts: choose stash or lwpv+sc, or leave autocast off"
            )

    def _randomness(self, device: torch.device) -> AbstractContextManager[None]:
        if self.settings.seed is None:
            return nullcontext()
        # A replica draws masks of its own; the first one's are the emulator's.
        place = (self.settings.seed, self.index, self.num_forwards, *([self._replica] if self._replica else []))
        return seeded(hash(place) & 0x7FFFFFFFFFFF, device)
