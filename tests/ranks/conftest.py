"""`ranks(n)` gives the session's pool of n gloo ranks."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from hypothesis import settings
from support.rank_pool import RankPools
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel import init_mesh

# pytest tests/ranks/ring/test_ring_sweep.py -s --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=500, deadline=None)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="module", autouse=True)
def no_world_is_idle_for_long(ranks: RankPools) -> Iterator[None]:
    yield
    ranks.close_unused()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    yield init_mesh(device_type="cpu")
    dist.destroy_process_group()
