"""Swap sequence for heads inside small groups of ranks, and back (Ulysses), by messages within one larger group.

h consecutive ranks that each hold some tokens of all heads come to hold all of those tokens for 1/h of the heads. The
usual form is an all-to-all on a process group of its own; here the same bytes go as messages on the context-parallel
group, so nobody has to create groups for every way of splitting it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.parallel.attention.kernels import accumulation_dtype
from fourfold.parallel.communication import Message, Place, exchange
from fourfold.parallel.sequence.sharding import Shard, join_ranges


def check_heads(num_heads: int, num_kv_heads: int, degree: int, size: int) -> None:
    """Raises ValueError where `degree` ranks cannot share the heads, or `size` ranks cannot be cut into such groups."""
    if degree < 1 or size % degree:
        raise ValueError(f"heads_degree={degree} does not divide the group's {size} ranks: choose a divisor")
    if num_heads % degree:
        raise ValueError(f"heads_degree={degree} does not divide {num_heads} query heads: choose a divisor")
    if num_kv_heads % degree and degree % num_kv_heads:
        raise ValueError(
            f"heads_degree={degree} neither divides {num_kv_heads} key heads nor is a multiple of them: "
            "choose one that does, or is"
        )


class HeadExchange:
    """The exchange among the `degree` consecutive ranks of a group that this rank belongs to.

    Args:
        shards: every rank's shard of the sequence.
        num_heads, num_kv_heads: of the whole layer; k and v are replicated where degree exceeds num_kv_heads.
    """

    def __init__(self, place: Place, degree: int, shards: Sequence[Shard], num_heads: int, num_kv_heads: int) -> None:
        self.place, self.degree, self.inner = place, degree, place.rank % degree
        if degree == 1:
            return
        first = place.rank - self.inner
        self._members = range(first, first + degree)
        self._num_heads, self._num_kv_heads = num_heads, num_kv_heads
        held = [shards[rank] for rank in self._members]
        order = join_ranges([tokens for shard in held for tokens in shard])
        starts = {}
        total = 0
        for tokens in order:
            for shard in held:
                for part in shard:
                    if part.step == tokens.step and part[0] in tokens:
                        starts[part] = total + tokens.index(part[0])
            total += len(tokens)
        self._num_tokens = total
        # For every member: where each of its runs of tokens goes in the joined order.
        self._places = [[slice(starts[part], starts[part] + len(part)) for part in shard] for shard in held]

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B, heads, S_local, D] each -> [B, this rank's heads, tokens of all members, D]. Cost: (h-1)/h of q, each."""
        if self.degree == 1:
            return tensors
        sends: list[Message] = []
        receives: list[Message] = []
        pieces: list[list[Tensor]] = []
        for x in tensors:
            mine = []
            for member, rank in enumerate(self._members):
                part = x[:, self._heads(x.shape[1], member)].transpose(1, 2)
                if member == self.inner:
                    mine.append(part)
                    continue
                heads = self._heads(x.shape[1], self.inner)
                shape = (x.shape[0], self._length(member), heads.stop - heads.start, x.shape[3])
                mine.append(x.new_empty(shape))
                sends.append((part.contiguous(), rank))
                receives.append((mine[-1], rank))
            pieces.append(mine)
        exchange(self.place, sends, receives).wait()
        return tuple(self._assemble(mine) for mine in pieces)

    def own(self, count: int) -> slice:
        """Which of `count` heads this rank has between to_heads and to_tokens."""
        return self._heads(count, self.inner)

    def to_tokens(self, out: Tensor) -> Tensor:
        """The way back for outputs: [B, H/h, tokens, D] -> [B, H, S_local, D]."""
        if self.degree == 1:
            return out
        return self._back([out], [self._num_heads], out.dtype)[0]

    def gradients_to_tokens(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The way back for gradients; those of replicated key heads are summed, in rank order."""
        if self.degree == 1:
            return dq, dk, dv
        counts = [self._num_heads, self._num_kv_heads, self._num_kv_heads]
        dq, dk, dv = self._back([dq, dk, dv], counts, accumulation_dtype(dq.dtype))
        return dq, dk, dv

    def _back(self, tensors: list[Tensor], counts: list[int], dtype: torch.dtype) -> list[Tensor]:
        sends: list[Message] = []
        receives: list[Message] = []
        pieces: list[list[Tensor]] = []
        for x, count in zip(tensors, counts, strict=True):
            mine = []
            for member, rank in enumerate(self._members):
                tokens = x.transpose(1, 2)
                part = torch.cat([tokens[:, place] for place in self._places[member]] or [tokens[:, :0]], dim=1)
                if member == self.inner:
                    mine.append(part)
                    continue
                heads = self._heads(count, member)
                mine.append(x.new_empty((x.shape[0], self._length(self.inner), heads.stop - heads.start, x.shape[3])))
                sends.append((part, rank))
                receives.append((mine[-1], rank))
            pieces.append(mine)
        exchange(self.place, sends, receives).wait()
        results = []
        for mine, count in zip(pieces, counts, strict=True):
            batch, tokens_here, _, size = mine[0].shape
            whole = mine[0].new_zeros((batch, tokens_here, count, size), dtype=dtype)
            for member, part in enumerate(mine):
                whole[:, :, self._heads(count, member)] += part
            results.append(whole.transpose(1, 2))
        return results

    def _assemble(self, pieces: list[Tensor]) -> Tensor:
        batch, _, heads, size = pieces[0].shape
        whole = pieces[0].new_empty((batch, self._num_tokens, heads, size))
        for piece, places in zip(pieces, self._places, strict=True):
            start = 0
            for place in places:
                stop = start + place.stop - place.start
                whole[:, place] = piece[:, start:stop]
                start = stop
        return whole.transpose(1, 2)

    def _heads(self, count: int, member: int) -> slice:
        first = member * count // self.degree
        return slice(first, first + max(1, count // self.degree))

    def _length(self, member: int) -> int:
        return sum(place.stop - place.start for place in self._places[member])
