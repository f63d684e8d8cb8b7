"""Kernels that attend for many sequences in one call, each to itself, with a window where one is asked.

A block is one call of a plain kernel. A row of packed documents, or a window cut into tiles, has hundreds of small
blocks, and on a GPU each then costs a launch and little else. The flash kernels take sequences one after the other in
one row and where each begins (`cu_seqlens`), so all small blocks of one shape are one call (attention.calls).

            keys  a a a b b                       keys  a a b
    queries a     #                       queries a     # #
            a     # #       causal                a     # #       not causal, as many keys as there are
            a     # # #                           b         #
            b           #
            b           # #

Tensors are [tokens, heads, D], lse is [heads, tokens], fp32 (fp64 for fp64), natural log: the layout of flash-attn, of
FlashAttention 3 and of torch's own operator. cuDNN's packed sequences are not used: torch has them switched off.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fourfold.parallel.attention.kernels import Gradients, Packing, SavedAttention, aten


class PackedCudaFlash:
    """torch's own flash kernel."""

    name = "cuda_flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> tuple[Tensor, Tensor]:
        left, right = packing.reach
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, packing.starts_q, packing.starts_k, packing.longest_q, packing.longest_k, 0.0,
            packing.causal and packing.window is None, False, scale=scale, window_size_left=left,
            window_size_right=right,
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, packing: Packing, scale: float) -> Gradients:
        left, right = packing.reach
        q, k, v, out, lse = saved
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout, which is off
        return aten._flash_attention_backward(  # type: ignore[no-any-return]
            grad_out, q, k, v, out, lse.contiguous(), packing.starts_q, packing.starts_k, packing.longest_q,
            packing.longest_k, 0.0, packing.causal and packing.window is None, unused, unused, scale=scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip


class PackedFlashAttn:
    """The flash-attn package, FlashAttention 2."""

    name = "flash_attn"

    def __init__(self, soft_cap: float = 0.0) -> None:
        self.soft_cap = soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, packing.starts_q, packing.starts_k, packing.longest_q, packing.longest_k, dropout_p=0.0,
            softmax_scale=scale, causal=packing.causal, window_size_left=packing.reach[0],
            window_size_right=packing.reach[1], softcap=self.soft_cap, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, packing: Packing, scale: float) -> Gradients:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        q, k, v, out, lse = saved
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            grad_out, q, k, v, out, lse.contiguous(), dq, dk, dv, packing.starts_q, packing.starts_k,
            packing.longest_q, packing.longest_k, dropout_p=0.0, softmax_scale=scale, causal=packing.causal,
            window_size_left=packing.reach[0], window_size_right=packing.reach[1], softcap=self.soft_cap,
            alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=None,
        )  # fmt: skip
        return dq, dk, dv


class PackedFlashAttn3:
    """FlashAttention 3."""

    name = "flash_attn_3"

    def __init__(self, soft_cap: float = 0.0) -> None:
        self.soft_cap = soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(
            q, k, v, cu_seqlens_q=packing.starts_q, cu_seqlens_k=packing.starts_k, max_seqlen_q=packing.longest_q,
            max_seqlen_k=packing.longest_k, softmax_scale=scale, causal=packing.causal, softcap=self.soft_cap,
            **_window(_flash_attn_forward, packing),
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, packing: Packing, scale: float) -> Gradients:
        from flash_attn_interface import _flash_attn_backward

        q, k, v, out, lse = saved
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Between the sequences and the gradients: how much of each sequence is used, which is all.
        _flash_attn_backward(
            grad_out, q, k, v, out, lse.contiguous(), packing.starts_q, packing.starts_k, None, None,
            packing.longest_q, packing.longest_k, *grads, scale, packing.causal, softcap=self.soft_cap,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_window(_flash_attn_backward, packing),
        )  # fmt: skip
        return grads


def _window(function: Any, packing: Packing) -> dict[str, Any]:
    """FlashAttention 3 took the window as a pair before it took two numbers."""
    names = signature(getattr(function, "_init_fn", function)).parameters
    if "window_size_left" in names:
        return {"window_size_left": packing.reach[0], "window_size_right": packing.reach[1]}
    return {"window_size": packing.reach}
