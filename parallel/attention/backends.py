"""Which kernel does a block, and what surrounds one: the cut, the flip of an anticausal triangle, the merge.

Softmax over many blocks needs no more than each block's output and lse: `merge` weighs outputs by them, and a block's
gradient is exact when its backward is given the merged output and the lse of the whole row.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fourfold.parallel.attention.blocks import Block
from fourfold.parallel.attention.kernels import (
    AttentionBackend,
    CpuFlash,
    CudaFlash,
    CudnnAttention,
    FlashAttn,
    Gradients,
    MathAttention,
    SavedAttention,
)

# In order of preference. cuDNN refuses more shapes, some of them only at run time, so it is asked for by name.
BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend for backend in (CpuFlash(), FlashAttn(), CudaFlash(), MathAttention(), CudnnAttention())
}


def select_backend(name: str | None, q: Tensor, k: Tensor) -> AttentionBackend:
    """The backend called `name`, or for None the first that takes these tensors.

    Args:
        q: [B, H, S_q, D]. k: [B, H_kv, S_k, D].
    Raises:
        ValueError: no backend of that name, or it cannot take these tensors.
    """
    if name is None:
        return next(backend for backend in BACKENDS.values() if backend.refusal(q, k) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: choose one of {', '.join(BACKENDS)}, or None")
    refusal = BACKENDS[name].refusal(q, k)
    if refusal:
        raise ValueError(f"backend={name!r}: {refusal}")
    return BACKENDS[name]


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add the attention over further keys to `out` and `lse`, in place.

    Args:
        out: [B, H, S, D], fp32 (fp64); zeros where no key was seen yet.
        lse: [B, H, S], fp32 (fp64); -inf there.
        block_out, block_lse: the same queries over other keys, any float dtype.
    Source: the sigmoid form of ring-flash-attention pull request 34; stable for any lse.
    """
    # Neither side has seen a key: -inf minus -inf. The row stays zero.
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


def attend_block(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one block of q, k and v, which are given whole.

    Kernels know "causal" only. An anticausal triangle is a causal one when both orders are reversed:

              keys                 keys reversed
            # # #                  # . .
            . # #   queries   ->   # # .   queries reversed
            . . #                  # # #
    """
    queries, keys = slice(*block.q), slice(*block.k)
    tensors = q[:, :, queries], k[:, :, keys], v[:, :, keys]
    if block.shape != "anticausal":
        return backend.forward(*tensors, causal=block.shape == "causal", scale=scale)
    out, lse = backend.forward(*_flipped(tensors), causal=True, scale=scale)
    return out.flip(2), lse.flip(2)


def attend_block_backward(
    backend: AttentionBackend, grad_out: Tensor, saved: SavedAttention, block: Block, scale: float
) -> Gradients:
    """(dq, dk, dv) of the block's own queries and keys; grad_out and `saved` are given whole."""
    queries, keys = (slice(None), slice(None), slice(*block.q)), (slice(None), slice(None), slice(*block.k))
    grad_out, q, k, v = grad_out[queries], saved.q[queries], saved.k[keys], saved.v[keys]
    here = SavedAttention(q, k, v, saved.out[queries], saved.lse[queries])
    if block.shape != "anticausal":
        return backend.backward(grad_out, here, causal=block.shape == "causal", scale=scale)
    dq, dk, dv = backend.backward(grad_out.flip(2), SavedAttention(*_flipped(here)), causal=True, scale=scale)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def _flipped(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor with its tokens in reverse order."""
    return tuple(x.flip(2) for x in tensors)
