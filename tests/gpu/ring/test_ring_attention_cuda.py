"""The CUDA backends against fp64, alone and under every kind of block the ring makes.

Every bound is a multiple of what plain attention, as a model's own code has it, is itself off from fp64 on that device.
"""

from functools import cache
from typing import Any

import pytest
import torch

from fourfold.parallel import ring_attention
from fourfold.parallel.attention.backends import merge, select_backend
from fourfold.parallel.attention.kernels import accumulation_dtype, hardware_of
from fourfold.parallel.testing.reference import attention_mask, attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# None is what the device gets: with documents and windows, two kernels side by side.
NAMES = [None, "cuda_flash", "cudnn", "flash_attn", "flash_attn_3", "flash_attn_4", "flex", "math"]
KERNELS = [*((name, torch.bfloat16) for name in NAMES), (None, torch.float32), ("efficient", torch.float32)]
# Two roundings of the same size, in other places. In bf16 plain attention rounds its scores, which kernels do not.
# Kernels round each block's output and gradients, and a query or key that is in several blocks has a sum of such.
TIMES_PLAIN = 1.5


def inputs(seq_len: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 8, seq_len, size), (1, 2, seq_len, size), (1, 2, seq_len, size), (1, 8, seq_len, size)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cap: float = 0.0, **options: Any) -> torch.Tensor:
    """Attention as a model's own code has it: products in q's dtype, softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = cap * (scores / cap).tanh() if cap else scores
    hidden = ~attention_mask(q.shape[2], **options).to(q.device)
    wide = accumulation_dtype(q.dtype)
    # A query that sees nothing gets zeros; a row of -inf would be nan.
    weights = scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1, dtype=wide).masked_fill(hidden, 0.0)
    return weights.to(q.dtype) @ v


@cache
def plain_error(size: int, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> float:
    """The worst of the output's and the three gradients' errors, of plain attention in this dtype."""
    q, k, v, grad = inputs(333, size, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = plain(*leaves, **dict(options))
    out.backward(grad)
    return max(errors(out, leaves, grad, dict(options)))


def errors(out: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor, options: dict[str, Any]) -> list[float]:
    """Of attention's output and of the three gradients, which `leaves` have, against fp64."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = plain(*exact, **options) if "cap" in options else attention_reference(*exact, **options)
    truth.backward(grad.double())
    return [error(out, truth), *(error(mine.grad, leaf.grad) for mine, leaf in zip(leaves, exact, strict=True))]


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": (100, 0)},
        {"window": (60, 30), "causal": False},
        {"cu_seqlens": (0, 3, 200, 333)},
        {"cu_seqlens": (0, 3, 200, 300), "window": (50, 0)},
    ],
)
def test_ring_blocks_equal_fp64(backend, dtype, size, options):
    q, k, v, grad = inputs(333, size, dtype)
    try:
        select_backend(backend, q, k)
    except ValueError as refusal:
        pytest.skip(str(refusal))  # this device or its packages do not have the kernel
    local = [x.clone().requires_grad_() for x in (q, k, v)]
    out = ring_attention(*local, None, backend=backend, **options)
    out.backward(grad)
    assert max(errors(out, local, grad, options)) <= TIMES_PLAIN * plain_error(size, dtype, tuple(options.items()))


@pytest.mark.parametrize("backend", [None, "flash_attn", "flash_attn_3", "flex", "math"])
def test_capped_scores_equal_fp64(backend):
    q, k, v, grad = inputs(333, 128)
    documents = (0, 3, 200, 333)
    try:
        select_backend(backend, q, k, 3.0)
    except ValueError as refusal:
        pytest.skip(str(refusal))  # this device or its packages do not have the kernel
    local = [x.clone().requires_grad_() for x in (q, k, v)]
    out = ring_attention(*local, None, backend=backend, soft_cap=3.0, cu_seqlens=documents)
    out.backward(grad)
    bound = plain_error(128, q.dtype, (("cap", 3.0), ("cu_seqlens", documents)))
    assert max(errors(out, local, grad, {"cap": 3.0, "cu_seqlens": documents})) <= TIMES_PLAIN * bound


def test_fp32_gets_the_memory_efficient_kernel():
    q, k, _, _ = (x.float() for x in inputs(16, 64))
    expected = "efficient" if torch.cuda.get_device_capability() >= (8, 0) else "math"
    assert select_backend(None, q, k).name == expected


def test_what_this_device_gets_by_default():
    """cuDNN's kernel on Hopper and later, torch's own before, unless a flash-attn package is installed."""
    q, k, _, _ = inputs(16, 128)
    here = hardware_of(q.device)
    if not here.packages and here.capability >= (8, 0):
        assert select_backend(None, q, k).name == ("cudnn" if here.capability >= (9, 0) else "cuda_flash")


def test_the_compiled_merge_equals_the_plain_one():
    out, lse = torch.randn(1, 4, 300, 64, device="cuda"), torch.randn(1, 4, 300, device="cuda")
    block_out, block_lse = torch.randn(1, 4, 100, 64, device="cuda").bfloat16(), torch.randn(1, 4, 100, device="cuda")
    lse[:, :, 150], block_lse[:, :, 50] = -torch.inf, -torch.inf
    out[:, :, 150] = 0
    plain, exact = [x.cpu() for x in (out, lse)], [x.cpu().double() for x in (out, lse)]
    merge(out[:, :, 100:200], lse[:, :, 100:200], block_out, block_lse)
    for on_cpu in (plain, exact):
        merge(on_cpu[0][:, :, 100:200], on_cpu[1][:, :, 100:200], block_out.cpu(), block_lse.cpu())
    assert error(out.cpu(), exact[0]) <= TIMES_PLAIN * error(plain[0], exact[0])
    assert torch.equal(lse.isinf().cpu(), exact[1].isinf())
    seen = ~exact[1].isinf()
    assert error(lse.cpu()[seen], exact[1][seen]) <= TIMES_PLAIN * error(plain[1][seen], exact[1][seen])
