"""Attention whose scores pass through cap * tanh(score / cap), as Gemma 2's do: no fused kernel of torch has it."""

import torch
from torch import Tensor

from fourfold.parallel.attention.kernels import Gradients, MathAttention, SavedAttention, by_key_head, widen


class SoftCapAttention(MathAttention):
    """MathAttention with soft-capped scores; holds S_q * S_k of them a head.

    Args:
        cap: scores stay within -cap and cap.
    """

    name = "soft_cap"

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._masked(self._capped(q, k, scale), causal)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ widen(v).unsqueeze(2)
        return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)

    def backward(self, grad_out: Tensor, saved: SavedAttention, *, causal: bool, scale: float) -> Gradients:
        q, k, v, out, lse = saved
        queries, grad, result = (by_key_head(widen(x), k) for x in (q, grad_out, out))
        capped = self._capped(q, k, scale)
        weights = (self._masked(capped, causal) - by_key_head(lse, k).unsqueeze(-1)).exp()
        delta = (grad * result).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ widen(v).unsqueeze(2).mT - delta)
        grad_scores *= (1 - (capped / self.cap).square()) * scale  # the slope of tanh
        grad_q = (grad_scores @ widen(k).unsqueeze(2)).flatten(1, 2)
        grad_k = (grad_scores.mT @ queries).sum(2)
        grad_v = (weights.mT @ grad).sum(2)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _capped(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[B, H_kv, H // H_kv, S_q, S_k]."""
        scores: Tensor = by_key_head(widen(q), k) @ widen(k).unsqueeze(2).mT * scale
        return (scores / self.cap).tanh() * self.cap

    def _masked(self, scores: Tensor, causal: bool) -> Tensor:
        if not causal:
            return scores
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        return scores.masked_fill(future, -torch.inf)
