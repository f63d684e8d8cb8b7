"""One case of ring attention on the ranks of a pool, against fp64 attention of one process."""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from fourfold.parallel import ring_attention, shard_sequence, unshard_sequence
from fourfold.parallel.testing.compare import assert_same
from fourfold.parallel.testing.reference import attention_reference

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
    names = ("o", "dq", "dk", "dv")
    where = f"a second run on rank {dist.get_rank()}"
    assert_same(zip(names, again, strict=True), zip(names, mine, strict=True), where)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    masks = {key: options[key] for key in ("causal", "scale", "window", "cu_seqlens") if key in options}
    truth = attention_reference(*leaves, **masks)
    truth.backward(grad.double())
    truths = [truth.detach(), *(x.grad for x in leaves)]
    terms = grad.double().norm().item()
    return {name: relative_error(value, right, terms) for name, value, right in zip(names, mine, truths, strict=True)}


def compare_all(cases: list[tuple[dict[str, int], dict[str, Any], int, torch.dtype]]) -> list[dict[str, float]]:
    return [attend_and_compare(*case) for case in cases]
