"""The paper's own Ring Self-Attention: keys go round, softmax over whole rows, then values go round.

Kept as a differentiable reference and as the baseline of the benchmark: it holds a rank's L/N rows of scores over all L
keys, [B, H, L/N, L] in fp32, which the online softmax of ring_attention does without.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import Place, exchange, place_in


def two_pass_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Ring Self-Attention as published, for contiguous shards of equal length.

    Args:
        q, k, v: [B, H, L/N, D], fp32 or fp64; no grouped heads, as in the paper.
        group: the N ranks that share the sequence; all call.
        causal: mask later keys. The paper has none; every block is computed all the same, then masked.
        scale: of the scores; None is D**-0.5.
    Returns:
        [B, H, L/N, D]. Differentiable; gradients as ring_attention's.
    Raises:
        ValueError: grouped heads, or a dtype that would lose the scores' precision.
    Cost: u = B*H*L/N*D elements. Forward 2(N-1)u a rank. Backward 4(N-1)u: V and K round again, dV and dK straight
        back to their ranks (the paper all-reduces them: 6(N-1)u). Memory B*H*L*L/N scores, saved for backward.
    Source: Li et al. 2021 (arXiv 2105.13120), section 3.2.
    """
    if q.shape != k.shape or k.shape != v.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: use ring_attention unless alike")
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{q.dtype}: the two-pass ring is a reference in fp32 or fp64, use ring_attention")
    place = place_in(group)
    out: Tensor = _TwoPass.apply(q, k, v, place, causal, q.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
    return out


class _TwoPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, place: Place, causal: bool, scale: float) -> Tensor:
        tokens = q.shape[2]
        scores = q.new_empty((*q.shape[:3], tokens * place.size))
        for source, keys in _round(place, k):
            torch.matmul(q, keys.mT, out=scores[..., _columns(source, tokens)])
        scores *= scale
        if causal:
            _mask(scores, place.rank * tokens)
        weights = scores.softmax(-1)
        del scores
        out = torch.zeros_like(q)
        for source, values in _round(place, v):
            out += weights[..., _columns(source, tokens)] @ values
        ctx.save_for_backward(q, k, v, out, weights)
        ctx.place, ctx.scale = place, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, weights = ctx.saved_tensors
        place, tokens = ctx.place, q.shape[2]
        grad_scores = torch.empty_like(weights)
        grad_values = []
        for source, values in _round(place, v):
            columns = _columns(source, tokens)
            torch.matmul(grad_out, values.mT, out=grad_scores[..., columns])
            grad_values.append((source, weights[..., columns].mT @ grad_out))
        # The softmax's gradient over whole rows.
        grad_scores -= (grad_out * out).sum(-1, keepdim=True)
        grad_scores *= weights
        grad_scores *= ctx.scale
        dq = torch.zeros_like(q)
        grad_keys = []
        for source, keys in _round(place, k):
            block = grad_scores[..., _columns(source, tokens)]
            dq += block @ keys
            grad_keys.append((source, block.mT @ q))
        return dq, _home(place, grad_keys), _home(place, grad_values), None, None, None


def _round(place: Place, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(source, its x), this rank's own first; each is passed on to the next neighbour while the caller computes."""
    held = x.contiguous()
    following, previous = (place.rank + 1) % place.size, (place.rank - 1) % place.size
    for step in range(place.size - 1):
        arriving = torch.empty_like(held)
        flight = exchange(place, [(held, following)], [(arriving, previous)])
        yield (place.rank - step) % place.size, held
        flight.wait()
        held = arriving
    yield following, held


def _home(place: Place, parts: list[tuple[int, Tensor]]) -> Tensor:
    """The sum of all ranks' gradients for this rank's tokens, in rank order."""
    own = dict(parts)
    received = {rank: torch.empty_like(own[place.rank]) for rank in own if rank != place.rank}
    exchange(
        place,
        [(part.contiguous(), rank) for rank, part in own.items() if rank != place.rank],
        [(buffer, rank) for rank, buffer in received.items()],
    ).wait()
    received[place.rank] = own[place.rank]
    total = torch.zeros_like(own[place.rank])
    for rank in range(place.size):
        total += received[rank]
    return total


def _columns(source: int, tokens: int) -> slice:
    return slice(source * tokens, (source + 1) * tokens)


def _mask(scores: Tensor, first_query: int) -> None:
    queries = torch.arange(first_query, first_query + scores.shape[-2], device=scores.device)
    keys = torch.arange(scores.shape[-1], device=scores.device)
    scores.masked_fill_(keys > queries.unsqueeze(1), -torch.inf)
