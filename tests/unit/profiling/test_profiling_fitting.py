"""Latency and bandwidth come back from times that were made of them, also where samples are disturbed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.profiling.fitting import fit_latency_bandwidth, spread

SIZES = [1024, 16384, 131072, 1 << 20, 1 << 22, 1 << 24]


@given(latency=st.floats(1e-6, 1e-2), bandwidth=st.floats(1e8, 1e12))
def test_a_line_is_found(latency, bandwidth):
    times = [latency + size / bandwidth for size in SIZES]
    fitted_latency, fitted_bandwidth = fit_latency_bandwidth(SIZES, times)
    for size, time in zip(SIZES, times, strict=True):
        assert fitted_latency + size / fitted_bandwidth == pytest.approx(time, rel=1e-6)


def test_two_disturbed_samples_do_not_move_the_line():
    times = [1e-4 + size / 2e9 for size in SIZES]
    times[1] *= 7
    times[4] *= 3
    assert fit_latency_bandwidth(SIZES, times) == pytest.approx((1e-4, 2e9), rel=1e-6)


def test_larger_messages_that_take_less_time_still_give_a_usable_line():
    latency, bandwidth = fit_latency_bandwidth([1024, 4096], [3e-4, 2e-4])
    assert latency == 0
    assert bandwidth > 0


@pytest.mark.parametrize(("sizes", "times"), [([1024], [0.0]), ([0], [1e-6]), ([], [])])
def test_what_cannot_be_fitted_is_refused(sizes, times):
    with pytest.raises(ValueError, match="cannot fit"):
        fit_latency_bandwidth(sizes, times)


def test_spread_ignores_the_outer_fifths():
    assert spread([1.0, 1.0, 1.0, 1.0, 1.0, 9.0]) == 0
    assert spread([1.0]) == 0
    assert spread([0.8, 0.9, 1.0, 1.1, 1.2]) == pytest.approx(0.24)
