"""Gradients of parameters summed over chunks, without a second tensor of a weight's size a chunk.

autograd makes a new gradient of each weight for each chunk and adds it: for small chunks, memory traffic that shows.
`summed_linears` lets the weights' products accumulate in place instead, and where a parameter has its .grad already
(a later micro-batch), in that one: Megatron-LM's fused gradient accumulation does the same in a buffer of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.parallel.attention.kernels import accumulation_dtype
from fourfold.parallel.stream.patching import replaced_forward


def gradient_in_place(parameter: Tensor) -> Tensor | None:
    """The parameter's .grad, where this backward may add to it and then hand autograd zeros; None where it must not.

    Only while autograd runs: it must be about to accumulate there (not autograd.grad, nor backward's `inputs`), and
    no hook may be waiting to see the gradient by itself. Hooks after accumulation, which DDP, FSDP and DeepSpeed use,
    find the whole sum.
    """
    grad = parameter.grad
    if grad is None or not parameter.is_leaf or parameter._backward_hooks or grad.requires_grad:
        return None
    if grad.layout != torch.strided or grad.dtype != accumulation_dtype(parameter.dtype):
        return None
    try:
        runs = torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # inside autograd.grad
        return None
    return grad if runs else None


class ParameterSums:
    """Gradients of parameters summed over chunks, in fp32 (fp64 for fp64).

    Args:
        parameters: what autograd differentiates in a chunk.
        leaves: inside a backward, the model's parameters they stand for: those that gradient_in_place allows are
            summed in their .grad.
    """

    def __init__(self, parameters: Sequence[Tensor], leaves: Sequence[Tensor] = ()) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * max(len(parameters), len(leaves))
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._in_place: set[int] = set()
        for index, leaf in enumerate(leaves):
            self._sums[index] = gradient_in_place(leaf)
            if self._sums[index] is not None:
                self._in_place.add(index)

        # Linears whose output nothing reads: see find_unread.
        self.unread: set[nn.Linear] = set()

    def index(self, parameter: Tensor | None) -> int | None:
        """The parameter's place, or None where it needs no gradient."""
        return self._index.get(id(parameter))

    def backward(self, outs: Sequence[Tensor], inputs: list[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The inputs' gradients, from those of `outs`; the parameters' are added."""
        gradients = torch.autograd.grad(outs, [*inputs, *self._parameters], grads, allow_unused=True)
        for index, part in enumerate(gradients[len(inputs) :]):
            if part is not None:
                self.add(index, part)
        return [
            torch.zeros_like(x) if part is None else part
            for x, part in zip(inputs, gradients[: len(inputs)], strict=True)
        ]

    def add(self, index: int, part: Tensor) -> None:
        total = self._sums[index]
        if total is None:
            self._sums[index] = part.to(accumulation_dtype(part.dtype))
        else:
            total.add_(part)

    def add_product(self, index: int, a: Tensor, b: Tensor) -> None:
        """Add a @ b, in place where the dtypes allow."""
        total = self._sums[index]
        if total is None:
            self.add(index, a @ b)
        elif total.dtype == a.dtype:
            total.addmm_(a, b)
        else:
            total.add_(a @ b)

    def total(self, index: int, like: Tensor) -> Tensor:
        """The sum so far, to be added to; zeros of like's shape at first."""
        total = self._sums[index]
        if total is None:
            total = self._sums[index] = torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))
        return total

    def values(self, like: Sequence[Tensor]) -> list[Tensor | None]:
        """What autograd is to accumulate, in the dtype of `like`; zeros without memory where it is done."""
        return [
            None
            if total is None
            else total.new_zeros(()).expand_as(total)
            if index in self._in_place
            else total.to(parameter.dtype)
            for index, (total, parameter) in enumerate(zip(self._sums, like, strict=True))
        ]


@contextmanager
def summed_linears(module: nn.Module, sums: ParameterSums) -> Iterator[None]:
    """Plain nn.Linear modules inside `module` add their weights' gradients to `sums`, not through autograd."""
    with ExitStack() as stack:
        for part in module.modules():
            if type(part) is nn.Linear and "forward" not in part.__dict__ and sums.index(part.weight) is not None:
                stack.enter_context(replaced_forward(part, partial(_forward, part, sums)))
        yield


def _forward(linear: nn.Linear, sums: ParameterSums, x: Tensor) -> Tensor:
    # Under autocast the dtypes of forward and backward are autograd's business.
    if x.dtype != linear.weight.dtype or torch.is_autocast_enabled(x.device.type) or not torch.is_grad_enabled():
        return F.linear(x, linear.weight, linear.bias)
    out: Tensor = _SummedLinear.apply(x, linear.weight, linear.bias, sums, linear)  # type: ignore[no-untyped-call]
    return out


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sums: ParameterSums, linear: nn.Linear
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        ctx.sums, ctx.bias_index = sums, sums.index(bias)
        # An alias's id is gone once autograd hands the saved one back.
        ctx.weight_index = sums.index(weight)
        if linear in sums.unread:
            return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        ctx.sums.add_product(ctx.weight_index, flat.T, x.reshape(-1, x.shape[-1]))
        if ctx.bias_index is not None:
            ctx.sums.add(ctx.bias_index, flat.sum(0))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


def find_unread(out: Tensor) -> set[nn.Linear]:
    """Summed linears whose output only reaches `out` through additions, so that no backward reads its value.

    A recomputation whose result is thrown away, as a layer's output is, need not compute it.
    """
    if out.grad_fn is None:
        return set()
    added, ends, frontier = set(), set(), [out.grad_fn]
    while frontier:
        node = frontier.pop()
        if node.name() == "AddBackward0":
            added.add(node)
            frontier += [after for after, _ in node.next_functions if after is not None]
        elif isinstance(node, _SummedLinear._backward_cls):  # type: ignore[attr-defined]
            ends.add(node)
    seen, frontier = set(added), list(added)
    while frontier:
        node = frontier.pop()
        for after, _ in node.next_functions:
            if after is None:
                continue
            if after in ends and node not in added:
                ends.discard(after)
            if after not in seen:
                seen.add(after)
                frontier.append(after)
    return {node.linear for node in ends}  # type: ignore[attr-defined]
