"""Micro-batches in flight as a checkpoint keeps them, and where there are none to keep."""

from dataclasses import replace

import pytest
import torch

from fourfold.launch.training.settings import TrainSettings
from fourfold.launch.training.undrained import as_bytes, check_in_flight, from_bytes, make_room, other_layout
from fourfold.layouts.inputs.layout import Layout

SETTINGS = TrainSettings(steps=8, checkpoint_every=2, checkpoints_in_flight=True)
PLAN = Layout(pp=4, global_batch=4, seq_len=8, schedule="lockstep")  # the first stage updates after 7 micro-batches


@pytest.mark.parametrize(
    ("layout", "settings", "said"),
    [
        ({"schedule": "1f1b"}, {}, "checkpoints_in_flight with schedule='1f1b', which drains at every step"),
        ({}, {"checkpoint_every": 0}, "checkpoint_every=0: there are no checkpoints"),
        ({}, {"checkpoint_every": 1}, "after 7 micro-batches, and a step has 4; give checkpoint_every of at least 2"),
        ({"schedule": "2bw"}, {"checkpoint_every": 1}, "after 7 micro-batches, and a step has 4"),
        ({"schedule": "1f1b-async", "global_batch": 3}, {"checkpoint_every": 1}, "after 4 micro-batches, and a step"),
    ],
)
def test_checkpoints_in_flight_are_refused_where_they_mean_nothing(layout, settings, said):
    plan, wanted = replace(PLAN, **layout), replace(SETTINGS, **settings)
    with pytest.raises(ValueError, match=said):
        check_in_flight(plan, wanted)
    check_in_flight(plan, replace(wanted, checkpoints_in_flight=False))
    check_in_flight(PLAN, replace(SETTINGS, checkpoint_every=8))


def test_the_shortest_time_to_a_checkpoint_in_flight_is_taken():
    check_in_flight(PLAN, SETTINGS)
    check_in_flight(replace(PLAN, schedule="1f1b-async"), replace(SETTINGS, checkpoint_every=1))


def test_a_state_comes_back_from_bytes_with_its_own_types():
    weights = torch.arange(4.0, dtype=torch.float64)
    state = {"sums": [None, torch.ones(2)], "recipes": {7: (weights, ("tensor", 0), True)}, "previous": [weights]}
    saved = as_bytes(state)
    extra = {"in_flight.pp2.dp0.pp0": torch.empty(0, dtype=torch.uint8), "before.weight": torch.zeros(3)}
    make_room(extra, {"in_flight.pp2.dp0.pp0": saved.shape, "before.weight": torch.Size([5])})
    assert extra["before.weight"].shape == (3,)
    back = from_bytes(extra["in_flight.pp2.dp0.pp0"].copy_(saved), torch.device("cpu"))
    assert back["sums"][0] is None
    assert torch.equal(back["sums"][1], torch.ones(2))
    kept, *rest = back["recipes"][7]
    assert rest == [("tensor", 0), True]
    assert kept.dtype == torch.float64
    assert torch.equal(kept, weights)
    assert kept.data_ptr() == back["previous"][0].data_ptr()  # one storage is written once


def test_the_layout_of_what_is_in_flight_is_read_from_its_name():
    own, others = "in_flight.pp2 mb1 0.5.dp0.pp1", "in_flight.pp4 mb1.dp0.pp1"
    assert other_layout([own, "before.weight"], ["in_flight.pp2 mb1 0.5.dp1.pp0"]) is None
    assert other_layout(["before.weight"], [own]) is None
    assert other_layout([others], [own]) == "pp4 mb1"
    assert other_layout([own], []) == "pp2 mb1 0.5"
