"""The loader: one order for any cut over ranks, left and taken up again at the batch."""

from itertools import islice

import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from fourfold.launch.training.loader import PackedBatches, TokenBatches

TOKENS = torch.arange(500, dtype=torch.int32)


def batches(**changes: object) -> TokenBatches:
    return TokenBatches(TOKENS, **{"seq_len": 8, "global_batch": 6, "seed": 3, **changes})  # type: ignore[arg-type]


def test_any_cut_over_ranks_is_the_same_order():
    whole = list(islice(batches(), 4))
    parts = [list(islice(batches(rows=slice(start, start + 2)), 4)) for start in (0, 2, 4)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), batch)
        assert batch.shape == (6, 8)
    assert not torch.equal(whole[0], whole[1])


def test_it_goes_on_where_it_was_left_under_another_cut():
    truth = list(islice(batches(), 5))
    left = batches(rows=slice(0, 3))
    list(islice(left, 3))
    again = batches(rows=slice(0, 6))
    again.load_state_dict(left.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(truth[3:], islice(again, 2), strict=True))


def test_torchdata_keeps_its_state():
    truth = list(islice(batches(), 5))
    loader = StatefulDataLoader(batches(), batch_size=None)
    taken = list(islice(loader, 3))
    again = StatefulDataLoader(batches(), batch_size=None)
    again.load_state_dict(loader.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(truth, [*taken, *islice(again, 2)], strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"seq_len": 1}, "seq_len=1"), ({"seq_len": 501}, "there are 500 tokens"), ({"global_batch": 0}, "one row")],
)
def test_what_gives_no_batch_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        batches(**changes)


def test_another_order_is_refused():
    state = batches().state_dict()
    for change in ({"seed": 4}, {"seq_len": 9}, {"global_batch": 12}):
        with pytest.raises(ValueError, match="the batches were of"):
            batches(**change).load_state_dict(state)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        TokenBatches(torch.zeros(9), seq_len=2, global_batch=1)


def packed(**changes: object) -> PackedBatches:
    return PackedBatches(TOKENS, np.arange(0, 500, 7), **{"seq_len": 16, "global_batch": 6, **changes})  # type: ignore[arg-type]


def test_packed_batches_go_on_where_they_were_left_under_another_cut():
    truth = list(islice(packed(), 8))
    left = packed(rows=slice(0, 3))
    list(islice(left, 5))
    again = packed(rows=slice(2, 6))
    again.load_state_dict(left.state_dict())
    for whole, part in zip(truth[5:], islice(again, 3), strict=True):
        for name in ("ids", "labels", "document_ids"):
            assert torch.equal(getattr(whole, name)[2:6], getattr(part, name))
    with pytest.raises(ValueError, match="the batches were of num_documents=72, these are of None"):
        batches(seed=0, seq_len=16).load_state_dict(left.state_dict())


@pytest.mark.parametrize("documents", [[], [1], [0, 0], [0, 500], [[0]]], ids=str)
def test_places_that_are_none_are_refused(documents):
    with pytest.raises(ValueError, match=r"rising from 0 and below 500"):
        PackedBatches(TOKENS, np.array(documents, dtype=np.int64), seq_len=8, global_batch=1)
