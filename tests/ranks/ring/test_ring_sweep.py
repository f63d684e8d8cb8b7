"""Any combination of sharding, length, documents, window, heads and ranks, drawn by hypothesis; prints the worst.

The suite draws a few dozen cases, always the same; `--hypothesis-profile=thorough` draws 500.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ring_cases import TOLERANCE, compare_all

from fourfold.parallel.sequence.sharding import SHARDINGS

NUM_CASES = 25 if settings().max_examples == 100 else settings().max_examples


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, Any], int, torch.dtype]:
    size = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 150), max_size=4))
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    seq_len = ends[-1] + draw(st.integers(0, 260))
    packed = draw(st.booleans())
    degree = draw(st.sampled_from([degree for degree in (1, 2, 3, 4) if size % degree == 0]))
    kv_heads = draw(st.sampled_from([heads for heads in (1, 2, 3, 4, 6) if not heads % degree or not degree % heads]))
    groups = draw(st.sampled_from([groups for groups in (1, 2, 3, 4) if not kv_heads * groups % degree]))
    reach = st.integers(-1, 200)
    shape = {
        "B": 1 if packed else draw(st.integers(1, 2)),
        "H": kv_heads * groups,
        "H_kv": kv_heads,
        "S": seq_len,
        "D": draw(st.sampled_from([32, 64, 80, 128, 256])),
    }
    options: dict[str, Any] = {
        "sharding": draw(st.sampled_from(SHARDINGS)),
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(reach, reach)),
        "heads_degree": degree,
        # Scores of standard deviation 2 at most: peaked rows lose digits in fp32 on one process too.
        "scale": draw(st.none() | st.sampled_from([0.05, 0.125])),
    }
    if packed:
        options["cu_seqlens"] = tuple(ends)
    return shape, options, size, draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))


@pytest.fixture(scope="module")
def worst():
    """The largest error of each dtype and its case, shown at the end with -s."""
    seen: dict[torch.dtype, tuple[float, str]] = {}
    yield seen
    for dtype, (error, what) in seen.items():
        print(f"\nlargest relative error in {dtype}: {error:.2e} ({what})")


@pytest.mark.timeout(3600)  # for the thorough profile
@settings(
    max_examples=NUM_CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_any_case_equals_one_process(ranks, worst, case):
    dtype = case[-1]
    for rank, (errors,) in enumerate(ranks(4)(compare_all, [case])):
        for name, error in errors.items():
            assert error <= TOLERANCE[dtype], f"{name} on rank {rank}"
            if error > worst.get(dtype, (-1.0, ""))[0]:
                worst[dtype] = (error, f"{name}, {case[2]} ranks, {case[0]}, {case[1]}")
