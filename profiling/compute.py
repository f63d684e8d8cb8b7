"""Cases for what a rank computes: matmul, attention, elementwise operators, a copy, and the cost of one call."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from math import prod

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from fourfold.profiling.clock import Clock
from fourfold.profiling.session import Case

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


class OperandPool:
    """One flat block of random numbers from which the operands of all cases are cut.

    A timed loop goes through several places of the block: a training step finds its weights where the last step left
    them, in memory rather than in the nearest cache.
    """

    PLACES = 8

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._block = torch.empty(num_elements, dtype=dtype, device=device).normal_(std=0.02)

    def views(self, shape: Sequence[int]) -> Iterator[torch.Tensor]:
        """Tensors of `shape`, in turns at different places of the block, for ever."""
        size = prod(shape)
        free = self._block.numel() - size
        assert free >= 0, f"an operand of {tuple(shape)} is larger than the pool of {self._block.numel()}"
        places = min(self.PLACES, 1 + free // size)
        starts = [free * place // max(1, places - 1) // 64 * 64 for place in range(places)]
        return cycle([self._block[start : start + size].view(*shape) for start in starts])


def matmul_case(pool: OperandPool, m: int, n: int, k: int, operands: str, *, essential: bool) -> Case:
    """out[m,n] = a[m,k] @ b[k,n], the result in new memory as in a model.

    Args:
        operands: "nt" (b stored [n,k], as a linear layer's forward has it), "nn", or "tn" (a stored [k,m]).
    """
    lefts = pool.views((k, m) if operands == "tn" else (m, k))
    rights = pool.views((n, k) if operands == "nt" else (k, n))
    next(rights)  # not the same place as the left one
    dtype = str(next(lefts).dtype).removeprefix("torch.")

    def call() -> torch.Tensor:
        left, right = next(lefts), next(rights)
        if operands == "nt":
            return linear(left, right)
        return torch.mm(left.t() if operands == "tn" else left, right)

    return Case(
        table="matmul",
        fields={"dtype": dtype, "m": m, "n": n, "k": k, "operands": operands},
        run=lambda clock, iterations: (clock.repeat(call, iterations),),
        essential=essential,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """One attention block: q is [batch, heads, seq_len, head_dim], k and v have `kv_heads` heads."""

    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    causal: bool = True


def attention_case(device: torch.device, dtype: torch.dtype, shape: AttentionShape, *, essential: bool = False) -> Case:
    """torch's scaled_dot_product_attention, forward and backward apart, operands strided as a model has them.

    q and its gradient are [batch, heads, seq_len, head_dim] views of [batch, seq_len, heads, head_dim] memory.
    """

    def operand(num_heads: int) -> torch.Tensor:
        data = torch.randn(shape.batch, shape.seq_len, num_heads, shape.head_dim, dtype=dtype, device=device)
        return data.transpose(1, 2)

    def run(clock: Clock, iterations: int) -> tuple[float, float]:
        q, k, v = (operand(num).requires_grad_() for num in (shape.heads, shape.kv_heads, shape.kv_heads))
        grad = operand(shape.heads)
        grouped = shape.heads != shape.kv_heads
        forward, backward = 0.0, 0.0
        for _ in range(iterations):
            start = clock.mark()
            out = scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)
            middle = clock.mark()
            torch.autograd.grad(out, (q, k, v), grad)
            end = clock.mark()
            clock.wait()
            forward += clock.seconds(start, middle)
            backward += clock.seconds(middle, end)
        return forward / iterations, backward / iterations

    return Case(
        table="attention",
        fields={"dtype": str(dtype).removeprefix("torch."), **asdict(shape)},
        columns=("forward_s", "backward_s"),
        run=run,
        essential=essential,
    )


def elementwise_case(pool: OperandPool, num_elements: int) -> Case:
    """Product of two tensors in new memory; bytes are those read and written."""
    lefts, rights = pool.views((num_elements,)), pool.views((num_elements,))
    left = next(rights)
    return Case(
        table="elementwise",
        fields={
            "dtype": str(left.dtype).removeprefix("torch."),
            "bytes": 3 * num_elements * left.element_size(),
        },
        run=lambda clock, iterations: (clock.repeat(lambda: torch.mul(next(lefts), next(rights)), iterations),),
    )


def copy_case(pool: OperandPool, num_elements: int) -> Case:
    """A streaming copy between two places; bytes are those read and written."""
    sources, targets = pool.views((num_elements,)), pool.views((num_elements,))
    source = next(targets)
    return Case(
        table="copy",
        fields={
            "dtype": str(source.dtype).removeprefix("torch."),
            "bytes": 2 * num_elements * source.element_size(),
        },
        run=lambda clock, iterations: (clock.repeat(lambda: next(targets).copy_(next(sources)), iterations),),
        essential=True,
    )


def overhead_case(device: torch.device) -> Case:
    """One elementwise operator on a tensor so small that only the call costs."""
    small = torch.zeros(16, device=device)
    call: Callable[[], object] = lambda: small.add(1.0)  # noqa: E731
    return Case(
        table="overhead",
        fields={"operator": "add"},
        run=lambda clock, iterations: (clock.repeat(call, iterations),),
        essential=True,
    )
