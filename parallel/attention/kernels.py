"""Kernels: attention of one block of queries to one block of keys, with its log-sum-exp, and the block's backward.

Softmax over many blocks needs no more than each block's output and lse: `merge` weighs outputs by them, and a block's
gradient is exact when its backward is given the merged output and the lse of the whole row. torch's fused kernels all
work so inside; `scaled_dot_product_attention` hides the lse, the aten operators underneath return it and take it back.

One class a backend, all with the same two methods. Tensors are [B, H, S, D]; k and v may have fewer heads (GQA, MQA):
consecutive query heads share one. lse is [B, H, S_q], fp32 (fp64 for fp64 inputs), natural log. `causal` masks keys
after a query, both counted from their first, so it asks for as many keys as queries. No row may be wholly masked:
attention.blocks cuts such rows off.

Gradients repeat bit for bit on CPU. On CUDA the kernels add dq with atomics unless
torch.use_deterministic_algorithms(True) is set (flash; cuDNN has its own rules).
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]
HALF = (torch.bfloat16, torch.float16)


class SavedAttention(NamedTuple):
    """What the forward of attention leaves for its backward.

    Attributes:
        q: [B, H, S_q, D]. k, v: [B, H_kv, S_k, D].
        out: [B, H, S_q, D], merged over all keys that the queries see, in q.dtype.
        lse: [B, H, S_q], likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a kernel runs on.

    Attributes:
        kind: torch's device type.
        capability: of a CUDA device: (8, 0) is an A100, (9, 0) an H100 or H200, (10, 0) a B200.
        packages: modules that kernels come from and that are installed, of KERNEL_PACKAGES.
    """

    kind: str
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a kernel takes.

    Attributes:
        kind: the device type it needs; None takes any.
        capability: the least it needs. up_to: the first that it no longer runs on.
        package: (module, how to install it), where it does not come with torch.
        dtypes: those it takes; () is every floating-point dtype.
        head_sizes: (multiple of, at most); None takes any.
    """

    kind: str | None = None
    capability: tuple[int, int] = (0, 0)
    up_to: tuple[int, int] = (99, 0)
    package: tuple[str, str] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    head_sizes: tuple[int, int] | None = None

    def refusal(self, name: str, hardware: Hardware, dtype: torch.dtype, head_size: int) -> str | None:
        """Why the kernel called `name` cannot do this, or None."""
        if self.package is not None and self.package[0] not in hardware.packages:
            return f"{name} is not installed: {self.package[1]}, or leave the backend to be chosen"
        if self.kind is not None and hardware.kind != self.kind:
            where = {"cuda": "on a CUDA device", "cpu": "on the CPU"}[self.kind]
            return f"{name} needs tensors {where}, not on {hardware.kind}"
        if self.kind == "cuda" and not self.capability <= hardware.capability < self.up_to:
            return f"{name} does not run on compute capability {hardware.capability}: leave the backend to be chosen"
        if not dtype.is_floating_point:
            return f"{name} attention needs floating-point tensors, not {dtype}"
        if self.dtypes and dtype not in self.dtypes:
            taken = " and ".join(str(each).removeprefix("torch.") for each in self.dtypes)
            return f"{name} takes {taken}, not {dtype}: cast, or ask for backend='math'"
        if self.head_sizes is not None and (head_size % self.head_sizes[0] or head_size > self.head_sizes[1]):
            multiple, most = self.head_sizes
            return f"{name} takes head sizes that are multiples of {multiple} up to {most}, not {head_size}"
        return None


# Modules of kernels that do not come with torch: FlashAttention 2, 3 and 4.
KERNEL_PACKAGES = ("flash_attn", "flash_attn_interface", "flash_attn.cute")


@lru_cache(maxsize=64)
def hardware_of(device: torch.device) -> Hardware:
    """What this process has there."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return Hardware(device.type, capability, frozenset(name for name in KERNEL_PACKAGES if _is_installed(name)))


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a row lie, and what each query sees of its own.

    Attributes:
        starts_q, starts_k: [n + 1], int32, on the tensors' device: where each sequence begins, and the end.
        longest_q, longest_k: tokens of the longest.
        causal: a query sees keys up to its own place; then a sequence has as many keys as queries.
        window: keys a query sees, itself included, of a causal packing; None is all before it.
    """

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool
    window: int | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """(left, right) keys seen beside a query's own, as the kernels have them: -1 is no limit."""
        return -1 if self.window is None else self.window - 1, 0 if self.causal else -1


class PackedKernel(Protocol):
    """What takes packed sequences.

    Attributes:
        name: of the backend that it belongs to.
    """

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> tuple[Tensor, Tensor]:
        """(out [T_q, H, D] in q.dtype, lse [H, T_q]) for q [T_q, H, D], k and v [T_k, H_kv, D]."""
        ...

    def backward(self, grad_out: Tensor, saved: SavedAttention, packing: Packing, scale: float) -> Gradients:
        """(dq, dk, dv), shaped and typed as q, k, v; the row's out and lse may be those of more keys than these."""
        ...


