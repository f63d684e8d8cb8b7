"""Packed causal documents: what each way of cutting them computes and sends, counted, for any machine.

    PYTHONPATH=src python -m benchmarks.ring_attention.packed

One row of documents of mixed length, a few long and many short. For each way of cutting: the (query, key) pairs of the
busiest rank over the mean (a step waits for the busiest), the tokens of the fullest rank over the mean (all that is not
attention), and the bytes that the rank which sends most sends forward and backward, where only the keys that somebody
reads are sent. A ring that passes every key around, as published ones do, sends `all keys`, whatever the documents.
"""

import argparse
from pathlib import Path

from benchmarks.arguments import count
from benchmarks.ring_attention.shardings import SHARDINGS, few_long_many_short
from benchmarks.rows import measurement, write_rows

from fourfold.parallel.attention.blocks import needed_keys, pair_blocks
from fourfold.parallel.sequence.sharding import document_ranges, shard_length

HERE = Path(__file__).parent
KV_HEADS, HEAD_SIZE = 8, 128
KEY_BYTES = 2 * KV_HEADS * HEAD_SIZE * 2  # a key and its value in bf16
GRADIENT_BYTES = 2 * KV_HEADS * HEAD_SIZE * 4  # their gradients in fp32
CAUSAL = (None, 0)


def counted(name: str, size: int, seq_len: int, cu_seqlens: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """(pairs, tokens, bytes sent forward and backward) of every rank."""
    shards = SHARDINGS[name](seq_len, size, cu_seqlens)
    documents = document_ranges(seq_len, cu_seqlens)
    pairs, num_bytes = [0] * size, [0] * size
    for reader, queries in enumerate(shards):
        for holder, keys in enumerate(shards):
            blocks = pair_blocks(queries, keys, documents, CAUSAL)
            pairs[reader] += sum(block.pairs for block in blocks)
            if reader != holder:
                read = sum(stop - start for start, stop in needed_keys(blocks))
                # Keys and values go out in both passes; their gradients come back in the second.
                num_bytes[holder] += 2 * read * KEY_BYTES
                num_bytes[reader] += read * GRADIENT_BYTES
    return pairs, [shard_length(shard) for shard in shards], num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=count, nargs="+", default=[8, 64])
    parser.add_argument("--seq-len", type=count, default=1 << 18)
    parser.add_argument("--no-write", action="store_true", help="leave packed.csv as it is")
    arguments = parser.parse_args()
    seq_len = arguments.seq_len
    try:
        cu_seqlens = few_long_many_short(seq_len)
    except ValueError as error:
        parser.error(str(error))
    print(f"{seq_len} tokens, {len(cu_seqlens) - 1} documents, causal, H_kv {KV_HEADS}, D {HEAD_SIZE}, bf16")
    print(f"{'ranks':>6}  {'cut':26}{'pairs, busiest':>15}{'tokens, fullest':>16}{'GB sent, most':>15}{'mean':>8}")
    rows = []
    for size in arguments.ranks:
        whole = (size - 1) * seq_len / size * (2 * KEY_BYTES + GRADIENT_BYTES)
        for name in SHARDINGS:
            pairs, tokens, num_bytes = counted(name, size, seq_len, cu_seqlens)
            figures = {
                "busiest_over_mean_pairs": ("1", max(pairs) * size / sum(pairs)),
                "fullest_over_mean_tokens": ("1", max(tokens) * size / sum(tokens)),
                "most_sent": ("bytes", max(num_bytes)),
                "mean_sent": ("bytes", sum(num_bytes) / size),
            }
            busiest, fullest, most, mean = (value for _, value in figures.values())
            print(f"{size:6}  {name:26}{busiest:15.3f}{fullest:16.3f}{most / 1e9:15.2f}{mean / 1e9:8.2f}", flush=True)
            rows += [
                measurement(
                    benchmark="ring_attention_packed", provider=name, metric=metric, unit=unit, samples=[value],
                    case=f"L={seq_len} documents={len(cu_seqlens) - 1} ranks={size}", kind="modelled", world_size=size,
                    device="any (counted)",
                )
                for metric, (unit, value) in figures.items()
            ]  # fmt: skip
        print(f"{size:6}  {'all keys to all ranks':26}{'':31}{whole / 1e9:15.2f}{whole / 1e9:8.2f}")
    if not arguments.no_write:
        write_rows(HERE / "packed.csv", rows)


if __name__ == "__main__":
    main()
