"""Cut one rank's share of masked attention into blocks that a plain kernel can do, without torch.

Every mask people train with (causal, windows, packed documents, and their combinations) is, between two runs of tokens
of one document, a band: key j is seen by query i when lo <= j - i <= hi. A band is rectangles with nothing masked and
triangles, so a kernel that knows "full" and "causal" does it all, and what the mask empties is not work at all. The
same blocks tell which keys one rank needs from another: the rest is never sent.

FlexAttention and MagiAttention reach the same by a compiled mask; neither has a CPU kernel.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fourfold.parallel.sequence.sharding import (
    Shard,
    ShardedSequence,
    document_ranges,
    index_from,
    mask_reach,
    shard_length,
)

Shape = Literal["full", "causal", "anticausal"]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """Queries q[0]:q[1] against keys k[0]:k[1] (local indices).

    "causal": as many keys as queries, the i-th query sees keys up to the i-th. "anticausal": from the i-th on.

    Attributes:
        window: keys that a query of a causal block sees, itself included, for a kernel that has windows; 0 is all.
    """

    q: Span
    k: Span
    shape: Shape = "full"
    window: int = 0

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are not masked."""
        queries, keys = self.q[1] - self.q[0], self.k[1] - self.k[0]
        if self.shape == "full":
            return queries * keys
        hidden = max(0, queries - self.window) if self.window else 0
        return queries * (queries + 1) // 2 - hidden * (hidden + 1) // 2


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of the ring, seen from one rank.

    Attributes:
        source, target: ring ranks that this rank receives keys from and sends its own to.
        receive: spans of the source's shard that this rank needs. They arrive joined; blocks index the joined keys.
        send: spans of this rank's shard that the target needs.
        blocks: the work on the received keys.
    """

    source: int
    target: int
    receive: tuple[Span, ...]
    send: tuple[Span, ...]
    blocks: tuple[Block, ...]

    @property
    def num_received(self) -> int:
        return sum(stop - start for start, stop in self.receive)


@lru_cache(maxsize=256)
def plan_hops(rank: int, sequence: ShardedSequence, leaf: int = 0, windows: bool = False) -> tuple[Hop, ...]:
    """The whole ring of one rank; hop 0 is its own keys. At hop h keys come from ring rank r-h and go to r+h.

    Keys go straight to the ranks that read them. Who sends to whom, 4 ranks:

        hop 1   0 -> 1 -> 2 -> 3 -> 0
        hop 2   0 -> 2 -> 0   1 -> 3 -> 1
        hop 3   0 -> 3 -> 2 -> 1 -> 0

    Args:
        rank: among the size/heads_degree ring ranks. Ring rank b stands for ranks b*heads_degree and on, together.
        leaf: triangles larger than this are cut into rectangles and smaller triangles (0: never), for kernels that
            do the whole square of a small triangle.
        windows: leave a window on a rank's own keys to the kernel, see pair_blocks.
    Cost: O(ring size * ranges of a shard); remembered for the last 256 calls.
    """
    documents = document_ranges(sequence.seq_len, sequence.cu_seqlens)
    reach = mask_reach(sequence.causal, sequence.window)
    return hops_between(rank, sequence.ring_shards, documents, reach, leaf, windows)


def hops_between(
    rank: int, shards: Sequence[Shard], documents: Sequence[range], reach: tuple[int | None, int | None],
    leaf: int = 0, windows: bool = False,
) -> tuple[Hop, ...]:  # fmt: skip
    """plan_hops for shards that were cut in whatever way.

    Args:
        shards: of every ring rank.
        documents: that no query sees beyond. reach: keys seen on either side of a query, None is no limit.
    """
    ring_size = len(shards)
    hops = []
    for step in range(ring_size):
        source, target = (rank - step) % ring_size, (rank + step) % ring_size
        blocks = pair_blocks(shards[rank], shards[source], documents, reach, windows=windows and step == 0)
        if step == 0:
            hops.append(Hop(rank, rank, (), (), tuple(tidy(blocks, leaf))))
            continue
        receive = needed_keys(blocks)
        send = needed_keys(pair_blocks(shards[target], shards[rank], documents, reach))
        joined = [Block(block.q, _moved(block.k, receive), block.shape) for block in blocks]
        hops.append(Hop(source, target, receive, send, tuple(tidy(joined, leaf))))
    return tuple(hops)


def pair_blocks(
    queries: Shard,
    keys: Shard,
    documents: Sequence[range],
    reach: tuple[int | None, int | None],
    *,
    windows: bool = False,
) -> list[Block]:
    """All unmasked work of one shard's queries on another's keys, in local indices of both.

    Args:
        windows: a causal window of queries on the same tokens' keys is one block, for a kernel that has windows; else
            it is cut into tiles.
    """
    left, right = reach
    key_starts = _offsets(keys)
    blocks: list[Block] = []
    # The runs of both shards ascend by their first token, so the documents and keys that a run of queries can see start
    # no earlier than those of the run before. Strided runs overlap: a run's later documents say nothing of the next's.
    first_document = first_key = 0
    for query_tokens, query_start in zip(queries, _offsets(queries), strict=True):
        while first_document < len(documents) and documents[first_document].stop <= query_tokens[0]:
            first_document += 1
        if first_document < len(documents):
            first_key = _first_run_from(keys, first_key, documents[first_document].start)
        document_key = first_key
        for document in documents[first_document:]:
            if document.start > query_tokens[-1]:
                break
            q_from, q_to = index_from(query_tokens, document.start), index_from(query_tokens, document.stop)
            if q_from == q_to:
                continue
            seen_from = document.start if left is None else max(document.start, query_tokens[q_from] - left)
            seen_to = document.stop if right is None else min(document.stop, query_tokens[q_to - 1] + right + 1)
            document_key = _first_run_from(keys, document_key, document.start)
            for key_tokens, key_start in zip(keys[document_key:], key_starts[document_key:], strict=True):
                if key_tokens[0] >= seen_to:
                    break
                k_from, k_to = index_from(key_tokens, seen_from), index_from(key_tokens, seen_to)
                if k_from < k_to:
                    stride = query_tokens.step
                    gap = key_tokens[k_from] - query_tokens[q_from]
                    lo = None if left is None else -((left + gap) // stride)
                    hi = None if right is None else (right - gap) // stride
                    q = (query_start + q_from, query_start + q_to)
                    k = (key_start + k_from, key_start + k_to)
                    if windows and hi == 0 and lo is not None and k_to - k_from == q_to - q_from > 1 - lo:
                        blocks.append(Block(q, k, "causal", 1 - lo))
                    else:
                        blocks += band_blocks(q, k, lo, hi)
    return blocks


def _first_run_from(runs: Shard, index: int, position: int) -> int:
    """Index, from `index` on, of the first run that does not end before `position`."""
    while index < len(runs) and runs[index][-1] < position:
        index += 1
    return index


def band_blocks(q: Span, k: Span, lo: int | None, hi: int | None) -> list[Block]:
    """Blocks of the band lo <= j - i <= hi, i and j counted from q[0] and k[0]; None is no limit."""
    num_queries, num_keys = q[1] - q[0], k[1] - k[0]
    hi = num_keys - 1 if hi is None else hi
    lo = 1 - num_queries if lo is None else lo
    if lo > hi:
        return []
    if lo <= 1 - num_queries:
        return _below(q, k, hi)
    if hi >= num_keys - 1:
        return _above(q, k, lo)
    # Both edges cross the rectangle. In a tile of as many queries as the band is wide, no key is cut by both edges:
    # the keys up to the first query's last one know only the lower edge, the rest only the upper.
    width, blocks = hi - lo + 1, []
    first = max(0, -hi)
    for start in range(first, num_queries, width):
        stop = min(start + width, num_queries)
        tile = (q[0] + start, q[0] + stop)
        k_from, k_to = max(start + lo, 0), min(stop + hi, num_keys)
        if k_from >= num_keys:
            break
        parting = min(max(start + hi + 1, k_from), k_to)
        if k_from < parting:
            blocks += _above(tile, (k[0] + k_from, k[0] + parting), lo - k_from + start)
        if parting < k_to:
            blocks += _below(tile, (k[0] + parting, k[0] + k_to), hi - parting + start)
    return blocks


def needed_keys(blocks: Iterable[Block]) -> tuple[Span, ...]:
    """The union of the blocks' keys as ascending spans."""
    spans: list[Span] = []
    for start, stop in sorted({block.k for block in blocks}):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
        else:
            spans.append((start, stop))
    return tuple(spans)


