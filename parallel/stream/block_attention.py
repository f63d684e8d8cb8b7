"""Attention of queries to keys that are all there, as blocks that a kernel does unmasked: forward and backward.

A causal layer without windows, packed documents or padding is one causal block, and a kernel's own output and gradients
are the result. Documents are one block each, which write side by side. Only where two blocks share queries are outputs
merged by their lse, and only where they share queries or keys are gradients added, both in fp32.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from fourfold.parallel.attention.blocks import Block, Span, pair_blocks, tidy
from fourfold.parallel.attention.calls import Tokens, add, attend_call, attend_call_backward, calls
from fourfold.parallel.attention.kernels import AttentionBackend, Gradients, SavedAttention, accumulation_dtype
from fourfold.parallel.attention.merged import Merged


@lru_cache(maxsize=8192)
def chunk_blocks(
    keys: tuple[Span, ...],
    documents: tuple[Span, ...],
    queries: Span,
    window: int | None,
    leaf: int,
    keys_a_call: int | None,
    windows: bool = False,
) -> tuple[Block, ...]:
    """The unmasked work of some queries. A block's q counts from queries[0], its k from the sequence's first token.

    Args:
        keys, documents: RowMask's.
        queries: first token and the one after the last.
        window: keys a query sees, itself included; None is all before it.
        leaf: the backend's: triangles down to this size are cut.
        keys_a_call: keys of an unmasked block at most; None is no limit.
        windows: leave the window to the kernel where queries and keys are the same tokens, see pair_blocks.
    """
    start, stop = queries
    reach = (None if window is None else window - 1, 0)
    oldest = 0 if window is None else max(0, start - window + 1)
    ranges = [range(max(begin, oldest), min(end, stop)) for begin, end in documents if end > oldest and begin < stop]
    blocks: list[Block] = []
    for begin, end in keys:
        begin, end = max(begin, oldest), min(end, stop)
        if begin < end:
            pairs = pair_blocks((range(start, stop),), (range(begin, end),), ranges, reach, windows=windows)
            blocks += [replace(block, k=(block.k[0] + begin, block.k[1] + begin)) for block in pairs]
    return tuple(piece for block in tidy(blocks, leaf) for piece in _cut(block, keys_a_call))


def attend_blocks(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, H, S_q, D] in q.dtype, lse [B, H, S_q]); queries that no block holds get zeros and -inf.

    Args:
        q: [B, H, S_q, D]. k, v: [B, H_kv, S_k, D].
        blocks: of these queries and keys.
    """
    each = calls(backend, q, blocks)
    if len(each) == 1 and _is_all(each[0].queries(q.device), q):
        out, lse = attend_call(backend, q, k, v, each[0], scale)
        return out.to(q.dtype), lse
    merged = Merged(q, [block.q for block in blocks], v.shape[3])
    for call in each:
        merged.add_call(call, *attend_call(backend, q, k, v, call, scale))
    return merged.out.to(q.dtype), merged.lse


def attend_blocks_backward(
    backend: AttentionBackend, grad_out: Tensor, saved: SavedAttention, blocks: Sequence[Block], scale: float
) -> Gradients:
    """(dq, dk, dv) in the inputs' dtype, of all these blocks; `saved` as attend_blocks had and gave it."""
    q, k, v = saved.q, saved.k, saved.v
    each = calls(backend, q, blocks)
    if len(each) == 1 and _is_all(each[0].queries(q.device), q) and _is_all(each[0].keys(k.device), k):
        dq, dk, dv = attend_call_backward(backend, grad_out, saved, each[0], scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    alone = [_side_by_side([block.q for block in blocks]), _side_by_side([block.k for block in blocks])]
    totals = [
        torch.zeros_like(x, dtype=x.dtype if one else accumulation_dtype(x.dtype))
        for x, one in zip((q, k, v), (alone[0], alone[1], alone[1]), strict=True)
    ]
    for call in each:
        queries, keys = call.queries(q.device), call.keys(k.device)
        parts = attend_call_backward(backend, grad_out, saved, call, scale)
        for total, tokens, part in zip(totals, (queries, keys, keys), parts, strict=True):
            add(total, tokens, part)
    return totals[0].to(q.dtype), totals[1].to(k.dtype), totals[2].to(v.dtype)


def _is_all(tokens: Tokens, x: Tensor) -> bool:
    return isinstance(tokens, tuple) and tokens == (0, x.shape[2])


def _side_by_side(spans: Sequence[Span]) -> bool:
    """Whether no two of the spans share a token."""
    ordered = sorted(spans)
    return all(first[1] <= second[0] for first, second in pairwise(ordered))


def _cut(block: Block, most: int | None) -> list[Block]:
    """A full block as blocks of at most so many keys."""
    first, last = block.k
    if most is None or block.shape != "full" or last - first <= most:
        return [block]
    return [Block(block.q, (key, min(key + most, last))) for key in range(first, last, most)]
