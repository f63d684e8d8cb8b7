"""How much faster than flushed pipelines is one that never drains?

    PYTHONPATH=src python -m benchmarks.pipelined_backprop.run                     # emulated stages and real ones
    PYTHONPATH=src python -m benchmarks.pipelined_backprop.run --only emulated     # replaces these rows only
    PYTHONPATH=src python -m benchmarks.pipelined_backprop.run --report            # the tables from results.csv

One process a stage over gloo, one thread each. Emulated stages sleep (--unit-ms for the forward, as long for each half
of the backward), so any number of them runs on any machine and theory is exact. Real stages share this machine's cores
and memory: how much two busy ones slow each other down, each in a process of its own without any traffic, is measured
before and after the pipelines in the same repeat, and theory is given with and without it. Everything is interleaved
within a repeat; ratios are taken within it. Each workload's rows are written as it ends.
"""

import argparse
import csv
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.pipelined_backprop import stages as workloads
from benchmarks.rows import measurement, write_rows
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining import Schedule1F1B

from fourfold.parallel import PipelinedBackprop
from fourfold.parallel.pipeline import PipelineSchedule
from fourfold.parallel.pipeline.schedule import async_speedup

COUNTS = (1, 2, 4, 8)  # micro-batches an update of the flushed pipelines
EMULATED = {2: 3, 4: 2, 8: 1}  # stages -> repeats
REAL_REPEATS = 5
COMPARED = (  # (way, over what, of whom)
    ("lockstep none", "1f1b", "fourfold"),
    ("lockstep lwpv+sc", "1f1b", "fourfold"),
    ("lockstep none", "torch", "torch"),
    ("lockstep none", "zb-h1", "fourfold"),
)
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
Seconds = dict[str, float]
Row = dict[str, Any]


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
    """Each stage's seconds a micro-batch alone, and by how much stages at work at once slow each other down."""
    rank = dist.get_rank()
    leaf = example.detach()
    for before in stages[:rank]:
        leaf = before(leaf).detach()
    leaf.requires_grad_(rank > 0)

    def work(seconds: float = 1.0) -> float:
        """For a set time, so that both are at work to the end."""
        start, repeats = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            stages[rank](leaf).square().mean().backward()
            repeats += 1
        return passed / repeats

    work(0.2)
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
            (before, first) = slow_down(stages, example)
            seconds = per_micro_batch(make, batch, max(8, 8 * round(1.5 / max(before) / 8)))
            (after, last) = slow_down(stages, example)
            extra = [(a + b) / 2 for a, b in zip(before, after, strict=True)], (first + last) / 2
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


def rows_of(kind: str, world: int, samples: list[tuple[Seconds, Any]]) -> list[Row]:
    """What results.csv keeps of one workload."""
    rows: list[Row] = []

    def row(provider: str, case: str, metric: str, unit: str, values: list[float], how: str = "cpu") -> None:
        rows.append(
            measurement(
                benchmark="pipelined_backprop", provider=provider, case=f"{workload(kind, world)} {case}",
                metric=metric, unit=unit, samples=values, kind=how, world_size=world,
            )
        )  # fmt: skip

    for way in samples[0][0]:
        provider = "torch" if way.startswith("torch") else "fourfold"
        row(provider, f"way={way.replace(' ', '/')}", "time", "ms/micro-batch", [1e3 * s[way] for s, _ in samples])
    real = samples[0][1] is not None
    if real:
        row("fourfold", "two stages at work", "slow_down", "ratio", [extra[1] for _, extra in samples])
    for count in COUNTS:
        row("theory", f"M={count}", "speedup over 1f1b", "ratio", [async_speedup(world, count)], "modelled")
        slower = [corrected(alone, factor, count) for _, (alone, factor) in samples] if real else []
        if real:
            row("theory", f"M={count} corrected", "speedup over 1f1b", "ratio", slower, "modelled")
        for way, over, provider in COMPARED:
            if f"{over} {count}" not in samples[0][0]:
                continue
            values = [s[f"{over} {count}"] / s[way] for s, _ in samples]
            case = f"M={count} {way.replace(' ', '/')}"
            row("fourfold", case, f"speedup over {provider} {'1f1b' if over == 'torch' else over}", "ratio", values)
            if real and (way, over) == COMPARED[0][:2]:
                shares = [value / theory for value, theory in zip(values, slower, strict=True)]
                row("fourfold", case, "speedup over corrected theory", "ratio", shares)
    return rows


def workload(kind: str, world: int) -> str:
    return f"workload={kind} stages={world}"


