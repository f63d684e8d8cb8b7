"""torch's memory-efficient attention on CUDA (CUTLASS, from xformers): the way for fp32, which flash kernels refuse.

What the operators ask for, as their sources say (attention_backward.cu, kernel_forward.h, kernel_backward.h of
torch's aten/native/transformers/cuda):

- as many key heads as query heads, so a group of query heads is a row of the batch whose keys are a view that repeats;
- head sizes, strides and addresses that are multiples of four numbers, the last dim contiguous;
- a log-sum-exp whose rows are a multiple of 32 long, in the natural log; the rows that nobody asks for are inf;
- for backward, an output that lies as [B, S, H, D]; it is not checked, and read wrongly where it lies otherwise, so it
  is copied.

It has never run on a device; the operators' own shape functions and a stand-in with these limits check the calls.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fourfold.parallel.attention.kernels import Gradients, Limits, PackedKernel, SavedAttention

aten = torch.ops.aten
LSE_ROWS = 32
WORD = 4  # numbers that the kernel reads at once


class EfficientAttention:
    """fp32, head sizes that are multiples of 4 up to 256. Products are three of TF32 each, which is fp32's precision.

    Fewer key heads cost backward a gradient of keys and values for each query head, before these are summed.
    """

    name = "efficient"
    leaf = 0
    limits = Limits(kind="cuda", capability=(8, 0), dtypes=(torch.float32,), head_sizes=(WORD, 256))
    packed: PackedKernel | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        rows = [_aligned(x) for x in _in_groups(q, k, v)]
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(*rows, None, True, 0.0, causal, scale=scale)
        return out.reshape(*q.shape[:3], v.shape[3]), lse[..., : q.shape[2]].reshape(q.shape[:3])

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        q, k, v, out, lse = saved
        rows = [_aligned(x) for x in _in_groups(q, k, v)]
        grad, merged = (x.reshape(*rows[0].shape[:3], -1).transpose(1, 2).contiguous() for x in (grad_out, out))
        whole = pad(lse.reshape(rows[0].shape[:3]), (0, -q.shape[2] % LSE_ROWS), value=torch.inf).contiguous()
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of dropout, which is off
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad.transpose(1, 2), *rows, None, merged.transpose(1, 2), whole, unused, unused, 0.0,
            [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        return dq.reshape(q.shape), dk.sum(1).reshape(k.shape), dv.sum(1).reshape(v.shape)


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B * H_kv, H // H_kv, S, D] of each; keys and values are seen by every head of a group without a copy."""
    rows, group = q.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
    keys, values = (x.reshape(rows, 1, *x.shape[2:]).expand(-1, group, -1, -1) for x in (k, v))
    return q.reshape(rows, group, *q.shape[2:]), keys, values


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy where the kernel could not read it four numbers at a time."""
    fits = x.stride(3) == 1 and all(step % WORD == 0 for step in (*x.stride()[:3], x.storage_offset()))
    return x if fits else x.clone(memory_format=torch.contiguous_format)
