"""Which kernel does a block, and what surrounds one: the cut, the flip of an anticausal triangle, the merge.

Softmax over many blocks needs no more than each block's output and lse: `merge` weighs outputs by them, and a block's
gradient is exact when its backward is given the merged output and the lse of the whole row.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from fourfold.parallel.attention.blocks import Block
from fourfold.parallel.attention.efficient import EfficientAttention
from fourfold.parallel.attention.flash_packages import FlashAttn, FlashAttn3, FlashAttn4
from fourfold.parallel.attention.flex import FlexAttention
from fourfold.parallel.attention.kernels import (
    AttentionBackend,
    CpuFlash,
    CudaFlash,
    CudnnAttention,
    Gradients,
    Hardware,
    MathAttention,
    PackedKernel,
    SavedAttention,
    hardware_of,
)
from fourfold.parallel.attention.packed import PackedCudaFlash, PackedFlashAttn, PackedFlashAttn3
from fourfold.parallel.attention.soft_cap import SoftCapAttention

BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        CpuFlash(), FlashAttn(), CudaFlash(), MathAttention(), CudnnAttention(), FlashAttn3(), FlashAttn4(),
        FlexAttention(), EfficientAttention(),
    )
}  # fmt: skip
# (device type, least compute capability, backends, the fastest first). The last row that fits a device is its own.
# On an H100 cuDNN's kernel took 0.55 to 0.6 of the time of torch's flash kernel. FlashAttention 3 and 4 have not been
# measured here; who has built one wants it, and their papers have them at or ahead of cuDNN on these devices.
# FlexAttention has not been measured either, and is used where it is asked for by name. The memory-efficient kernel has
# not run: it is there for fp32, which none of the others takes, and `math` would hold the scores.
PREFERENCES: tuple[tuple[str, tuple[int, int], tuple[str, ...]], ...] = (
    ("cpu", (0, 0), ("cpu_flash", "math")),
    ("cuda", (0, 0), ("flash_attn", "cuda_flash", "efficient", "math")),
    ("cuda", (9, 0), ("flash_attn_3", "cudnn", "flash_attn", "cuda_flash", "efficient", "math")),
    ("cuda", (10, 0), ("flash_attn_4", "cudnn", "cuda_flash", "efficient", "math")),
)
# Kernels that cap scores by themselves; made for one cap each.
CAPPING: dict[str, Callable[[float], AttentionBackend]] = {
    "flash_attn": lambda cap: FlashAttn(PackedFlashAttn(cap), cap),
    "flash_attn_3": lambda cap: FlashAttn3(PackedFlashAttn3(cap), cap),
    "math": SoftCapAttention,
    "flex": FlexAttention,
}
# Those that take packed sequences and windows, the fastest first.
PACKED: dict[str, PackedKernel] = {
    "flash_attn_3": PackedFlashAttn3(),
    "flash_attn": PackedFlashAttn(),
    "cuda_flash": PackedCudaFlash(),
}


@dataclass(frozen=True, slots=True)
class FastPath:
    """Which kernels attention runs on.

    Attributes:
        kernel: the backend that does a block: all of a causal sequence, a large document, a hop of the ring.
        packed: what does all small blocks of one shape in one call (documents of any length where it is `kernel`
            itself, padded rows, the tiles of a window), and narrow windows by its own argument; None where each is a
            call of `kernel`.
    """

    kernel: str
    packed: str | None

    @property
    def is_fused(self) -> bool:
        """Whether no score is ever held in memory."""
        return self.kernel != "math"


def fast_path(hardware: Hardware, dtype: torch.dtype, head_size: int, *, soft_cap: bool = False) -> FastPath:
    """What such tensors get where nobody asks for a backend, in StreamBP and in the ring.

        fast_path(Hardware("cuda", (9, 0)), torch.bfloat16, 128)   # an H100: FastPath("cudnn", packed="cuda_flash")

    Args:
        head_size: the larger of queries' and values', where they differ.
        soft_cap: the scores are capped.
    Raises:
        ValueError: tensors of whole numbers.
    """

    def takes(name: str) -> bool:
        can_cap = name in CAPPING or not soft_cap
        return can_cap and BACKENDS[name].limits.refusal(name, hardware, dtype, head_size) is None

    fitting = [names for kind, least, names in PREFERENCES if kind == hardware.kind and hardware.capability >= least]
    kernel = next(filter(takes, fitting[-1] if fitting else ("math",)), None)
    if kernel is None:
        raise ValueError(f"no attention backend takes {dtype} tensors on {hardware.kind}: cast them to a float dtype")
    if kernel == "math":
        return FastPath(kernel, None)
    return FastPath(kernel, next(filter(takes, PACKED), None))


def choose_backend(hardware: Hardware, dtype: torch.dtype, head_size: int, *, soft_cap: bool = False) -> str:
    """The name of the backend that does a block, see fast_path."""
    return fast_path(hardware, dtype, head_size, soft_cap=soft_cap).kernel


def select_backend(name: str | None, q: Tensor, v: Tensor, soft_cap: float | None = None) -> AttentionBackend:
    """The backend called `name`, or for None what fast_path gives these tensors.

    Args:
        q: [B, H, S_q, D]. v: [B, H_kv, S_k, D_v].
        soft_cap: see ring_attention.
    Raises:
        ValueError: no backend of that name, or it cannot take these tensors.
    """
    hardware, head_size = hardware_of(q.device), max(q.shape[-1], v.shape[-1])
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap}: scores stay within -soft_cap and soft_cap, so give a positive number")
    if name is None:
        chosen = fast_path(hardware, q.dtype, head_size, soft_cap=soft_cap is not None)
        return _made(chosen.kernel, chosen.packed, soft_cap)
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: choose one of {', '.join(BACKENDS)}, or None")
    refusal = BACKENDS[name].limits.refusal(name, hardware, q.dtype, head_size)
    if refusal:
        raise ValueError(f"backend={name!r}: {refusal}")
    if soft_cap is not None and name not in CAPPING:
        raise ValueError(f"backend={name!r} has no soft cap: choose one of {', '.join(CAPPING)}, or None")
    return _made(name, name if name in PACKED else None, soft_cap)


@lru_cache(maxsize=64)
def _made(name: str, packed: str | None, soft_cap: float | None) -> AttentionBackend:
    """The backend, with what packs sequences for it."""
    if soft_cap is not None:
        return CAPPING[name](soft_cap)
    if packed is None:
        return BACKENDS[name]
    return type(BACKENDS[name])(PACKED[packed])  # type: ignore[call-arg]


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

    Sizes are symbols, so that blocks of any size share a kernel. Where there is no Triton for the device, as on Windows
    or before Volta, it is _merge itself.
    """
    from torch.utils._triton import has_triton

    if not has_triton():
        return _merge
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
    tensors = padded(backend, q[:, :, queries], k[:, :, keys], v[:, :, keys])
    # The dtype is the caller's choice: autocast would compute a kernel's own fp32 products in another.
    assert not block.window, "only packed kernels have windows, see attention.calls"
    with torch.autocast(q.device.type, enabled=False):
        if block.shape != "anticausal":
            out, lse = backend.forward(*tensors, causal=block.shape == "causal", scale=scale)
            return out[..., : v.shape[3]], lse
        out, lse = backend.forward(*_flipped(tensors), causal=True, scale=scale)
        return out.flip(2)[..., : v.shape[3]], lse.flip(2)