def tidy(blocks: Sequence[Block], leaf: int = 0) -> list[Block]:
    """Join full blocks that touch (fewer kernel calls, fewer merges), and cut triangles down to `leaf`."""
    full = _joined([block for block in blocks if block.shape == "full"])
    triangles = [piece for block in blocks if block.shape != "full" for piece in _cut_triangle(block, leaf)]
    return sorted(full + triangles)


def _below(q: Span, k: Span, hi: int) -> list[Block]:
    """j - i <= hi: a rectangle, then a triangle, then a rectangle of the queries that see all."""
    q = (q[0] + max(0, -hi), q[1])
    hi = max(0, hi)
    k = (k[0], min(k[1], k[0] + q[1] - q[0] + hi))
    if q[0] >= q[1] or k[0] >= k[1]:
        return []
    side = k[1] - k[0] - hi
    if side <= 1:
        return [Block(q, k)]
    corner = (q[0], q[0] + side)
    blocks = [Block(corner, (k[0] + hi, k[1]), "causal")]
    if hi:
        blocks.append(Block(corner, (k[0], k[0] + hi)))
    if corner[1] < q[1]:
        blocks.append(Block((corner[1], q[1]), k))
    return blocks


def _above(q: Span, k: Span, lo: int) -> list[Block]:
    """lo <= j - i: the mirror image of `_below`, with both orders reversed."""
    hi = (k[1] - k[0]) - (q[1] - q[0]) - lo
    turned = _below((-q[1], -q[0]), (-k[1], -k[0]), hi)
    return [
        Block((-block.q[1], -block.q[0]), (-block.k[1], -block.k[0]), "full" if block.shape == "full" else "anticausal")
        for block in turned
    ]


