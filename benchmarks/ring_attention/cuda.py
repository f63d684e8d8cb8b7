"""Ring attention on CUDA: the compute part of one rank on one device, and real rings where there are several.

    PYTHONPATH=src python -m benchmarks.ring_attention.cuda
    PYTHONPATH=src python -m benchmarks.ring_attention.cuda --print     # the table of what was measured
    PYTHONPATH=src python -m benchmarks.ring_attention.cuda --device cpu --tokens 512 --ranks 2   # tries the script out

Forward and backward, H 32, H_kv 8, D 128, bf16, by the device's clock, the median of --repeats after one that warms up.

- ring: what one rank of a causal zigzag ring computes, its messages left out, by attention backend; over the limit,
  which is SDPA by cuDNN on 1/N of the heads at full length. Peaks are above q, k, v and the output's gradient.
- packed: the same for a row of documents, a few long and many short, for each way of cutting them: the rank with most
  pairs, by the backend that the device gets. A step waits for that rank, so these compare with each other.
- nccl: ring_attention on one rank a device, messages and all; only where this host has several devices.

Samples are appended to cuda_samples.csv as they come, and those there are not taken again; what a backend refuses,
or is not installed, is told and not kept. After --budget seconds, or where the device fails, it stops, and goes on
where it is called again.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks.arguments import amount, count, stored_rows, table_file
from benchmarks.ring_attention.shardings import SHARDINGS, few_long_many_short
from benchmarks.rows import ORIGIN, append_row, measurement, origin, write_rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fourfold.parallel import ring_attention
from fourfold.parallel.attention.backends import BACKENDS, select_backend
from fourfold.parallel.attention.blocks import Hop, hops_between
from fourfold.parallel.communication import Exchange, Place
from fourfold.parallel.ring import hops as ring_hops
from fourfold.parallel.ring.heads import HeadExchange
from fourfold.parallel.sequence.sharding import Shard, document_ranges, shard_length, shard_ranges

HERE = Path(__file__).parent
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
FIELDS = ("kind", "tokens", "ranks", "provider", "seconds", "peak_mib", "error", "device", *ORIGIN)
CASES = ((16384, 4), (32768, 8), (65536, 4), (65536, 8), (131072, 8))
CAUSAL = (None, 0)
# Fewer make no row of a few long and many short documents.
LEAST_TOKENS = 128
Rows = list[dict[str, str]]
Run = Callable[[], object]


def leaves(heads: int, kv_heads: int, tokens: int, device: str) -> list[Tensor]:
    """q, k, v that want gradients, and the gradient of the output: [1, heads, tokens, D], tokens first in memory."""
    dtype = torch.bfloat16
    made = [
        torch.randn(1, tokens, count, HEAD_SIZE, device=device, dtype=dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    return [x.requires_grad_(index < 3) for index, x in enumerate(made)]


def limit(tokens: int, ranks: int, device: str) -> Run:
    """SDPA on 1/N of the heads at full length."""
    q, k, v, grad = leaves(max(1, HEADS // ranks), max(1, KV_HEADS // ranks), tokens, device)

    def run() -> None:
        kernel: Any = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else nullcontext()
        with kernel:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, (q, k, v), grad)

    return run


@contextmanager
def silent() -> Iterator[None]:
    """Messages neither leave nor arrive; what would have arrived is whatever lies in its buffer."""
    original = ring_hops.exchange
    ring_hops.exchange = lambda place, sends, receives: Exchange([], [])
    try:
        yield
    finally:
        ring_hops.exchange = original


def compute_part(hops: tuple[Hop, ...], rank: int, shards: tuple[Shard, ...], backend: str | None, device: str) -> Run:
    """What rank `rank` computes in a forward and backward."""
    q, k, v, grad = (x.detach() for x in leaves(HEADS, KV_HEADS, shard_length(shards[rank]), device))
    chosen, place = select_backend(backend, q, k), Place(None, rank, len(shards))
    heads = HeadExchange(place, 1, shards, HEADS, KV_HEADS)
    ring = ring_hops.Ring(place, hops, heads, chosen, HEAD_SIZE**-0.5)

    def run() -> None:
        with silent():
            ring.backward(grad, ring.forward(q, k, v))

    return run


def zigzag(tokens: int, ranks: int, backend: str | None, device: str) -> Run:
    shards, rank = shard_ranges(tokens, ranks, "zigzag"), ranks // 2
    leaf = BACKENDS[backend].leaf if backend else 0
    hops = hops_between(rank, shards, document_ranges(tokens, None), CAUSAL, leaf)
    return compute_part(hops, rank, shards, backend, device)


def packed(tokens: int, ranks: int, name: str, device: str) -> Run:
    """Of the rank with most pairs."""
    cu_seqlens = few_long_many_short(tokens)
    shards, documents = SHARDINGS[name](tokens, ranks, cu_seqlens), document_ranges(tokens, cu_seqlens)
    leaf = BACKENDS["cpu_flash"].leaf if device == "cpu" else 0
    plans = [hops_between(rank, shards, documents, CAUSAL, leaf) for rank in range(ranks)]
    pairs = [sum(block.pairs for hop in plan for block in hop.blocks) for plan in plans]
    busiest = max(range(ranks), key=pairs.__getitem__)
    return compute_part(plans[busiest], busiest, shards, None, device)


def timed(run: Run, device: str, repeats: int) -> tuple[float, float]:
    """(median seconds, peak MiB above what was there) of `run`."""
    cuda = device == "cuda"
    seconds, peak = [], 0.0
    for repeat in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        if not repeat:
            seconds.clear()  # the first warms up
    return median(seconds), peak


def timed_limit(tokens: int, ranks: int, device: str, repeats: int) -> tuple[float, float]:
    """The limit, measured with whole heads: where `ranks` does not divide them, its time is scaled to 1/N of them."""
    seconds, peak = timed(limit(tokens, ranks, device), device, repeats)
    return seconds * HEADS / (ranks * max(1, HEADS // ranks)), peak


def _nccl_rank(rank: int, size: int, rendezvous: str, tokens: int, repeats: int, path: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    shard = shard_ranges(tokens, size, "zigzag")[rank]
    q, k, v, grad = leaves(HEADS, KV_HEADS, shard_length(shard), "cuda")
    dist.all_reduce(torch.zeros(1, device="cuda"))  # the first use of the group

    def run() -> None:
        torch.autograd.grad(ring_attention(q, k, v, None, seq_len=tokens), (q, k, v), grad)

    found = timed(run, "cuda", repeats)
    worst = torch.tensor(found, dtype=torch.float64, device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if rank == 0:
        torch.save(worst.tolist(), path)
    dist.destroy_process_group()


def nccl(tokens: int, size: int, repeats: int) -> tuple[float, float]:
    """The slowest rank's seconds and the largest peak, of a ring over `size` devices of this host."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_nccl_rank, (size, f"{folder}/rendezvous", tokens, repeats, f"{folder}/result"), nprocs=size)
        seconds, peak = torch.load(f"{folder}/result")
    return seconds, peak


