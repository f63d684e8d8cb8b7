"""The mesh agrees with the rank arithmetic and refuses a world of another size."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankFailure
from torch.distributed import distributed_c10d

from fourfold.parallel import init_mesh
from fourfold.parallel.communication import new_group
from fourfold.parallel.grid import Grid
from fourfold.parallel.mesh import replica_mesh


def coordinates_of(shape: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """This rank's coordinates by torch's mesh and by rank arithmetic."""
    mesh = init_mesh(**shape, device_type="cpu")
    assert mesh.mesh_dim_names == ("dp", "pp", "cp", "tp")
    of_mesh = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate(), strict=True))
    return of_mesh, Grid(**shape).coordinates(dist.get_rank())


@pytest.mark.parametrize("shape", [{"dp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "cp": 2}])
def test_mesh_and_arithmetic_agree(ranks, shape):
    for rank, (of_mesh, of_grid) in enumerate(ranks(4)(coordinates_of, shape)):
        assert of_mesh == of_grid, f"rank {rank}"


def test_a_grid_of_another_size_is_refused(ranks):
    with pytest.raises(RankFailure, match="needs 3 ranks, but the world has 2: start 3 processes"):
        ranks(2)(coordinates_of, {"dp": 3})


def timeouts() -> list[float]:
    mesh = init_mesh(dp=2, cp=2, device_type="cpu", timeout=timedelta(seconds=77))
    groups = [mesh.get_group("dp"), mesh.get_group("cp"), replica_mesh(mesh).get_group()]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_group_has_the_timeout_that_was_given(ranks):
    assert ranks(4)(timeouts) == [[77.0] * 3] * 4


def group_of_rank_0() -> tuple[int, torch.device | None]:
    """Its size, and what the world is bound to afterwards."""

    def split(group: dist.ProcessGroup) -> None:
        raise AssertionError("NCCL's communicator of the world would be split, which takes all of its ranks")

    world = dist.group.WORLD
    assert world is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_c10d, "_get_split_source", split)
        world.bound_device_id = torch.device("cuda", 0)
        try:
            return new_group([0]).size() if dist.get_rank() == 0 else 0, world.bound_device_id
        finally:
            world.bound_device_id = None


def bound_to_by_nccl() -> torch.device | None:
    """What a new group is bound to, where the world is bound to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
        patch.setattr(torch.cuda, "current_device", lambda: 1)
        return new_group([0, 1]).bound_device_id


def test_nccl_connects_a_new_group_at_once(ranks):
    assert ranks(2)(bound_to_by_nccl) == [torch.device("cuda", 1)] * 2


def test_on_a_bound_world_a_group_is_made_by_its_members_alone(ranks):
    bound = torch.device("cuda", 0)
    assert ranks(2)(group_of_rank_0) == [(1, bound), (0, bound)]
