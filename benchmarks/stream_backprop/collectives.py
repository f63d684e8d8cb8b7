"""Collectives of one training step by kind of data parallelism: as many for many chunks as for one.

    PYTHONPATH=src python -m benchmarks.stream_backprop.collectives                   # two gloo ranks, a minute

Every row also compares the gradients, summed or averaged by that library, with plain backpropagation of one process.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks.rows import measurement, write_rows

from fourfold.parallel.testing.data_parallel import KINDS, TOKENS, WHOLE, step

CHUNK_SIZES = (0, WHOLE, 5)  # 0: plain backpropagation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "collectives.csv")
    arguments = parser.parse_args()
    rendezvous = os.path.join(tempfile.mkdtemp(), "rendezvous")
    mp.spawn(_rank, (rendezvous, arguments.kinds, arguments.out), nprocs=2)  # type: ignore[no-untyped-call]


def _rank(rank: int, rendezvous: str, kinds: list[str], out: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    rows = []
    lines = ["| | chunks | collectives of a step | worst gradient error |", "|---|---|---|---|"]
    for kind in kinds:
        for chunk_size in CHUNK_SIZES:
            errors, calls = step(kind, chunk_size)
            worst = max(errors.values())
            case = f"kind={kind} chunks={_words(chunk_size)}"
            rows += [
                measurement(
                    benchmark="stream_collectives", provider="ours" if chunk_size else "plain", case=case,
                    metric=metric, unit="", samples=[value], kind="cpu", world_size=2,
                )
                for metric, value in [("gradient_error", worst), ("collectives", sum(calls.values()))]
            ]  # fmt: skip
            counts = ", ".join(f"{number} {name}" for name, number in sorted(calls.items()))
            lines.append(f"| {kind} | {_words(chunk_size)} | {counts} | {worst:.1e} |")
    if rank == 0:
        write_rows(out, rows)
        print("\n".join(lines))
    dist.destroy_process_group()


def _words(chunk_size: int) -> str:
    return f"{-(-TOKENS // chunk_size)}" if chunk_size else "plain"


if __name__ == "__main__":
    main()
