"""Ranks that MPI started: `mpiexec -n 2 python -m fourfold.launch.train --layout layout.toml`.

torch's own MPI backend needs a torch built against MPI. Here MPI only starts the processes and tells each its rank;
rank 0 finds a free port, MPI broadcasts it, and torch.distributed meets there with gloo or NCCL.
"""

import os
import socket
from collections.abc import Mapping

_SIZE_VARIABLES = ("PMI_SIZE", "PMIX_SIZE", "OMPI_COMM_WORLD_SIZE")


def started_by_mpi(environment: Mapping[str, str]) -> bool:
    """Whether an MPI launcher, and not torchrun, started this process."""
    return "RANK" not in environment and any(name in environment for name in _SIZE_VARIABLES)


def started_size(environment: Mapping[str, str]) -> int:
    """How many processes MPI's launcher says that it has started."""
    return next(int(environment[name]) for name in _SIZE_VARIABLES if name in environment)


def adopt_mpi_ranks() -> None:
    """Set the variables that torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, ...) from MPI's world.

    Every rank calls.

    Raises:
        ValueError: mpi4py is not installed, or is of another MPI than the launcher, so that each process is alone.
    Cost: one broadcast of an address and one split by host.
    """
    try:
        from mpi4py import MPI
    except ImportError:
        raise ValueError(
            "MPI started this process, but mpi4py is missing: pip install 'fourfold[mpi]', or use torchrun"
        ) from None
    world, started = MPI.COMM_WORLD, started_size(os.environ)
    if world.size != started:
        raise ValueError(
            f"MPI's launcher started {started} processes, and mpi4py sees {world.size}: they are of two kinds of MPI; "
            "use mpi4py's own mpiexec (of fourfold[mpi]), srun --mpi=none, or torchrun"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    meeting = world.bcast(_meeting_point(world.size == local.size) if world.rank == 0 else None)
    if world.size == local.size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(local.rank),
        "LOCAL_WORLD_SIZE": str(local.size),
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": str(meeting[1]),
    }


def _meeting_point(one_host: bool) -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ("127.0.0.1" if one_host else socket.gethostname()), probe.getsockname()[1]
