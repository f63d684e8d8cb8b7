"""Attention whose scores pass through cap * tanh(score / cap), as Gemma 2's do: no fused kernel of torch has it."""

import torch
from torch import Tensor

from fourfold.parallel.attention.kernels import Gradients, MathAttention, SavedAttention, by_key_head, widen

# Queries whose scores are held at a time: as many as keep matrix products efficient.
ROWS = 512


class SoftCapAttention(MathAttention):
    """MathAttention with soft-capped scores; holds those of ROWS queries and all keys a head.

    Args:
        cap: scores stay within -cap and cap.
    """

    name = "soft_cap"

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, q.shape[2], ROWS):
            scores = self._masked(self._capped(q[:, :, start : start + ROWS], k, scale), causal, start)
            lse = scores.logsumexp(-1)
            out = scores.softmax(-1) @ widen(v).unsqueeze(2)
            parts.append((out.flatten(1, 2), lse.flatten(1, 2)))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        k, v = saved.k, saved.v
        parts, grad_k, grad_v = [], torch.zeros_like(widen(k)), torch.zeros_like(widen(v))
        for start in range(0, saved.q.shape[2], ROWS):
            rows = (slice(None), slice(None), slice(start, start + ROWS))
            queries, grad, out = (by_key_head(widen(x[rows]), k) for x in (saved.q, grad_out, saved.out))
            capped = self._capped(saved.q[rows], k, scale)
            weights = (self._masked(capped, causal, start) - by_key_head(saved.lse[rows], k).unsqueeze(-1)).exp()
            delta = (grad * out).sum(-1, keepdim=True)
            grad_scores = weights * (grad @ widen(v).unsqueeze(2).mT - delta)
            grad_scores *= (1 - (capped / self.cap).square()) * scale  # the slope of tanh
            parts.append((grad_scores @ widen(k).unsqueeze(2)).flatten(1, 2))
            grad_k += (grad_scores.mT @ queries).sum(2)
            grad_v += (weights.mT @ grad).sum(2)
        return torch.cat(parts, dim=2), grad_k, grad_v

    def _capped(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[B, H_kv, H // H_kv, S_q, S_k]."""
        scores: Tensor = by_key_head(widen(q), k) @ widen(k).unsqueeze(2).mT * scale
        return (scores / self.cap).tanh() * self.cap

    def _masked(self, scores: Tensor, causal: bool, start: int) -> Tensor:
        """With the keys after each query masked; `start` queries come before the first."""
        if not causal:
            return scores
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1 + start)
        return scores.masked_fill(future, -torch.inf)
