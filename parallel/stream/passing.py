"""The hidden states' gradient on its way down the layers, overwritten in place as it goes.

A layer's backward needs a chunk of its output's gradient, and then room for the same chunk of its input's. autograd
would hold two tensors of the whole sequence; a tensor that streaming made itself, and that nothing but this backward
holds, serves as both.
"""

import weakref

import torch
from torch import Tensor

from fourfold.parallel.stream.patching import held_once


class PassingGradient:
    """The gradient that streaming itself made last, and so may overwrite when it comes back as a layer's."""

    _made: "weakref.ref[Tensor] | None" = None

    def hand_on(self, grad: Tensor) -> Tensor:
        """Remember `grad`, which autograd gets now."""
        self._made = weakref.ref(grad)
        return grad

    def room_for(self, x: Tensor, grad: Tensor) -> Tensor:
        """Where to put the gradient of a layer's input x, chunk by chunk, given that of its output."""
        # One use is this call's own; a hook's or autograd.grad's tensor has more, and keeps its values.
        mine = self._made is not None and self._made() is grad and held_once(grad)
        return grad if mine and grad.dtype == x.dtype and grad.shape == x.shape else torch.empty_like(x)
