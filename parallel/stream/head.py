"""The end of a language model, norm, vocabulary projection and log-softmax, a few tokens at a time.

Whole logits are [B, T, V]: 4 GB at 8k tokens of a 128k vocabulary in fp32, several times over. Every loss people train
with is a function of three numbers a token: the target's log-probability, the logits' lse (z-loss, entropy-like
penalties) and their mean (label smoothing). `HeadStatistics` gives them, differentiable, from tiles of some tokens by
some of the vocabulary, computed once forward and once backward. torch's F.linear_cross_entropy and Liger-Kernel give
the cross-entropy alone. That one, whose gradient is known before backward begins, `HeadLoss` computes in a single pass
over whole rows, which needs room for the projection's gradient from the forward on.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.parallel.attention.kernels import accumulation_dtype, widen
from fourfold.parallel.stream.gradients import entered_autocast, once, own_saved_tensors
from fourfold.parallel.stream.head_chunk import (
    HeadChunk,
    HeadParts,
    HeadSums,
    TokenGradients,
    head_sums,
    products_dtype,
    slices,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head(HeadParts):
    """A model's last modules, and what training asks of them."""

    def statistics(self, hidden: Tensor, targets: Tensor, *, mean: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability of the target, lse, mean logit), each [B, T] in fp32; 0 where the target is negative.

        Args:
            hidden: [B, T, d], the last layer's output. targets: [B, T], int64.
            mean: whether the mean is wanted; without, it is 0.
        """
        return HeadStatistics.apply(hidden, targets, self.rows(targets), self, mean, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] in the projection's dtype (autocast's where it is on), for some of the last layer's output."""
        projection = self.projection
        with entered_autocast(self.autocast):
            logits = F.linear(self.normalise(hidden), projection.weight, projection.bias)
            if self.scale != 1.0:
                logits = logits * self.scale
            return logits if self.soft_cap is None else (logits / self.soft_cap).tanh() * self.soft_cap

    def loss(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """-weight * the sum of the targets' log-probabilities, a fp32 scalar; `weight` is one too, on hidden's device.

        Cost: logits once, and with a gradient two more products of their size; the gradient waits for backward. Where
            the projection has a .grad that sums can be added to, logits once more, and they are added there, unless in
            a single_pass; so in fp16, whose gradients want the loss's scale first, and where the sums go by_tiles.
        """
        grad = torch.is_grad_enabled()
        matrix = self.projection.weight
        # fp16's gradients vanish before the loss is scaled, so they wait for the scale.
        half = products_dtype(self) == torch.float16
        in_place = (
            not self.single_pass and matrix.grad is not None and matrix.grad.dtype == accumulation_dtype(matrix.dtype)
        )
        if grad and matrix.requires_grad and (in_place or half):
            return -(self.statistics(hidden, targets, mean=False)[0].sum() * weight).to(
                accumulation_dtype(hidden.dtype)
            )
        return HeadLoss.apply(hidden, targets, self.rows(targets), weight, self, grad, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]


def add_tiles(
    head: Head, hidden: Tensor, targets: Tensor, rows: Tensor, tokens: TokenGradients, sums: "HeadSums"
) -> None:
    """Add the projection's gradient, a tile of the vocabulary at a time: fp32 sums of a tile are all that is there.

    Args:
        hidden: [n, d]. targets: [n]. rows: of the two, those that count.
        tokens: of all of hidden.
    """
    parts = [
        (HeadChunk(head, hidden[i], targets[i], graph=False), tokens.of(i)) for i in torch.split(rows, head.tile[0])
    ]
    for tile in slices(head.projection.out_features, head.tile[1]):
        weight = bias = None
        for chunk, here in parts:
            grad = chunk.logits_grad(tile, here)
            weight = _plus(weight, chunk.product(grad))
            if head.projection.bias is not None:
                bias = _plus(bias, grad.sum(0))
            del grad  # before the next one is made
        sums.add_rows(head.projection, tile, weight, bias)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return widen(part) if total is None else total.add_(part)


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
            chunk = HeadChunk(head, flat[index], labels[index])
            nothing = labels[index] < 0
            for place, (result, part) in enumerate(zip(results, _reduce(chunk, head, with_mean), strict=True)):
                part = part.squeeze(-1)
                result.view(-1)[index] = part if place > 2 else part.masked_fill(nothing, 0)
        ctx.save_for_backward(hidden, targets, rows, *results[3:])
        ctx.head, ctx.parameters = head, parameters
        ctx.set_materialize_grads(False)
        return tuple(results[:3])

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, rows, highest, total = (x.flatten(0, 1) if x.dim() > 1 else x for x in ctx.saved_tensors)
        # Of what nobody used there is none, which for the mean saves work; nor of a token without a target.
        counts = targets.ge(0).unsqueeze(-1)
        nothing = torch.zeros_like(total).unsqueeze(-1)
        logprob, lse = (nothing if grad is None else grad.reshape(-1, 1).where(counts, 0) for grad in grads[:2])
        mean = None if grads[2] is None else grads[2].reshape(-1, 1).where(counts, 0)
        head: Head = ctx.head
        grad_hidden = torch.zeros_like(ctx.saved_tensors[0])
        tokens = TokenGradients(highest.unsqueeze(-1), (lse - logprob) / total.unsqueeze(-1), logprob, mean)
        tiled = head.by_tiles(len(rows))
        with head_sums(head, ctx.parameters, in_backward=True) as sums:
            for index in torch.split(rows, head.tile[0]):
                chunk = HeadChunk(head, hidden[index], targets[index])
                for part in slices(head.projection.out_features, head.tile[1]):
                    grad = chunk.logits_grad(part, tokens.of(index))
                    chunk.add_gradients(part, grad, None if tiled else sums)
                    del grad  # before the next one is made
                grad_hidden.view(-1, grad_hidden.shape[-1])[index] = chunk.finish(sums)
            if tiled:
                add_tiles(head, hidden, targets, rows, tokens, sums)
            values = sums.values(ctx.parameters)
        return head.passing.hand_on(grad_hidden), None, None, None, None, *values


class HeadLoss(torch.autograd.Function):
    """See Head.loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, rows: Tensor, weight: Tensor, head: Head, grad: bool,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        dtype = accumulation_dtype(hidden.dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        ctx.grad_hidden, ctx.head, ctx.parameters = torch.zeros_like(hidden) if grad else None, head, parameters
        ctx.tiled = grad and head.by_tiles(len(rows))
        flat, labels = hidden.flatten(0, 1), targets.flatten()
        # Of each token: its highest logit and the exponentials' sum, for add_tiles.
        peaks, totals = (torch.zeros((len(labels), 1), dtype=dtype, device=hidden.device) for _ in range(2))
        everything, share = slice(0, head.projection.out_features), -weight.to(dtype)
        matrix = head.projection.weight.detach().to(products_dtype(head))
        with head_sums(head, parameters, in_backward=False) as sums, own_saved_tensors():
            for index in torch.split(rows, head.chunk):
                chunk = HeadChunk(head, flat[index], labels[index], weight=matrix)
                logits, slope = chunk.logits(everything)
                place, counts = chunk.targets(everything)
                target = logits.gather(-1, place)
                peak = logits.amax(-1, keepdim=True)
                total = logits.sub_(peak).exp_().sum(-1, keepdim=True)
                loss -= (target - peak - total.log()).where(counts, 0).sum() * weight
                peaks[index], totals[index] = peak, total
                if ctx.grad_hidden is not None:
                    tokens = TokenGradients(peak, (-share / total).where(counts, 0), share.expand_as(total))
                    logits = chunk.projection_grad(everything, logits.mul_(tokens.factor), slope, tokens)
                    chunk.add_gradients(everything, logits, None if ctx.tiled else sums)
                    ctx.grad_hidden.view(-1, hidden.shape[-1])[index] = chunk.finish(sums)
                del logits, slope  # before the next ones are made
        ctx.sums = sums.values(parameters) if grad else []
        if ctx.tiled:
            ctx.save_for_backward(hidden, targets, rows, share, peaks, totals)
        return loss

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_hidden is None:
            raise RuntimeError("the gradient of this loss is computed with it, and was used up: compute the loss again")
        head: Head = ctx.head
        # In place: they are the largest tensors of the step, and this backward runs once.
        gradients = [
            None if total is None else total.mul_(grad.to(total.dtype)) for total in (ctx.grad_hidden, *ctx.sums)
        ]
        if ctx.tiled:
            hidden, targets, rows, share, peaks, totals = ctx.saved_tensors
            share = share * grad
            counts = targets.flatten().ge(0).unsqueeze(-1)
            tokens = TokenGradients(peaks, (-share / totals).where(counts, 0), share.expand_as(totals))
            with head_sums(head, ctx.parameters, in_backward=False) as sums:
                add_tiles(head, hidden.flatten(0, 1), targets.flatten(), rows, tokens, sums)
                tiles = sums.values(ctx.parameters)
            # The norm's are known from the forward pass, the projection's from here.
            gradients[1:] = [found if tile is None else tile for found, tile in zip(gradients[1:], tiles, strict=True)]
        passed = head.passing.hand_on(ctx.grad_hidden)
        ctx.grad_hidden, ctx.sums = None, []
        return passed, None, None, None, None, None, *gradients[1:]


def _reduce(chunk: HeadChunk, head: Head, with_mean: bool) -> tuple[Tensor, ...]:
    """(log-probability, lse, mean, highest logit, sum of the exponentials below it), each [n, 1], over all tiles."""
    highest = target = total = mean = None
    for rows in slices(head.projection.out_features, head.tile[1]):
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
