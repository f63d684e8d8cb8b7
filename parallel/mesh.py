"""The (dp, pp, cp, tp) device mesh.

torch.distributed's DeviceMesh does the work: one process group an axis, slicing, flattening. This file only fixes the
names and the order of the axes, starts torch.distributed where nobody has, and refuses a grid that does not match the
world in words a user can act on.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from fourfold.parallel.grid import AXES, Grid


def init_mesh(
    *,
    dp: int = 1,
    pp: int = 1,
    cp: int = 1,
    tp: int = 1,
    device_type: str | None = None,
    timeout: timedelta | None = None,
) -> DeviceMesh:
    """Arrange all ranks in a grid with axes dp, pp, cp and tp; every rank must call.

    torch.distributed is started if it is not yet: from torchrun's environment variables, or as a world of one
    where there are none.

    Args:
        dp: data-parallel replicas.
        pp: pipeline stages.
        cp: ranks that share one sequence.
        tp: ranks that share one layer's matrices.
        device_type: "cuda" or "cpu"; None takes CUDA where this host has a device.
        timeout: the longest that a rank waits for the others in one operation; None for torch's (10 to 30 minutes).
    Returns:
        DeviceMesh of shape (dp, pp, cp, tp), tp fastest.
    Raises:
        ValueError: the product of the axes is not the world size, or CUDA was asked for and is absent.
    Cost: one group creation an axis, once; on CUDA an all-reduce of a number on each axis longer than 1.
    """
    grid = Grid(dp=dp, pp=pp, cp=cp, tp=tp)
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    elif device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device_type='cuda', but torch sees no CUDA device here: use 'cpu', or None to choose")
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if grid.world_size != world_size:
        raise ValueError(
            f"dp={dp} x pp={pp} x cp={cp} x tp={tp} needs {grid.world_size} ranks, but the world has {world_size}: "
            f"start {grid.world_size} processes or choose axes whose product is {world_size}"
        )
    if not dist.is_initialized():
        _start(device_type, timeout)
    mesh = init_device_mesh(device_type, grid.shape, mesh_dim_names=AXES)
    if device_type == "cuda":
        _connect(mesh)
    if timeout is not None:
        groups = [mesh.get_group(axis) for axis in AXES]
        if dp > 1 and cp > 1:  # parallelize's replicas: made here, the group is found again under its name there
            groups.append(mesh["dp", "cp"]._flatten("dp_cp").get_group())
        for group in groups:
            _set_pg_timeout(timeout, group)  # torch gives a new group its own default
    return mesh


def replica_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that hold the same weights and different tokens: dp and cp in one axis."""
    if mesh["cp"].size() == 1:
        return mesh["dp"]
    if mesh["dp"].size() == 1:
        return mesh["cp"]
    return mesh["dp", "cp"]._flatten("dp_cp")


def _connect(mesh: DeviceMesh) -> None:
    """Have NCCL make each axis' communicator now.

    In a world that is not bound to its devices (as _start binds it) NCCL makes it at a group's first operation, for
    which all its ranks have to be there. The first one may well be a message between two of them: a tied embedding's,
    or a pipeline's, where the others would never come.
    """
    for axis in AXES:
        if mesh[axis].size() > 1:
            dist.all_reduce(torch.zeros((), device="cuda"), group=mesh.get_group(axis))


def _start(device_type: str, timeout: timedelta | None) -> None:
    device = None
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device, timeout=timeout)
