"""The pool itself: results in rank order, a failure shown and survived, a hang ended."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import MOST_THREADS, RankFailure, RankPools


def add_ranks(offset: int) -> float:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return total.item()


def fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ArithmeticError("deliberate")
    dist.barrier()


def test_results_come_back_from_every_rank(ranks):
    assert ranks(2)(add_ranks, 10) == [21.0, 21.0]


def make_groups(count: int) -> int:
    for _ in range(count):
        group = dist.new_group()
        dist.barrier(group)
    return os.getpid()


def test_a_world_that_gathered_threads_is_replaced(ranks):
    before = ranks(2)(make_groups, MOST_THREADS)
    after = ranks(2)(make_groups, 0)
    assert not set(before) & set(after)
    assert ranks(2)(make_groups, 0) == after


def test_a_failing_rank_is_named_and_the_pool_recovers(ranks):
    ranks(2)(add_ranks, 0)  # started
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2.*ArithmeticError: deliberate"):
        ranks(2)(fail_on_last_rank)
    assert time.monotonic() - start < 60  # rank 0 waits in a barrier for 120 s if nobody ends it
    assert ranks(2)(add_ranks, 0) == [1.0, 1.0]


def test_a_hanging_rank_is_ended(ranks):
    with pytest.raises(RankFailure, match="gave no answer within"):
        ranks(2)(time.sleep, 600, timeout_s=1.0)


def test_a_world_that_is_not_asked_for_is_closed():
    pools = RankPools()
    try:
        before = pools(1)(make_groups, 0)
        pools.close_unused()
        assert pools(1)(make_groups, 0) == before
        pools.close_unused()
        pools.close_unused()
        assert pools(1)(make_groups, 0) != before
    finally:
        pools.close()
