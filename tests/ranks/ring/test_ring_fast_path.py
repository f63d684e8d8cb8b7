"""A GPU's packed kernels around the ring, by stand-ins on a CPU: fp64's numbers, and few calls."""

from typing import Any

import pytest
import torch
from support.emulated_kernels import emulated
from support.ring_cases import compare_all

from fourfold.parallel.attention.flash_packages import FlashAttn
from fourfold.parallel.attention.kernels import CudnnAttention
from fourfold.parallel.attention.packed import PackedCudaFlash, PackedFlashAttn
from fourfold.parallel.ring import attention as ring_attention_module
from fourfold.parallel.testing.compare import assert_errors

KERNELS = {"flash_attn": lambda: FlashAttn(PackedFlashAttn()), "cudnn": lambda: CudnnAttention(PackedCudaFlash())}
DOCUMENTS = (0, 3, 3, 60, 61, 64, 70, 101, 130)
TOLERANCE = 1e-12
SHAPE = {"S": 137, "H": 4, "H_kv": 2}


def compared(kernel: str, cases: list[Any]) -> tuple[list[dict[str, float]], int, int]:
    """(the errors of each case, calls that were packed, calls in all) of this rank."""
    with emulated() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_attention_module, "select_backend", lambda *_: KERNELS[kernel]())
        errors = compare_all(cases)
    return errors, sum(name.endswith("packed") for name, *_ in seen.seen), len(seen.seen)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_kernels_around_the_ring_equal_fp64(ranks, kernel):
    options = [
        {"sharding": sharding, "window": window, "cu_seqlens": documents}
        for sharding in ("contiguous", "zigzag", "striped")
        for window in (None, (6, 0))
        for documents in (DOCUMENTS, None)
    ]
    options += [{"causal": False, "window": (20, 6), "cu_seqlens": DOCUMENTS}, {"heads_degree": 2, "window": (5, 0)}]
    cases = [(SHAPE, option, 2, torch.float64) for option in options]
    for rank, (answers, packed, total) in enumerate(ranks(2)(compared, kernel, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert_errors(errors, TOLERANCE, f"{kernel}, {case}, rank {rank}")
        assert 0 < packed <= total


@pytest.mark.parametrize("kernel", KERNELS)
def test_documents_are_a_few_calls_a_rank(ranks, kernel):
    """Fifty documents over two ranks: 200 blocks on the first, 100 on the second, and one call a hop and shape."""
    cases = [({"S": 400, "H": 4, "H_kv": 2}, {"cu_seqlens": tuple(range(0, 401, 8))}, 2, torch.float64)]
    answers = ranks(2)(compared, kernel, cases)
    assert max(error for errors, *_ in answers for error in errors[0].values()) < TOLERANCE
    # Two passes each: on the first rank triangles and squares of its own keys, and what it sees of the other's.
    assert [counts for _, *counts in answers] == [[6, 6], [4, 4]]
