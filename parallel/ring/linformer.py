"""Attention whose communication does not grow with the sequence: Linformer, and the sliding window.

The sliding window is `ring_attention(..., window=(left, right))`: with contiguous shards a rank asks its neighbour for
as many keys as the window reaches back, and nobody else for anything. Linformer projects the keys of the whole sequence
to a fixed number of rows; under sequence parallelism each rank projects its own, and the projections are summed.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fourfold.parallel.communication import place_in


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    group: dist.ProcessGroup | None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend this rank's queries to R projected keys of the whole sequence. Bidirectional: rows mix all tokens.

    Args:
        q: [B, H, S_local, D].
        k, v: [B, H_kv, S_local, D]; H_kv divides H.
        key_projection, value_projection: [R, S_local]: this rank's columns of Linformer's E and F, as
            `shard_sequence(E, group, dim=1)` gives them, in the sharding of q, k and v. They may be one tensor.
        group: the ranks that share the sequence; all call.
        scale: of the scores; None is D**-0.5.
    Returns:
        [B, H, S_local, D], softmax(q (E k)^T * scale) (F v). Differentiable in all five tensors: gradients of the sum
        of all ranks' losses.
    Raises:
        ValueError: projections that do not have R rows and S_local columns.
    Cost: one all-reduce of 2*B*H_kv*R*D elements each way, whatever the length; 2*R*S_local*D multiplications a head
        for each of projecting and attending. The projection is summed in fp32 (fp64 for fp64).
    Source: Wang et al. 2020 (arXiv 2006.04768); under sequence parallelism Li et al. 2021 (arXiv 2105.13120).
    """
    expected = (key_projection.shape[0], k.shape[2])
    if tuple(key_projection.shape) != expected or tuple(value_projection.shape) != expected or v.shape != k.shape:
        raise ValueError(
            f"projections {tuple(key_projection.shape)} and {tuple(value_projection.shape)} for k {tuple(k.shape)} and "
            f"v {tuple(v.shape)}: each is [R, {k.shape[2]}], this rank's columns, and k and v are alike"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads over {k.shape[1]} key heads: the latter must divide the former")
    wide = torch.promote_types(k.dtype, torch.float32)
    projected = torch.stack([key_projection.to(k.dtype) @ k, value_projection.to(v.dtype) @ v]).to(wide)
    keys, values = _AllReduce.apply(projected, group).to(k.dtype)  # type: ignore[no-untyped-call]
    return scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


class _AllReduce(torch.autograd.Function):
    """Sum over the group. Every rank's loss reads the sum, so the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    if place_in(group).size > 1:
        dist.all_reduce(total, group=group)
    return total
