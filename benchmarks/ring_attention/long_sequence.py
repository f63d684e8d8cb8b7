"""More tokens than the paper's 114,000, forward and backward, on ranks of one thread each, with the peak a rank.

    PYTHONPATH=src python -m benchmarks.ring_attention.long_sequence

The length is a prime, so nothing divides it. Peaks are of fresh worlds: resident memory of the largest rank, whole
process, and how much of it the call added to q, k, v and the output's gradient.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.ring_attention.providers import HEAD_SIZE, leaves
from benchmarks.ring_attention.run import join_world, peak_bytes, resident_bytes, world
from benchmarks.rows import measurement, write_rows

from fourfold.parallel import ring_attention
from fourfold.parallel.ring import linformer_attention
from fourfold.parallel.sequence.sharding import shard_length, shard_ranges

HERE = Path(__file__).parent
SEQ_LEN = 114_689
WINDOW = 1024
PROJECTED = 256
METRICS, UNITS = ("wall", "cpu", "peak", "peak_growth"), ("s", "s", "bytes", "bytes")


def linformer(heads: int, tokens: int) -> Callable[[], Any]:
    q, k, v, grad = leaves(heads, tokens)
    projections = [(torch.randn(PROJECTED, tokens) / PROJECTED**0.5).requires_grad_() for _ in range(2)]
    return lambda: linformer_attention(q, k, v, projections[0], projections[1], None).backward(grad)


def window(heads: int, tokens: int) -> Callable[[], Any]:
    q, k, v, grad = leaves(heads, tokens)
    return lambda: ring_attention(q, k, v, None, sharding="contiguous", window=(WINDOW, 0)).backward(grad)


def full(heads: int, tokens: int) -> Callable[[], Any]:
    q, k, v, grad = leaves(heads, tokens)
    return lambda: ring_attention(q, k, v, None).backward(grad)


KINDS = {"linformer": (linformer, "contiguous"), "window": (window, "contiguous"), "full causal": (full, "zigzag")}


def _rank(rank: int, size: int, rendezvous: str, kind: str, heads: int, path: str) -> None:
    join_world(rank, size, rendezvous, timeout_s=1800)
    make, sharding = KINDS[kind]
    run = make(heads, shard_length(shard_ranges(SEQ_LEN, size, sharding)[rank]))
    dist.barrier()
    before = resident_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    peak = peak_bytes()
    used = [time.perf_counter() - start, time.process_time() - cpu, float(peak), float(peak - before)]
    worst = torch.tensor(used, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if rank == 0:
        torch.save(worst.tolist(), path)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="exact causal attention as well, with one head: minutes")
    arguments = parser.parse_args()
    rows = []
    cases = [("linformer", 8), ("window", 8)] + ([("full causal", 1)] if arguments.full else [])
    print(f"L={SEQ_LEN}, {arguments.ranks} ranks, B=1 D={HEAD_SIZE} fp32; window {WINDOW}, Linformer R={PROJECTED}")
    for kind, heads in cases:
        result = world(_rank, arguments.ranks, kind, heads)
        if isinstance(result, str):
            raise RuntimeError(f"{kind}: {result}")
        wall, cpu, peak, added = result
        memory = f"peak {peak / 1e6:6.0f} MB a rank, {added / 1e6:5.0f} added"
        print(f"{kind:12} H={heads}: {wall:7.1f} s, {cpu:7.1f} CPU s, {memory}", flush=True)
        for metric, unit, value in zip(METRICS, UNITS, result, strict=True):
            rows.append(
                measurement(
                    benchmark="ring_attention_long", provider=f"fourfold {kind}", metric=metric, unit=unit,
                    case=f"L={SEQ_LEN} H={heads} D={HEAD_SIZE} fp32", samples=[value], kind="cpu",
                    world_size=arguments.ranks,
                )
            )  # fmt: skip
    write_rows(HERE / "long_sequence.csv", rows)


if __name__ == "__main__":
    main()
