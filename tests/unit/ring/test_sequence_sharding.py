"""Shards: every token once, any length, balanced on the work; positions and labels follow."""

import random
import subprocess
import sys
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.parallel.attention.blocks import hops_between
from fourfold.parallel.sequence.sharding import (
    SHARDINGS,
    attended_pairs,
    document_ranges,
    join_ranges,
    positions,
    shard_length,
    shard_ranges,
)


@st.composite
def packed(draw: st.DrawFn) -> tuple[int, tuple[int, ...] | None]:
    """A length, and documents that may be empty and may leave padding."""
    lengths = draw(st.lists(st.integers(0, 40), max_size=6))
    padding = draw(st.integers(0, 9))
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends[-1] + padding, draw(st.sampled_from([None, tuple(ends)]))


def test_shards_as_literal_tables():
    assert shard_ranges(7, 3, "contiguous") == ((range(2),), (range(2, 4),), (range(4, 7),))
    assert shard_ranges(8, 2, "zigzag") == ((range(2), range(6, 8)), (range(2, 6),))
    assert shard_ranges(5, 2, "striped") == ((range(0, 5, 2),), (range(1, 5, 2),))
    assert shard_ranges(1, 3, "striped") == ((range(0, 1, 3),), (), ())
    assert shard_ranges(12, 2, "zigzag", (0, 4, 12)) == (
        (range(1), range(3, 6), range(10, 12)),
        (range(1, 3), range(6, 10)),
    )


@given(packed(), st.integers(1, 6), st.sampled_from(SHARDINGS))
def test_every_token_is_held_once(sequence, size, sharding):
    seq_len, cu_seqlens = sequence
    shards = shard_ranges(seq_len, size, sharding, cu_seqlens)
    assert len(shards) == size
    assert sorted(token for shard in shards for tokens in shard for token in tokens) == list(range(seq_len))
    for shard in shards:
        assert all(shard)
        assert [tokens.start for tokens in shard] == sorted(tokens.start for tokens in shard)


@given(packed(), st.integers(1, 5), st.sampled_from(SHARDINGS))
def test_positions_restart_with_documents(sequence, size, sharding):
    seq_len, cu_seqlens = sequence
    truth = {}
    starts = set(cu_seqlens or (0,))
    position = 0
    for token in range(seq_len):
        position = 0 if token in starts else position
        truth[token] = position
        position += 1
    for shard in shard_ranges(seq_len, size, sharding, cu_seqlens):
        assert positions(shard, cu_seqlens) == [truth[token] for tokens in shard for token in tokens]


@given(
    packed(),
    st.integers(1, 4),
    st.sampled_from(SHARDINGS),
    st.booleans(),
    st.sampled_from([None, (3, 0), (-1, 2), (0, 5)]),
)
def test_loads_add_up_to_the_mask(sequence, size, sharding, causal, window):
    seq_len, cu_seqlens = sequence
    documents = cu_seqlens or (0, seq_len)
    left, right = (reach if reach >= 0 else seq_len for reach in window or (-1, -1))
    right = 0 if causal else right
    total = 0
    for start, stop in pairwise(documents):
        for query in range(start, stop):
            total += min(query - start, left) + 1 + min(stop - 1 - query, right)
    loads = attended_pairs(seq_len, size, sharding, causal=causal, window=window, cu_seqlens=cu_seqlens)
    assert sum(loads) == total


def test_causal_load_is_balanced_but_for_contiguous():
    for sharding, spread in (("zigzag", 1.0), ("striped", 1.002), ("contiguous", 14.99)):
        loads = attended_pairs(8192, 8, sharding)
        assert max(loads) / min(loads) == pytest.approx(spread, rel=1e-3)


def test_packed_load_is_balanced_in_work_and_in_tokens():
    lengths = random.Random(0)
    ends = [0]
    while ends[-1] < 200_000:  # log-normal document lengths: a few long ones carry most of the work
        ends.append(ends[-1] + int(lengths.lognormvariate(6.5, 1.2)) + 1)
    cu_seqlens = tuple(ends)
    loads = attended_pairs(ends[-1], 8, "zigzag", cu_seqlens=cu_seqlens)
    tokens = [shard_length(shard) for shard in shard_ranges(ends[-1], 8, "zigzag", cu_seqlens)]
    assert max(loads) / (sum(loads) / 8) < 1.01
    assert max(tokens) / (sum(tokens) / 8) < 1.05


def test_refusals_name_the_values():
    with pytest.raises(ValueError, match="sharding='snake': choose one of contiguous, zigzag, striped"):
        shard_ranges(8, 2, "snake")
    with pytest.raises(ValueError, match="ends at 9, but the sequence has 8 tokens"):
        shard_ranges(8, 2, "zigzag", (0, 9))
    with pytest.raises(ValueError, match="falls somewhere"):
        shard_ranges(8, 2, "zigzag", (0, 5, 3))
    with pytest.raises(ValueError, match="seq_len=-1"):
        shard_ranges(-1, 2, "zigzag")


def test_the_planner_can_import_the_arithmetic_without_torch():
    modules = "fourfold.parallel.sequence.sharding, fourfold.parallel.attention.blocks"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}, check=False).returncode == 0


def test_packed_documents_send_less_than_each_document_over_all_ranks():
    """And the busiest rank has the mean's work, where cuts along the row leave it several times as much."""
    size, lengths = 8, [4096, 1024, 1024] + [97, 301, 55, 211] * 10
    ends = tuple(accumulate(lengths, initial=0))
    documents = document_ranges(ends[-1], ends)
    each: list[list[range]] = [[] for _ in range(size)]
    for document in documents:
        for rank, shard in enumerate(shard_ranges(len(document), size, "zigzag")):
            each[rank] += [range(document.start + part.start, document.start + part.stop) for part in shard]
    cuts = {
        "row": shard_ranges(ends[-1], size, "zigzag"),
        "each": tuple(join_ranges(parts) for parts in each),
        "ours": shard_ranges(ends[-1], size, "zigzag", ends),
    }
    pairs, sent = {}, {}
    for name, shards in cuts.items():
        plans = [hops_between(rank, shards, documents, (None, 0)) for rank in range(size)]
        pairs[name] = [sum(block.pairs for hop in plan for block in hop.blocks) for plan in plans]
        sent[name] = [sum(stop - start for hop in plan for start, stop in hop.send) for plan in plans]
    assert pairs["ours"] == attended_pairs(ends[-1], size, cu_seqlens=ends)
    assert max(pairs["ours"]) * size < 1.02 * sum(pairs["ours"])
    assert max(pairs["row"]) * size > 2 * sum(pairs["row"])
    assert max(sent["ours"]) < 0.8 * max(sent["each"])
