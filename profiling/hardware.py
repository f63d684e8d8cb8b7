"""What this host is: cores, device names, and the memory one rank may use.

psutil and torch tell most of it. They do not see the limits of a container: a cgroup's memory limit, its CPU quota and
the CPU affinity decide what a rank really gets, so they are read here.
"""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's model name; the architecture where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def physical_cores(cpus: Path = _CPUS, cgroup: Path = _CGROUP) -> int:
    """Physical cores this process may run on: by affinity, hyper-threads counted once, at most the cgroup's quota."""
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        topology = cpus / f"cpu{cpu}" / "topology"
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            cores.add((str(cpu), ""))
    count = len(cores)
    for folder in _cgroup_folders(cgroup):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            count = min(count, max(1, int(words[0]) // int(words[1])))
    return max(1, count)


def default_num_ranks(device_type: str) -> int:
    """Ranks a host: one a GPU, or one a physical core and at most 4."""
    return torch.cuda.device_count() if device_type == "cuda" else min(4, physical_cores())


def free_memory_bytes(device: torch.device, ranks_per_host: int, cgroup: Path = _CGROUP) -> int:
    """What one rank may allocate now.

    On CUDA the free memory of the rank's device. On a CPU the smaller of what the system has available and what the
    cgroups of this process leave (file cache that can be dropped counts as free), divided by the ranks of the host.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for folder in _cgroup_folders(cgroup):
        limit = _words(folder / "memory.max")
        if limit and limit[0] != "max":
            lines = [line.split() for line in _text(folder / "memory.stat").splitlines()]
            reclaimable = sum(int(line[1]) for line in lines if line[0] == "inactive_file")
            used = int(_words(folder / "memory.current")[0])
            free = min(free, int(limit[0]) - used + reclaimable)
    for folder in (cgroup / "memory",):  # version 1 mounts the process's own group here inside a container
        limit, current = _words(folder / "memory.limit_in_bytes"), _words(folder / "memory.usage_in_bytes")
        if limit and current:
            free = min(free, int(limit[0]) - int(current[0]))
    return max(0, free) // ranks_per_host


def held_outside_bytes(device: torch.device, free_before_bytes: int) -> int:
    """What torch's allocator does not know of and the device has lost since `free_before_bytes` of it were free.

    Communication buffers, libraries' workspaces and kernels; 0 on a CPU, where nothing tells it from other processes.
    """
    if device.type != "cuda":
        return 0
    free = int(torch.cuda.mem_get_info(device)[0])
    return max(0, free_before_bytes - free - int(torch.cuda.memory_reserved(device)))


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """The version 2 cgroup of this process and its parents up to `root`: each may set a limit."""
    path = next((line[3:] for line in _text(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/")
    folder = root / path.strip("/")
    while True:
        yield folder
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _words(file: Path) -> list[str]:
    return _text(file).split()
