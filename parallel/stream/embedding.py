"""The token embedding of a streamed step: the first layer's input looked up again, not kept.

The first layer's input is the table's rows for the tokens, so backward can look them up instead of keeping [B, T, d];
and the table's gradient is added where it is, instead of in a second table that autograd would make and add.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fourfold.parallel.stream.gradients import gradient_in_place


class Lookup:
    """One pass's lookup in an embedding table.

    Args:
        module: an embedding that can_look_up_again.
    """

    def __init__(self, module: nn.Embedding) -> None:
        self._weight, self._padding = module.weight, module.padding_idx

    _made: "weakref.ref[Tensor] | None" = None
    _tokens: Tensor
    _version: int

    def __call__(self, tokens: Tensor) -> Tensor:
        out: Tensor = _Lookup.apply(tokens, self._weight, self._padding)  # type: ignore[no-untyped-call]
        self._made, self._tokens, self._version = weakref.ref(out), tokens, out._version
        return out

    def sources(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(tokens, table) if x is what was looked up, unchanged."""
        mine = self._made is not None and self._made() is x and x._version == self._version
        return (self._tokens, self._weight) if mine else None


def can_look_up_again(module: nn.Module, model: nn.Module) -> bool:
    """Whether `module`, the model's token embedding, is a plain one whose table is whole until backward ends."""
    if type(module) is not nn.Embedding or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return False
    weight = module.weight
    whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size() and not hasattr(weight, "ds_id")
    return weight.is_leaf and whole and not any(isinstance(part, FSDPModule) for part in model.modules())


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(tokens, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        total = gradient_in_place(ctx.weight)
        if total is None:
            padding = -1 if ctx.padding is None else ctx.padding
            rows = len(ctx.weight)
            return None, torch.ops.aten.embedding_dense_backward(grad, tokens, rows, padding, False), None
        kept = None if ctx.padding is None else total[ctx.padding].clone()
        total.index_add_(0, tokens.flatten(), grad.flatten(0, -2).to(total.dtype))
        if kept is not None:
            total[ctx.padding] = kept
        return None, total.new_zeros(()).expand_as(total), None
