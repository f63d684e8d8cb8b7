"""The end of a language model, norm, vocabulary projection and log-softmax, a few tokens at a time.

Whole logits are [B, T, V]: 4 GB at 8k tokens of a 128k vocabulary in fp32, several times over. Every loss people train
with is a function of three numbers a token: the target's log-probability, the logits' lse (z-loss, entropy-like
penalties) and their mean (label smoothing). `HeadStatistics` gives them, differentiable, from tiles of some tokens by
some of the vocabulary, computed once forward and once backward. torch's F.linear_cross_entropy and Liger-Kernel give
the cross-entropy alone. That one, whose gradient is known before backward begins, `HeadLoss` computes in a single pass
over whole rows, which needs room for the projection's gradient from the forward on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.parallel.attention.kernels import accumulation_dtype
from fourfold.parallel.stream.gradients import ParameterSums, entered_autocast, once
from fourfold.parallel.stream.passing import PassingGradient
from fourfold.parallel.stream.patching import swapped_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A model's last modules.

    Attributes:
        norm: the norm after the last layer, [tokens, d] to [tokens, d].
        normalise: its forward, which is called without its hooks: they would run for every chunk.
        projection: d to V.
        scale: logits are multiplied by it.
        soft_cap: then they become soft_cap * tanh(logits / soft_cap); None is no cap.
        chunk: tokens whose logits HeadLoss has at a time, whole rows.
        tile: (tokens, rows of the vocabulary) that HeadStatistics has at a time.
        autocast: (device type, dtype) of an enabled autocast.
        passing: see layer_run.StreamRun.
    """

    norm: nn.Module
    normalise: Callable[[Tensor], Tensor]
    projection: nn.Linear
    scale: float
    soft_cap: float | None
    chunk: int
    tile: tuple[int, int]
    autocast: tuple[str, torch.dtype] | None
    passing: PassingGradient

    def parameters(self) -> list[Tensor]:
        """The norm's that need a gradient, then the projection's weight and bias as far as they do."""
        ends = [p for p in (self.projection.weight, self.projection.bias) if p is not None]
        return [p for p in (*self.norm.parameters(), *ends) if p.requires_grad]

    def statistics(self, hidden: Tensor, targets: Tensor, *, mean: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability of the target, lse, mean logit), each [B, T] in fp32; 0 where the target is negative.

        Args:
            hidden: [B, T, d], the last layer's output. targets: [B, T], int64.
            mean: whether the mean is wanted; without, it is 0.
        """
        rows = targets.flatten().ge(0).nonzero().flatten()
        return HeadStatistics.apply(hidden, targets, rows, self, mean, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]

    def loss(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """-weight * the sum of the targets' log-probabilities, a fp32 scalar; `weight` is one too, on hidden's device.

        Cost: logits once, and with a gradient two more products of their size; the gradient waits for backward. Where
            the projection has a .grad that sums can be added to, logits once more, and they are added there; so in
            fp16, whose gradients want the loss's scale first.
        """
        grad = torch.is_grad_enabled()
        matrix = self.projection.weight
        # fp16's gradients vanish before the loss is scaled, so they wait for the scale.
        half = (matrix.dtype if self.autocast is None else self.autocast[1]) == torch.float16
        in_place = matrix.grad is not None and matrix.grad.dtype == accumulation_dtype(matrix.dtype)
        if grad and matrix.requires_grad and (in_place or half):
            return -(self.statistics(hidden, targets, mean=False)[0].sum() * weight).to(
                accumulation_dtype(hidden.dtype)
            )
        rows = targets.flatten().ge(0).nonzero().flatten()
        return HeadLoss.apply(hidden, targets, rows, weight, self, grad, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]


class _Chunk:
    """Some tokens at the head, whose logits come by slices of the vocabulary."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor) -> None:
        self._head, self._targets = head, targets.unsqueeze(-1)
        self._leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), entered_autocast(head.autocast):
            self._normed = head.normalise(self._leaf)
        self._dtype = head.projection.weight.dtype if head.autocast is None else head.autocast[1]
        self._input = self._normed.detach().to(self._dtype)
        self._grad_input: Tensor | None = None

    def logits(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(logits [n, rows] in fp32, slope of the soft cap or None)."""
        weight, bias = self._weight(rows), self._head.projection.bias
        if bias is None:
            logits = self._input @ weight.T
        else:
            logits = torch.addmm(bias.detach()[rows].to(weight.dtype), self._input, weight.T)
        logits, slope = logits.to(accumulation_dtype(logits.dtype)), None
        if self._head.scale != 1.0:
            logits *= self._head.scale
        if self._head.soft_cap is not None:
            logits.div_(self._head.soft_cap).tanh_()
            slope = 1 - logits.square()
            logits *= self._head.soft_cap
        return logits, slope

    def targets(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(the target's place among these rows of the vocabulary or any, whether it is among them), [n, 1]."""
        place = self._targets - rows.start
        return place.clamp(0, rows.stop - rows.start - 1), (place >= 0) & (self._targets < rows.stop)

    def add_gradients(
        self, rows: slice, grad: Tensor, slope: Tensor | None, logprob: Tensor, mean: Tensor | None, sums: "_Sums"
    ) -> None:
        """Take in the gradients from these rows of the vocabulary.

        Args:
            grad: [n, rows], what logits get through the lse. Overwritten.
            logprob, mean: gradients of the two statistics, [n, 1].
        """
        place, here = self.targets(rows)
        grad.scatter_add_(-1, place, logprob * here)
        if mean is not None:
            grad += mean / self._head.projection.out_features
        if slope is not None:
            grad *= slope
        if self._head.scale != 1.0:
            grad *= self._head.scale
        low = grad.to(self._dtype)
        sums.add_projection(self._head.projection, rows, low.T, self._input, grad)
        part = low @ self._weight(rows)
        if self._grad_input is None:
            self._grad_input = part.to(accumulation_dtype(part.dtype))
        else:
            self._grad_input += part

    def finish(self, sums: "_Sums") -> Tensor:
        """The hidden states' gradient, once all rows of the vocabulary are in."""
        assert self._grad_input is not None
        return sums.backward([self._normed], [self._leaf], [self._grad_input.to(self._normed.dtype)])[0]

    def _weight(self, rows: slice) -> Tensor:
        return self._head.projection.weight.detach()[rows].to(self._dtype)


class HeadStatistics(torch.autograd.Function):
    """See Head.statistics."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, rows: Tensor, head: Head, with_mean: bool, *parameters: Tensor
    ) -> Any:
        dtype = accumulation_dtype(hidden.dtype)
        # Of each token: its target's log-probability, lse and mean logit, and the highest logit and the exponentials'
        # sum, from which exponentials come out more exact than from the lse.
        results = [torch.zeros(targets.shape, dtype=dtype, device=hidden.device) for _ in range(5)]
        flat, labels = hidden.flatten(0, 1), targets.flatten()
        for index in torch.split(rows, head.tile[0]):
            chunk = _Chunk(head, flat[index], labels[index])
            parts = _reduce(chunk, head, with_mean)
            for result, part in zip(results, parts, strict=True):
                result.view(-1)[index] = part.squeeze(-1)
        ctx.save_for_backward(hidden, targets, rows, *results[3:])
        ctx.head, ctx.parameters = head, parameters
        return tuple(results[:3])

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, rows, highest, total = (x.flatten(0, 1) if x.dim() > 1 else x for x in ctx.saved_tensors)
        logprob, lse, mean = (grad.reshape(-1, 1) for grad in grads)
        head: Head = ctx.head
        grad_hidden = torch.zeros_like(ctx.saved_tensors[0])
        with _head_sums(head, ctx.parameters, in_backward=True) as sums:
            smooth = bool(mean.any())
            for index in torch.split(rows, head.tile[0]):
                chunk = _Chunk(head, hidden[index], targets[index])
                peak, factor = highest[index].unsqueeze(-1), ((lse - logprob)[index] / total[index].unsqueeze(-1))
                for part in _slices(head.projection.out_features, head.tile[1]):
                    logits, slope = chunk.logits(part)
                    grad = logits.sub_(peak).exp_().mul_(factor)
                    chunk.add_gradients(part, grad, slope, logprob[index], mean[index] if smooth else None, sums)
                    del logits, slope, grad  # before the next ones are made
                grad_hidden.view(-1, grad_hidden.shape[-1])[index] = chunk.finish(sums)
            values = sums.values(ctx.parameters)
        return head.passing.hand_on(grad_hidden), None, None, None, None, *values


class HeadLoss(torch.autograd.Function):
    """See Head.loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, rows: Tensor, weight: Tensor, head: Head, grad: bool,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        loss = torch.zeros((), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
        ctx.grad_hidden, ctx.head = torch.zeros_like(hidden) if grad else None, head
        flat, labels = hidden.flatten(0, 1), targets.flatten()
        everything = slice(0, head.projection.out_features)
        with _head_sums(head, parameters, in_backward=False) as sums:
            for index in torch.split(rows, head.chunk):
                chunk = _Chunk(head, flat[index], labels[index])
                logits, slope = chunk.logits(everything)
                target = logits.gather(-1, labels[index].unsqueeze(-1))
                highest = logits.amax(-1, keepdim=True)
                total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
                loss -= (target - highest - total.log()).sum() * weight
                if ctx.grad_hidden is not None:
                    share = -weight.to(total.dtype).expand_as(total)
                    chunk.add_gradients(everything, logits.mul_(-share / total), slope, share, None, sums)
                    ctx.grad_hidden.view(-1, hidden.shape[-1])[index] = chunk.finish(sums)
                del logits, slope  # before the next ones are made
        ctx.sums = sums.values(parameters) if grad else []
        return loss

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_hidden is None:
            raise RuntimeError("the gradient of this loss is computed with it, and was used up: compute the loss again")
        # In place: they are the largest tensors of the step, and this backward runs once.
        gradients = [
            None if total is None else total.mul_(grad.to(total.dtype)) for total in (ctx.grad_hidden, *ctx.sums)
        ]
        passed = ctx.head.passing.hand_on(ctx.grad_hidden)
        ctx.grad_hidden, ctx.sums = None, []
        return passed, None, None, None, None, None, *gradients[1:]


class _Sums(ParameterSums):
    """Sums of the head: a norm's through autograd, and the projection's by products added in place."""

    def __init__(self, leaves: list[Tensor], parameters: Sequence[Tensor], in_backward: bool) -> None:
        super().__init__(leaves, parameters if in_backward else ())
        self._places = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._sums += [None] * (len(parameters) - len(self._sums))

    def add_projection(self, projection: nn.Linear, rows: slice, grad: Tensor, x: Tensor, logits_grad: Tensor) -> None:
        """Add grad [rows, n] @ x [n, d] to the weight's rows, and to the bias's the sum of logits_grad [n, rows]."""
        index = self._places.get(id(projection.weight))
        if index is not None:
            total = self.total(index, projection.weight)[rows]
            if total.dtype == grad.dtype:
                total.addmm_(grad, x)
            else:
                total += grad @ x
        index = self._places.get(id(projection.bias))
        if index is not None:
            self.total(index, projection.bias)[rows] += logits_grad.sum(0)


@contextmanager
def _head_sums(head: Head, parameters: Sequence[Tensor], *, in_backward: bool) -> Iterator[_Sums]:
    num_norm = sum(p.requires_grad for p in head.norm.parameters())
    with swapped_parameters(head.norm, parameters[:num_norm]) as leaves:
        yield _Sums(leaves, parameters, in_backward)


def _reduce(chunk: _Chunk, head: Head, with_mean: bool) -> tuple[Tensor, ...]:
    """(log-probability, lse, mean, highest logit, sum of the exponentials below it), each [n, 1], over all tiles."""
    highest = target = total = mean = None
    for rows in _slices(head.projection.out_features, head.tile[1]):
        logits, _ = chunk.logits(rows)
        place, here = chunk.targets(rows)
        found, top = logits.gather(-1, place) * here, logits.amax(-1, keepdim=True)
        added = logits.sum(-1, keepdim=True) if with_mean else torch.zeros_like(top)
        if highest is None or target is None or total is None or mean is None:
            highest, target, mean = top, found, added
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        else:
            before, highest = highest, torch.maximum(highest, top)
            total = total * (before - highest).exp_() + logits.sub_(highest).exp_().sum(-1, keepdim=True)
            target, mean = target + found, mean + added
        del logits  # before the next ones are made
    assert highest is not None
    assert target is not None
    assert total is not None
    assert mean is not None
    lse = total.log() + highest
    return target - lse, lse, mean / head.projection.out_features, highest, total


def _slices(stop: int, size: int) -> Iterator[slice]:
    for first in range(0, stop, size):
        yield slice(first, min(first + size, stop))
