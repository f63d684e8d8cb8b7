"""What a ring was tried on is what it runs on: changes of a model since then, and ranks whose weights differ.

The trial (trial.py) says that a model acts token by token. A hook, a module or a forward that comes later was not
tried, and neither was a model that attends by another function meanwhile; each would give a number, and a wrong one.
What frameworks put in (FSDP, DDP, DeepSpeed, Accelerate, compiled layers, adapters, streaming) leaves values as they
are, or acts on each token alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

# Packages whose hooks and forwards gather, move, cast or adapt weights.
FRAMEWORKS = (
    "torch.", "deepspeed.", "accelerate.", "transformers.", "peft.", "liger_kernel.", "fourfold.parallel.",
)  # fmt: skip
# Where modules come from that frameworks put into a model, and that act on each token alone.
MODULES = (
    "torch.nn.modules.linear.", "torch.nn.modules.dropout.", "torch.nn.modules.container.", "torch.nn.modules.sparse.",
    "torch.nn.utils.", "torch.distributed.", "torch._dynamo.", "deepspeed.", "accelerate.", "peft.", "liger_kernel.",
    "fourfold.parallel.",
)  # fmt: skip


class Snapshot:
    """The modules of a model, with their hooks and forwards, as they were tried.

    Args:
        attention: its modules that attend around the ring, by the attention function called `name`.
    """

    def __init__(self, model: nn.Module, attention: list[nn.Module], name: str) -> None:
        self._attention, self._name = attention, name
        self._seen = {module: _functions(module) for module in model.modules()}

    def change(self, model: nn.Module) -> str | None:
        """What of the model was not there when it was tried, in words; None where nothing was put in."""
        mend = "call use_ring_attention again, which tries the model as it is now"
        for module in self._attention:
            config = getattr(module, "config", None)
            now = getattr(config, "_attn_implementation", self._name)
            if now != self._name:
                return (
                    f"{type(module).__name__} attends by {now!r} since use_ring_attention, each rank to its own tokens "
                    f"alone: {mend}, or stop_ring_attention(model)"
                )
        for name, module in model.named_modules():
            if module not in self._seen and not from_framework(type(module), MODULES):
                return f"{name} ({type(module).__name__}) came after use_ring_attention, and may mix tokens: {mend}"
            for each in _functions(module):
                known = any(each is seen for seen in self._seen.get(module, ()))
                if not known and not from_framework(each) and _origin(each) != _origin(type(module)):
                    what = getattr(each, "__name__", type(each).__name__)
                    return (
                        f"{name or 'the model'} ({type(module).__name__}) has a hook or forward ({what}) that came "
                        f"after use_ring_attention, and may mix tokens: {mend}"
                    )
        return None


def checksum(model: nn.Module) -> int:
    """A number that differs where plain weights do, to the bit, on any device; sharded weights are left out.

    Cost: every weight is read once.
    """
    total = 0
    if any(hasattr(module, "_is_fsdp_managed_module") for module in model.modules()):
        return total
    for place, parameter in enumerate(model.parameters(), start=1):
        plain = type(parameter) is nn.Parameter and not parameter.is_meta and not hasattr(parameter, "ds_id")
        if plain and parameter.numel():
            size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(parameter.element_size())
            if size is not None:
                total += place * int(parameter.detach().contiguous().view(-1).view(size).sum(dtype=torch.int64))
    return total % (1 << 62)


def from_framework(what: Any, packages: tuple[str, ...] = FRAMEWORKS) -> bool:
    """Whether a class, hook or function is a framework's."""
    return _origin(what).startswith(packages)


def _origin(what: Any) -> str:
    """The Python module that it comes from, with a dot at the end; of what wraps a function, the function's."""
    while isinstance(what, partial):
        what = what.func
    return f"{getattr(what, '__module__', None) or type(what).__module__}."


def _functions(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward that stands in the module's own attributes, if any, and its hooks."""
    own = module.__dict__.get("forward")
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return hooks if own is None else [own, *hooks]
