"""Everything that is measured: each maker returns a function that runs one forward and backward on this rank.

The tensors of one case are B1 H8 D64 fp32, tokens before heads in memory, as projections in a model leave them.
"""

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fourfold.parallel import ring_attention
from fourfold.parallel.ring import two_pass_ring_attention
from fourfold.parallel.sequence.sharding import shard_length, shard_ranges

HEADS, HEAD_SIZE = 8, 64
Run = Callable[[], Any]


def packed_documents(seq_len: int) -> tuple[int, ...]:
    """Documents of 1/2, 1/4, 1/8, 1/16 and the rest of the sequence, none of a round length."""
    ends = [0]
    for part in (2, 4, 8, 16):
        ends.append(ends[-1] + seq_len // part - 7)
    return (*ends, seq_len)


def window_of(seq_len: int) -> tuple[int, int]:
    return seq_len // 8, 0


def leaves(heads: int, tokens: int) -> list[Tensor]:
    """q, k, v that want gradients, and the gradient of the output: [1, heads, tokens, D]."""
    tensors = [torch.randn(1, tokens, heads, HEAD_SIZE).transpose(1, 2) for _ in range(4)]
    return [x.requires_grad_(index < 3) for index, x in enumerate(tensors)]


def limit(rank: int, size: int, seq_len: int) -> Run:
    """The same work with no communication: this rank's share of the heads at full length."""
    q, k, v, grad = leaves(HEADS // size, seq_len)
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)


def packed_limit(rank: int, size: int, seq_len: int) -> Run:
    documents = [leaves(HEADS // size, stop - start) for start, stop in pairwise(packed_documents(seq_len))]

    def run() -> None:
        for q, k, v, grad in documents:
            scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    return run


def ring(sharding: str = "zigzag", case: str = "causal", heads: str = "ring") -> Callable[[int, int, int], Run]:
    def make(rank: int, size: int, seq_len: int) -> Run:
        documents = packed_documents(seq_len) if case == "packed" else None
        options: dict[str, Any] = {"sharding": sharding, "cu_seqlens": documents}
        if case == "window":
            options["window"] = window_of(seq_len)
        if heads == "all":
            options["heads_degree"] = size
        q, k, v, grad = leaves(HEADS, shard_length(shard_ranges(seq_len, size, sharding, documents)[rank]))
        return lambda: ring_attention(q, k, v, None, **options).backward(grad)

    return make


def two_pass(rank: int, size: int, seq_len: int) -> Run:
    q, k, v, grad = leaves(HEADS, seq_len // size)
    return lambda: two_pass_ring_attention(q, k, v, None, causal=True).backward(grad)


# Peers, as they install. Each takes the shard of its own layout; what a peer cannot do, its call says.


def ringmaster_zigzag(rank: int, size: int, seq_len: int) -> Run:
    attend = importlib.import_module("ringmaster.ring.zigzag").zigzag_ring_attention
    q, k, v, grad = leaves(HEADS, seq_len // size)
    return lambda: _backward(
        attend(*_tokens_first(q, k, v), group=dist.group.WORLD, scaling=HEAD_SIZE**-0.5), *_tokens_first(grad)
    )


def ringmaster_ring(rank: int, size: int, seq_len: int) -> Run:
    attend = importlib.import_module("ringmaster.ring.p2p_attn").ring_p2p_attention
    q, k, v, grad = leaves(HEADS, seq_len // size)
    return lambda: _backward(
        attend(*_tokens_first(q, k, v), group=dist.group.WORLD, causal=True, scaling=HEAD_SIZE**-0.5),
        *_tokens_first(grad),
    )


def ring_attention_pytorch(rank: int, size: int, seq_len: int) -> Run:
    attend = importlib.import_module("ring_attention_pytorch").ring_flash_attn
    q, k, v, grad = leaves(HEADS, seq_len // size)
    options = {"causal": True, "ring_reduce_col": True, "striped_ring_attn": True, "ring_size": size}
    return lambda: _backward(attend(*_tokens_first(q, k, v), **options), *_tokens_first(grad))


def yunchang_ring(rank: int, size: int, seq_len: int) -> Run:
    attend = importlib.import_module("yunchang.ring").ring_pytorch_attn_func
    q, k, v, grad = leaves(HEADS, seq_len // size)
    return lambda: _backward(attend(*_tokens_first(q, k, v), causal=True, group=dist.group.WORLD), *_tokens_first(grad))


def yunchang_ulysses(rank: int, size: int, seq_len: int) -> Run:
    module = importlib.import_module("yunchang")
    kernels = importlib.import_module("yunchang.kernels")
    attend = module.UlyssesAttention(dist.group.WORLD, attn_type=kernels.AttnType.TORCH)
    q, k, v, grad = leaves(HEADS, seq_len // size)
    return lambda: _backward(attend(*_tokens_first(q, k, v), causal=True), *_tokens_first(grad))


def ring_flash_attn_zigzag(rank: int, size: int, seq_len: int) -> Run:
    attend = importlib.import_module("ring_flash_attn").zigzag_ring_flash_attn_func
    q, k, v, grad = leaves(HEADS, seq_len // size)
    return lambda: _backward(attend(*_tokens_first(q, k, v), causal=True), *_tokens_first(grad))


def deepspeed_ulysses(rank: int, size: int, seq_len: int) -> Run:
    comm = importlib.import_module("deepspeed.comm")
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # else it compiles an operator before the first exchange
    comm.init_distributed("gloo", verbose=False)
    layer = importlib.import_module("deepspeed.sequence.layer").DistributedAttention

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    attend = layer(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    q, k, v, grad = leaves(HEADS, seq_len // size)
    return lambda: _backward(attend(*_tokens_first(q, k, v), 0), *_tokens_first(grad))


def torch_context_parallel(rank: int, size: int, seq_len: int) -> Run:
    experimental = importlib.import_module("torch.distributed.tensor.experimental")
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    tensors = leaves(HEADS, seq_len)

    def run() -> None:
        q, k, v, grad = (x.detach().clone() for x in tensors)
        with experimental.context_parallel(mesh, buffers=[q, k, v, grad], buffer_seq_dims=[2] * 4):
            for x in (q, k, v):
                x.requires_grad_()
            scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    return run


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, D] views."""
    return [x.transpose(1, 2) for x in tensors]


def _backward(out: Any, grad: Tensor) -> None:
    (out[0] if isinstance(out, tuple) else out).backward(grad)


OURS: dict[str, Callable[[int, int, int], Run]] = {
    "limit": limit,
    "zigzag": ring("zigzag"),
    "contiguous": ring("contiguous"),
    "striped": ring("striped"),
    "heads only": ring("zigzag", heads="all"),
    "window": ring("zigzag", case="window"),
    "window contiguous": ring("contiguous", case="window"),
    "packed limit": packed_limit,
    "packed": ring("zigzag", case="packed"),
}
PEERS: dict[str, Callable[[int, int, int], Run]] = {
    "axolotl-ringmaster zigzag": ringmaster_zigzag,
    "axolotl-ringmaster ring": ringmaster_ring,
    "ring-attention-pytorch": ring_attention_pytorch,
    "yunchang ring": yunchang_ring,
    "yunchang ulysses": yunchang_ulysses,
    "ring-flash-attn": ring_flash_attn_zigzag,
    "deepspeed ulysses": deepspeed_ulysses,
    "torch context_parallel": torch_context_parallel,
}
ALL = OURS | {"two-pass RSA": two_pass} | PEERS
