"""The paper scan by the planner's formulas: a hop's work is quadratic in the shard, its bytes linear."""

import pytest
from benchmarks.ring_attention.scan import hop_seconds, swap_seconds


def ratio(num_ranks: int, heads_degree: int) -> float:
    forward, move, _, _ = hop_seconds(num_ranks, heads_degree, "400 Gb/s")
    return forward / move


def test_heads_degree_moves_the_border_by_as_many_ranks():
    assert ratio(64, 1) / ratio(128, 1) == pytest.approx(2, rel=0.1)
    assert ratio(128, 2) / ratio(64, 1) == pytest.approx(1, rel=0.1)
    assert hop_seconds(64, 1, "NVLink")[1] < hop_seconds(64, 1, "400 Gb/s")[1]


def test_the_swap_is_small_beside_a_hop():
    assert swap_seconds(64, 1) == 0.0
    assert swap_seconds(256, 8) < hop_seconds(256, 8, "400 Gb/s")[0]
