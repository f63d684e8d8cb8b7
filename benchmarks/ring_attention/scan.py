"""On paper: where a ring hides its hops at one million tokens, by the planner's own formulas.

    PYTHONPATH=src python -m benchmarks.ring_attention.scan

A hop of causal zigzag does half of the score matrix of two shards, and moves keys and values (bf16) forward, and those
and the fp32 gradients of them backward. It is hidden where it computes longer than it moves. H100s, NVLink 4 as if one
node held all ranks (450 GB/s a direction), and 400 Gb/s a device between nodes, as the planner's preset has them.
"""

from pathlib import Path

from benchmarks.rows import measurement, write_rows

from fourfold.layouts.cost.ring_hops import RingShape, hop_seconds, swap_seconds
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.constants import load_constants

HERE = Path(__file__).parent
SEQ_LEN = 1 << 20
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
CLUSTER = "H100-80GB"
# Ranks between neighbours of the ring: NVLink as if one node held all ranks; over the network, nodes of eight.
LINKS = {"NVLink": 1, "400 Gb/s": 8}


def main() -> None:
    rows = []
    cluster, constants = load_cluster(CLUSTER), load_constants()
    print(f"L={SEQ_LEN} B=1 H={HEADS} H_kv={KV_HEADS} D={HEAD_SIZE} bf16 causal zigzag, H100; hop times in us")
    header = ("ranks", "h", "link", "compute", "move", "ratio", "bwd compute", "bwd move", "ratio", "swap")
    print("".join(f"{word:>12}" for word in header))
    for link, rank_distance in LINKS.items():
        for num_ranks in (64, 128, 256, 512, 1024):
            for heads_degree in (1, 2, 4, 8):
                shape = RingShape(
                    seq_len=SEQ_LEN, num_ranks=num_ranks, heads_degree=heads_degree, num_heads=HEADS,
                    num_kv_heads=KV_HEADS, head_dim=HEAD_SIZE,
                )  # fmt: skip
                hop = hop_seconds(shape, cluster, constants, rank_distance)
                forward, backward = hop.forward / hop.forward_move, hop.backward / hop.backward_move
                columns = [
                    hop.forward * 1e6, hop.forward_move * 1e6, forward, hop.backward * 1e6, hop.backward_move * 1e6,
                    backward, swap_seconds(shape, cluster, constants) * 1e6,
                ]  # fmt: skip
                words = "".join(f"{value:12.2f}" for value in columns)
                print(f"{num_ranks:12}{heads_degree:12}{link:>12}{words}")
                for metric, value in (("compute_over_move", forward), ("backward", backward)):
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
