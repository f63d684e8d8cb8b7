"""The end of a language model, norm, vocabulary projection and log-softmax, a few tokens at a time.

Whole logits are [B, T, V]: 4 GB at 8k tokens of a 128k vocabulary in fp32, several times over. Every loss people train
with is a function of three numbers a token: the target's log-probability, the logits' lse (z-loss, entropy-like
penalties) and their mean (label smoothing). `HeadStatistics` gives them, differentiable, with the logits of one chunk
at a time in memory, computed once forward and once backward. torch's F.linear_cross_entropy and Liger-Kernel give the
cross-entropy alone. That one, whose gradient is known before backward begins, `HeadLoss` computes in a single pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.parallel.attention import accumulation_dtype
from fourfold.parallel.stream_gradients import ParameterSums
from fourfold.parallel.stream_module import aliased, entered_autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A model's last modules.

    Attributes:
        norm: the norm after the last layer, [tokens, d] to [tokens, d].
        projection: d to V.
        scale: logits are multiplied by it.
        soft_cap: then they become soft_cap * tanh(logits / soft_cap); None is no cap.
        chunk: tokens whose logits exist at a time.
        autocast: (device type, dtype) of an enabled autocast.
    """

    norm: nn.Module
    projection: nn.Linear
    scale: float
    soft_cap: float | None
    chunk: int
    autocast: tuple[str, torch.dtype] | None

    def parameters(self) -> list[Tensor]:
        """The norm's that need a gradient, then the projection's weight and bias as far as they do."""
        ends = [p for p in (self.projection.weight, self.projection.bias) if p is not None]
        return [p for p in (*self.norm.parameters(), *ends) if p.requires_grad]

    def statistics(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability of the target, lse, mean logit), each [N] in fp32; 0 where the target is negative.

        Args:
            hidden: [N, d], the last layer's output. targets: [N], int64.
        """
        rows = targets.ge(0).nonzero().flatten()
        return HeadStatistics.apply(hidden, targets, rows, self, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]

    def loss(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """-weight * the sum of the targets' log-probabilities, a fp32 scalar; `weight` is one too, on hidden's device.

        Cost: logits once, and with a gradient two more products of their size; the gradient waits for backward.
        """
        rows = targets.ge(0).nonzero().flatten()
        grad = torch.is_grad_enabled()
        return HeadLoss.apply(hidden, targets, rows, weight, self, grad, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]


class _Chunk:
    """The logits of some tokens, overwritten by their exponentials and then by the gradient of the loss."""

    def __init__(self, head: Head, weight: Tensor, hidden: Tensor, targets: Tensor) -> None:
        self._head, self._weight, self._targets = head, weight, targets.unsqueeze(-1)
        self.leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), entered_autocast(head.autocast):
            self.normed = head.norm(self.leaf)
        self._input = self.normed.detach().to(weight.dtype)
        bias = head.projection.bias
        logits = (
            self._input @ weight.T
            if bias is None
            else torch.addmm(bias.detach().to(weight.dtype), self._input, weight.T)
        )
        self._logits = logits.to(accumulation_dtype(logits.dtype))
        if head.scale != 1.0:
            self._logits *= head.scale
        if head.soft_cap is not None:
            self._logits.div_(head.soft_cap).tanh_()
            self._slope = 1 - self._logits.square()
            self._logits *= head.soft_cap

    _slope: Tensor | None = None

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability, lse, mean logit), each [n]. Leaves exponentials for `gradients`."""
        mean = self._logits.mean(-1)
        target = self._logits.gather(-1, self._targets).squeeze(-1)
        highest = self._logits.amax(-1, keepdim=True)
        self._total = self._logits.sub_(highest).exp_().sum(-1, keepdim=True)
        lse = (self._total.log() + highest).squeeze(-1)
        return target - lse, lse, mean

    def gradients(self, logprob: Tensor, lse: Tensor, mean: Tensor | None, sums: "_Sums") -> Tensor:
        """Gradient of the hidden states, from those of the three statistics [n]; adds the parameters' to `sums`."""
        grad = self._logits.mul_((lse - logprob).unsqueeze(-1) / self._total)
        grad.scatter_add_(-1, self._targets, logprob.unsqueeze(-1))
        if mean is not None:
            grad += (mean / grad.shape[-1]).unsqueeze(-1)
        if self._slope is not None:
            grad *= self._slope
        if self._head.scale != 1.0:
            grad *= self._head.scale
        low = grad.to(self._input.dtype)
        projection = self._head.projection
        last = sums.size - 1
        if projection.bias is not None and projection.bias.requires_grad:
            sums.add(last, grad.sum(0))
            last -= 1
        if projection.weight.requires_grad:
            sums.add_product(last, low.T, self._input)
        return sums.backward(self.normed, [self.leaf], (low @ self._weight).to(self.normed.dtype))[0]


