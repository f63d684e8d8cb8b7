"""Blocks cover the mask exactly: each unmasked pair once, no masked pair, no key sent that nobody reads."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from fourfold.parallel.attention.blocks import Block, band_blocks, plan_hops, tidy
from fourfold.parallel.sequence.sharding import SHARDINGS, ShardedSequence, join_ranges, shard_ranges


def painted(blocks: list[Block], num_queries: int, num_keys: int) -> np.ndarray:
    """How often each (query, key) pair is computed."""
    counts = np.zeros((num_queries, num_keys), dtype=int)
    for block in blocks:
        region = counts[slice(*block.q), slice(*block.k)]
        side = np.ones_like(region)
        region += {"full": side, "causal": np.tril(side), "anticausal": np.triu(side)}[block.shape]
        assert block.pairs > 0
        assert block.shape == "full" or region.shape[0] == region.shape[1]
    return counts


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.none() | st.integers(-35, 35),
    st.none() | st.integers(-35, 35),
    st.integers(0, 4),
)
def test_a_band_is_covered_once(num_queries, num_keys, lo, hi, leaf):
    distance = np.arange(num_keys)[None, :] - np.arange(num_queries)[:, None]
    seen = (distance >= (-99 if lo is None else lo)) & (distance <= (99 if hi is None else hi))
    blocks = tidy(band_blocks((0, num_queries), (0, num_keys), lo, hi), leaf)
    assert (painted(blocks, num_queries, num_keys) == seen).all()


def test_a_causal_zigzag_ring_as_a_literal_table():
    own, other = plan_hops(0, ShardedSequence(2, 8))
    # Rank 0 holds tokens 0 1 6 7, rank 1 holds 2 3 4 5.
    assert own.blocks == (Block((0, 2), (0, 2), "causal"), Block((2, 4), (0, 2)), Block((2, 4), (2, 4), "causal"))
    assert (other.receive, other.send, other.blocks) == (((0, 4),), ((0, 2),), (Block((2, 4), (0, 4)),))
    own, other = plan_hops(1, ShardedSequence(2, 8))
    assert own.blocks == (Block((0, 4), (0, 4), "causal"),)
    assert (other.receive, other.send, other.blocks) == (((0, 2),), ((0, 4),), (Block((0, 4), (0, 2)),))


def test_a_window_reaches_only_the_ranks_that_hold_it():
    for rank in range(8):
        hops = plan_hops(rank, ShardedSequence(8, 800, "contiguous", window=(30, 0)))
        asked = [hop.source for hop in hops if hop.receive]
        assert asked == ([rank - 1] if rank else [])
        assert [hop.receive for hop in hops if hop.receive] == ([((70, 100),)] if rank else [])


def test_short_documents_stay_home():
    cu_seqlens = tuple(range(0, 64 * 500 + 1, 500))
    for rank in range(4):
        hops = plan_hops(rank, ShardedSequence(4, 64 * 500, "contiguous", cu_seqlens=cu_seqlens))
        assert not any(hop.receive or hop.send or hop.blocks for hop in hops[1:])


@st.composite
def tasks(draw: st.DrawFn) -> dict:
    lengths = draw(st.lists(st.integers(0, 25), max_size=4))
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    size, heads_degree = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (6, 3), (4, 4)]))
    reach = st.integers(-1, 30)
    return {
        "size": size,
        "seq_len": ends[-1] + draw(st.integers(0, 9)),
        "sharding": draw(st.sampled_from(SHARDINGS)),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(reach, reach)),
        "cu_seqlens": draw(st.sampled_from([None, tuple(ends)])),
        "heads_degree": heads_degree,
    }


def dense_mask(task: dict) -> np.ndarray:
    tokens = np.arange(task["seq_len"])
    distance = tokens[None, :] - tokens[:, None]
    seen = np.ones_like(distance, dtype=bool)
    left, right = task["window"] or (-1, -1)
    if left >= 0:
        seen &= distance >= -left
    if task["causal"] or right >= 0:
        seen &= distance <= (0 if task["causal"] else right)
    if task["cu_seqlens"] is not None:
        document = np.searchsorted(task["cu_seqlens"], tokens, side="right")
        seen &= (document[None, :] == document[:, None]) & (tokens < task["cu_seqlens"][-1])[:, None]
    return seen


# Two ranks' strided runs side by side: the second starts before the first has ended, and before its last document.
INTERLEAVED = {
    "size": 4, "seq_len": 5, "sharding": "striped", "causal": False, "window": None, "cu_seqlens": (0, 3, 5),
    "heads_degree": 2,
}  # fmt: skip


@example(INTERLEAVED, 0)
@given(tasks(), st.integers(0, 5))
def test_the_ring_covers_the_mask_once_and_sends_what_is_read(task, leaf):
    ring_size = task["size"] // task["heads_degree"]
    shards = shard_ranges(task["seq_len"], task["size"], task["sharding"], task["cu_seqlens"])
    held = [
        [token for tokens in join_ranges(sum(shards[first : first + task["heads_degree"]], ())) for token in tokens]
        for first in range(0, task["size"], task["heads_degree"])
    ]
    plans = [plan_hops(rank, ShardedSequence(**task), leaf) for rank in range(ring_size)]
    counts = np.zeros((task["seq_len"], task["seq_len"]), dtype=int)
    for rank, plan in enumerate(plans):
        for step, hop in enumerate(plan):
            if step == 0:
                keys = held[rank]
            else:
                keys = [token for span in hop.receive for token in held[hop.source][slice(*span)]]
                assert plans[hop.source][step].send == hop.receive
                assert plans[hop.source][step].target == rank
            here = painted(list(hop.blocks), len(held[rank]), len(keys))
            assert step == 0 or here.any(axis=0).all(), "a key was sent that no query reads"
            counts[np.ix_(held[rank], keys)] += here
    assert (counts == dense_mask(task)).all()
