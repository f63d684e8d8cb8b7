"""`ranks(n)` gives the session's pool of n gloo ranks."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from support.rank_pool import RankPool

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