class HeadStatistics(torch.autograd.Function):
    """See Head.statistics."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, rows: Tensor, head: Head, *parameters: Tensor) -> Any:
        ctx.save_for_backward(hidden, targets, rows)
        ctx.head, ctx.parameters = head, parameters
        dtype = accumulation_dtype(hidden.dtype)
        results = tuple(torch.zeros(len(targets), dtype=dtype, device=hidden.device) for _ in range(3))
        weight = _weight(head)
        for index in torch.split(rows, head.chunk):
            chunk = _Chunk(head, weight, hidden[index], targets[index])
            for result, part in zip(results, chunk.statistics(), strict=True):
                result[index] = part
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, logprob: Tensor, lse: Tensor, mean: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, rows = ctx.saved_tensors
        head: Head = ctx.head
        grad_hidden = torch.zeros_like(hidden)
        with _head_sums(head, ctx.parameters) as sums:
            weight = _weight(head)
            smooth = bool(mean.any())
            for index in torch.split(rows, head.chunk):
                chunk = _Chunk(head, weight, hidden[index], targets[index])
                chunk.statistics()
                part = chunk.gradients(logprob[index], lse[index], mean[index] if smooth else None, sums)
                grad_hidden[index] = part
        return grad_hidden, None, None, None, *sums.values(ctx.parameters)


class HeadLoss(torch.autograd.Function):
    """See Head.loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, rows: Tensor, weight: Tensor, head: Head, grad: bool,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
        ctx.grad_hidden = torch.zeros_like(hidden) if grad else None
        with _head_sums(head, parameters) as sums:
            matrix = _weight(head)
            for index in torch.split(rows, head.chunk):
                chunk = _Chunk(head, matrix, hidden[index], targets[index])
                logprob, _, _ = chunk.statistics()
                total -= logprob.sum() * weight
                if ctx.grad_hidden is not None:
                    share = -weight.expand_as(logprob).to(logprob.dtype)
                    ctx.grad_hidden[index] = chunk.gradients(share, torch.zeros_like(share), None, sums)
        ctx.sums = sums.values(parameters) if grad else []
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_hidden is None:
            raise RuntimeError("the gradient of this loss is computed with it, and was used up: compute the loss again")
        # In place: they are the largest tensors of the step, and this backward runs once.
        gradients = [
            None if total is None else total.mul_(grad.to(total.dtype)) for total in (ctx.grad_hidden, *ctx.sums)
        ]
        ctx.grad_hidden, ctx.sums = None, []
        return gradients[0], None, None, None, None, None, *gradients[1:]


class _Sums(ParameterSums):
    """Sums of the head: a norm's through autograd, and the projection's by products added in place."""

    def __init__(self, parameters: list[Tensor], num_norm: int) -> None:
        super().__init__(parameters[:num_norm])
        self.size = len(parameters)
        self._sums = [None] * self.size


@contextmanager
def _head_sums(head: Head, parameters: Sequence[Tensor]) -> Iterator[_Sums]:
    num_norm = sum(p.requires_grad for p in head.norm.parameters())
    with aliased(head.norm, parameters[:num_norm]) as aliases:
        yield _Sums([*aliases, *parameters[num_norm:]], num_norm)


def _weight(head: Head) -> Tensor:
    """The projection's weight in the dtype it multiplies in."""
    weight = head.projection.weight.detach()
    return weight if head.autocast is None else weight.to(head.autocast[1])
