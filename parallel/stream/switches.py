"""What a layer's modules are switched to in the forward pass, set again while backward recomputes the layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from torch import nn

# Where a module has its hooks: peft sets some for one call, to choose adapters row by row.
HOOKS = frozenset({
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
})  # fmt: skip


class Switches:
    """What a layer's modules are switched to: training or not, dropout's rate, which adapters are on, their hooks.

    Args:
        layer: read now; a backward that runs later, perhaps in another mode, recomputes with what was read.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._modules = [(module, _switches(module)) for module in layer.modules()]
        self._weights = list(layer.parameters())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The modules as they were read; as they are now again after.

        Raises:
            ValueError: adapters were merged or unmerged in between, or parameters exchanged (torch.func's
                functional_call puts its own in a module's places for one call): the weights are others.
        """
        here = [parameter for module, _ in self._modules[:1] for parameter in module.parameters()]
        if any(mine is not theirs for mine, theirs in zip_longest(here, self._weights)):
            raise ValueError(
                "a layer's parameters are others than in the forward pass, as after torch.func.functional_call: "
                "backward would recompute with these; exchange them after backward, or stream_backprop_disable"
            )
        changed: list[tuple[nn.Module, str, Any]] = []
        try:
            for module, switches in self._modules:
                for name, before in switches.items():
                    now = module.__dict__.get(name, before)
                    if now == before:
                        continue
                    if name == "merged_adapters":
                        raise ValueError(
                            f"adapters were merged between forward and backward ({before} then, {now} now): backward "
                            "would recompute with other weights; merge after backward"
                        )
                    changed.append((module, name, now))
                    module.__dict__[name] = before
            yield
        finally:
            for module, name, now in changed:
                module.__dict__[name] = now


def _switches(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in HOOKS:
            found[name] = type(value)(value)
            continue
        if isinstance(value, bool | float | str):
            found[name] = value
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            found[name] = list(value)
        elif isinstance(value, dict) and value and all(isinstance(part, int | float) for part in value.values()):
            found[name] = dict(value)
    return found
