"""How much faster than flushed pipelines is one that never drains?

    PYTHONPATH=src python -m benchmarks.pipelined_backprop.run                     # emulated stages and real ones
    PYTHONPATH=src python -m benchmarks.pipelined_backprop.run --only emulated

One process a stage over gloo, one thread each. Emulated stages sleep (--unit-ms for the forward, as long for each half
of the backward), so any number of them runs on any machine and theory is exact. Real stages share this machine's cores
and memory: how much two busy ones slow each other down is measured in the same repeat, and theory is given with and
without it. Everything is interleaved within a repeat; ratios are taken within it.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.pipelined_backprop import stages as workloads
from benchmarks.rows import measurement, write_rows
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining import Schedule1F1B

from fourfold.parallel import PipelinedBackprop, PipelineSchedule
from fourfold.parallel.pipeline_schedule import async_speedup

COUNTS = (1, 2, 4, 8)  # micro-batches an update of the flushed pipelines
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
Seconds = dict[str, float]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def timed(work: Callable[[], Any]) -> float:
    """Seconds from a common start to the end on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def per_micro_batch(make: Callable[[], list[nn.Module]], batch: tuple[Tensor, Tensor], steady: int) -> Seconds:
    """Seconds a micro-batch of each way to run the pipeline, once each."""
    world = dist.get_world_size()
    result: Seconds = {}

    def trainer(schedule: str, mitigation: str = "none") -> PipelinedBackprop:
        ours = PipelinedBackprop(
            make(), group=None, optimizer=SGD, loss_fn=loss_fn, schedule=schedule, mitigation=mitigation
        )
        ours.run([batch])  # shapes, allocations, imports
        return ours

    fill = 2 * world
    for name, mitigation in (("lockstep", "none"), ("lockstep", "lwpv+sc"), ("1f1b-async", "none")):
        ours = trainer(name, mitigation)
        short = timed(lambda ours=ours, n=fill: ours.run([batch] * n))
        long = timed(lambda ours=ours, n=fill + steady: ours.run([batch] * n))
        result[f"{name} {mitigation}"] = (long - short) / steady
    for count in COUNTS:
        groups = max(1, steady // count)
        for name in ("1f1b", "zb-h1"):
            ours = trainer(f"{name}:{count}")
            seconds = timed(lambda ours=ours, n=groups * count: ours.run([batch] * n))
            result[f"{name} {count}"] = seconds / (groups * count)
        if count >= world:
            step = torch_step(make(), batch, count)
            step()
            seconds = timed(lambda step=step, groups=groups: [step() for _ in range(groups)])
            result[f"torch {count}"] = seconds / (groups * count)
    return result


def torch_step(stages: list[nn.Module], batch: tuple[Tensor, Tensor], count: int) -> Callable[[], None]:
    """One step of torch.distributed.pipelining's 1F1B on `count` micro-batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = TorchStage(stages[rank], rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, count, loss_fn=loss_fn)
    optimizer = SGD(stages[rank].parameters())
    inputs, targets = (torch.cat([one] * count) for one in batch)

    def step() -> None:
        if rank == 0:
            schedule.step(inputs)
        elif rank == world - 1:
            schedule.step(target=targets)
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def slow_down(stages: list[nn.Module], example: Tensor) -> tuple[list[float], float]:
    """Each stage's seconds a micro-batch alone, and by how much two stages at work at once slow each other down."""
    rank = dist.get_rank()
    leaf = example.detach()
    for before in stages[:rank]:
        leaf = before(leaf).detach()
    leaf.requires_grad_(rank > 0)

    def work(repeats: int = 6) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            stages[rank](leaf).square().mean().backward()
        return (time.perf_counter() - start) / repeats

    work(2)
    alone = [0.0] * dist.get_world_size()
    for turn in range(dist.get_world_size()):
        dist.barrier()
        if turn == rank:
            alone[rank] = work()
    dist.barrier()
    together = work()
    values = torch.tensor([*alone, together / alone[rank]], dtype=torch.float64)
    dist.all_reduce(values)
    return values[:-1].tolist(), values[-1].item() / dist.get_world_size()


def corrected(alone: list[float], factor: float, count: int) -> float:
    """Speed-up over 1F1B of `count` micro-batches for two stages of these times, slower by `factor` while both work."""

    def seconds(schedule: str, length: int) -> float:
        program = PipelineSchedule.named(schedule, 2).program(length)
        run = program.simulate(forward_s=[t / 3 for t in alone], backward_s=[2 * t / 3 for t in alone])
        idle = run.bubble * run.makespan * 2
        return run.makespan + (factor - 1) * (run.makespan - idle)  # two stages: one idles at a time

    steady = (seconds("lockstep", 24) - seconds("lockstep", 8)) / 16
    return seconds(f"1f1b:{count}", count) / count / steady


def rank_main(rank: int, world: int, kind: str, repeats: int, unit_s: float, folder: str, results: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{kind}{world}", rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    for _ in range(repeats):
        if kind == "emulated":
            batch = (torch.zeros(1, 4), torch.zeros(1, 4))
            seconds = per_micro_batch(lambda: [workloads.SleepingStage(unit_s) for _ in range(world)], batch, 16)
            extra = None
        else:
            make, example = workloads.real(kind, world)
            batch = (example, torch.zeros(1))
            stages = make()
            with torch.no_grad():
                batch = (example, torch.zeros_like(nn.Sequential(*stages)(example)))
            extra = slow_down(stages, example)
            seconds = per_micro_batch(make, batch, 8)
        if rank == 0:
            results.put((seconds, extra))
    dist.destroy_process_group()


def measure(kind: str, world: int, repeats: int, unit_s: float) -> list[tuple[Seconds, Any]]:
    """`repeats` times all ways to run, in fresh processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_main, args=(rank, world, kind, repeats, unit_s, folder, results), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        samples = []
        while len(samples) < repeats:
            try:
                samples.append(results.get(timeout=10))
            except Exception:
                if any(process.exitcode for process in processes):
                    raise RuntimeError(f"a rank of {kind} with {world} stages failed; its error is above") from None
        for process in processes:
            process.join()
    return samples


def table(kind: str, world: int, samples: list[tuple[Seconds, Any]]) -> list[dict[str, Any]]:
    """Print the speed-ups of one workload and return its rows."""
    rows: list[dict[str, Any]] = []

    def row(provider: str, case: str, metric: str, unit: str, values: list[float], how: str = "cpu") -> str:
        case = f"workload={kind} stages={world} {case}"
        rows.append(
            measurement(
                benchmark="pipelined_backprop", provider=provider, case=case, metric=metric, unit=unit,
                samples=values, kind=how, world_size=world,
            )
        )  # fmt: skip
        return (
            f"{median(values):.3f}"
            if len(values) == 1
            else f"{median(values):.3f} ({min(values):.2f}-{max(values):.2f})"
        )

    print(f"\n{kind}, {world} stages, {len(samples)} repeats: median (lowest-highest)")
    for way in samples[0][0]:
        provider = "torch" if way.startswith("torch") else "fourfold"
        shown = row(
            provider, f"way={way.replace(' ', '/')}", "time", "ms/micro-batch", [1e3 * s[way] for s, _ in samples]
        )
        print(f"  {way:20} {shown} ms a micro-batch")
    if samples[0][1] is not None:
        shown = row("fourfold", "two stages at work", "slow_down", "ratio", [extra[1] for _, extra in samples])
        print(f"  two stages at work at once take {shown} times as long")
    print(
        "| M | (M+S-1)/M | corrected | over 1F1B | with LWPv+SC | over torch 1F1B | over zero-bubble H1 | 1+(S-1)/3M |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for count in COUNTS:
        cells = [row("theory", f"M={count}", "speedup over 1f1b", "ratio", [async_speedup(world, count)], "modelled")]
        if samples[0][1] is not None:
            values = [corrected(alone, factor, count) for _, (alone, factor) in samples]
            cells.append(row("theory", f"M={count} corrected", "speedup over 1f1b", "ratio", values, "modelled"))
        else:
            cells.append("-")
        for way, over, provider in (
            ("lockstep none", "1f1b", "fourfold"),
            ("lockstep lwpv+sc", "1f1b", "fourfold"),
            ("lockstep none", "torch", "torch"),
            ("lockstep none", "zb-h1", "fourfold"),
        ):
            if f"{over} {count}" not in samples[0][0]:
                cells.append("refused")
                continue
            values = [s[f"{over} {count}"] / s[way] for s, _ in samples]
            cells.append(
                row(
                    "fourfold", f"M={count} {way.replace(' ', '/')}", f"speedup over {provider} {over}", "ratio", values
                )
            )
        # H1's bubble is that small only with as many micro-batches as stages.
        cells.append(f"{1 + (world - 1) / (3 * count):.3f}" if count >= world else "-")
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="emulated, transformer or resnet")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 4, 8], help="numbers of emulated stages")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--unit-ms", type=float, default=20.0, help="sleep of a forward and of each half of a backward")
    given = parser.parse_args()
    rows = []
    for kind, world in [*(("emulated", world) for world in given.stages), ("transformer", 2), ("resnet", 2)]:
        if given.only in kind:
            rows += table(kind, world, measure(kind, world, given.repeats, given.unit_ms / 1e3))
    write_rows(given.out, rows)


if __name__ == "__main__":
    main()
