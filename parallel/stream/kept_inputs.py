"""The first layer's input: looked up again in the embedding table in backward, and not kept.

It is the table's rows for the tokens, so it need not be kept as [B, T, d]; and the table's gradient is added where it
is, instead of in a second table that autograd would make and add.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fourfold.parallel.stream.gradients import gradient_in_place
from fourfold.parallel.stream.patching import num_changes

# Tokens whose looked-up rows are compared at a time, so that the comparison needs little memory.
COMPARED_TOKENS = 1024


class Lookup:
    """The token embedding's lookup in one run.

    Args:
        module: an embedding that can_look_up_again.
    """

    def __init__(self, module: nn.Embedding) -> None:
        self._weight, self._padding = module.weight, module.padding_idx
        self._tokens: Tensor | None = None
        self._found: tuple[Tensor, int] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens
        out: Tensor = _Lookup.apply(tokens, self._weight, self._padding)  # type: ignore[no-untyped-call]
        self._found = out, num_changes(out)
        return out

    def sources(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(tokens, table) if x is what a lookup gives now; asked once, by the first layer that runs.

        A hook may have changed what was looked up, and a model may scale it: unless x is that very tensor, the values
        are compared on a CPU. On another device the host would have to wait for them, and x is kept.
        """
        tokens, found = self._tokens, self._found
        self._tokens = self._found = None
        if tokens is None or x.dtype != self._weight.dtype or x.shape[:-1] != tokens.shape:
            return None
        if found is not None and x is found[0] and num_changes(x) == found[1]:
            return tokens, self._weight
        if x.device.type != "cpu":
            return None
        with torch.no_grad():
            for start in range(0, tokens.shape[1], COMPARED_TOKENS):
                here = slice(start, start + COMPARED_TOKENS)
                if not torch.equal(x[:, here], F.embedding(tokens[:, here], self._weight)):
                    return None
        return tokens, self._weight


def can_look_up_again(module: nn.Module, model: nn.Module) -> bool:
    """Whether `module`, the model's token embedding, is a plain one whose table is whole until backward ends."""
    if type(module) is not nn.Embedding or module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return False
    weight = module.weight
    whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return weight.is_leaf and whole and not weights_are_sharded(model)


def weights_are_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed's ZeRO-3 gathers the weights for a module's forward and drops them after."""
    if any(isinstance(part, FSDPModule) for part in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


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
