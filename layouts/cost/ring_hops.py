"""What one hop of a causal zigzag ring computes and moves, in seconds: where a ring hides its hops, on paper.

A hop does half of the score matrix of two shards and moves one shard's keys and values in bf16; backward moves those
and their fp32 gradients. Its work is quadratic in the shard and its bytes linear, so on few ranks its work hides it,
and on many it does not.
"""

from dataclasses import dataclass

import numpy as np

from fourfold.layouts.cost.collectives import Network
from fourfold.layouts.cost.kernels import kernels_of
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.constants import Constants

KEY_BYTES, GRADIENT_BYTES = 2, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RingShape:
    """One layer's attention of one sequence over `num_ranks` ranks, of which heads_degree at a time share the heads."""

    seq_len: int
    num_ranks: int
    heads_degree: int = 1
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class HopSeconds:
    """Of one hop: its work, and the time its messages travel."""

    forward: float
    forward_move: float
    backward: float
    backward_move: float


def hop_seconds(shape: RingShape, cluster: Cluster, constants: Constants, rank_distance: int) -> HopSeconds:
    """One hop by the planner's formulas.

    Args:
        rank_distance: between neighbours of the ring: 1 inside a node, the node's devices or more beyond it.
    """
    tokens = shape.seq_len * shape.heads_degree // shape.num_ranks
    heads = shape.num_heads // shape.heads_degree
    kv_heads = max(1, shape.num_kv_heads // shape.heads_degree)
    # Each of the shard's queries sees half of the hop's keys, in the mean.
    forward, backward = kernels_of(cluster, constants).attention_s(
        np.array(1), np.array(heads), np.array(tokens), np.array(tokens / 2), np.array(tokens / 2), shape.head_dim
    )
    elements = 2 * kv_heads * shape.head_dim * tokens
    network = _network(cluster, constants)
    moves = [
        float(network.send_s(np.array(elements * width), np.array(2), np.array(rank_distance)))
        for width in (KEY_BYTES, KEY_BYTES + GRADIENT_BYTES)
    ]
    return HopSeconds(float(forward), moves[0], float(backward), moves[1])


def swap_seconds(shape: RingShape, cluster: Cluster, constants: Constants) -> float:
    """Moving q, k and v to heads and the output back, forward, among neighbours of one node."""
    if shape.heads_degree == 1:
        return 0.0
    tokens = shape.seq_len // shape.num_ranks
    num_bytes = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * tokens * KEY_BYTES
    members = np.array(shape.heads_degree)
    return float(_network(cluster, constants).collective_s("all_to_all", np.array(num_bytes), members, np.array(1)))


def _network(cluster: Cluster, constants: Constants) -> Network:
    return Network(cluster=cluster, efficiency=(constants.inner_link, constants.outer_link))