def _cut_triangle(block: Block, leaf: int) -> list[Block]:
    side = block.q[1] - block.q[0]
    if not leaf or side <= leaf or block.window:
        return [block]
    leaves = -(-side // leaf)
    half = leaves // 2 * leaf if leaves > 1 else side
    early_q, late_q = (block.q[0], block.q[0] + half), (block.q[0] + half, block.q[1])
    early_k, late_k = (block.k[0], block.k[0] + half), (block.k[0] + half, block.k[1])
    square = Block(late_q, early_k) if block.shape == "causal" else Block(early_q, late_k)
    return [
        *_cut_triangle(Block(early_q, early_k, block.shape), leaf),
        square,
        *_cut_triangle(Block(late_q, late_k, block.shape), leaf),
    ]


def _joined(blocks: list[Block]) -> list[Block]:
    by_queries: list[Block] = []
    for block in sorted(blocks, key=lambda block: (block.k, block.q)):
        last = by_queries[-1] if by_queries else None
        if last and last.k == block.k and last.q[1] == block.q[0]:
            by_queries[-1] = Block((last.q[0], block.q[1]), block.k)
        else:
            by_queries.append(block)
    by_keys: list[Block] = []
    for block in sorted(by_queries):
        last = by_keys[-1] if by_keys else None
        if last and last.q == block.q and last.k[1] == block.k[0]:
            by_keys[-1] = Block(block.q, (last.k[0], block.k[1]))
        else:
            by_keys.append(block)
    return by_keys


def _moved(span: Span, received: Sequence[Span]) -> Span:
    """A span of the source's shard in the joined keys that arrive."""
    before = 0
    for start, stop in received:
        if start <= span[0] < stop:
            return before + span[0] - start, before + span[1] - start
        before += stop - start
    raise AssertionError(f"keys {span} were not asked for: {received}")


def _offsets(shard: Shard) -> list[int]:
    offsets, total = [], 0
    for tokens in shard:
        offsets.append(total)
        total += len(tokens)
    assert total == shard_length(shard)
    return offsets


def keys_sent(rank: int, sequence: ShardedSequence) -> tuple[int, int]:
    """(sent, received): keys that one ring rank sends to all others, and receives, in one pass around the ring.

    Forward moves sent * 2 * B * (H_kv / heads_degree) * D * itemsize bytes out of the rank (keys and values; a
    replicated head counts as one). Backward moves them again, and returns received * 2 * B * (H_kv / heads_degree) * D
    gradients in fp32. With s = seq_len / ring size, and n ring ranks, unmasked: sent = (n-1)*s. Causal zigzag:
    (n-1+rank)*s/2, for earlier pieces are all that later ranks read. Causal contiguous: (n-1-rank)*s.

    Args: as plan_hops', rank among the ring ranks.
    """
    hops = plan_hops(rank, sequence)
    sent = sum(stop - start for hop in hops for start, stop in hop.send)
    return sent, sum(hop.num_received for hop in hops)