class Samples:
    """What has been measured: rows that a call adds to, of this device alone."""

    def __init__(self, rows: Rows, path: Path, device: str, budget_s: float) -> None:
        self.path, self.ends = path, time.monotonic() + budget_s
        self.device = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
        self.rows = [row for row in rows if row["device"] == self.device]
        self.left = 0

    def take(self, kind: str, case: tuple[int, int], provider: str, measure: Callable[[], tuple[float, float]]) -> None:
        """Measure once, unless that was done, or time is up."""
        key = {"kind": kind, "tokens": str(case[0]), "ranks": str(case[1]), "provider": provider}
        if any(key.items() <= row.items() for row in self.rows):
            return
        if time.monotonic() > self.ends:
            self.left += 1
            return
        row = dict.fromkeys(FIELDS, "") | key | {"device": self.device} | origin()
        try:
            seconds, peak = measure()
            row |= {"seconds": f"{seconds:.6g}", "peak_mib": f"{peak:.1f}"}
        except ValueError as refusal:  # not kept: what is not installed may be by the next call
            print(kind, *case, refusal, flush=True)
            return
        except Exception as error:  # a kernel that does not do this here: its words are the result
            row["error"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            if isinstance(error, torch.AcceleratorError):  # this process's device answers nothing any more
                self.ends = 0.0
        self.rows.append(row)
        append_row(self.path, row, FIELDS)
        print(" ".join(row[field] for field in FIELDS[:7]), flush=True)


def table(rows: Rows) -> str:
    """Of each device: times over the limit and peaks, or why something has none, as markdown."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        lines += [f"\n{device}\n", "| tokens, ranks | what | s | over the limit | peak MiB |", "|---|---|---|---|---|"]
        mine = [row for row in rows if row["device"] == device]
        limits = {
            (row["tokens"], row["ranks"]): float(row["seconds"])
            for row in mine
            if (row["kind"], row["provider"]) == ("ring", "limit") and row["seconds"]
        }
        for case in sorted({(int(row["tokens"]), int(row["ranks"])) for row in mine}):
            words = (str(case[0]), str(case[1]))
            for row in mine:
                if (row["tokens"], row["ranks"]) != words:
                    continue
                start = f"| {case[0]}, {case[1]} | {row['kind']}: {row['provider']} |"
                if not row["seconds"]:
                    lines.append(f"{start} {row['error'] or 'not measured'} | | |")
                    continue
                seconds, base = float(row["seconds"]), limits.get(words)
                over = f"{seconds / base:.2f}" if base and row["kind"] != "packed" else ""
                lines.append(f"{start} {seconds:.4f} | {over} | {row['peak_mib']} |")
    return "\n".join(lines)


def results(rows: Rows) -> list[dict[str, Any]]:
    return [
        measurement(
            benchmark="ring_attention_cuda", provider=row["provider"], metric=metric, unit=unit,
            case=f"{row['kind']} L={row['tokens']} ranks={row['ranks']}", samples=[float(row[metric])],
            kind="cpu" if row["device"] == "cpu" else "gpu", world_size=int(row["ranks"]), device=row["device"],
        )
        | {name: row[name] for name in ORIGIN}  # of the measurement, not of this call
        for row in rows
        if row["seconds"]
        for metric, unit in (("seconds", "s"), ("peak_mib", "MiB"))
    ]  # fmt: skip


def main() -> None:
    usage = "python -m benchmarks.ring_attention.cuda [options]; --help lists them"
    parser = argparse.ArgumentParser(
        description=__doc__, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=count, nargs="+", help="lengths, each with every one of --ranks")
    parser.add_argument("--ranks", type=count, nargs="+", help="of a ring, with --tokens; default: 8")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--budget", type=amount, default=440, help="seconds after which nothing new is begun")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--samples", type=table_file, default=HERE / "cuda_samples.csv")
    parser.add_argument("--out", type=table_file, default=HERE / "cuda.csv")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    given = parser.parse_args()
    device, repeats = given.device, given.repeats
    if given.ranks and not given.tokens:
        parser.error("--ranks without --tokens: give both, or neither for the cases of the page")
    cases = [(tokens, ranks) for tokens in given.tokens or () for ranks in given.ranks or [8]] or list(CASES)
    for tokens, ranks in cases:
        if tokens < max(LEAST_TOKENS, 2 * ranks):
            parser.error(f"--tokens {tokens} with --ranks {ranks}: at least {max(LEAST_TOKENS, 2 * ranks)} tokens")
    stored = stored_rows(parser, given.samples, FIELDS)
    if given.print:
        print(table(stored) if stored else f"{given.samples} has no rows: nothing was measured yet")
        return
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu tries the script out")
    samples = Samples(stored, given.samples, device, given.budget)
    names = [name for name, backend in BACKENDS.items() if backend.limits.kind == device]
    for case in cases:
        samples.take("ring", case, "limit", lambda case=case: timed_limit(*case, device, repeats))
        for name in names:
            samples.take("ring", case, name, lambda c=case, n=name: timed(zigzag(*c, n, device), device, repeats))
    for case in cases[-2:]:
        for name in SHARDINGS:
            samples.take("packed", case, name, lambda c=case, n=name: timed(packed(*c, n, device), device, repeats))
    devices = torch.cuda.device_count() if device == "cuda" else 0
    for tokens in sorted({tokens for tokens, _ in cases}) if devices > 1 else []:
        case = (tokens, devices)
        samples.take("ring", case, "limit", lambda case=case: timed_limit(*case, device, repeats))
        samples.take("nccl", case, "fourfold", lambda case=case: nccl(*case, repeats))
    print(table(samples.rows))
    if samples.left:
        print(f"{samples.left} measurements were left: time is up, or the device failed; call it again")
    if device == "cuda":
        write_rows(given.out, results(samples.rows))


if __name__ == "__main__":
    main()