def attend_block_backward(
    backend: AttentionBackend, grad_out: Tensor, saved: SavedAttention, block: Block, scale: float
) -> Gradients:
    """(dq, dk, dv) of the block's own queries and keys; grad_out and `saved` are given whole."""
    queries, keys = (slice(None), slice(None), slice(*block.q)), (slice(None), slice(None), slice(*block.k))
    grad_out, q, k, v = grad_out[queries], saved.q[queries], saved.k[keys], saved.v[keys]
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[3] != v.shape[3]:
            *wide, out, grad_out = padded(backend, q, k, v, saved.out[queries], grad_out)
            here = SavedAttention(wide[0], wide[1], wide[2], out, saved.lse[queries])
            return unpadded(_block_gradients(backend, grad_out, here, block, scale), (q, k, v))
        here = SavedAttention(q, k, v, saved.out[queries], saved.lse[queries])
        return _block_gradients(backend, grad_out, here, block, scale)


def _block_gradients(
    backend: AttentionBackend, grad_out: Tensor, here: SavedAttention, block: Block, scale: float
) -> Gradients:
    if block.shape != "anticausal":
        return backend.backward(grad_out, here, causal=block.shape == "causal", scale=scale)
    dq, dk, dv = backend.backward(grad_out.flip(2), SavedAttention(*_flipped(here)), causal=True, scale=scale)
    return dq.flip(2), dk.flip(2), dv.flip(2)


def padded(backend: AttentionBackend, *tensors: Tensor) -> tuple[Tensor, ...]:
    """With zeros up to the largest head size, which change nothing, for kernels that know one size."""
    size = max(x.shape[3] for x in tensors)
    if isinstance(backend, MathAttention) or all(x.shape[3] == size for x in tensors):
        return tensors
    return tuple(torch.nn.functional.pad(x, (0, size - x.shape[3])) for x in tensors)


def unpadded(gradients: Gradients, like: Gradients) -> Gradients:
    """Gradients of padded tensors as those of the tensors `like`."""
    dq, dk, dv = (gradient[..., : x.shape[3]] for gradient, x in zip(gradients, like, strict=True))
    return dq, dk, dv


def _flipped(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor with its tokens in reverse order."""
    return tuple(x.flip(2) for x in tensors)
