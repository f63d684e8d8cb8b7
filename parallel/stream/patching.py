"""Temporary changes to a model's modules while a chunk runs: parameters, forwards, attention functions, autocast."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

# The name by which transformers finds stream.layer's attention function.
NAME = "fourfold_stream"


@contextmanager
def aliased(layer: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Detached leaves in the parameters' places: a chunk's gradients must not run hooks set on the parameters."""
    aliases = {id(p): p.detach().requires_grad_() for p in parameters}
    places = [
        (module._parameters, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in aliases
    ]
    try:
        for home, name, parameter in places:
            home[name] = aliases[id(parameter)]  # type: ignore[assignment]
        yield [aliases[id(p)] for p in parameters]
    finally:
        for home, name, parameter in places:
            home[name] = parameter


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def attention_function(config: Any) -> Iterator[None]:
    """transformers makes masks, and its modules attend, by the name in the config, read at every call."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


@contextmanager
def entered_autocast(settings: tuple[str, torch.dtype] | None) -> Iterator[None]:
    if settings is None:
        yield
    else:
        with torch.autocast(settings[0], dtype=settings[1]):
            yield


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward that refuses create_graph: torch's once_differentiable would return constants for it."""
    without_graph = torch.autograd.function.once_differentiable(backward)  # type: ignore[no-untyped-call]

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: a streamed backward cannot be differentiated; stream_backprop_disable first"
            )
        return without_graph(ctx, *grads)

    return checked
