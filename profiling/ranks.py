"""The profile as every rank measures it, together with all the others.

Links inside a host and between hosts are measured as separate tiers.
"""

import datetime
import hashlib
import json
import os
import sys
import time

import torch
import torch.distributed as dist

from fourfold.profiling.clock import Clock
from fourfold.profiling.cluster_file import cluster_table, write_cluster
from fourfold.profiling.hardware import device_name, free_memory_bytes, held_outside_bytes
from fourfold.profiling.links import Tier, find_tiers
from fourfold.profiling.parallelism import Parallelism
from fourfold.profiling.partial import PartialProfile
from fourfold.profiling.plan import profile_cases
from fourfold.profiling.progress import ProgressLine
from fourfold.profiling.session import Case, Timings, measure
from fourfold.profiling.settings import ProfileSettings
from fourfold.profiling.shapes import read_config

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


def profile_ranks(settings: ProfileSettings, parallelism: Parallelism | None = None) -> None:
    """Measure on all ranks of the initialised world; rank 0 writes `settings.out`. Every rank must call.

    Args:
        parallelism: how training spreads a layer over ranks; None measures no tensor- and no context-parallel layers.
    Raises:
        ValueError: hosts of unequal numbers of ranks, ranks with other options, models or kinds of device than others,
            or a model config without a needed field.
    Cost: about `settings.seconds`, more where the model's own shapes need it.
    """
    start = time.perf_counter()
    # What the ranks are: their device, its free memory (the smallest counts), and the links between them.
    device = chosen_device(settings.device)
    _refuse_unequal(settings, device)
    world_size = dist.get_world_size()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    torch.manual_seed(dist.get_rank())
    free_bytes = free_memory_bytes(device, per_host)
    memory = torch.tensor([free_bytes])
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    tiers = find_tiers(device.type)
    # What is measured, and what an interrupted profile has of it.
    cases = profile_cases(settings, device, tiers, parallelism)
    name = device_name(device)
    partial = PartialProfile(settings, cases, {"device": name, "ranks": world_size, "torch": torch.__version__})
    with ProgressLine(enabled=dist.get_rank() == 0) as progress:
        timings, left_out = measure(
            cases,
            Clock(device),
            seconds=settings.seconds - (time.perf_counter() - start),
            timings=partial.load() if settings.resume and dist.get_rank() == 0 else None,
            progress=progress.show,
            keep=partial.save,
        )
    # What the device has lost besides to groups of ranks and libraries: the largest counts.
    outside = torch.tensor([held_outside_bytes(device, free_bytes)])
    dist.all_reduce(outside, dist.ReduceOp.MAX)
    if dist.get_rank():
        return
    # Rank 0 writes the file, and then nothing is left to resume.
    header = {
        "name": f"{world_size} x {name} ({device.type})",
        "provenance": f"measured by layout-advisor profile, {datetime.date.today()}, torch {torch.__version__}",
        "num_devices": world_size,
        "devices_per_node": per_host,
    }
    described = {
        "name": name,
        "type": device.type,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "memory_bytes": memory.item(),
    }
    if device.type == "cuda":
        described["reserve_bytes"] = outside.item()
    write_cluster(settings.out, cluster_table(header, described, _rows(cases, timings, tiers)))
    partial.remove()
    note = f", {len(left_out)} left out for want of time (raise --seconds)" if left_out else ""
    print(f"{settings.out}: {len(timings.rounds)} cases on {header['name']}{note}", file=sys.stderr, flush=True)


def chosen_device(asked: str | None) -> torch.device:
    """This rank's device: the one asked for, or CUDA where this host has it.

    Raises:
        ValueError: CUDA was asked for and is absent.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here: use --device cpu")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _refuse_unequal(settings: ProfileSettings, device: torch.device) -> None:
    """Refuse, on every rank, options or a config.json that differ between them: ranks would wait in different cases."""
    config = read_config(settings.model) if settings.model else None
    mine = [config, settings.seq_len, settings.micro_batches, settings.layers, device.type]
    digest = int.from_bytes(hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()[:7])
    extremes = torch.tensor([digest, -digest])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes[0] != -extremes[1]:
        raise ValueError(
            "ranks have other options, another config.json or other devices than others: give the same command on "
            "every host, with the same model"
        )


def _rows(cases: list[Case], timings: Timings, tiers: list[Tier]) -> dict[str, list[dict[str, object]]]:
    """The measured cases by the table of cluster.toml that they belong to."""
    sizes = {tier.name: tier.num_ranks for tier in tiers}
    rows: dict[str, list[dict[str, object]]] = {}
    for case in cases:
        if case.key in timings.rounds:
            row = timings.row(case)
            if case.table == "link":
                row["num_ranks"] = sizes[row["tier"]]
            rows.setdefault(case.table, []).append(row)
    return rows
