"""Which tokens of a sequence each context-parallel rank holds, without torch.

A shard is a tuple of `range`s of global token positions, ascending: one range for contiguous shards, two for zigzag,
one with a stride for striped, one or two a document for packed zigzag. Everything else (what a rank attends to, what it
sends, position ids, shifted labels) follows from the ranges, so no rule below asks for a length that divides.

Causal attention makes late tokens dearer than early ones. Contiguous shards therefore leave the first rank almost idle;
zigzag gives rank r pieces r and 2n-1-r of 2n; striped deals tokens out in turn. Whose token is whose, 3 ranks:

    contiguous   0 0 0 0 1 1 1 1 2 2 2 2
    zigzag       0 0 1 1 2 2 2 2 1 1 0 0
    striped      0 1 2 0 1 2 0 1 2 0 1 2

Packed documents restart the slope, so zigzag is cut document by document there. `attended_pairs` says what each rank
has to do.

torch's context_parallel has the zigzag ("head-tail") for lengths that divide by 2n; nobody has uneven ones.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise
from math import ceil

SHARDINGS = ("contiguous", "zigzag", "striped")
Shard = tuple[range, ...]

# No rank takes a larger part than this of its share (of the work, or of the tokens) from one document, unless all
# ranks share it: placing the parts greedily leaves less imbalance than that, and short documents, whole on one rank or
# on few, need little communication or none.
SMALL_PART = 1 / 32


@dataclass(frozen=True, slots=True)
class ShardedSequence:
    """A masked sequence and the group that shares it: with a rank's number, all that its part follows from.

    Attributes:
        size: ranks of the group.
        seq_len, sharding, causal, window, cu_seqlens, heads_degree: as ring_attention's arguments.
    """

    size: int
    seq_len: int
    sharding: str = "zigzag"
    _: KW_ONLY
    causal: bool = True
    window: tuple[int, int] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    heads_degree: int = 1

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Of every rank of the group; see shard_ranges."""
        return shard_ranges(self.seq_len, self.size, self.sharding, self.cu_seqlens)

    @property
    def ring_shards(self) -> tuple[Shard, ...]:
        """Of every ring rank, which is heads_degree ranks together."""
        shards, degree = self.shards, self.heads_degree
        groups = [shards[first : first + degree] for first in range(0, self.size, degree)]
        return tuple(join_ranges([tokens for shard in group for tokens in shard]) for group in groups)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every rank of the group."""
        return [shard_length(shard) for shard in self.shards]


@lru_cache(maxsize=64)
def shard_ranges(
    seq_len: int, size: int, sharding: str, cu_seqlens: tuple[int, ...] | None = None
) -> tuple[Shard, ...]:
    """The shard of every rank of a group of `size`.

    Args:
        seq_len: tokens of the whole sequence, any number from 0.
        size: ranks that share it.
        sharding: "contiguous": cut in `size` runs. "zigzag": rank r holds pieces r and 2*size-1-r of 2*size.
            "striped": rank r holds tokens r, r+size, r+2*size, ...
        cu_seqlens: starts of the packed documents and the end of the last, from 0. Zigzag then cuts each document on
            its own, over as many ranks as its causal work asks for (short ones stay whole). Tokens past the last end
            are padding.
    Returns:
        For each rank its ranges, ascending, none empty, neighbours joined. A rank may hold nothing.
    Raises:
        ValueError: an unknown sharding, a negative length, or cu_seqlens that do not start at 0, fall, or pass seq_len.
    Cost: O(size + documents * log(documents)); remembered for the last 64 calls.
    Source: zigzag: Zhu 2024 (ring-flash-attention); striped: Brandon et al. 2023 (arXiv 2311.09431).
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r}: choose one of {', '.join(SHARDINGS)}")
    if seq_len < 0 or size < 1:
        raise ValueError(f"seq_len={seq_len} and size={size}: a length is at least 0, a group at least one rank")
    documents = document_ranges(seq_len, cu_seqlens)
    if sharding == "striped":
        return tuple((range(rank, seq_len, size),) if rank < seq_len else () for rank in range(size))
    if sharding == "contiguous":
        return tuple(join_ranges([run]) for run in _runs(range(seq_len), size))
    return _zigzag(documents, size, padding=range(documents[-1].stop if documents else 0, seq_len))


def document_ranges(seq_len: int, cu_seqlens: tuple[int, ...] | None) -> list[range]:
    """The tokens of each document, empty ones left out; without `cu_seqlens` one document of the whole sequence.

    Raises:
        ValueError: `cu_seqlens` does not start at 0, falls, or passes seq_len.
    """
    if cu_seqlens is None:
        return [range(seq_len)] if seq_len else []
    if not cu_seqlens or cu_seqlens[0] != 0:
        raise ValueError(f"cu_seqlens={_short(cu_seqlens)}: it starts with 0 and goes on with the end of each document")
    if any(stop < start for start, stop in pairwise(cu_seqlens)):
        raise ValueError(f"cu_seqlens={_short(cu_seqlens)} falls somewhere: give the running total of document lengths")
    if cu_seqlens[-1] > seq_len:
        raise ValueError(f"cu_seqlens ends at {cu_seqlens[-1]}, but the sequence has {seq_len} tokens: it is global")
    return [range(start, stop) for start, stop in pairwise(cu_seqlens) if stop > start]