def print_table(kind: str, world: int, rows: list[Row]) -> None:
    """The speed-ups of one workload as README.md shows them; nothing where it has not been run."""
    title = workload(kind, world)
    found = {(row["case"].removeprefix(title).strip(), row["metric"]): row for row in rows if _is_of(row, title)}
    if not found:
        return

    def cell(case: str, metric: str, missing: str = "-") -> str:
        row = found.get((case, metric))
        if row is None:
            return missing
        shown = f"{float(row['median']):.3f}"
        return shown if int(row["repeats"]) == 1 else f"{shown} ({float(row['low']):.2f}-{float(row['high']):.2f})"

    measured = next(row for row in found.values() if row["kind"] != "modelled")
    print(f"\n{kind}, {world} stages, {measured['repeats']} repeats: median (lowest-highest)\n")
    slow = cell("two stages at work", "slow_down", "")
    if slow:
        print(f"Two stages at work at once take {slow} times as long as one alone.\n")
    heads = ["M", "(M+S-1)/M", *(["so corrected"] if slow else []), "over 1F1B", *(["of corrected"] if slow else [])]
    heads += ["with LWPv+SC", "over torch 1F1B", "over zero-bubble H1", "1+(S-1)/3M"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for count in COUNTS:
        plain, predicted = f"M={count} lockstep/none", f"M={count} lockstep/lwpv+sc"
        cells = [str(count), cell(f"M={count}", "speedup over 1f1b")]
        cells += [cell(f"M={count} corrected", "speedup over 1f1b")] if slow else []
        cells += [cell(plain, "speedup over fourfold 1f1b")]
        cells += [cell(plain, "speedup over corrected theory")] if slow else []
        cells += [
            cell(predicted, "speedup over fourfold 1f1b"),
            cell(plain, "speedup over torch 1f1b", "refused"),
            cell(plain, "speedup over fourfold zb-h1"),
            # H1's bubble is that small only with as many micro-batches as stages.
            f"{1 + (world - 1) / (3 * count):.3f}" if count >= world else "-",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    times = {case.partition("way=")[2]: float(row["median"]) for (case, _), row in found.items() if "way=" in case}
    print_equal_memory(world, times)


def print_equal_memory(world: int, times: dict[str, float]) -> None:
    """Speed beside the micro-batches whose activations stage 0 holds: lockstep's are nearly twice as many as 1F1B's.

    Args:
        times: way -> milliseconds a micro-batch.
    """
    print("\n| schedule | micro-batches held on stage 0 | ms a micro-batch | ratio to 1F1B at M = 1, 2, 4, 8 |")
    print("| --- | --- | --- | --- |")
    held = {"lockstep/none": 2 * (world - 1) + 1, "1f1b-async/none": world}
    for way, count in held.items():
        if way in times and "1f1b/1" in times:
            ratios = ", ".join(f"{times[f'1f1b/{each}'] / times[way]:.2f}" for each in COUNTS)
            print(f"| {way.partition('/')[0]} | {count} | {times[way]:.1f} | {ratios} |")
    for each in COUNTS:
        if f"1f1b/{each}" in times:
            print(f"| 1F1B, M = {each} | {min(world, each)} | {times[f'1f1b/{each}']:.1f} | 1 |", flush=True)


def merge(table: Path, title: str, rows: list[Row]) -> None:
    """Put `rows` in the place of the workload's earlier ones."""
    write_rows(table, [row for row in read_rows(table) if not _is_of(row, title)] + rows)


def _is_of(row: Row, title: str) -> bool:
    return str(row["case"]).startswith(title + " ")


def read_rows(table: Path) -> list[Row]:
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="emulated, transformer or resnet")
    parser.add_argument("--repeats", type=int, default=0, help="in place of each workload's own")
    parser.add_argument("--stages", type=int, nargs="*", default=list(EMULATED), help="numbers of emulated stages")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--unit-ms", type=float, default=30.0, help="sleep of a forward and of each half of a backward")
    parser.add_argument("--report", action="store_true", help="print the tables of --out, run nothing")
    given = parser.parse_args()
    for kind, world in [*(("emulated", world) for world in given.stages), ("transformer", 2), ("resnet", 2)]:
        if given.only not in kind:
            continue
        if not given.report:
            start = time.monotonic()
            repeats = given.repeats or (EMULATED.get(world, 1) if kind == "emulated" else REAL_REPEATS)
            merge(
                given.out,
                workload(kind, world),
                rows_of(kind, world, measure(kind, world, repeats, given.unit_ms / 1e3)),
            )
            print(f"\n({kind}, {world} stages: {time.monotonic() - start:.0f} s)")
        print_table(kind, world, read_rows(given.out))


if __name__ == "__main__":
    main()
