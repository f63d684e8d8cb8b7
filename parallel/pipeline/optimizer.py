"""Optimizers of torch.optim that know how late their gradients are.

torch.optim has no place to say that a gradient is D updates old. This wrapper leaves the optimizers as they are and
changes what they read, so every option of theirs (foreach, fused, amsgrad, decoupled decay) keeps its meaning. What is
changed, with equations and papers: answers.py. Whether any of it helps: benchmarks/pipelined_backprop/README.md.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fourfold.parallel.pipeline.answers import Answer, BasisRotation, DriftCorrection, Lateness, answers_of
from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.moments import Slot, check_moments


class NamedParameters(list[torch.nn.Parameter]):
    """A list of parameters that knows their names; what an optimizer factory is called with.

    Attributes:
        names: as the stage's module has them ("norm.weight"), in the order of the list.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], names: Sequence[str]) -> None:
        super().__init__(parameters)
        self.names = list(names)

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name, parameter), as module.named_parameters gives."""
        return zip(self.names, self, strict=True)


OptimizerFactory = Callable[[NamedParameters], Optimizer | Sequence[Optimizer]]


def make_optimizers(
    factory: OptimizerFactory, parameters: NamedParameters, stage: int
) -> tuple[list[Optimizer], list[int]]:
    """The optimizers of a stage over `parameters`, and in which order these are in them, as places in the list.

    Raises:
        ValueError: they are not over the parameters that the factory was called with.
    """
    made = factory(parameters)
    if not isinstance(made, Optimizer | Iterable):
        raise ValueError(
            f"stage {stage}: the optimizer factory returned {type(made).__name__}: return a torch.optim.Optimizer, or "
            "several"
        )
    optimizers = [made] if isinstance(made, Optimizer) else list(made)
    groups = [group for each in optimizers for group in getattr(each, "param_groups", [])]
    # Learning rates that are tensors become this stage's own: a scheduler writes into them, also for other stages.
    copies: dict[int, Tensor] = {}
    for group in groups:
        if isinstance(rate := group.get("lr"), Tensor):
            group["lr"] = copies.setdefault(id(rate), rate.clone())
    given = [p for group in groups for p in group["params"]]
    places = {id(p): at for at, p in enumerate(parameters)}
    if sorted(map(id, given)) != sorted(places):
        missing = [name for name, p in parameters.named() if id(p) not in set(map(id, given))]
        raise ValueError(
            f"stage {stage}: the optimizer factory must build its optimizer over the parameters it is called with, all "
            "of them once and no others (the module's own are overwritten by predicted weights)"
            + (f"; missing: {', '.join(missing[:5])}" if missing else "")
        )
    return optimizers, [places[id(p)] for p in given]


class DelayedOptimizer:
    """Steps optimizers whose gradients are `delay` updates late, and says which weights to compute with.

    Args:
        optimizer: one over the stage's parameters, or several over some each (Muon for matrices, AdamW for the rest);
            their state is their own and saved as usual.
        delay: D in updates; at 0 (and with no lag) every method is the plain optimizer's, bit for bit.
        lag_updates: e, updates of this stage from its backward of a micro-batch to that of stage 0 (for SpecTrain).
        part: there are other parameters of the stage elsewhere; `check_turned` is then to be called with theirs.
    Raises:
        ValueError: a mitigation that reads the momentum (sc, nesterov, lwpv, spectrain) of an optimizer that is not
            supported, basis rotation without an Adam, an optimizer that evaluates the loss itself (LBFGS).
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        delay: float,
        mitigation: Mitigation,
        lag_updates: int = 0,
        part: bool = False,
    ) -> None:
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.mitigation = mitigation
        for each in self.optimizers:
            _check_optimizer(each, mitigation)
        places = [
            (each, number, p)
            for each in self.optimizers
            for number, group in enumerate(each.param_groups)
            for p in group["params"]
        ]
        self.slots = [Slot(index, *place) for index, place in enumerate(places)]
        self._late = Lateness(mitigation, delay, lag_updates)
        self._answers = answers_of(self._late)
        for answer in self._answers:
            answer.kept = answer.blank(self.slots) if answer.starts_blank else {}
        if not part:
            check_turned([self.kinds])

    @property
    def kinds(self) -> dict[str, bool]:
        """Of the optimizers, by name: whether basis rotation finds a step to turn; nothing without a rotation."""
        if not any(isinstance(answer, BasisRotation) for answer in self._answers):
            return {}
        adams = [slot.optimizer for slot in self.slots if slot.is_adam]
        return {type(each).__name__: any(each is adam for adam in adams) for each in self.optimizers}

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, where it is one.

        Raises:
            ValueError: where there are several.
        """
        if len(self.optimizers) > 1:
            raise ValueError(f"this stage has {len(self.optimizers)} optimizers: see `optimizers`")
        return self.optimizers[0]

    @property
    def classes(self) -> list[str]:
        """Names of the optimizers' classes."""
        return [type(each).__name__ for each in self.optimizers]

    @property
    def delay(self) -> float:
        return self._late.delay

    @property
    def num_updates(self) -> int:
        """Made so far."""
        return self._late.num_updates

    def begin(self) -> None:
        """At the start of a run, before which somebody may have set the optimizers' states in place."""
        for slot in self.slots:
            slot.counted = None

    @torch.no_grad()
    def step(
        self, *, after_hooks: Callable[[], None] | None = None, after_step: Callable[[], None] | None = None
    ) -> None:
        """One update from the gradients in `.grad`, which it may change.

        The user's pre-hooks run before the answers to delay: what they do to gradients (clipping, say) is part of what
        is compensated. The user's post-hooks run after the answers: they see and may change (clamp, say) the weights as
        they will be.

        Args:
            after_hooks: called after the pre-hooks of each optimizer, before the answers.
            after_step: called after the answers have acted on the step of each optimizer, before its post-hooks.
        Cost: that of the optimizers, and for sc two passes over moments and gradients.
        """
        # The weights before, where an answer needs them; their predecessors make room first.
        for answer in self._answers:
            answer.kept.pop("before", None)
        needed = any(answer.needs_old for answer in self._answers)
        old = [slot.parameter.detach().clone() for slot in self.slots] if needed else []
        for optimizer in self.optimizers:
            slots = [slot for slot in self.slots if slot.optimizer is optimizer]
            # A pre-hook registered last runs last: the answers see gradients as the optimizer will.
            before = _once(partial(self._before_step, slots, after_hooks))
            first = optimizer.register_step_pre_hook(lambda *_, before=before: before())
            # A post-hook is moved to the front: the user's see the step with all that the answers change of it.
            after = _once(partial(self._after_step, slots, after_step))
            last = optimizer.register_step_post_hook(lambda *_, after=after: after())
            hooks = last.hooks_dict_ref()
            assert hooks is not None  # the optimizer, which holds them, is alive
            hooks.move_to_end(last.id, last=False)
            try:
                optimizer.step()
                after()  # of an optimizer whose step runs no hooks
            finally:
                first.remove()
                last.remove()
        self._late.num_updates += 1
        for answer in self._answers:
            answer.after_update(self.slots, old)

    @property
    def predicts(self) -> bool:
        """Whether forwards read other weights than the present ones."""
        late, mitigation = self._late, self.mitigation
        return (mitigation.spectrain and late.delay + late.lag_updates > 0) or (
            mitigation.predict != "none" and late.delay > 0
        )

    @property
    def corrects(self) -> bool:
        """Whether backwards read other weights than the present ones."""
        late, mitigation = self._late, self.mitigation
        return (mitigation.spectrain and late.lag_updates > 0) or (mitigation.correction > 0 and late.delay > 0)

    @torch.no_grad()
    def forward_weights(self) -> list[Tensor] | None:
        """New tensors with the weights that a forward should read now, in the optimizers' order; None: the weights.

        LWP^v: w - lr T v, T times the step of the moment alone. LWP^w: w + T (w - w_before). T is the horizon times D;
        for SpecTrain D + lag.
        """
        late, mitigation = self._late, self.mitigation
        if not self.predicts:
            return None
        if mitigation.spectrain:
            return self._ahead(late.delay + late.lag_updates)
        horizon = mitigation.horizon * late.delay
        if mitigation.predict == "velocity":
            return self._ahead(horizon)
        before = self._kept("before")
        if before is None:
            return [slot.parameter.detach().clone() for slot in self.slots]
        ahead = [(1 + horizon) if slot.parameter.requires_grad else 1.0 for slot in self.slots]
        triples = zip(before, self.slots, ahead, strict=True)
        return [torch.lerp(old, slot.parameter.detach(), far) for old, slot, far in triples]

    @torch.no_grad()
    def backward_weights(self) -> list[Tensor] | None:
        """New tensors with the weights that a backward should read now; None: the weights."""
        if self.mitigation.spectrain and self._late.lag_updates:
            return self._ahead(self._late.lag_updates)
        corrections = [answer for answer in self._answers if isinstance(answer, DriftCorrection)]
        return corrections[0].backward_weights(self.slots) if corrections else None

    def remembered(self, *, blank: bool = False) -> dict[str, list[Tensor]]:
        """What the answers keep from update to update, a tensor a parameter ("before", "drift"), as far as there is.

        Args:
            blank: zeros for all that there may be, to be filled from a file.
        """
        kept = [answer.blank(self.slots) if blank else answer.kept for answer in self._answers]
        return {kind: tensors for each in kept for kind, tensors in each.items()}

    def go_on(self, num_updates: int, remembered: dict[str, list[Tensor]]) -> None:
        """Set the count of updates and what `remembered` returned; the optimizers' states are their own matter."""
        self.begin()
        self._late.num_updates = num_updates
        for answer in self._answers:
            there = {kind: remembered[kind] for kind in answer.kinds if kind in remembered}
            if len(there) == len(answer.kinds):
                answer.kept = there
            else:
                answer.kept = answer.blank(self.slots) if answer.starts_blank else {}

    def state_dict(self) -> dict[str, Any]:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {
            "optimizer": states[0] if len(states) == 1 else states,
            "classes": self.classes,
            "num_updates": self.num_updates,
            "before": None,
            "drift": None,
            **self.remembered(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = [state["optimizer"]] if len(self.optimizers) == 1 else state["optimizer"]
        for optimizer, own in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(deepcopy(own))  # it keeps the tensors it is given
        remembered = {
            kind: [tensor.clone() for tensor in tensors]
            for kind, tensors in state.items()
            if kind not in ("optimizer", "classes", "num_updates") and tensors is not None
        }
        self.go_on(state["num_updates"], remembered)

    def _before_step(self, slots: list[Slot], after_hooks: Callable[[], None] | None) -> None:
        if after_hooks is not None:
            after_hooks()
        for answer in self._answers:
            answer.before_step(slots)

    def _after_step(self, slots: list[Slot], after_step: Callable[[], None] | None) -> None:
        for slot in slots:
            if slot.counted is not None and slot.parameter.grad is not None:
                slot.counted = slot.counted[0], slot.counted[1] + 1
        for answer in reversed(self._answers):
            answer.after_step(slots)
        if after_step is not None:
            after_step()

    def _kept(self, kind: str) -> list[Tensor] | None:
        return next((answer.kept[kind] for answer in self._answers if kind in answer.kept), None)

    def _ahead(self, horizon: float) -> list[Tensor]:
        weights: list[Tensor] = []
        gradients = self._kept("gradient")
        for slot in self.slots:
            p, moment = slot.parameter.detach(), slot.moment
            if moment is None and gradients is not None and gradients[slot.index].numel():
                moment = gradients[slot.index]  # no momentum: v is the gradient
            rate = float(slot.group["lr"]) * self._late.rate_factor * horizon
            rotation = self._rotation(slot)
            if moment is None or not slot.parameter.requires_grad:  # a weight that was frozen stays where it is
                weights.append(p.clone())
            elif rotation is None:
                weights.append(slot.step_from(p, moment, rate))
            else:
                weights.append(p + rotation.outward(slot, slot.step_from(torch.zeros_like(p), moment, rate)))
        return weights

    def _rotation(self, slot: Slot) -> BasisRotation | None:
        found: list[Answer] = [answer for answer in self._answers if isinstance(answer, BasisRotation)]
        turned = found and any(found[0].kept[kind][slot.index].numel() for kind in ("row_basis", "column_basis"))
        return found[0] if turned else None  # type: ignore[return-value]


def check_turned(kinds: Iterable[dict[str, bool]]) -> None:
    """Refuse basis rotation for a stage none of whose optimizers steps as Adam does.

    Args:
        kinds: DelayedOptimizer.kinds of all parts of the stage.
    Raises:
        ValueError: naming the optimizers.
    """
    found = [kind for each in kinds for kind in each.items()]
    if found and not any(turned for _, turned in found):
        names = ", ".join(dict(found))
        raise ValueError(f"{names}: basis rotation turns the steps of Adam, AdamW and NAdam; leave out rotate")


def _once(action: Callable[[], None]) -> Callable[[], None]:
    """`action` the first time: a subclass whose step calls its parent's runs pre-hooks twice."""
    done: list[bool] = []

    def run() -> None:
        if not done:
            done.append(True)
            action()

    return run


def _check_optimizer(optimizer: Any, mitigation: Mitigation) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"the optimizer factory returned {type(optimizer).__name__}: return a torch.optim.Optimizer, or several"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "differentiable=True keeps a graph of the updates, which a stream would never free: leave it out"
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times a step; a pipeline has one gradient an update: use SGD or AdamW"
        )
    if mitigation.reads_momentum or mitigation.rotate_every:
        check_moments(optimizer)


def check_hooks(names: Sequence[str], parameters: Sequence[torch.nn.Parameter], stage: int) -> None:
    """Refuse hooks on the optimizer's parameters, which no backward reaches: they would never run.

    Raises:
        ValueError: naming the parameter.
    """
    for name, parameter in zip(names, parameters, strict=True):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"stage {stage}: a hook on the gradient of {name} is registered on the optimizer's own parameter, "
                "through which no backward goes: register it on the module's (stages[i].parameters()), or use "
                "on_gradients or a pre-hook of the optimizer"
            )
