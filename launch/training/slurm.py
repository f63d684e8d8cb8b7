"""Ranks that Slurm started: `srun -n 2 python -m fourfold.launch.train --layout layout.toml`.

srun tells each process its rank and where the job runs; torch.distributed meets on the first host of the step, at a
port that follows from the job's number, so that no two jobs of a host meet at one.
"""

import os
import re
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 15_000, 45_000


def started_by_slurm(environment: Mapping[str, str]) -> bool:
    """Whether srun, and not a launcher within its task, started this process as one of several."""
    return "RANK" not in environment and "SLURM_PROCID" in environment and _num_tasks(environment) > 1


def adopt_slurm_ranks(environment: Mapping[str, str]) -> None:
    """Set the variables that torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, ...) from srun's.

    Raises:
        ValueError: srun did not say on which hosts it started the tasks.
    """
    size = _num_tasks(environment)
    num_hosts = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    hosts = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    if num_hosts > 1 and not hosts:
        raise ValueError("srun started tasks on several hosts without SLURM_STEP_NODELIST: use torchrun on each host")
    if num_hosts == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
    node = int(environment.get("SLURM_NODEID", "0"))
    local_size = tasks[node] if len(tasks) == num_hosts and sum(tasks) == size else -(-size // num_hosts)
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    os.environ |= {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", environment["SLURM_PROCID"]),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": first_host(hosts) if num_hosts > 1 else "127.0.0.1",
        "MASTER_PORT": environment.get("MASTER_PORT", str(_FIRST_PORT + job % _NUM_PORTS)),
    }


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: "node[07-09,12],other" is "node07", "rack[1-2]n[3,5]" is "rack1n3"."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodelist)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def tasks_per_node(compressed: str) -> list[int]:
    """Slurm's compressed list, a number a node: "4(x2),3" is [4, 4, 3]; empty where it is none."""
    tasks: list[int] = []
    for part in compressed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return []
        tasks += [int(match[1])] * int(match[2] or "1")
    return tasks


def _num_tasks(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
