"""Ring attention against the same work with no communication, and against what else can be installed.

    PYTHONPATH=src python -m benchmarks.ring_attention.run

Times come from one world a case, in which the contestants take turns round by round; a round's ratio is the CPU time of
the slower rank over that of the limit in the same round. Peak memory comes from a fresh world for each contestant. A
peer that does not run is named with its own words.
"""

import argparse
import csv
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks.ring_attention.providers import ALL, HEADS, OURS, PEERS, packed_documents, window_of
from benchmarks.rows import measurement, write_rows

from fourfold.parallel.sequence.sharding import attended_pairs

HERE = Path(__file__).parent
LIMITS = {"packed": "packed limit"}
SMALL = 512


@dataclass
class Seen:
    """What one contestant showed: per-round maxima over the ranks."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    refusal: str = ""


def join_world(rank: int, size: int, rendezvous: str, timeout_s: float = 60) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )


def _agree(problem: str) -> str:
    """The first rank's complaint on every rank, so that all leave together."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((said for said in problems if said), "")


def _attempt(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""


def _time_rank(rank: int, size: int, rendezvous: str, seq_len: int, names: list[str], rounds: int, path: str) -> None:
    join_world(rank, size, rendezvous)
    seen = {name: Seen() for name in names}
    runs: dict[str, Callable[[], Any]] = {}

    for name in names:

        def prepare(name: str = name) -> None:
            ALL[name](rank, size, SMALL)()
            runs[name] = ALL[name](rank, size, seq_len)

        seen[name].refusal = _agree(_attempt(prepare))
    for round_number in range(rounds + 1):
        for name in names:
            if seen[name].refusal:
                continue
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            runs[name]()
            used = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall], dtype=torch.float64)
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            if round_number:  # the first round warms up
                seen[name].cpu_s.append(used[0].item())
                seen[name].wall_s.append(used[1].item())
    if rank == 0:
        torch.save(seen, path)
    dist.barrier()


def _peak_rank(rank: int, size: int, rendezvous: str, seq_len: int, name: str, path: str) -> None:
    join_world(rank, size, rendezvous)
    ALL[name](rank, size, SMALL)()
    run = ALL[name](rank, size, seq_len)
    dist.barrier()
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run()
    peak = torch.tensor([float(peak_bytes() - before)], dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if rank == 0:
        torch.save(peak.item(), path)
    dist.barrier()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def world(body: Callable[..., None], size: int, *arguments: Any) -> Any:
    """Run `body` on a fresh world and return what its rank 0 saved, or the complaint of the rank that died."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/result"
        try:
            mp.spawn(body, (size, f"{folder}/rendezvous", *arguments, path), nprocs=size)
        except Exception as error:
            return str(error).strip().splitlines()[-1]
        return torch.load(path, weights_only=False)


def pairs_over_limit(name: str, size: int, seq_len: int) -> float:
    """The (query, key) pairs of the busiest rank over the limit's, a head's worth each."""
    options: dict[str, Any] = {}
    if name.startswith("window"):
        options["window"] = window_of(seq_len)
    if name == "packed":
        options["cu_seqlens"] = packed_documents(seq_len)
    sharding = name.split()[-1] if name.split()[-1] in ("contiguous", "striped") else "zigzag"
    loads = attended_pairs(seq_len, size, sharding, **options)
    whole = sum(attended_pairs(seq_len, 1, **({"cu_seqlens": options["cu_seqlens"]} if name == "packed" else {})))
    return max(loads) * size / whole


def measure_case(size: int, seq_len: int, names: list[str], rounds: int) -> list[dict[str, Any]]:
    case = f"ranks={size} S={seq_len} B=1 H={HEADS} D=64 causal fp32"
    seen: dict[str, Seen] = world(_time_rank, size, seq_len, [name for name in names if name not in PEERS], rounds)
    limits = dict.fromkeys(names, seen)
    for name in [name for name in names if name in PEERS]:
        # A peer that hangs or dies takes its world along, so each has one of its own, with the limit in it.
        result = world(_time_rank, size, seq_len, ["limit", name], rounds)
        limits[name] = result if isinstance(result, dict) else {name: Seen(refusal=result)}
    limit_peak = world(_peak_rank, size, seq_len, "limit")
    rows = []

    def add(name: str, metric: str, unit: str, samples: list[float]) -> None:
        provider = name if name in PEERS else f"fourfold {name}" if "limit" not in name else f"torch {name}"
        rows.append(
            measurement(
                benchmark="ring_attention", provider=provider, case=case, metric=metric, unit=unit, samples=samples,
                kind="cpu", world_size=size,
            )
        )  # fmt: skip

    print(f"\n{case}, {rounds} rounds", flush=True)
    print(f"{'':28}{'CPU s':>8}{'over limit':>12}{'best':>7}{'a pair':>8}{'wall':>7}{'peak MB':>9}{'extra MB':>9}")
    for name in names:
        own = limits[name][name]
        if own.refusal:
            print(f"{name:28}does not run: {own.refusal[:100]}")
            continue
        base = limits[name][LIMITS.get(name, "limit")]
        ratios = [mine / theirs for mine, theirs in zip(own.cpu_s, base.cpu_s, strict=True)]
        walls = [mine / theirs for mine, theirs in zip(own.wall_s, base.wall_s, strict=True)]
        best = min(own.cpu_s) / min(base.cpu_s)
        work = pairs_over_limit(name, size, seq_len) if name in OURS and "limit" not in name else 1.0
        peak = world(_peak_rank, size, seq_len, name)
        add(name, "cpu", "s", own.cpu_s)
        add(name, "wall", "s", own.wall_s)
        add(name, "cpu_over_limit", "1", ratios)
        add(name, "best_cpu_over_best_limit", "1", [best])
        add(name, "cpu_over_limit_per_unmasked_pair", "1", [ratio / work for ratio in ratios])
        add(name, "wall_over_limit", "1", walls)
        memory = f"{'':18}"
        if isinstance(peak, float):
            add(name, "peak_growth", "bytes", [peak])
            add(name, "extra_peak_over_limit", "bytes", [peak - limit_peak])
            memory = f"{peak / 1e6:9.0f}{(peak - limit_peak) / 1e6:9.0f}"
        print(
            f"{name:28}{median(own.cpu_s):8.2f}{median(ratios):12.3f}{best:7.3f}{median(ratios) / work:8.3f}"
            f"{median(walls):7.2f}{memory}",
            flush=True,
        )
    return rows


def _other_cases(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of an earlier run for cases that this one has not measured."""
    if not path.exists():
        return []
    measured = {row["case"] for row in rows}
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["case"] not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 4096, 16384])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="contestants, beside the limits")
    parser.add_argument("--no-write", action="store_true", help="leave results.csv as it is")
    arguments = parser.parse_args()
    rows = []
    for size in arguments.ranks:
        for seq_len in arguments.lengths:
            names = list(OURS)
            # The peers and the two-pass ring cost up to ten times as much: at one length, where it fits in memory.
            if seq_len == 4096:
                names += ["two-pass RSA", *PEERS]
            if arguments.only:
                names = [name for name in names if name in arguments.only or "limit" in name]
            rows += measure_case(size, seq_len, names, arguments.rounds)
            if not arguments.no_write:
                write_rows(HERE / "results.csv", [*_other_cases(HERE / "results.csv", rows), *rows])


if __name__ == "__main__":
    main()
