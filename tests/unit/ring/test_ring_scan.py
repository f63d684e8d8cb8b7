"""A ring's hops by the planner's formulas: a hop's work is quadratic in the shard, its bytes linear."""

import pytest

from fourfold.layouts.cost.ring_hops import HopSeconds, RingShape, hop_seconds, swap_seconds
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.constants import load_constants

H100, CONSTANTS = load_cluster("H100-80GB"), load_constants()
NVLINK, NETWORK = 1, 8  # ranks between neighbours of a ring: inside a node of eight, and from node to node


def shape(num_ranks: int, heads_degree: int) -> RingShape:
    return RingShape(
        seq_len=1 << 20, num_ranks=num_ranks, heads_degree=heads_degree, num_heads=32, num_kv_heads=8, head_dim=128
    )


def hop(num_ranks: int, heads_degree: int, rank_distance: int) -> HopSeconds:
    return hop_seconds(shape(num_ranks, heads_degree), H100, CONSTANTS, rank_distance)


def ratio(num_ranks: int, heads_degree: int) -> float:
    seconds = hop(num_ranks, heads_degree, NETWORK)
    return seconds.forward / seconds.forward_move


def test_heads_degree_moves_the_border_by_as_many_ranks():
    assert ratio(64, 1) / ratio(128, 1) == pytest.approx(2, rel=0.1)
    assert ratio(128, 2) / ratio(64, 1) == pytest.approx(1, rel=0.1)
    assert hop(64, 1, NVLINK).forward_move < hop(64, 1, NETWORK).forward_move


def test_the_swap_is_small_beside_a_hop():
    assert swap_seconds(shape(64, 1), H100, CONSTANTS) == 0.0
    assert swap_seconds(shape(256, 8), H100, CONSTANTS) < hop(256, 8, NETWORK).forward
