"""Ring attention against fp64 attention of one process: outputs, every gradient, every mask, any length."""

import pytest
import torch
import torch.distributed as dist
from support.ring_cases import TOLERANCE, compare_all, first_ranks

from fourfold.parallel import ring_attention
from fourfold.parallel.testing.compare import assert_errors

SHARDINGS = ("contiguous", "zigzag", "striped")


def check(ranks, size: int, shapes: list[dict], options: list[dict], dtype=torch.float32) -> None:
    """Every shape with every set of options, in one visit to the ranks."""
    cases = [(shape, option, size, dtype) for shape in shapes for option in options]
    for rank, answers in enumerate(ranks(2 if size <= 2 else 4)(compare_all, cases)):
        for case, errors in zip(cases, answers, strict=True):
            assert_errors(errors, TOLERANCE[dtype], f"{case}, rank {rank}")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_process(ranks, size):
    options = [{"sharding": sharding, "causal": causal} for sharding in SHARDINGS for causal in (True, False)]
    check(ranks, size, [{"B": 2, "H": 4, "H_kv": 2, "S": 193}], options)


def test_sequences_shorter_than_the_ranks(ranks):
    check(ranks, 4, [{"S": seq_len} for seq_len in (0, 1, 3, 7)], [{"sharding": sharding} for sharding in SHARDINGS])


WINDOWS = [(0, 0), (5, 0), (40, -1), (-1, 9), (17, 30), (300, 300)]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_windows(ranks, sharding):
    options = [
        {"sharding": sharding, "window": window, "causal": causal} for window in WINDOWS for causal in (True, False)
    ]
    check(ranks, 4, [{"S": 151}], options)


DOCUMENTS = [(0, 3, 3, 100, 101, 157), (0, 157), (0, 60, 120), (0,)]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_packed_documents(ranks, sharding):
    options = [
        {"sharding": sharding, "window": window, "causal": causal, "cu_seqlens": cu_seqlens}
        for window in (None, (20, 6))
        for causal in (True, False)
        for cu_seqlens in DOCUMENTS
    ]
    check(ranks, 4, [{"S": 157, "H": 2, "H_kv": 1}], options)


@pytest.mark.parametrize("heads_degree", [2, 4])
def test_heads_times_ring(ranks, heads_degree):
    shapes = [{"B": 2, "H": heads, "H_kv": kv_heads, "S": 97} for heads, kv_heads in [(8, 8), (8, 4), (8, 2), (4, 1)]]
    options = [{"sharding": sharding, "heads_degree": heads_degree} for sharding in SHARDINGS]
    options.append({"heads_degree": heads_degree, "window": (9, 4), "causal": False})
    check(ranks, 4, shapes, options)
    check(ranks, 4, [{"H": 4, "H_kv": 2, "S": 157}], [{"heads_degree": heads_degree, "cu_seqlens": DOCUMENTS[0]}])


def test_head_sizes_in_bf16(ranks):
    shapes = [{"H": 4, "H_kv": 2, "S": 301, "D": size} for size in (32, 80, 128, 256)]
    check(ranks, 2, shapes, [{"scale": 0.1}, {"backend": "math"}], torch.bfloat16)


REFUSALS = [
    ({"sharding": "snake"}, "choose one of contiguous, zigzag, striped"),
    ({"window": (-2, 0)}, "-1 for all"),
    ({"cu_seqlens": [1, 16]}, "starts with 0"),
    ({"cu_seqlens": [0, 9, 4]}, "falls somewhere"),
    ({"cu_seqlens": [0, 17]}, "ends at 17, but the sequence has 16"),
    ({"cu_seqlens": [0, 16], "shape": (2, 4, 8, 16)}, "pack the documents into one row"),
    ({"heads_degree": 3}, "does not divide the group's 2 ranks"),
    ({"heads_degree": 2, "shape": (1, 3, 8, 16), "kv_heads": 1}, "does not divide 3 query heads"),
    ({"kv_heads": 3}, "4 query heads over 3 key heads"),
    ({"backend": "cudnn"}, "needs tensors on a CUDA device"),
    ({"backend": "fast"}, "choose one of"),
    ({"seq_len": 40}, "its zigzag shard of seq_len=40 has 20"),
    ({"k_dtype": torch.bfloat16}, "cast and move them to one dtype and device"),
]


def refusals() -> list[str]:
    """What ring_attention says to each case; every rank must say something, or the others would hang."""
    answers = []
    for options, _ in REFUSALS:
        options = dict(options)
        shape, kv_heads = options.pop("shape", (1, 4, 8, 16)), options.pop("kv_heads", 2)
        q = torch.randn(shape)
        k = q[:, :kv_heads].to(options.pop("k_dtype", q.dtype))
        try:
            ring_attention(q, k, q[:, :kv_heads], None, **options)
            answers.append("accepted")
        except ValueError as error:
            answers.append(str(error))
    return answers


def test_refusals(ranks):
    for rank, answers in enumerate(ranks(2)(refusals)):
        for answer, (options, message) in zip(answers, REFUSALS, strict=True):
            assert message in answer, f"{options}, rank {rank}"


def lose_a_token() -> str:
    x = torch.randn(1, 1, 8 - dist.get_rank(), 16)
    try:
        ring_attention(x, x, x, None)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_wrong_shard_is_an_error_on_every_rank_not_a_hang(ranks):
    for rank, answer in enumerate(ranks(2)(lose_a_token, timeout_s=20)):
        assert "the ranks hold [8, 7] tokens" in answer, f"rank {rank}"


def outsider() -> str:
    group = first_ranks(3)
    x = torch.randn(1, 1, 4, 16)
    try:
        ring_attention(x, x, x, group)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_rank_outside_the_group_is_told(ranks):
    assert ranks(4)(outsider) == ["accepted"] * 3 + ["rank 3 is not in this group: only its members may call"]
