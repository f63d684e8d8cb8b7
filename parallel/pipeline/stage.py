"""One stage of an asynchronous pipeline: a module, its optimizer, and which weights each forward and backward reads.

Autograd refuses a backward after an optimizer changed a saved weight in place, which is what pipelined backpropagation
is about: forward with old (or predicted) weights, backward with the present ones. Weights are therefore written through
`.data`, which does not count as a change. The optimizer owns its parameters (the masters). Where forwards read the
present weights the masters share the module's storage and nothing is copied; otherwise the module's storage is filled
before each forward and set back after it, so that between actions the module always holds the present weights.

Activation checkpointing and StreamBP recompute inside the backward, hence with the backward's weights: what is stale
then is only the stage's input. Under autocast without either, the graph keeps the forward's weights as low-precision
casts, and the backward computes input gradients with those: in effect stashed, whatever the mitigation says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fourfold.parallel.gradients import average_gradients
from fourfold.parallel.pipeline.links import replica_lost
from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.optimizer import DelayedOptimizer, OptimizerFactory

Weights = list[Tensor] | None  # None: the present ones
LossFunction = Callable[[Tensor, Any], Tensor]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(slots=True)
class Flight:
    """A micro-batch between its forward and its backward."""

    input: Tensor
    output: Tensor  # the loss, on the last stage
    weights: Weights
    result: Tensor  # `output` without its graph
    parameter_groups: list[dict[str, Any]] = field(default_factory=list)  # between the two halves of a backward


def check_recomputation(module: nn.Module | None, delays: Sequence[float]) -> None:
    """Refuse a stage that recomputes around an attention output of other weights than the backward's.

    Args:
        delays: of all stages, so that every rank refuses.
    """
    if getattr(module, "keeps_attention", False) and max(delays) > 0:
        raise ValueError(
            "keep_attention in a pipeline that updates between a forward and its backward: the kept output would be of "
            "other weights than what is recomputed around it; choose keep_attention=False, or a schedule that drains"
        )


class PipelineStage:
    """What a rank of the runtime, or the emulator for each stage, does with a micro-batch.

    Args:
        module: maps one tensor [B, ...] to one tensor; on the last stage its output goes into `loss_fn`.
        optimizer: called with this stage's masters, in the order of module.parameters().
        delay: D, in updates; with `behind` as DelayedOptimizer's.
        double_buffered: a micro-batch's forward and backward read the same version of the weights, not the present one.
        separate: keep the masters apart from the module's storage even where no mitigation asks for it (the emulator).
        loss_fn: (output, target) -> scalar mean over the micro-batch; on the last stage only.
        dp_group: replicas of this stage; gradients are averaged over it.
        seed: if given, every forward draws its random numbers (dropout) from (seed, stage, micro-batch) alone.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        index: int,
        optimizer: OptimizerFactory,
        delay: float,
        behind: int = 0,
        mitigation: Mitigation,
        double_buffered: bool = False,
        separate: bool = False,
        loss_fn: LossFunction | None = None,
        scheduler: SchedulerFactory | None = None,
        dp_group: dist.ProcessGroup | None = None,
        seed: int | None = None,
    ) -> None:
        self.module = module
        self.index = index
        self.loss_fn = loss_fn
        self.dp_group = dp_group
        self.seed = seed
        self.num_forwards = 0
        self.stashes = (mitigation.stash and delay > 0) or double_buffered
        self._live = [p for p in module.parameters() if p.requires_grad]
        self._names = {id(p): name for name, p in module.named_parameters()}
        if dp_group is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, group=dp_group, group_src=0)
        self._pending = 0
        self._separate = False
        self.optimizer: DelayedOptimizer | None = None
        self.scheduler: LRScheduler | None = None
        self._masters = self._live
        if self._live:
            self._attach(optimizer, scheduler, mitigation, delay, behind, separate)

    def _attach(
        self,
        factory: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        mitigation: Mitigation,
        delay: float,
        behind: int,
        separate: bool,
    ) -> None:
        copies = [nn.Parameter(p.detach().clone()) for p in self._live]
        optimizer = factory(copies)
        given = [p for group in optimizer.param_groups for p in group["params"]]
        if {id(p) for p in given} != {id(p) for p in copies}:
            raise ValueError(
                f"stage {self.index}: the optimizer factory must build its optimizer over the parameters it is called "
                "with, all of them and no others (the module's own are overwritten by predicted weights)"
            )
        self.optimizer = DelayedOptimizer(optimizer, delay=delay, mitigation=mitigation, behind=behind)
        # From here on everything is in the optimizer's order, which its param_groups may have changed.
        live = dict(zip(map(id, copies), self._live, strict=True))
        self._masters = given
        self._live = [live[id(p)] for p in given]
        self._separate = separate or self.stashes or self.optimizer.predicts or self.optimizer.corrects
        if not self._separate:
            for master, p in zip(self._masters, self._live, strict=True):
                master.data = p.data
        self.scheduler = scheduler(optimizer) if scheduler is not None else None

    def snapshot(self) -> Weights:
        """What forwards should read from now to the next update; new tensors where later reads may see an update."""
        weights = self.optimizer.forward_weights() if self.optimizer is not None else None
        return self.present() if weights is None and self.stashes else weights

    def present(self) -> list[Tensor]:
        """A copy of the present weights."""
        return [p.detach().clone() for p in self._masters]

    def forward(self, value: Tensor, target: Any, weights: Weights) -> Flight:
        """Run the module on `value` (detached from its sender) with `weights`, keeping the graph."""
        leaf = value.detach()
        if self.index and leaf.is_floating_point():
            leaf.requires_grad_()
        with self._randomness(leaf.device):
            self._load(weights)
            output = self.module(leaf)
            self._load(None if weights is None else self._masters)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"stage {self.index} returned {type(output).__name__}: stages map one tensor to one tensor"
            )
        if self.loss_fn is not None:
            output = self.loss_fn(output, target)
            if output.numel() != 1:
                raise ValueError(f"loss_fn must return one number, the mean over its micro-batch; got {output.shape}")
        self.num_forwards += 1
        kept = weights if self.stashes else None
        return Flight(leaf, output, kept, output.detach().contiguous())

    @torch.no_grad()
    def evaluate(self, value: Tensor, target: Any) -> Tensor:
        """Output (or loss) with the present weights, without a graph."""
        output: Tensor = self.module(value)
        return output if self.loss_fn is None else self.loss_fn(output, target)

    def backward(self, flight: Flight, gradient: Tensor | None) -> Tensor | None:
        """Accumulate the parameters' gradients; returns the input's (None on stage 0)."""
        self._pending += 1
        if flight.output.requires_grad:
            weights = self._backward_weights(flight)
            self._load(weights)
            torch.autograd.backward(flight.output, gradient)
            self._load(None if weights is None else self._masters)
        return flight.input.grad

    def backward_input(self, flight: Flight, gradient: Tensor | None) -> Tensor | None:
        """The first half of a split backward: only the input's gradient."""
        # torch's own zero-bubble runtime walks the graph for this; private there, but there is no public way.
        from torch.distributed.pipelining._backward import stage_backward_input

        if not flight.input.requires_grad:
            # Nothing to send: the whole backward is the weights' half.
            flight.parameter_groups = [{"gradient": gradient}]
            return None
        gradients = None if gradient is None else [gradient]
        # It detaches the output in place, which autograd refuses for a view.
        output = flight.output.clone() if flight.output._is_view() else flight.output
        _, flight.parameter_groups = stage_backward_input([output], gradients, [flight.input], iter(self._live))
        return flight.input.grad

    def backward_weight(self, flight: Flight) -> None:
        """The second half: only the parameters' gradients."""
        from torch.distributed.pipelining._backward import stage_backward_weight

        self._pending += 1
        if flight.input.requires_grad:
            stage_backward_weight(iter(self._live), flight.parameter_groups)
        elif flight.output.requires_grad:
            torch.autograd.backward(flight.output, flight.parameter_groups[0]["gradient"])

    @torch.no_grad()
    def update(self) -> None:
        """Average the gradients since the last update over micro-batches and replicas, and step.

        Every micro-batch counts the same, also a smaller last one. Cost: with replicas one all-reduce of the gradients.

        Raises:
            PipelineError: a replica is gone.
        """
        count, self._pending = self._pending, 0
        if self.optimizer is None:
            return
        pairs = [(m, p) for m, p in zip(self._masters, self._live, strict=True) if p.grad is not None]
        gradients = [p.grad for _, p in pairs if p.grad is not None]
        if gradients and self.dp_group is not None and self.dp_group.size() > 1:
            try:
                average_gradients((p for _, p in pairs), self.dp_group)
            except RuntimeError as error:
                raise replica_lost(self.index, self.dp_group, error) from error
        if gradients and count > 1:
            torch._foreach_div_(gradients, float(count))
        for master, p in pairs:
            master.grad, p.grad = p.grad, None
        self.optimizer.step()
        for master, _ in pairs:
            master.grad = None
        if self._separate:
            self._load(self._masters)
        if self.scheduler is not None:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """All that the next run depends on; the pipeline is drained between runs, so nothing is in flight."""
        return {
            "stage": self.index,
            "module": self.module.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "num_forwards": self.num_forwards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another stage."""
        if state["stage"] != self.index:
            raise ValueError(f"this is the state of stage {state['stage']}, not of stage {self.index}")
        self.module.load_state_dict(state["module"])
        self.num_forwards = state["num_forwards"]
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for master, p in zip(self._masters, self._live, strict=True):
                    master.data.copy_(p.data)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def remembered(self, *, blank: bool = False) -> dict[str, Tensor]:
        """DelayedOptimizer.remembered, by the names of the parameters: "before.NAME"."""
        kinds = {} if self.optimizer is None else self.optimizer.remembered(blank=blank)
        return {
            f"{kind}.{self._names[id(p)]}": tensor
            for kind, tensors in kinds.items()
            for p, tensor in zip(self._live, tensors, strict=True)
        }

    def go_on(self, *, num_updates: int, num_forwards: int, remembered: dict[str, Tensor]) -> None:
        """Set what weights and optimizer states do not tell, for state that came by name instead of load_state_dict.

        Args:
            remembered: as `remembered` returns it. A kind that lacks some parameters, as under another cut of the
                model into stages (the last keeps none), is left out: its prediction starts afresh.
        """
        self.num_forwards = num_forwards
        if self.optimizer is None:
            return
        names = [self._names[id(p)] for p in self._live]
        kinds = {
            kind: [remembered[f"{kind}.{name}"] for name in names]
            for kind in {name.split(".", 1)[0] for name in remembered}
            if all(f"{kind}.{name}" in remembered for name in names)
        }
        self.optimizer.go_on(num_updates, kinds)

    @contextmanager
    def optimizer_parameters(self) -> Iterator[torch.optim.Optimizer | None]:
        """While it lasts, the module's parameters are those that the optimizer owns; yields the optimizer.

        For torch.distributed.checkpoint, which finds an optimizer's state by the names of a module's parameters.
        """
        masters = dict(zip(map(id, self._live), self._masters, strict=True))
        places = [
            (module, name, p)
            for module in self.module.modules()
            for name, p in module._parameters.items()
            if id(p) in masters
        ]
        for module, name, p in places:
            module._parameters[name] = masters[id(p)]  # type: ignore[assignment]
        try:
            yield self.optimizer.optimizer if self.optimizer is not None else None
        finally:
            for module, name, p in places:
                module._parameters[name] = p
            with torch.no_grad():
                self._load(self._masters)

    def _backward_weights(self, flight: Flight) -> Weights:
        if flight.weights is not None:
            return flight.weights
        return self.optimizer.backward_weights() if self.optimizer is not None else None

    def _load(self, weights: list[Tensor] | list[nn.Parameter] | None) -> None:
        if weights:
            torch._foreach_copy_([p.data for p in self._live], [weight.detach() for weight in weights])

    def _randomness(self, device: torch.device) -> AbstractContextManager[None]:
        if self.seed is None:
            return nullcontext()
        return _seeded(hash((self.seed, self.index, self.num_forwards)) & 0x7FFFFFFFFFFF, device)


class _seeded(AbstractContextManager[None]):
    """Random numbers from `seed`, and the outer generator's state put back."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._fork = torch.random.fork_rng([device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)
