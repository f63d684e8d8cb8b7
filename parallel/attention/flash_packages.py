"""Kernels of packages beside torch: FlashAttention 2, 3 and 4. Nothing is imported before a kernel is called."""

import torch
from torch import Tensor

from fourfold.parallel.attention.kernels import HALF, Gradients, Limits, PackedKernel, SavedAttention


class FlashAttn:
    """The flash-attn package, FlashAttention 2: bf16 and fp16, head sizes that are multiples of 8 up to 256."""

    name = "flash_attn"
    leaf = 0
    limits = Limits(
        kind="cuda", capability=(8, 0), dtypes=HALF, head_sizes=(8, 256),
        package=("flash_attn", "pip install flash-attn"),
    )  # fmt: skip

    def __init__(self, packed: PackedKernel | None = None, soft_cap: float = 0.0) -> None:
        self.packed, self.soft_cap = packed, soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=0.0, softmax_scale=scale, causal=causal,
            window_size_left=-1, window_size_right=-1, softcap=self.soft_cap, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out.transpose(1, 2), lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        q, k, v, out, lse = saved
        grad_q, grad_k, grad_v = (torch.empty_like(x.transpose(1, 2)) for x in (q, k, v))
        _flash_attn_backward(
            grad_out.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2),
            lse.contiguous(), grad_q, grad_k, grad_v, dropout_p=0.0, softmax_scale=scale, causal=causal,
            window_size_left=-1, window_size_right=-1, softcap=self.soft_cap, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=None,
        )  # fmt: skip
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


class FlashAttn3:
    """FlashAttention 3, which is built from flash-attention's hopper folder: Hopper, bf16 and fp16."""

    name = "flash_attn_3"
    leaf = 0
    limits = Limits(
        kind="cuda", capability=(9, 0), up_to=(10, 0), dtypes=HALF, head_sizes=(8, 256),
        package=("flash_attn_interface", "build it from flash-attention/hopper"),
    )  # fmt: skip

    def __init__(self, packed: PackedKernel | None = None, soft_cap: float = 0.0) -> None:
        self.packed, self.soft_cap = packed, soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import _flash_attn_forward

        tensors = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = _flash_attn_forward(*tensors, softmax_scale=scale, causal=causal, softcap=self.soft_cap)
        return out.transpose(1, 2), lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        from flash_attn_interface import _flash_attn_backward

        q, k, v, out, grad = (x.transpose(1, 2) for x in (saved.q, saved.k, saved.v, saved.out, grad_out))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        # Between the tensors: starts, used lengths and longest of packed documents, of which there are none.
        _flash_attn_backward(
            grad, q, k, v, out, saved.lse.contiguous(), *[None] * 6, *grads, scale, causal, softcap=self.soft_cap
        )
        return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


class FlashAttn4:
    """FlashAttention 4 (flash_attn.cute): Blackwell, bf16 and fp16, head sizes up to 128."""

    name = "flash_attn_4"
    leaf = 0
    limits = Limits(
        kind="cuda", capability=(10, 0), dtypes=HALF, head_sizes=(8, 128),
        package=("flash_attn.cute", "pip install flash-attn-4"),
    )  # fmt: skip

    def __init__(self, packed: PackedKernel | None = None) -> None:
        self.packed = packed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        tensors = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = _flash_attn_fwd(*tensors, softmax_scale=scale, causal=causal, return_lse=True)
        return out.transpose(1, 2), lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, grad = (x.transpose(1, 2) for x in (saved.q, saved.k, saved.v, saved.out, grad_out))
        dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, grad, saved.lse.contiguous(), softmax_scale=scale, causal=causal)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
