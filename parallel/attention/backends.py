"""Which kernel does a block, and what surrounds one: the cut, the flip of an anticausal triangle, the merge.

Softmax over many blocks needs no more than each block's output and lse: `merge` weighs outputs by them, and a block's
gradient is exact when its backward is given the merged output and the lse of the whole row.
"""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from fourfold.parallel.attention.blocks import Block
from fourfold.parallel.attention.kernels import (
    AttentionBackend,
    CpuFlash,
    CudaFlash,
    CudnnAttention,
    FlashAttn,
    FlashAttn3,
    FlashAttn4,
    Gradients,
    Hardware,
    MathAttention,
    SavedAttention,
    hardware_of,
)

BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        CpuFlash(), FlashAttn(), CudaFlash(), MathAttention(), CudnnAttention(), FlashAttn3(), FlashAttn4()
    )
}  # fmt: skip
# (device type, least compute capability, backends, the fastest first). The last row that fits a device is its own.
# On an H100 cuDNN's kernel took 0.55 to 0.6 of the time of torch's flash kernel. FlashAttention 3 and 4 have not been
# measured here; who has built one wants it, and their papers have them at or ahead of cuDNN on these devices.
PREFERENCES: tuple[tuple[str, tuple[int, int], tuple[str, ...]], ...] = (
    ("cpu", (0, 0), ("cpu_flash", "math")),
    ("cuda", (0, 0), ("flash_attn", "cuda_flash", "math")),
    ("cuda", (9, 0), ("flash_attn_3", "cudnn", "flash_attn", "cuda_flash", "math")),
    ("cuda", (10, 0), ("flash_attn_4", "cudnn", "cuda_flash", "math")),
)


def choose_backend(hardware: Hardware, dtype: torch.dtype, head_size: int) -> str:
    """The name of the backend that such tensors get where nobody asks for one.

        choose_backend(Hardware("cuda", (9, 0)), torch.bfloat16, 128)   # an H100 gets "cudnn"

    Raises:
        ValueError: tensors of whole numbers.
    """
    fitting = [names for kind, least, names in PREFERENCES if kind == hardware.kind and hardware.capability >= least]
    for name in fitting[-1] if fitting else ("math",):
        if BACKENDS[name].limits.refusal(name, hardware, dtype, head_size) is None:
            return name
    raise ValueError(f"no attention backend takes {dtype} tensors on {hardware.kind}: cast them to a float dtype")


def select_backend(name: str | None, q: Tensor, k: Tensor) -> AttentionBackend:
    """The backend called `name`, or for None the one that choose_backend gives these tensors.

    Args:
        q: [B, H, S_q, D]. k: [B, H_kv, S_k, D].
    Raises:
        ValueError: no backend of that name, or it cannot take these tensors.
    """
    hardware = hardware_of(q.device)
    if name is None:
        return BACKENDS[choose_backend(hardware, q.dtype, q.shape[-1])]
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: choose one of {', '.join(BACKENDS)}, or None")
    refusal = BACKENDS[name].limits.refusal(name, hardware, q.dtype, q.shape[-1])
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
    (_fused_merge() if out.is_cuda else _merge)(out, lse, block_out, block_lse)


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    block_lse = block_lse.to(lse.dtype)
    # Neither side has seen a key: -inf minus -inf. The row stays zero.
    weight = torch.sigmoid(block_lse - lse).nan_to_num(0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, block_lse))


@cache
def _fused_merge() -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """_merge compiled: each number is read and written once, and there is no fp32 copy of a block's output.

    Sizes are symbols, so that blocks of any size share a kernel.
    """
    compiled: Callable[[Tensor, Tensor, Tensor, Tensor], None] = torch.compile(_merge, dynamic=True)
    return compiled


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
    # The dtype is the caller's choice: autocast would compute a kernel's own fp32 products in another.
    with torch.autocast(q.device.type, enabled=False):
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
    with torch.autocast(q.device.type, enabled=False):
        if block.shape != "anticausal":
            return backend.backward(grad_out, here, causal=block.shape == "causal", scale=scale)
        dq, dk, dv = backend.backward(grad_out.flip(2), SavedAttention(*_flipped(here)), causal=True, scale=scale)
        return dq.flip(2), dk.flip(2), dv.flip(2)


def _flipped(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor with its tokens in reverse order."""
    return tuple(x.flip(2) for x in tensors)