def join_ranges(ranges: Sequence[range]) -> Shard:
    """Sort by position, drop empty ranges, join the ones that touch. All of one stride; strided ones stay apart."""
    joined: list[range] = []
    for tokens in sorted((tokens for tokens in ranges if tokens), key=lambda tokens: tokens.start):
        if joined and tokens.step == 1 and joined[-1].stop == tokens.start:
            joined[-1] = range(joined[-1].start, tokens.stop)
        else:
            joined.append(tokens)
    return tuple(joined)


def shard_length(shard: Shard) -> int:
    """Tokens in a shard."""
    return sum(len(tokens) for tokens in shard)


def positions(shard: Shard, cu_seqlens: tuple[int, ...] | None = None) -> list[int]:
    """Position of each token of the shard in its document (for RoPE), in the order of the shard.

    Padding past the last document counts from 0 again.
    """
    if cu_seqlens is None:
        return [token for tokens in shard for token in tokens]
    return [token - cu_seqlens[bisect_right(cu_seqlens, token) - 1] for tokens in shard for token in tokens]


def attended_pairs(
    seq_len: int,
    size: int,
    sharding: str = "zigzag",
    *,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
) -> list[int]:
    """The load of each rank: how many (query, key) pairs its tokens attend to, a head.

    Args: as ring_attention's.
    Returns:
        One count a rank. Attention costs 4*D flops a pair and head forward, 10*D backward.
    Cost: O(documents * ranges of all shards).
    """
    documents = document_ranges(seq_len, cu_seqlens)
    left, right = mask_reach(causal, window)
    loads = []
    for shard in shard_ranges(seq_len, size, sharding, cu_seqlens):
        load = 0
        for document in documents:
            for tokens in shard:
                inside = clip(tokens, document.start, document.stop)
                if inside:
                    load += _keys_before(inside, document, left) + _keys_after(inside, document, right) + len(inside)
        loads.append(load)
    return loads


def mask_reach(causal: bool, window: tuple[int, int] | None) -> tuple[int | None, int | None]:
    """How many keys before and after itself a query sees; None is no limit.

    Raises:
        ValueError: a window entry below -1, or not two whole numbers.
    """
    if window is None:
        return None, 0 if causal else None
    if len(window) != 2 or any(not isinstance(reach, int) or reach < -1 for reach in window):
        raise ValueError(f"window={window!r}: give (left, right), the keys seen on either side, -1 for all of them")
    left, right = (None if reach == -1 else reach for reach in window)
    return left, 0 if causal else right


def clip(tokens: range, start: int, stop: int) -> range:
    """The part of a range between two global positions, of the same stride."""
    return tokens[index_from(tokens, start) : index_from(tokens, stop)]


def index_from(tokens: range, position: int) -> int:
    """Index in the range of the first token at or after a global position."""
    return min(max(-((tokens.start - position) // tokens.step), 0), len(tokens))


def _runs(tokens: range, count: int) -> list[range]:
    """`count` runs whose lengths differ by at most one."""
    cuts = [tokens.start + part * len(tokens) // count for part in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _zigzag(documents: Sequence[range], size: int, padding: range) -> tuple[Shard, ...]:
    """Longest document first, each cut in zigzag over the ranks with the least causal work so far."""
    held: list[list[range]] = [[run] for run in _runs(padding, size)]
    total_work = sum(_causal_pairs(document) for document in documents)
    total_tokens = sum(len(document) for document in documents)
    least = [(0, 0, rank) for rank in range(size)]
    for document in sorted(documents, key=len, reverse=True):
        work = _causal_pairs(document)
        shares = max(work * size / total_work, len(document) * size / total_tokens)
        num_ranks = min(size, ceil(shares / SMALL_PART))
        chosen = sorted((heappop(least) for _ in range(num_ranks)), key=lambda load: load[2])
        runs = _runs(document, 2 * num_ranks)
        for index, (work_held, tokens_held, rank) in enumerate(chosen):
            pair = runs[index], runs[-1 - index]
            held[rank].extend(pair)
            # Equal work by construction; the rounding of lengths is left to the tokens, which break ties.
            tokens_added = len(pair[0]) + len(pair[1])
            heappush(least, (work_held + work // num_ranks, tokens_held + tokens_added, rank))
    return tuple(join_ranges(ranges) for ranges in held)


def _causal_pairs(document: range) -> int:
    return len(document) * (len(document) + 1) // 2


def _keys_before(queries: range, document: range, reach: int | None) -> int:
    """Sum over queries of the keys of the document before each, at most `reach` of them."""
    if reach is None:
        return _sum(queries, -document.start)
    near = clip(queries, document.start, document.start + reach)
    return _sum(near, -document.start) + (len(queries) - len(near)) * reach


def _keys_after(queries: range, document: range, reach: int | None) -> int:
    last = document.stop - 1
    near = queries if reach is None else clip(queries, document.stop - reach, document.stop)
    return len(near) * last - _sum(near, 0) + (len(queries) - len(near)) * (reach or 0)


def _sum(tokens: range, offset: int) -> int:
    if not tokens:
        return 0
    return len(tokens) * (tokens[0] + tokens[-1] + 2 * offset) // 2


def _short(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ... {values[-1]}]"
