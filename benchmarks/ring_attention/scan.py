"""On paper: where a ring hides its hops at one million tokens, by the planner's own formulas.

    PYTHONPATH=src python -m benchmarks.ring_attention.scan

A hop of causal zigzag does half of the score matrix of two shards, and moves keys and values (bf16) forward, and those
and the fp32 gradients of them backward. It is hidden where it computes longer than it moves. H100s, NVLink 4 as if one
node held all ranks (450 GB/s a direction), and 400 Gb/s a device between nodes, as the planner's preset has them.
"""

from pathlib import Path

import numpy as np
from benchmarks.rows import measurement, write_rows

from fourfold.layouts.cost.collectives import Network
from fourfold.layouts.cost.kernels import kernels_of
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.constants import load_constants

HERE = Path(__file__).parent
SEQ_LEN = 1 << 20
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
KEY_BYTES, GRADIENT_BYTES = 2, 4
NODE = 8
CLUSTER = "H100-80GB"


def hop_seconds(num_ranks: int, heads_degree: int, link: str) -> tuple[float, float, float, float]:
    """(compute forward, move forward, compute backward, move backward) of one hop, in seconds."""
    cluster, constants = load_cluster(CLUSTER), load_constants()
    tokens = SEQ_LEN * heads_degree // num_ranks
    heads, kv_heads = HEADS // heads_degree, max(1, KV_HEADS // heads_degree)
    forward, backward = kernels_of(cluster, constants).attention_s(
        np.array(1), np.array(heads), np.array(tokens), np.array(tokens / 2), np.array(tokens / 2), HEAD_SIZE
    )
    network = Network(cluster=cluster, efficiency=(constants.inner_link, constants.outer_link))
    elements = 2 * kv_heads * HEAD_SIZE * tokens
    # One node of ranks talks over NVLink; neighbours a node apart talk over the network.
    stride = 1 if link == "NVLink" else NODE
    sizes = [elements * KEY_BYTES, elements * (KEY_BYTES + GRADIENT_BYTES)]
    moves = [float(network.send_s(np.array(size), np.array(2), np.array(stride))) for size in sizes]
    return float(forward), moves[0], float(backward), moves[1]


def swap_seconds(num_ranks: int, heads_degree: int) -> float:
    """Moving q, k, v to heads and the output back, forward; inside a node."""
    if heads_degree == 1:
        return 0.0
    cluster, constants = load_cluster(CLUSTER), load_constants()
    network = Network(cluster=cluster, efficiency=(constants.inner_link, constants.outer_link))
    tokens = SEQ_LEN // num_ranks
    num_bytes = (2 * HEADS + 2 * KV_HEADS) * HEAD_SIZE * tokens * KEY_BYTES
    return float(network.collective_s("all_to_all", np.array(num_bytes), np.array(heads_degree), np.array(1)))


def main() -> None:
    rows = []
    print(f"L={SEQ_LEN} B=1 H={HEADS} H_kv={KV_HEADS} D={HEAD_SIZE} bf16 causal zigzag, H100; hop times in us")
    header = ("ranks", "h", "link", "compute", "move", "ratio", "bwd compute", "bwd move", "ratio", "swap")
    print("".join(f"{word:>12}" for word in header))
    for link in ("NVLink", "400 Gb/s"):
        for num_ranks in (64, 128, 256, 512, 1024):
            for heads_degree in (1, 2, 4, 8):
                forward, move, backward, move_back = hop_seconds(num_ranks, heads_degree, link)
                swap = swap_seconds(num_ranks, heads_degree)
                times = [forward * 1e6, move * 1e6, forward / move, backward * 1e6, move_back * 1e6]
                print(
                    f"{num_ranks:12}{heads_degree:12}{link:>12}"
                    + "".join(f"{value:12.2f}" for value in [*times, backward / move_back, swap * 1e6])
                )
                for metric, value in (("compute_over_move", forward / move), ("backward", backward / move_back)):
                    rows.append(
                        measurement(
                            benchmark="ring_attention_scan", provider="fourfold", metric=metric, unit="1",
                            case=f"L={SEQ_LEN} ranks={num_ranks} heads_degree={heads_degree} link={link}",
                            samples=[value], kind="modelled", world_size=num_ranks, device="H100 (modelled)",
                        )
                    )  # fmt: skip
    write_rows(HERE / "scan.csv", rows)


if __name__ == "__main__":
    main()
