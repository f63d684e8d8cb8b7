"""The profile as every rank runs it: `torchrun ... -m fourfold.profiling.run --out cluster.toml`.

On one machine `layout-advisor profile` starts the ranks by itself. On several hosts start this module with
torchrun on each of them; links inside a host and between hosts are measured as separate tiers.
"""

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from fourfold.profiling.clock import Clock
from fourfold.profiling.cluster_file import cluster_table, write_cluster
from fourfold.profiling.hardware import device_name, free_memory_bytes
from fourfold.profiling.links import find_tiers
from fourfold.profiling.partial import PartialProfile, StaleProfileError
from fourfold.profiling.plan import profile_cases
from fourfold.profiling.progress import ProgressLine
from fourfold.profiling.refusal import refuse
from fourfold.profiling.session import measure
from fourfold.profiling.settings import ProfileSettings, parse_settings
from fourfold.profiling.shapes import model_shape, read_config


def profile_ranks(settings: ProfileSettings) -> None:
    """Measure on all ranks of the initialised world; rank 0 writes `settings.out`. Every rank must call.

    Raises:
        ValueError: hosts of unequal numbers of ranks, or a model config without a needed field.
    Cost: about `settings.seconds`, more where the model's own shapes need it.
    """
    start = time.perf_counter()
    device = _device(settings.device)
    world_size = dist.get_world_size()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    torch.manual_seed(dist.get_rank())
    memory = torch.tensor([free_memory_bytes(device, per_host)])
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    tiers = find_tiers(device.type)
    cases = profile_cases(settings, device, tiers)
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
    if dist.get_rank():
        return
    sizes = {tier.name: tier.num_ranks for tier in tiers}
    rows: dict[str, list[dict[str, object]]] = {}
    for case in cases:
        if case.key in timings.rounds:
            row = timings.row(case)
            if case.table == "link":
                row["num_ranks"] = sizes[row["tier"]]
            rows.setdefault(case.table, []).append(row)
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
    write_cluster(settings.out, cluster_table(header, described, rows))
    partial.remove()
    note = f", {len(left_out)} left out for want of time (raise --seconds)" if left_out else ""
    print(f"{settings.out}: {len(timings.rounds)} cases on {header['name']}{note}", file=sys.stderr, flush=True)


def _device(asked: str | None) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device here: use --device cpu")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@record
def main() -> None:
    try:
        settings = parse_settings()
        device = _device(settings.device)
        if settings.model:
            model_shape(read_config(settings.model))
    except ValueError as error:
        refuse(error)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # A lost rank ends the others within this time, should the launcher not have ended them.
    limit = datetime.timedelta(seconds=max(120.0, 4 * settings.seconds))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=limit, device_id=device if device.type == "cuda" else None)
    try:
        profile_ranks(settings)
    except StaleProfileError as error:
        refuse(error)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
