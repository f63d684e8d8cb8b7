"""The hidden states' gradient on its way down the layers, overwritten in place as it goes.

A layer's backward needs a chunk of its output's gradient, and then room for the same chunk of its input's. autograd
would hold two tensors of the whole sequence; a tensor that streaming made itself, and that nothing but this backward
holds, serves as both.
"""

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.stream.patching import holders, unseen


class PassingGradient:
    """The gradient that streaming itself made last, and so may overwrite when it comes back as a layer's."""

    _made: "weakref.ref[Tensor] | None" = None

    def hand_on(self, grad: Tensor) -> Tensor:
        """Remember `grad`, which autograd gets now."""
        self._made = weakref.ref(grad)
        return grad

    def may_overwrite(self, grad: Tensor) -> bool:
        """Whether `grad`, which a layer's backward was just given, was made here and is held by nobody else.

        A hook that keeps it, or autograd.grad, has it as it is then. To be asked by the backward itself, of its
        argument, as the probe does: each further function that passes it on would count as a holder.
        """
        return self._made is not None and self._made() is grad and holders(grad) == _alone()


def room_for(x: Tensor, grad: Tensor, ours: bool) -> Tensor:
    """Where to put the gradient of a layer's input x, chunk by chunk: in that of its output, if that is `ours`."""
    return grad if ours and grad.dtype == x.dtype and grad.shape == x.shape else torch.empty_like(x)


class _Probe(torch.autograd.Function):
    """Counts the holders of a gradient that its own backward made and that nobody keeps."""

    found: tuple[int, int, int] = (0, 0, 0)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _count(grad)
        return torch.zeros_like(grad)


def _count(grad: Tensor) -> None:
    _Probe.found = holders(grad)


@cache
def _alone() -> tuple[int, int, int]:
    """The holders of a gradient that a backward was given and nobody keeps: versions of torch and Python differ."""
    with torch.enable_grad(), unseen():
        x = torch.zeros(1, requires_grad=True, device="cpu")
        _Probe.apply(_Probe.apply(x)).backward()  # type: ignore[no-untyped-call]
    return _Probe.found
