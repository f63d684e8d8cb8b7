"""Shards and back: an exact inverse, gradients of the sum of all ranks' losses, labels shifted before they are cut."""

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankFailure

from fourfold.parallel import shard_sequence, unshard_sequence
from fourfold.parallel.sequence import shard_labels, shard_positions
from fourfold.parallel.testing.compare import assert_ranks

SHARDINGS = ("contiguous", "zigzag", "striped")


def there_and_back(seq_len: int, sharding: str, cu_seqlens: tuple[int, ...] | None) -> dict[str, float]:
    """Elements that did not come back, and the gradient's largest error relative to its element."""
    rules = {"sharding": sharding, "cu_seqlens": cu_seqlens}
    x = torch.randn(2, seq_len, 3, dtype=torch.float64).requires_grad_()
    shard = shard_sequence(x, None, dim=1, **rules)
    whole = unshard_sequence(shard, None, dim=-2, **rules)
    weights = torch.randn(2, seq_len, 3, dtype=torch.float64) * (dist.get_rank() + 1)
    (whole * weights).sum().backward()
    # x is this rank's own copy: its shard is read by every rank's loss, the rest by none.
    total = weights.clone()
    dist.all_reduce(total)
    mine = torch.zeros(seq_len, dtype=torch.float64)
    positions = shard_sequence(torch.arange(seq_len), None, dim=0, **rules)
    mine[positions] = 1.0
    truth = total * mine[None, :, None]
    return {
        "elements changed": float((whole != x).sum()),
        "gradient": float(((x.grad - truth).abs() / truth.abs().clamp_min(1e-300)).max()) if seq_len else 0.0,
    }


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_unshard_is_the_inverse_and_both_are_differentiable(ranks, sharding):
    for seq_len, cu_seqlens in [(1, None), (17, None), (40, (0, 3, 30)), (0, None)]:
        answers = ranks(4)(there_and_back, seq_len, sharding, cu_seqlens)
        assert_ranks(answers, 1e-15, f"{seq_len} tokens, {sharding}, cu_seqlens={cu_seqlens}")


def wrong_sharding() -> str:
    # 3 and 4 tokens are no contiguous shards of 7... but 4 and 3 are no zigzag ones.
    try:
        unshard_sequence(torch.randn(4 - dist.get_rank(), 2), None, dim=0, sharding="contiguous")
    except ValueError as error:
        return str(error)
    return "accepted"


def test_shards_of_another_sharding_are_refused_on_every_rank(ranks):
    for rank, answer in enumerate(ranks(2)(wrong_sharding)):
        assert "the ranks hold [4, 3] tokens, but contiguous" in answer, f"rank {rank}"


def test_positions_and_labels_without_a_group():
    assert shard_positions(8, (0, 2)).tolist() == [0, 1, 6, 7]
    assert shard_positions(8, (1, 2), "contiguous", (0, 6, 8)).tolist() == [4, 5, 0, 1]
    labels = torch.arange(10, 18).unsqueeze(0)
    assert shard_labels(labels, (0, 2)).tolist() == [[11, 12, 17, -100]]
    # Documents of 5 and 2 tokens and one of padding: nothing is predicted across an end.
    assert shard_labels(labels, (0, 1), cu_seqlens=(0, 5, 7)).tolist() == [[11, 12, 13, 14, -100, 16, -100, -100]]


def stranger() -> None:
    group = dist.new_group([0])
    shard_sequence(torch.randn(4), group, dim=0)


def test_a_rank_outside_the_group_is_told(ranks):
    with pytest.raises(RankFailure, match="rank 1 is not in this group"):
        ranks(2)(stranger)
