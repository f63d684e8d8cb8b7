"""Slow single-process truth for everything in this folder: what the parallel paths are tested against."""

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
) -> Tensor:
    """Masked softmax attention over the whole sequence, in fp64, differentiable; rows that see nothing give zeros.

    Args:
        q: [B, H, S, D]. k, v: [B, H_kv, S, D], any float dtype.
        causal, scale, window, cu_seqlens: as ring_attention's.
    Returns:
        [B, H, S, D], fp64.
    Cost: B*H*S*S fp64 scores, several times over.
    """
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = attention_mask(q.shape[2], causal=causal, window=window, cu_seqlens=cu_seqlens).to(q.device)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    # A finite fill: softmax over a row of -inf would be nan, and its gradient too.
    weights = scores.masked_fill(~seen, torch.finfo(torch.float64).min).softmax(-1).masked_fill(~seen, 0.0)
    return weights @ v


def attention_mask(
    seq_len: int,
    *,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
) -> Tensor:
    """[S, S] of bool: row i is True at the keys that query i sees."""
    tokens = torch.arange(seq_len)
    distance = tokens.unsqueeze(0) - tokens.unsqueeze(1)
    seen = torch.ones(seq_len, seq_len, dtype=torch.bool)
    if causal:
        seen &= distance <= 0
    if window is not None:
        left, right = window
        seen &= (distance >= -left) | (left == -1)
        seen &= (distance <= right) | (right == -1)
    if cu_seqlens is not None:
        document = torch.bucketize(tokens, torch.tensor(cu_seqlens[1:]), right=True)
        seen &= document.unsqueeze(0) == document.unsqueeze(1)
        seen &= (tokens < cu_seqlens[-1]).unsqueeze(1)
    return seen


def linformer_reference(q: Tensor, k: Tensor, v: Tensor, key_projection: Tensor, value_projection: Tensor) -> Tensor:
    """softmax(q (E k)^T / sqrt(D)) (F v) over the whole sequence, in fp64, differentiable.

    Args:
        q: [B, H, S, D]. k, v: [B, H_kv, S, D]. key_projection (E), value_projection (F): [R, S].
    Returns:
        [B, H, S, D], fp64.
    """
    q, k, v = (x.double() for x in (q, k, v))
    keys, values = (
        (projection.double() @ x).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        for projection, x in ((key_projection, k), (value_projection, v))
    )
    scores: Tensor = q @ keys.mT * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ values
