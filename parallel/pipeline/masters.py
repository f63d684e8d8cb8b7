"""A stage's weights in two places: those its module computes with, and those its optimizer owns (the masters).

Autograd refuses a backward after an optimizer changed a saved weight in place, which is what pipelined backpropagation
is about: forward with old (or predicted) weights, backward with the present ones. Weights are therefore written through
`.data`, which does not count as a change. Where forwards read the present weights the masters share the module's
storage and nothing is copied; otherwise the module's storage is filled before each forward and set back after it, so
that between actions the module always holds the present weights.

Where the optimizer is sharded over the stage's replicas (shards.py), a replica has masters of the parameters that it
owns, and of the others the weights that their owners had after the newest update.

Weights that the user sets between two runs, in the module or in the optimizer, are taken; what cannot be taken (other
parameters, another dtype or device, a change in mid-stream) is noticed and refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold.parallel.gradients import local_part
from fourfold.parallel.pipeline.local_parts import Fingerprint, fingerprint, local_parts, share_storage
from fourfold.parallel.pipeline.optimizer import NamedParameters, OptimizerFactory, check_hooks, make_optimizers
from fourfold.parallel.pipeline.shards import Shards


class MasterWeights:
    """The trainable parameters of `module` and the optimizer's copies of them.

    Args:
        stage: its number, for errors.
        dtype: of the masters; None for the module's own.
        replicas: over which the optimizer is sharded; None for none.

    Attributes:
        live: the module's, in the optimizers' order; where it is sharded, those of the first replica first.
        names: by the module, in the same order.
        in_order: the module's, in its own order, which is that of all replicas.
        masters: the optimizer's, of those that this replica owns.
        held: the present weights in the order of `live`: masters, and those of other replicas as they were gathered.
        separate: whether the present weights have storage of their own.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: int,
        dtype: torch.dtype | None = None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._module, self._stage = module, stage
        self.in_order = [p for _, p in named]
        self.shards = Shards(named, stage, replicas) if replicas is not None and named else None
        self.names = [name for name, _ in named]
        self.live = list(self.in_order)
        if self.shards is not None:
            self.follow_owners()
        self.masters = [nn.Parameter(p.detach().clone() if dtype is None else p.detach().to(dtype, copy=True))
                        for p in self.own_live]  # fmt: skip
        self.separate = dtype is not None and any(p.dtype != dtype for p in self.live)
        self.held: list[Tensor] = []
        self._dtypes = {name: p.dtype for name, p in named}
        self._devices = {name: p.device for name, p in named}
        self._fingerprints: list[Fingerprint] = []
        self._set_in_optimizer: set[str] = set()  # since `note`
        self._noted: list[tuple[bool, int, int]] = []  # whether it trains, writes, and where it lies, when a run begins
        self._optimizers: list[torch.optim.Optimizer] = []
        self._given: list[tuple[Tensor | None, int]] = []  # the module's gradients when the masters got them

    @property
    def own_live(self) -> list[nn.Parameter]:
        """Those of `live` that this replica owns: all, where the optimizer is not sharded."""
        return self.live if self.shards is None else self.live[self.shards.own]

    @property
    def own_names(self) -> list[str]:
        return self.names if self.shards is None else self.names[self.shards.own]

    @property
    def narrower(self) -> bool:
        """Whether the module's weights are rounded masters."""
        return any(master.dtype != p.dtype for master, p in zip(self.masters, self.own_live, strict=True))

    @property
    def apart(self) -> bool:
        """Whether the masters have storage of their own: by it one sees where a replica's user has set a weight."""
        return self.separate or self.shards is not None

    def own(self, factory: OptimizerFactory) -> list[torch.optim.Optimizer]:
        """Make the optimizers over the masters; from here on everything is in the optimizers' order.

        Raises:
            ValueError: they are not over the parameters that the factory was called with.
        """
        names, live = self.own_names, self.own_live
        if not names:
            return []  # there are more replicas than parameters
        optimizers, order = make_optimizers(factory, NamedParameters(self.masters, names), self._stage)
        self._optimizers = optimizers
        check_hooks(self.own_names, self.masters, self._stage)
        self.masters = [self.masters[at] for at in order]
        own = slice(None) if self.shards is None else self.shards.own
        self.live[own], self.names[own] = [live[at] for at in order], [names[at] for at in order]
        return optimizers

    def follow_owners(self) -> None:
        """Put parameters into the order that `shards` has: by owners and, once all have told, as their optimizers."""
        assert self.shards is not None
        places = dict(zip(self.names, self.live, strict=True))
        self.names = list(self.shards.names)
        self.live = [places[name] for name in self.names]

    def share(self) -> None:
        """Give the masters the module's storage, unless they must be apart."""
        if not self.apart:
            for master, p in zip(self.masters, self.live, strict=True):
                share_storage(master, p)
        self.held = list(self.masters)
        if self.shards is not None:
            self.held = [p.detach().clone() for p in self.live] if self.separate else list(self.live)
            self.held[self.shards.own] = self.masters
        self._note_places()
        self.note()

    @torch.no_grad()
    def exchange(self) -> None:
        """After an update: what other replicas' masters are now; every replica calls."""
        if self.shards is None:
            return
        if self.separate:
            self.held = []  # those before make room
        present = self.shards.gathered(self.masters, self.live)
        present[self.shards.own] = self.masters
        if self.separate:
            self.held = present
        else:
            self.load(present)

    def hand_over_gradients(self) -> None:
        """Give the masters the module's gradients, in their own precision; the module keeps its own for hooks."""
        self._given = []
        for master, p in zip(self.masters, self.own_live, strict=True):
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
            self._given.append((p.grad, -1 if p.grad is None else p.grad._version))

    def take_gradient_changes(self) -> None:
        """After an optimizer's pre-hooks: take what they did to the module's gradients, as to the masters'."""
        for at, (master, p) in enumerate(zip(self.masters, self.own_live, strict=True)):
            given, version = self._given[at]
            if p.grad is not given:
                master.grad = None if p.grad is None else p.grad.to(master.dtype)
            elif given is not None and given is not master.grad and given._version != version:
                master.grad = given.to(master.dtype)
            self._given[at] = p.grad, -1 if p.grad is None else p.grad._version

    def show_gradients(self, hook: Callable[[dict[str, Tensor]], object]) -> None:
        """Call `hook` with the module's gradients by name, and take what it changed, replaced or took out.

        Raises:
            ValueError: another name, shape or type.
        """
        shown = {name: p.grad for name, p in zip(self.names, self.live, strict=True) if p.grad is not None}
        known = dict(shown)
        if isinstance(returned := hook(shown), dict) and returned is not shown:
            raise ValueError(f"stage {self._stage}: on_gradients returned another dict: change its own in place")
        if other := [name for name in shown if name not in known]:
            raise ValueError(
                f"stage {self._stage}: on_gradients set {other[0]!r}, which had no gradient: change those that it is "
                f"called with ({', '.join(list(known)[:5])}, ...)"
            )
        for name, p in zip(self.names, self.live, strict=True):
            given = shown.get(name)
            if name in known and given is not known[name]:
                if isinstance(given, Tensor) and isinstance(p, DTensor) != isinstance(given, DTensor):
                    raise ValueError(
                        f"stage {self._stage}: on_gradients made a {type(given).__name__} of {name}, which tensor "
                        "parallelism cuts: change what it is called with in place, or put a DTensor in its place"
                    )
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
            torch._foreach_copy_([local_part(p).data for p in self.live], local_parts(weights))

    def restore(self) -> None:
        """Fill the module with the present weights."""
        self.load(self.held)

    def present(self) -> list[Tensor]:
        """A copy of the present weights, of those that are cut this rank's parts."""
        return [local_part(p).clone() for p in self.held]

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
        for master, p in zip(self.masters, self.own_live, strict=True):
            master.requires_grad_(p.requires_grad)
            if not self.apart and local_part(master).data_ptr() != local_part(p).data_ptr():
                share_storage(master, p)  # the module's storage was exchanged
        for at, (name, held, p) in enumerate(zip(self.names, self.held, self.live, strict=True)):
            own, module = local_part(held), local_part(p)
            if not self.apart or held is p or torch.equal(own.to(module.dtype), module):
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
                self._set_in_optimizer.add(name)
            elif not for_now:
                own.copy_(module)
        self._note_places()

    @torch.no_grad()
    def take_all_changes(self) -> None:
        """`take_changes`, and what was set in the optimizers of other replicas; every one calls before a run.

        Where a weight was also set in the module here, it stays, to be refused as unlike on all replicas.

        Raises:
            ValueError: as `take_changes`, of any replica.
        """
        if self.shards is None:
            self.take_changes()
            return

        def take() -> list[str]:
            self.take_changes()
            return sorted(self._set_in_optimizer)

        elsewhere = {name for names in self.shards.do_together(take) for name in names}
        if not elsewhere:
            return
        present = self.shards.gathered(self.masters, self.live)
        changed = zip(self.names, self.held, self.live, present, self._fingerprints, strict=True)
        for name, held, p, theirs, known in changed:
            if name in elsewhere.difference(self.own_names) and fingerprint(p.detach()) == known:
                held.data.copy_(theirs)
                p.data.copy_(theirs)
        self.note()

    def note(self) -> None:
        """After a run: remember the weights, to see later which side was changed."""
        self._set_in_optimizer = set()
        if self.apart:
            self._fingerprints = [fingerprint(local_part(p)) for p in self.live]

    def _note_places(self) -> None:
        self._noted = [(p.requires_grad, p._version, local_part(p).data_ptr()) for p in self.live]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, the module's parameters are the masters; afterwards it has the weights that these have.

        Parameters that other replicas own stay as they are in the module, and are taken from there.

        Raises:
            ValueError: those would be rounded ones.
        """
        if self.shards is not None and any(held.dtype != p.dtype for held, p in zip(self.held, self.live, strict=True)):
            raise ValueError(
                f"stage {self._stage}: with shard_optimizer=True and master_dtype a replica has its own weights in "
                "full precision and the others' rounded: save what state_dict() returns, on every replica"
            )
        masters = dict(zip(map(id, self.own_live), self.masters, strict=True))
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
            self.take_others_from_module()
            with torch.no_grad():
                self.restore()
            self.note()

    @torch.no_grad()
    def take_others_from_module(self) -> None:
        """The present weights that other replicas own become those in the module, where a file has set them."""
        owned = set(map(id, self.masters))
        for held, p in zip(self.held, self.live, strict=True):
            if id(held) not in owned:
                held.data.copy_(p.data)

    def check_untouched(self) -> None:
        """In mid-stream: refuse weights that were changed in place since the run began (through `.data` is not seen).

        Raises:
            ValueError: naming the parameter.
        """
        places = (
            [place for _, _, place in self._noted]
            if self.apart
            else [local_part(each).data_ptr() for each in self.masters]
        )
        for name, p, place, (trains, writes, _) in zip(self.names, self.live, places, self._noted, strict=True):
            if p.requires_grad != trains:
                raise ValueError(
                    f"stage {self._stage}: weight {name} was {'un' if p.requires_grad else ''}frozen while a stream "
                    "runs, when other stages are at other micro-batches: freeze weights between two runs"
                )
            if p._version != writes or not (self.separate or local_part(p).data_ptr() == place):
                raise ValueError(
                    f"stage {self._stage}: weight {name} was changed while a stream runs, where it holds predicted or "
                    "past weights: change weights between two runs, or in an optimizer's hook those that it owns "
                    "(param_groups)"
                )

    def _check_parameters(self) -> None:
        owned = [p for each in self._optimizers for group in each.param_groups for p in group["params"]]
        if list(map(id, owned)) != list(map(id, self.masters)):
            raise ValueError(
                f"stage {self._stage}: its optimizer has other parameters, or in another order, than when the pipeline "
                "was made (add_param_group?): make all groups in the optimizer factory"
            )
        check_hooks(self.own_names, self.masters, self._stage)
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
        for name, held, p in zip(self.names, self.held, self.live, strict=True):
            device = self._devices[name] if held is p else held.device
            if p.device != device or p.dtype != self._dtypes[name]:
                raise ValueError(
                    f"stage {self._stage}: parameter {name} went to {p.dtype} on {p.device}, its optimizer state is "
                    f"{held.dtype} on {device}: convert and move modules before making the pipeline"
                )
