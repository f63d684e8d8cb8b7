"""Linformer and the two-pass ring against fp64 on one process; what Linformer sends does not depend on the length."""

import pytest
import torch
import torch.distributed as dist

from fourfold.parallel import ring_attention, shard_sequence, unshard_sequence
from fourfold.parallel.ring import linformer_attention, two_pass_ring_attention
from fourfold.parallel.testing.compare import assert_ranks, relative_error
from fourfold.parallel.testing.reference import attention_reference, linformer_reference


def errors(names: tuple[str, ...], mine: list[torch.Tensor], truths: list[torch.Tensor]) -> dict[str, float]:
    return {name: relative_error(a, b) for name, a, b in zip(names, mine, truths, strict=True)}


def linformer_errors(seq_len: int, sharding: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 4, seq_len, 16), (2, 2, seq_len, 16), (2, 2, seq_len, 16), (8, seq_len), (8, seq_len)]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator)
    dims = [2, 2, 2, 1, 1]
    local = [
        shard_sequence(x, None, dim=dim, sharding=sharding).clone().requires_grad_()
        for x, dim in zip(whole, dims, strict=True)
    ]
    out = linformer_attention(*local, None)
    out.backward(shard_sequence(grad, None, dim=2, sharding=sharding))
    mine = [
        unshard_sequence(x, None, dim=dim, sharding=sharding)
        for x, dim in zip([out.detach(), *(x.grad for x in local)], [2, *dims], strict=True)
    ]
    leaves = [x.double().requires_grad_() for x in whole]
    truth = linformer_reference(*leaves)
    truth.backward(grad.double())
    return errors(
        ("o", "dq", "dk", "dv", "d key_projection", "d value_projection"),
        mine,
        [truth.detach(), *(x.grad for x in leaves)],
    )


@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
def test_linformer_equals_one_process(ranks, sharding):
    assert_ranks(ranks(4)(linformer_errors, 61, sharding), 2e-6, sharding)  # fp32 rounding


def reduced_bytes(seq_len: int) -> int:
    total = 0
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    q, k, v = (torch.randn(1, 2, seq_len, 16, requires_grad=True) for _ in range(3))
    projection = torch.randn(8, seq_len)
    dist.all_reduce = counting
    try:
        linformer_attention(q, k, v, projection, projection, None).sum().backward()
    finally:
        dist.all_reduce = original
    return total


def test_linformer_sends_the_same_for_any_length(ranks):
    # Keys and values, 2 heads, 8 rows of 16 fp32, each way.
    assert ranks(2)(reduced_bytes, 10) == ranks(2)(reduced_bytes, 1000) == [2 * 2 * 2 * 8 * 16 * 4] * 2


def linformer_refusal() -> str:
    x = torch.randn(1, 2, 10, 16)
    try:
        linformer_attention(x, x, x, torch.randn(8, 20), torch.randn(8, 20), None)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_linformer_refuses_whole_projections(ranks):
    for rank, answer in enumerate(ranks(2)(linformer_refusal)):
        assert "each is [R, 10], this rank's columns" in answer, f"rank {rank}"


def two_pass_errors(causal: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(4)
    q, k, v, grad = (torch.randn(2, 2, 48, 16, generator=generator) for _ in range(4))
    local = [shard_sequence(x, None, dim=2, sharding="contiguous").clone().requires_grad_() for x in (q, k, v)]
    out = two_pass_ring_attention(*local, None, causal=causal)
    out.backward(shard_sequence(grad, None, dim=2, sharding="contiguous"))
    parts = [out.detach(), *(x.grad for x in local)]
    mine = [unshard_sequence(x, None, dim=2, sharding="contiguous") for x in parts]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = attention_reference(*leaves, causal=causal)
    truth.backward(grad.double())
    return errors(("o", "dq", "dk", "dv"), mine, [truth.detach(), *(x.grad for x in leaves)])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_the_two_pass_ring_equals_one_process(ranks, size, causal):
    assert_ranks(ranks(size)(two_pass_errors, causal), 2e-6, f"{size} ranks, causal={causal}")  # fp32 rounding


def window_bytes(seq_len: int) -> int:
    total = 0
    original = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal total
        total += sum(op.tensor.numel() for op in operations if op.op is dist.isend)
        return original(operations)

    x = torch.randn(1, 1, seq_len // dist.get_world_size(), 16, requires_grad=True)
    dist.batch_isend_irecv = counting
    try:
        ring_attention(x, x, x, None, sharding="contiguous", window=(20, 0)).sum().backward()
    finally:
        dist.batch_isend_irecv = original
    return total


def test_a_window_sends_the_same_for_any_length(ranks):
    # Rank 0 sends its last 20 keys and values, twice; rank 1 returns their gradients.
    assert ranks(2)(window_bytes, 100) == ranks(2)(window_bytes, 1000) == [4 * 20 * 16, 2 * 20 * 16]
