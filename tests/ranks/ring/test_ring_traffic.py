"""What the ring sends, counted; and that it computes while it sends, on a modelled link and a modelled clock."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fourfold.parallel import ring_attention
from fourfold.parallel.attention.blocks import keys_sent
from fourfold.parallel.attention.kernels import CpuFlash
from fourfold.parallel.sequence.sharding import ShardedSequence, shard_length, shard_ranges

HEADS, KV_HEADS, SIZE = 4, 2, 16


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def local_inputs(seq_len: int, sharding: str, cu_seqlens: tuple[int, ...] | None, dtype: torch.dtype) -> list:
    shard = shard_ranges(seq_len, dist.get_world_size(), sharding, cu_seqlens)[dist.get_rank()]
    return [
        torch.randn(1, heads, shard_length(shard), SIZE, dtype=dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def sent_bytes(seq_len: int, options: dict[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """(forward, backward) bytes this rank handed to torch.distributed for sending."""
    sent = 0

    def counting(original: Any) -> Any:
        def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
            nonlocal sent
            sent += sum(op.tensor.numel() * op.tensor.element_size() for op in operations if op.op is dist.isend)
            return original(operations)

        return batch

    with patched(dist, "batch_isend_irecv", counting):
        inputs = local_inputs(seq_len, options.get("sharding", "zigzag"), options.get("cu_seqlens"), dtype)
        out = ring_attention(*inputs, None, **options)
        forward = sent
        out.sum().backward()
    return forward, sent - forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"sharding": "zigzag"},
        {"sharding": "contiguous"},
        {"sharding": "striped"},
        {"causal": False},
        {"window": (50, 0)},
        {"sharding": "contiguous", "window": (50, 0)},
        {"cu_seqlens": (0, 300, 640)},
    ],
)
def test_bytes_sent_are_the_formula(ranks, options, dtype):
    for rank, (forward, backward) in enumerate(ranks(4)(sent_bytes, 640, options, dtype)):
        sent, received = keys_sent(rank, ShardedSequence(4, 640, **options))
        assert forward == sent * 2 * KV_HEADS * SIZE * dtype.itemsize
        assert backward == forward + received * 2 * KV_HEADS * SIZE * 4


def test_the_closed_forms():
    size, length = 8, 1600
    share = length // size
    for rank in range(size):
        assert keys_sent(rank, ShardedSequence(size, length, causal=False))[0] == (size - 1) * share
        assert keys_sent(rank, ShardedSequence(size, length))[0] == (size - 1 + rank) * share // 2
        assert keys_sent(rank, ShardedSequence(size, length, "contiguous"))[0] == (size - 1 - rank) * share
        # A window of one shard's length reaches one shard back, whatever the number of ranks.
        near = ShardedSequence(size, length, "contiguous", window=(share, 0))
        assert keys_sent(rank, near)[0] == (share if rank < size - 1 else 0)


def test_heads_exchange_bytes(ranks):
    """heads_degree=2 of 4: q, k, v and o swap half of the heads; the ring is 2 long with half of the heads."""
    unit = 640 // 4 * SIZE * 4
    for rank, (forward, _) in enumerate(ranks(4)(sent_bytes, 640, {"heads_degree": 2}, torch.float32)):
        swapped = (2 * HEADS + 2 * KV_HEADS) * unit // 2
        sent, _ = keys_sent(rank // 2, ShardedSequence(4, 640, heads_degree=2))
        assert forward == swapped + sent * 2 * KV_HEADS // 2 * SIZE * 4


COMPUTE_S, GRADIENT_S = 1.0, 2.5


def modelled_seconds(link_s: float) -> tuple[float, float]:
    """Forward and backward on a clock that only kernels (COMPUTE_S, GRADIENT_S a hop) and the link (a batch) move."""
    clock = 0.0

    class Slow:
        def __init__(self, work: dist.Work) -> None:
            self.work, self.arrival = work, clock + link_s

        def wait(self) -> None:
            nonlocal clock
            self.work.wait()
            clock = max(clock, self.arrival)

    def slow(original: Any) -> Any:
        return lambda operations: [Slow(work) for work in original(operations)]

    def taking(seconds: float) -> Any:
        def make(original: Any) -> Any:
            def kernel(*args: Any, **kwargs: Any) -> Any:
                nonlocal clock
                clock += seconds
                return original(*args, **kwargs)

            return kernel

        return make

    with (
        patched(dist, "batch_isend_irecv", slow),
        patched(CpuFlash, "forward", taking(COMPUTE_S)),
        patched(CpuFlash, "backward", taking(GRADIENT_S)),
    ):
        inputs = local_inputs(64, "contiguous", None, torch.float32)
        out = ring_attention(*inputs, None, sharding="contiguous", causal=False)
        forward = clock
        out.sum().backward()
    return forward, clock - forward


@pytest.mark.parametrize("link_s", [0.0, 0.3, 0.9, 2.0, 10.0])
def test_hops_are_hidden_behind_the_work(ranks, link_s):
    for forward, backward in ranks(4)(modelled_seconds, link_s):
        assert forward == pytest.approx(COMPUTE_S + 3 * max(COMPUTE_S, link_s))
        # A hop's gradients leave when it is computed and arrive behind the next hop; only the last have nothing to
        # hide behind. Where the link is the slower one, they overtake nothing: keys are already on their way.
        assert backward == pytest.approx(GRADIENT_S + 3 * max(GRADIENT_S, link_s) + link_s)
