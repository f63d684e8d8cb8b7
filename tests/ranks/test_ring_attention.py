"""Ring attention against fp64 attention of one process: outputs, every gradient, every mask, any length."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankFailure

from fourfold.parallel import ring_attention, shard_sequence, unshard_sequence
from fourfold.parallel.reference import attention_reference

# Relative error in the Frobenius norm. fp32: rounding of a few thousand products; bf16: 8 bits of mantissa.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def make_inputs(shape: dict[str, int], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    batch, heads, kv_heads, seq_len, size = (shape[key] for key in ("B", "H", "H_kv", "S", "D"))
    sizes = [(batch, count, seq_len, size) for count in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@cache
def first_ranks(size: int) -> dist.ProcessGroup | None:
    """The group of the first `size` ranks; every rank of the world calls."""
    return None if size == dist.get_world_size() else dist.new_group(list(range(size)))


def relative_error(value: torch.Tensor, truth: torch.Tensor, terms: float) -> float:
    """Of the Frobenius norm; of the terms' own where they cancel (a query with one key has dq = 0 exactly)."""
    norm = truth.norm().item()
    norm = norm if norm > 1e-6 * terms else terms
    return (value.double() - truth).norm().item() / norm if norm else value.double().norm().item()


def attend_and_compare(
    shape: dict[str, int], options: dict[str, Any], size: int, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Errors of o, dq, dk, dv, whole; a subgroup of the first `size` ranks works, the others look on."""
    shape = {"B": 1, "H": 2, "H_kv": 2, "D": 32} | shape
    group = first_ranks(size)
    if dist.get_rank() >= size:
        return {}
    q, k, v, grad = make_inputs(shape, dtype)
    sharded = {key: options[key] for key in ("sharding", "cu_seqlens") if key in options}

    def ring() -> list[torch.Tensor]:
        local = [shard_sequence(x, group, dim=2, **sharded).clone().requires_grad_() for x in (q, k, v)]
        out = ring_attention(*local, group, **options)
        out.backward(shard_sequence(grad, group, dim=2, **sharded))
        parts = [out.detach(), *(x.grad for x in local)]
        return [unshard_sequence(part, group, dim=2, **sharded) for part in parts]

    mine, again = ring(), ring()
    assert all(torch.equal(first, second) for first, second in zip(mine, again, strict=True)), "not repeatable"
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    masks = {key: options[key] for key in ("causal", "scale", "window", "cu_seqlens") if key in options}
    truth = attention_reference(*leaves, **masks)
    truth.backward(grad.double())
    truths = [truth.detach(), *(x.grad for x in leaves)]
    terms = grad.double().norm().item()
    return {
        name: relative_error(value, right, terms)
        for name, value, right in zip(("o", "dq", "dk", "dv"), mine, truths, strict=True)
    }


def check(ranks, size: int, shape: dict[str, int], options: dict[str, Any], dtype=torch.float32) -> None:
    pool = ranks(2 if size <= 2 else 4)
    for errors in pool(attend_and_compare, shape, options, size, dtype):
        assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


SHARDINGS = ("contiguous", "zigzag", "striped")


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_process(ranks, sharding, causal, size):
    check(ranks, size, {"B": 2, "H": 4, "H_kv": 2, "S": 193}, {"sharding": sharding, "causal": causal})


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("seq_len", [0, 1, 3, 7])
def test_sequences_shorter_than_the_ranks(ranks, sharding, seq_len):
    check(ranks, 4, {"S": seq_len}, {"sharding": sharding})


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("window", [(0, 0), (5, 0), (40, -1), (-1, 9), (17, 30), (300, 300)])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(ranks, sharding, window, causal):
    check(ranks, 4, {"S": 151}, {"sharding": sharding, "window": window, "causal": causal})


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("window", [None, (20, 6)])
@pytest.mark.parametrize("cu_seqlens", [(0, 3, 3, 100, 101, 157), (0, 157), (0, 60, 120), (0,)])
def test_packed_documents(ranks, sharding, window, cu_seqlens):
    for causal in (True, False):
        options = {"sharding": sharding, "window": window, "causal": causal, "cu_seqlens": cu_seqlens}
        check(ranks, 4, {"S": 157, "H": 2, "H_kv": 1}, options)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("heads_degree", [2, 4])
def test_heads_times_ring(ranks, sharding, heads, heads_degree):
    shape = {"B": 2, "H": heads[0], "H_kv": heads[1], "S": 97}
    check(ranks, 4, shape, {"sharding": sharding, "heads_degree": heads_degree})


@pytest.mark.parametrize("size", [32, 80, 128, 256])
def test_bf16_and_head_sizes(ranks, size):
    check(ranks, 2, {"H": 4, "H_kv": 2, "S": 301, "D": size}, {"scale": 0.1}, torch.bfloat16)


def refused(options: dict[str, Any], shape: tuple[int, ...] = (1, 4, 8, 16)) -> None:
    x = torch.randn(shape)
    ring_attention(x, x[:, :2], x[:, :2], None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "snake"}, "choose one of contiguous, zigzag, striped"),
        ({"window": (-2, 0)}, "-1 for all"),
        ({"cu_seqlens": [1, 16]}, "starts with 0"),
        ({"cu_seqlens": [0, 9, 4]}, "falls somewhere"),
        ({"cu_seqlens": [0, 17]}, "ends at 17, but the sequence has 16"),
        ({"heads_degree": 3}, "does not divide the group's 2 ranks"),
        ({"backend": "cudnn"}, "needs tensors on a CUDA device"),
        ({"backend": "fast"}, "choose one of"),
        ({"seq_len": 17}, "its zigzag shard of seq_len=17 has"),
    ],
)
def test_refusals(ranks, options, message):
    with pytest.raises(RankFailure, match=f"ValueError: .*{message}"):
        ranks(2)(refused, options)


def lose_a_token() -> None:
    x = torch.randn(1, 1, 8 - dist.get_rank(), 16)
    ring_attention(x, x, x, None)


def test_a_wrong_shard_is_an_error_on_every_rank_not_a_hang(ranks):
    with pytest.raises(RankFailure, match=r"the ranks hold \[8, 7\] tokens"):
        ranks(2)(lose_a_token, timeout_s=20)
