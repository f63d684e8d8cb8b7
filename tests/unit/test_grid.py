"""Rank arithmetic and the cut of layers into stages, as literal tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.parallel.grid import Grid, interleaved_ranges, layer_ranges


def test_tp_counts_fastest():
    grid = Grid(dp=2, cp=2, tp=2)
    assert [tuple(grid.coordinates(rank).values()) for rank in range(8)] == [
        (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1),
        (1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 0, 1, 1),
    ]  # fmt: skip
    assert {axis: grid.stride(axis) for axis in ("dp", "pp", "cp", "tp")} == {"dp": 4, "pp": 4, "cp": 2, "tp": 1}


def test_what_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="tp=0"):
        Grid(tp=0)
    with pytest.raises(ValueError, match="rank 4 is outside"):
        Grid(dp=4).coordinates(4)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "sizes"),
    [(4, 1, [4]), (4, 2, [2, 2]), (5, 2, [3, 2]), (5, 3, [2, 2, 1]), (6, 4, [1, 2, 2, 1]), (7, 4, [2, 2, 2, 1])],
)
def test_the_ends_stay_light(num_layers, num_stages, sizes):
    assert [len(stage) for stage in layer_ranges(num_layers, num_stages)] == sizes


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "less", "sizes"),
    [
        (8, 4, (0, 1), [2, 3, 2, 1]),
        (8, 2, (0, 2), [5, 3]),
        (126, 16, (1, 1), [7] + [8] * 14 + [7]),
        (8, 4, (1, 1), [1, 3, 3, 1]),
    ],
)
def test_the_ends_count_for_layers(num_layers, num_stages, less, sizes):
    assert [len(stage) for stage in layer_ranges(num_layers, num_stages, *less)] == sizes
    with pytest.raises(ValueError, match="head_counts_as=9"):
        layer_ranges(8, 2, 0, 9)


@given(st.integers(1, 200), st.integers(1, 64))
def test_every_layer_is_on_one_stage(num_layers, num_stages):
    if num_layers < num_stages:
        with pytest.raises(ValueError, match=f"pp={num_stages}"):
            layer_ranges(num_layers, num_stages)
        return
    stages = layer_ranges(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1 or num_stages == 1


def test_runs_are_dealt_in_rounds():
    assert interleaved_ranges(8, 2, 2) == [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]
    assert interleaved_ranges(7, 2, 3) == [
        [range(2), range(3, 4), range(5, 6)],
        [range(2, 3), range(4, 5), range(6, 7)],
    ]


@given(st.integers(1, 100), st.integers(1, 16), st.integers(1, 8))
def test_interleaving_moves_no_layer_to_another_share(num_layers, num_ranks, chunks):
    """What a rank holds is what the planner prices: as many layers as without."""
    if num_layers < num_ranks * chunks:
        with pytest.raises(ValueError, match=f"pp={num_ranks} x vp={chunks}"):
            interleaved_ranges(num_layers, num_ranks, chunks)
        return
    runs = interleaved_ranges(num_layers, num_ranks, chunks)
    dealt = [runs[rank][chunk] for chunk in range(chunks) for rank in range(num_ranks)]
    assert [layer for run in dealt for layer in run] == list(range(num_layers))
    assert all(len(run) >= 1 for run in dealt)
    assert [sum(map(len, each)) for each in runs] == [len(run) for run in layer_ranges(num_layers, num_ranks)]
