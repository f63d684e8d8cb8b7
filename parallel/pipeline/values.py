"""What stages hand to one another: a tensor, or tuples, lists and dicts of tensors with plain values between them.

torch.utils._pytree does this privately and for any class. Here the kinds are few, so that their description can be sent
to the next stage, and everything else is refused by name. Tensors may be integer (masks, positions, document numbers)
or floating; gradients come back for those that need one.
"""

from collections.abc import Sequence
from copy import copy
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Structure = tuple[str, Any]
_PLAIN = (type(None), bool, int, float, str)


class TensorSpec(NamedTuple):
    """What the receiver of a tensor must know."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    needs_gradient: bool


def take_apart(value: Any, where: str = "value") -> tuple[list[Tensor], Structure]:
    """The tensors of `value`, in order, and the structure that `put_together` needs to build it again.

    Args:
        where: what the error calls the value ("the output of stage 2").
    Raises:
        ValueError: naming the place and the type of what is no tensor, tuple, list, dict or plain value.
    """
    tensors: list[Tensor] = []
    return tensors, _structure(value, where, tensors)


def _structure(value: Any, where: str, tensors: list[Tensor]) -> Structure:
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor", len(tensors) - 1
    if isinstance(value, _PLAIN):
        return "plain", value
    if isinstance(value, dict):
        return "dict", [(key, _structure(each, f"{where}[{key!r}]", tensors)) for key, each in value.items()]
    if isinstance(value, tuple | list):
        kind = "named" if hasattr(value, "_fields") else "tuple" if isinstance(value, tuple) else "list"
        parts = [_structure(each, f"{where}[{at}]", tensors) for at, each in enumerate(value)]
        return kind, (type(value), parts) if kind == "named" else parts
    raise ValueError(
        f"{where} is a {type(value).__name__}: stages pass tensors, or tuples, lists and dicts of tensors, numbers, "
        "strings and None"
    )


def put_together(structure: Structure, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `take_apart`; dicts of any kind come back as plain dicts."""
    kind, rest = structure
    if kind == "tensor":
        return tensors[rest]
    if kind == "dict":
        return {key: put_together(each, tensors) for key, each in rest}
    if kind == "named":
        return rest[0](*(put_together(each, tensors) for each in rest[1]))
    if kind in ("tuple", "list"):
        parts = [put_together(each, tensors) for each in rest]
        return tuple(parts) if kind == "tuple" else parts
    return rest


def copied(value: Any) -> Any:
    """`value` with tensors of its own, in tuples, lists and dicts too; what is none of these is itself.

    A stream may fill one buffer again and again, and a stage may write into its input; micro-batches in flight need
    both as they were.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        twin = copy(value)  # of its own class
        for key, each in value.items():
            twin[key] = copied(each)
        return twin
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copied, value))
    if type(value) in (tuple, list):
        return type(value)(map(copied, value))
    return value


class _Received(torch.autograd.Function):
    """A leaf as a result of something, so that a stage may begin with an operation in place (a ReLU, say)."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.data  # its own count of writes; nobody else reads the leaf's numbers

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def received(leaf: Tensor) -> Tensor:
    """What a stage's module is given in place of a leaf that collects the gradient."""
    return _Received.apply(leaf) if leaf.requires_grad else leaf  # type: ignore[no-any-return,no-untyped-call]


def apart(outputs: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    """`outputs`, those copied that are weights or buffers of `module` themselves, which an update would change."""
    if all(output.grad_fn is not None and output._base is None for output in outputs):
        return list(outputs)
    held = (*module.parameters(), *module.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in held if not hasattr(tensor, "to_local")}
    return [each.clone() if each.untyped_storage().data_ptr() in own else each for each in outputs]


def resolved(tensor: Tensor) -> Tensor:
    """`tensor` with its numbers as they stand in memory, in one order: conjugation and negation are lazy in torch."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def describe(tensors: Sequence[Tensor]) -> list[TensorSpec]:
    return [TensorSpec(tensor.dtype, tuple(tensor.shape), needs_gradient(tensor)) for tensor in tensors]


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a gradient of it is of use: it is floating and some weight before it is trained."""
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


def call(module: nn.Module, value: Any) -> Any:
    """`module(value)`; a tuple or dict goes in as arguments where `forward` takes several and can take these.

    A forward(self, hidden, mask) thus receives what the stage before returned as (hidden, mask), or as
    {"hidden": ..., "mask": ...}; a forward(self, pair), with one argument that it must have, receives the tuple itself.
    """
    if isinstance(value, tuple | dict) and value and _takes_several(module, value):
        return module(**value) if isinstance(value, dict) else module(*value)
    return module(value)


def _takes_several(module: nn.Module, value: tuple[Any, ...] | dict[str, Any]) -> bool:
    inner = getattr(module, "_orig_mod", module)  # of a module that torch.compile wraps
    every = list(signature(inner.forward).parameters.values())
    named = [each for each in every if each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    needed = {each.name for each in named if each.default is Parameter.empty}
    if isinstance(value, dict):
        return len(named) > 1 and needed <= set(value) <= {each.name for each in named}
    positional = [each for each in named if each.kind != Parameter.KEYWORD_ONLY]
    open_ended = not named and any(each.kind == Parameter.VAR_POSITIONAL for each in every)
    return open_ended or (len(needed) > 1 and len(needed) <= len(value) <= len(positional))
