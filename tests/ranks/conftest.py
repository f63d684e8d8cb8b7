"""`ranks(n)` gives the session's pool of n gloo ranks."""

from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from hypothesis import settings
from support.rank_pool import RankPool
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel import init_mesh

# pytest tests/ranks/ring/test_ring_sweep.py -s --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=500, deadline=None)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    yield init_mesh(device_type="cpu")
    dist.destroy_process_group()