class AttentionBackend(Protocol):
    """What a backend offers.

    Attributes:
        name: how users ask for it.
        leaf: the kernel does the whole square of causal blocks up to this size, so larger triangles are worth cutting
            (0: it skips what is masked by itself).
        limits: what it takes.
        packed: what does many small blocks in one call, and windows; None is nothing.
    """

    name: str
    leaf: int
    limits: Limits
    packed: PackedKernel | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """(out [B, H, S_q, D] in q.dtype or the accumulation dtype, lse [B, H, S_q])."""
        ...

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        """(dq, dk, dv) of this block alone, in either of these; saved.out and saved.lse are the merged ones."""
        ...


class MathAttention:
    """Plain matrix products on any device and dtype; holds S_q * S_k scores a head.

    Results stay in the accumulation dtype, so that blocks are rounded once, as their sum.
    """

    name = "math"
    leaf = 0
    limits = Limits()
    packed: PackedKernel | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        # Not by the lse: its rounding would be in the whole row, and backward would take it for a gradient of scores.
        out = scores.softmax(-1) @ widen(v).unsqueeze(2)
        return out.flatten(1, 2), lse.flatten(1, 2)

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        q, k, v, out, lse = saved
        grad, lse = by_key_head(widen(grad_out), k), by_key_head(lse, k)
        delta = (grad * by_key_head(widen(out), k)).sum(-1, keepdim=True)
        weights = (_scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
        grad_v = (weights.mT @ grad).sum(2)
        grad_scores = weights * (grad @ widen(v).unsqueeze(2).mT - delta) * scale
        grad_q = (grad_scores @ widen(k).unsqueeze(2)).flatten(1, 2)
        grad_k = (grad_scores.mT @ by_key_head(widen(q), k)).sum(2)
        return grad_q, grad_k, grad_v


class CpuFlash:
    """torch's flash kernel for CPU: fp32, bf16, fp16 and fp64, any head size, fewer key heads as they are.

    It computes causal squares up to 512 whole. From 192 queries on it works on 64 rows at a time, below on 32 and
    slower: triangles of 192 are the smallest worth cutting.
    """

    name = "cpu_flash"
    leaf = 192
    limits = Limits(kind="cpu")
    packed: PackedKernel | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            grad_out, *saved, 0.0, causal, scale=scale
        )


class CudaFlash:
    """torch's own flash kernel on CUDA: bf16 and fp16, head sizes that are multiples of 8 up to 256."""

    name = "cuda_flash"
    leaf = 0
    limits = Limits(kind="cuda", capability=(8, 0), dtypes=HALF, head_sizes=(8, 256))

    def __init__(self, packed: PackedKernel | None = None) -> None:
        self.packed = packed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        q, k, v, out, lse = saved
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of dropout, which is off
        return aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused,
            scale=scale,
        )  # fmt: skip


class CudnnAttention:
    """cuDNN's fused attention through torch: bf16 and fp16, head sizes that are multiples of 8 up to 128.

    Its kernels for Hopper and later are 1.6 to 1.8 times as fast there as torch's own flash kernel. It takes no
    sequence of one token: such blocks go to that one.
    """

    name = "cudnn"
    leaf = 0
    limits = Limits(kind="cuda", capability=(8, 0), dtypes=HALF, head_sizes=(8, 128))

    def __init__(self, packed: PackedKernel | None = None) -> None:
        self.packed = packed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        if min(q.shape[2], k.shape[2]) == 1:
            return CudaFlash().forward(q, k, v, causal=causal, scale=scale)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.reshape(q.shape[:3])

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        q, k, v, out, lse = saved
        if min(q.shape[2], k.shape[2]) == 1:
            return CudaFlash().backward(grad_out, saved, causal=causal, scale=scale)
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        return aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
            grad_out, q, k, v, out, lse.contiguous().unsqueeze(-1), unused, unused, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What outputs, lse and gradients are summed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """x in the dtype that is summed in."""
    return x.to(accumulation_dtype(x.dtype))


def by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, ...] -> [B, H_kv, H // H_kv, ...]."""
    return x.reshape(x.shape[0], k.shape[1], -1, *x.shape[2:])


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[B, H_kv, H // H_kv, S_q, S_k], masked with -inf."""
    scores: Tensor = by_key_head(widen(q), k) @ widen(k).unsqueeze(2).mT * scale
    if causal:
        masked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(masked, -torch.inf)
    return scores


def _is_installed(module: str) -> bool:
    """Whether a module is there, without importing it (but for the packages above it)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
