"""Memory and cores under a container's limits, read from folders made here."""

import os
from pathlib import Path

import psutil
import torch

from fourfold.profiling.hardware import free_memory_bytes, physical_cores

CPU = torch.device("cpu")


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_cgroup_limit_counts_and_dropped_file_cache_is_free(tmp_path):
    stat = "anon 100\ninactive_file 4096\nactive_file 9\n"
    root = write(tmp_path, memory__max="1000000\n", memory__current="600000\n", memory__stat=stat)
    assert free_memory_bytes(CPU, 2, root) == (1_000_000 - 600_000 + 4096) // 2


def test_without_a_limit_the_system_decides(tmp_path):
    root = write(tmp_path, memory__max="max\n")
    free = free_memory_bytes(CPU, 1, root)
    assert 0.5 * psutil.virtual_memory().available < free <= psutil.virtual_memory().total


def test_version_1_limit(tmp_path):
    write(tmp_path / "memory", memory__limit_in_bytes="50000", memory__usage_in_bytes="60000")
    assert free_memory_bytes(CPU, 1, tmp_path) == 0


def test_hyper_threads_count_once_and_the_quota_caps(tmp_path):
    for cpu in os.sched_getaffinity(0):
        write(tmp_path / f"cpu{cpu}" / "topology", physical_package_id="0\n", core_id="0\n")
    assert physical_cores(tmp_path, tmp_path / "none") == 1
    quota = write(tmp_path / "cgroup", cpu__max="100000 100000\n")
    assert physical_cores(tmp_path / "no topology", quota) == 1
    assert physical_cores(tmp_path / "no topology", tmp_path / "none") == len(os.sched_getaffinity(0))
