"""torch's FlexAttention as a backend: blocks of any shape, with soft caps, by a kernel that torch compiles.

It is the way for capped scores on a device without a flash-attn package. FlexAttention has no backward of its own that
takes the merged output and lse of all keys, but it differentiates its lse, and that is enough: with the block's share
w = exp(lse of the block - lse of all) of each row's softmax, the merged output depends on the block's output by w, and
on the block's lse by w * (output of the block - merged output). So backward runs the block's forward once more.

It has not run on a device yet.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.attention.kernels import HALF, Gradients, Limits, PackedKernel, SavedAttention

Flex = Callable[..., tuple[Tensor, Any]]
"""torch's flex_attention, or what stands for it."""


class FlexAttention:
    """Compiled for CUDA: bf16 and fp16, head sizes that are multiples of 16 up to 256.

    Args:
        soft_cap: scores become soft_cap * tanh(scores / soft_cap); 0 is no cap.
    """

    name = "flex"
    leaf = 0
    limits = Limits(kind="cuda", capability=(8, 0), dtypes=HALF, head_sizes=(16, 256))
    packed: PackedKernel | None = None

    def __init__(self, soft_cap: float = 0.0) -> None:
        self.soft_cap = soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return _flex(q, k, v, self.soft_cap, causal, scale)

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        leaves = [x.detach().requires_grad_() for x in saved[:3]]
        with torch.enable_grad():
            out, lse = _flex(leaves[0], leaves[1], leaves[2], self.soft_cap, causal, scale)
        share = (lse.detach() - saved.lse).exp().unsqueeze(-1)
        grad_own = grad_out.to(share.dtype) * share
        grad_lse = (grad_own * (out.detach().to(share.dtype) - saved.out.to(share.dtype))).sum(-1)
        dq, dk, dv = torch.autograd.grad((out, lse), leaves, (grad_own.to(out.dtype), grad_lse.to(lse.dtype)))
        return dq, dk, dv


def _flex(q: Tensor, k: Tensor, v: Tensor, cap: float, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    mask = _causal_mask(q.shape[2], k.shape[2], q.device) if causal else None
    modify = _capped(cap) if cap else None
    from torch.nn.attention.flex_attention import AuxRequest

    out, found = _compiled()(
        q, k, v, score_mod=modify, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert found.lse is not None
    return out, found.lse


@cache
def _compiled() -> Flex:
    """Sizes are symbols, so that blocks of any size share a kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Flex = torch.compile(flex_attention, dynamic=True)
    return compiled


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _causal_mask(queries: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(seen, None, None, queries, keys, device=device)
