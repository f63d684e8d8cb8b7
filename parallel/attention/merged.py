"""The attention of a row of queries, summed block by block of keys."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fourfold.parallel.attention.backends import merge
from fourfold.parallel.attention.blocks import Span
from fourfold.parallel.attention.calls import Call
from fourfold.parallel.attention.kernels import accumulation_dtype


class Merged:
    """Output and lse of queries, from the blocks of keys that they see, in any order.

    Queries of one block only are copied as they are, and where that goes for all of them, nothing is widened. What
    comes first for a span of queries is copied too; only what follows is merged.

    Args:
        q: [B, H, S, D], for its shape, dtype and device.
        spans: of queries, of all the blocks to come.
        head_size: of the values; None is q's.

    Attributes:
        out: [B, H, S, D], tokens before heads in memory, as models and messages have them; zeros where no key was
            seen. In q.dtype where no two blocks share a query, else in the accumulation dtype.
        lse: [B, H, S] in the accumulation dtype; -inf where no key was seen.
    """

    def __init__(self, q: Tensor, spans: Sequence[Span], head_size: int | None = None) -> None:
        batch, heads, tokens, size = q.shape
        size = head_size or size
        wide = accumulation_dtype(q.dtype)
        ordered = sorted(spans)
        alone = all(first[1] <= second[0] for first, second in pairwise(ordered))
        # Room that some block fills is not cleared before.
        full = sum(stop - start for start, stop in _union(ordered)) == tokens
        make = q.new_empty if full else q.new_zeros
        self.out = make((batch, tokens, heads, size), dtype=q.dtype if alone else wide).transpose(1, 2)
        self.lse = q.new_full((batch, tokens, heads), -torch.inf, dtype=wide).transpose(1, 2)
        self._seen: list[Span] = []

    def add_call(self, call: Call, out: Tensor, lse: Tensor) -> None:
        """A call's output [B, H, n, D] and lse [B, H, n] of its queries, in its order."""
        tokens = call.queries(out.device)
        if isinstance(tokens, tuple):
            self.add(tokens, out, lse)
            return
        spans = [block.q for block in call.blocks]
        overlaps = [_overlap(span, self._seen) for span in spans]
        if not any(overlaps):
            self.out.index_copy_(2, tokens, out.to(self.out.dtype))
            self.lse.index_copy_(2, tokens, lse.to(self.lse.dtype))
        elif overlaps == [stop - start for start, stop in spans]:
            seen_out, seen_lse = self.out.index_select(2, tokens), self.lse.index_select(2, tokens)
            merge(seen_out, seen_lse, out, lse)
            self.out.index_copy_(2, tokens, seen_out)
            self.lse.index_copy_(2, tokens, seen_lse)
        else:
            if call.shape == "anticausal":
                out, lse = out.flip(2), lse.flip(2)
            first = 0
            for start, stop in spans:
                here = slice(first, first + stop - start)
                self.add((start, stop), out[:, :, here], lse[:, :, here])
                first = here.stop
            return
        self._seen = _union(sorted([*self._seen, *spans]))

    def add(self, span: Span, out: Tensor, lse: Tensor) -> None:
        """A block's output [B, H, n, D] and lse [B, H, n] of the queries span[0]:span[1]."""
        # Cut the block where queries that have seen keys begin and end.
        start = span[0]
        for seen in [*self._seen, (span[1], span[1])]:
            if seen[1] <= start or seen[0] > span[1]:
                continue
            if start < seen[0]:
                self._copy((start, seen[0]), span[0], out, lse)
            first, last = max(start, seen[0]), min(seen[1], span[1])
            if first < last:
                here = slice(first - span[0], last - span[0])
                rows = slice(first, last)
                merge(self.out[:, :, rows], self.lse[:, :, rows], out[:, :, here], lse[:, :, here])
            start = max(start, last)
        self._seen = _union(sorted([*self._seen, span]))

    def _copy(self, span: Span, first: int, out: Tensor, lse: Tensor) -> None:
        here = slice(span[0] - first, span[1] - first)
        self.out[:, :, slice(*span)] = out[:, :, here]
        self.lse[:, :, slice(*span)] = lse[:, :, here]


def _overlap(span: Span, others: Sequence[Span]) -> int:
    """Tokens of the span that lie in one of the others, of which no two overlap."""
    return sum(max(0, min(span[1], stop) - max(span[0], start)) for start, stop in others)


def _union(spans: Sequence[Span]) -> list[Span]:
    """Of ascending spans; those that touch are joined."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
