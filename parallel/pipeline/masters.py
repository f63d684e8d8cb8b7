"""A stage's weights in two places: those its module computes with, and those its optimizer owns (the masters).

Autograd refuses a backward after an optimizer changed a saved weight in place, which is what pipelined backpropagation
is about: forward with old (or predicted) weights, backward with the present ones. Weights are therefore written through
`.data`, which does not count as a change. Where forwards read the present weights the masters share the module's
storage and nothing is copied; otherwise the module's storage is filled before each forward and set back after it, so
that between actions the module always holds the present weights.

Weights that the user sets between two runs, in the module or in the optimizer, are taken; what cannot be taken (other
parameters, another dtype or device, a change in mid-stream) is noticed and refused.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold.parallel.pipeline.optimizer import DelayedOptimizer, NamedParameters, OptimizerFactory

Fingerprint = tuple[int, int]


class MasterWeights:
    """The trainable parameters of `module` and the optimizer's copies of them.

    Args:
        stage: its number, for errors.
        dtype: of the masters; None for the module's own.

    Attributes:
        live, masters: the module's and the optimizer's, in the same order.
        names: by the module.
        separate: whether they have storage of their own.
    """

    def __init__(self, module: nn.Module, stage: int, dtype: torch.dtype | None = None) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._module, self._stage = module, stage
        self.names = [name for name, _ in named]
        self.live = [p for _, p in named]
        self.masters = [nn.Parameter(p.detach().clone() if dtype is None else p.detach().to(dtype, copy=True))
                        for p in self.live]  # fmt: skip
        self.separate = any(master.dtype != p.dtype for master, p in zip(self.masters, self.live, strict=True))
        self._dtypes = {name: p.dtype for name, p in named}
        self._fingerprints: list[Fingerprint] = []
        self._writes: list[int] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._given: list[tuple[Tensor | None, int]] = []  # the module's gradients when the masters got them

    @property
    def narrower(self) -> bool:
        """Whether the module's weights are rounded masters."""
        return any(master.dtype != p.dtype for master, p in zip(self.masters, self.live, strict=True))

    def own(self, factory: OptimizerFactory) -> list[torch.optim.Optimizer]:
        """Make the optimizers over the masters; from here on everything is in the optimizers' order.

        Raises:
            ValueError: they are not over the parameters that the factory was called with.
        """
        made = factory(NamedParameters(self.masters, self.names))
        if not isinstance(made, torch.optim.Optimizer | Iterable):
            raise ValueError(
                f"stage {self._stage}: the optimizer factory returned {type(made).__name__}: return a "
                "torch.optim.Optimizer, or several"
            )
        optimizers = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
        _own_rates(optimizers)
        given = [p for each in optimizers for group in getattr(each, "param_groups", []) for p in group["params"]]
        places = {id(master): at for at, master in enumerate(self.masters)}
        if sorted(map(id, given)) != sorted(places):
            missing = [
                name for name, p in zip(self.names, self.masters, strict=True) if id(p) not in set(map(id, given))
            ]
            raise ValueError(
                f"stage {self._stage}: the optimizer factory must build its optimizer over the parameters it is called "
                "with, all of them once and no others (the module's own are overwritten by predicted weights)"
                + (f"; missing: {', '.join(missing[:5])}" if missing else "")
            )
        self._optimizers = optimizers
        order = [places[id(p)] for p in given]
        self.masters = [self.masters[at] for at in order]
        self.live, self.names = [self.live[at] for at in order], [self.names[at] for at in order]
        return optimizers

    def share(self) -> None:
        """Give the masters the module's storage, unless they must be apart."""
        if not self.separate:
            for master, p in zip(self.masters, self.live, strict=True):
                master.data = p.data
        self._writes = [p._version for p in self.live]
        self.note()

    def hand_over_gradients(self) -> None:
        """Give the masters the module's gradients, in their own precision; the module keeps its own for hooks."""
        self._given = []
        for master, p in zip(self.masters, self.live, strict=True):
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
            self._given.append((p.grad, -1 if p.grad is None else p.grad._version))

    def take_gradient_changes(self) -> None:
        """After an optimizer's pre-hooks: take what they did to the module's gradients, as to the masters'."""
        for at, (master, p) in enumerate(zip(self.masters, self.live, strict=True)):
            given, version = self._given[at]
            if p.grad is not given:
                master.grad = None if p.grad is None else p.grad.to(master.dtype)
            elif given is not None and given is not master.grad and given._version != version:
                master.grad = given.to(master.dtype)
            self._given[at] = p.grad, -1 if p.grad is None else p.grad._version

    def show_gradients(self, hook: Callable[[dict[str, Tensor]], None]) -> None:
        """Call `hook` with the module's gradients by name, and take what it changed, replaced or took out.

        Raises:
            ValueError: another name, shape or type.
        """
        shown = {name: p.grad for name, p in zip(self.names, self.live, strict=True) if p.grad is not None}
        known = dict(shown)
        hook(shown)
        if other := [name for name in shown if name not in known]:
            raise ValueError(
                f"stage {self._stage}: on_gradients set {other[0]!r}, which had no gradient: change those that it is "
                f"called with ({', '.join(list(known)[:5])}, ...)"
            )
        for name, p in zip(self.names, self.live, strict=True):
            given = shown.get(name)
            if name in known and given is not known[name]:
                if given is not None and (not isinstance(given, Tensor) or given.shape != p.shape):
                    what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
                    raise ValueError(
                        f"stage {self._stage}: on_gradients made {what} of {name}, which is {list(p.shape)}"
                    )
                p.grad = None if given is None else given.detach().to(p.dtype)

    def take_gradients(self) -> list[Tensor | None]:
        """The module's gradients, which it has no more."""
        taken = [p.grad for p in self.live]
        self.drop_gradients()
        return taken

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """The inverse of `take_gradients`."""
        for p, gradient in zip(self.live, gradients, strict=True):
            p.grad = gradient

    def drop_gradients(self) -> None:
        """Of module and masters."""
        self._given = []
        for p in (*self.masters, *self.live):
            p.grad = None

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around a half backward that adds to the module's gradients itself: run the hooks that autograd would run."""
        hooks = [getattr(p, "_post_accumulate_grad_hooks", None) for p in self.live]
        before = [(p.grad, -1 if p.grad is None else p.grad._version) for p in self.live]
        yield
        for p, of_p, (gradient, version) in zip(self.live, hooks, before, strict=True):
            changed = p.grad is not None and (p.grad is not gradient or p.grad._version != version)
            for hook in list((of_p or {}).values()) if changed else []:
                hook(p)

    def load(self, weights: Sequence[Tensor] | None) -> None:
        """Fill the module with `weights`; nothing for None."""
        if weights:
            torch._foreach_copy_([p.data for p in self.live], [weight.detach() for weight in weights])

    def restore(self) -> None:
        """Fill the module with the present weights."""
        self.load(self.masters)

    def present(self) -> list[Tensor]:
        """A copy of the present weights."""
        return [p.detach().clone() for p in self.masters]

    @torch.no_grad()
    def take_changes(self, *, for_now: bool = False) -> None:
        """Before a run: take what the user has set since the last, in the module or in the optimizer.

        Args:
            for_now: to evaluate. What was set in the module is read from there and the masters stay, so that averaged
                weights that are put in for an evaluation, and taken out again, leave wider masters as they were.

        Raises:
            ValueError: naming the parameter that was replaced, added, moved, or set in both places differently.
        Cost: reads the weights twice.
        """
        self._check_parameters()
        for at, (name, master, p) in enumerate(zip(self.names, self.masters, self.live, strict=True)):
            master.requires_grad_(p.requires_grad)
            if not self.separate:
                if master.data_ptr() != p.data_ptr():
                    master.data = p.data  # the module's storage was exchanged
                continue
            own, module = local_part(master), local_part(p)
            if torch.equal(own.to(module.dtype), module):
                continue
            known = self._fingerprints[at]
            set_in_module = fingerprint(module) != known
            set_in_optimizer = fingerprint(own.to(module.dtype)) != known
            if set_in_module and set_in_optimizer:
                raise ValueError(
                    f"stage {self._stage}: weight {name} was set in the module and, otherwise, in the optimizer: "
                    "set it in one of them"
                )
            if set_in_optimizer:
                module.copy_(own)
            elif not for_now:
                own.copy_(module)
        self._writes = [p._version for p in self.live]

    def note(self) -> None:
        """After a run: remember the weights, to see later which side was changed."""
        if self.separate:
            self._fingerprints = [fingerprint(local_part(p)) for p in self.live]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, the module's parameters are the masters; afterwards it has the weights that these have."""
        masters = dict(zip(map(id, self.live), self.masters, strict=True))
        places = [
            (module, name, p)
            for module in self._module.modules()
            for name, p in module._parameters.items()
            if id(p) in masters
        ]
        for module, name, p in places:
            module._parameters[name] = masters[id(p)]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, name, p in places:
                module._parameters[name] = p
            with torch.no_grad():
                self.restore()
            self.note()

    def check_untouched(self) -> None:
        """In mid-stream: refuse weights that were changed in place since the run began (through `.data` is not seen).

        Raises:
            ValueError: naming the parameter.
        """
        for name, p, master, writes in zip(self.names, self.live, self.masters, self._writes, strict=True):
            if p.requires_grad != master.requires_grad:
                raise ValueError(
                    f"stage {self._stage}: weight {name} was {'un' if p.requires_grad else ''}frozen while a stream "
                    "runs, when other stages are at other micro-batches: freeze weights between two runs"
                )
            if p._version != writes or not (self.separate or p.data_ptr() == master.data_ptr()):
                raise ValueError(
                    f"stage {self._stage}: weight {name} was changed while a stream runs, where it holds predicted or "
                    "past weights: change weights between two runs, or in an optimizer's hook those that it owns "
                    "(param_groups)"
                )

    def _check_parameters(self) -> None:
        held = [p for each in self._optimizers for group in each.param_groups for p in group["params"]]
        if list(map(id, held)) != list(map(id, self.masters)):
            raise ValueError(
                f"stage {self._stage}: its optimizer has other parameters, or in another order, than when the pipeline "
                "was made (add_param_group?): make all groups in the optimizer factory"
            )
        there = dict(self._module.named_parameters())
        known = {id(p) for p in self.live}
        if lost := [name for name, p in zip(self.names, self.live, strict=True) if there.get(name) is not p]:
            raise ValueError(
                f"stage {self._stage}: parameter {lost[0]} is not the object that it was when the pipeline was made, "
                "and the optimizer does not know the new one: set weights in place, or make a new pipeline"
            )
        if new := [name for name, p in there.items() if p.requires_grad and id(p) not in known]:
            raise ValueError(
                f"stage {self._stage}: parameter {new[0]} was not trainable when the pipeline was made, and no "
                "optimizer has it: make a new pipeline"
            )
        for name, master, p in zip(self.names, self.masters, self.live, strict=True):
            if p.device != master.device or p.dtype != self._dtypes[name]:
                raise ValueError(
                    f"stage {self._stage}: parameter {name} went to {p.dtype} on {p.device}, its optimizer state is "
                    f"{master.dtype} on {master.device}: convert and move modules before making the pipeline"
                )


def attach(
    masters: MasterWeights, factory: OptimizerFactory, *, delayed: dict[str, object], separate: bool
) -> DelayedOptimizer:
    """The delayed optimizer over `masters`, and their storage shared where nothing asks for two places.

    Args:
        delayed: delay, mitigation and lag_updates for DelayedOptimizer.
        separate: keep the masters apart in any case.
    """
    optimizer = DelayedOptimizer(masters.own(factory), **delayed)  # type: ignore[arg-type]
    masters.separate = masters.separate or separate or optimizer.predicts or optimizer.corrects
    masters.share()
    return optimizer


def _own_rates(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Learning rates that are tensors become this stage's own: a scheduler writes into them, also for other stages."""
    copies: dict[int, Tensor] = {}
    for group in (group for each in optimizers for group in getattr(each, "param_groups", [])):
        rate = group.get("lr")
        if isinstance(rate, Tensor):
            group["lr"] = copies.setdefault(id(rate), rate.clone())


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Two sums over the bits: other weights have others, but for a coincidence."""
    flat = tensor.contiguous().view(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
    return int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64))
