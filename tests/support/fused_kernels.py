"""Stand-ins for Liger-Kernel's kernels, in plain torch, on any device.

Like those they write where autograd does not look: the rotary one over queries and keys, the gated ones' backward over
their inputs. A norm gives the dtype that it takes.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.parallel.attention.kernels import widen
from fourfold.parallel.stream.fused import Kernels


class FusedKernels:
    """Kernels, and how often each was called."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        self.count["rms_norm"] += 1
        wide = widen(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if casting == "llama":
            return ((weight + offset) * wide.to(x.dtype)).to(x.dtype)
        return (wide * (weight.to(wide.dtype) + offset)).to(x.dtype)

    def silu_mul(self, a: Tensor, b: Tensor) -> Tensor:
        self.count["silu_mul"] += 1
        return _Gated.apply(a, b, F.silu)  # type: ignore[no-any-return, no-untyped-call]

    def gelu_mul(self, a: Tensor, b: Tensor) -> Tensor:
        self.count["gelu_mul"] += 1
        return _Gated.apply(a, b, _gelu)  # type: ignore[no-any-return, no-untyped-call]

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.count["rotary"] += 1
        return _Rotary.apply(q, k, cos, sin)  # type: ignore[no-any-return, no-untyped-call]

    def kernels(self, device_type: str = "cpu") -> Kernels:
        return Kernels(device_type, self.rms_norm, self.silu_mul, self.gelu_mul, self.rotary)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _write(x: Tensor, values: Tensor) -> Tensor:
    """Over the memory of x, which autograd is not told."""
    with torch.no_grad():
        x.data.copy_(values)
    return x


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.activation = activation
        return activation(a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        with torch.enable_grad():
            leaf = a.detach().clone().requires_grad_()
            activated = ctx.activation(leaf)
        (of_a,) = torch.autograd.grad(activated, leaf, grad * b)
        return _write(a, of_a), _write(b, grad * activated.detach()), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]  # a copy of what lies otherwise
        q, k = (_write(x, _rotated(x, cos, sin)) for x in rows)
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_q, cos, -sin), _rotated(grad_k, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat([-x[..., half:], x[..., :half]], -1) * sin.unsqueeze(1)
