"""The CUDA backends against fp64, alone and under every kind of block the ring makes.

Every bound is a multiple of what plain attention, torch's own under a mask, is itself off from fp64 on that device.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fourfold.parallel import ring_attention
from fourfold.parallel.attention.backends import merge, select_backend
from fourfold.parallel.attention.kernels import hardware_of
from fourfold.parallel.testing.reference import attention_mask, attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# None is what the device gets: with documents and windows, two kernels side by side.
NAMES = [None, "cuda_flash", "cudnn", "flash_attn", "flash_attn_3", "flash_attn_4", "flex", "math"]
KERNELS = [*((name, torch.bfloat16) for name in NAMES), (None, torch.float32), ("efficient", torch.float32)]
# Two roundings of the same size, in other places.
TIMES_PLAIN = 1.5


def inputs(seq_len: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 8, seq_len, size), (1, 2, seq_len, size), (1, 2, seq_len, size), (1, 8, seq_len, size)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@cache
def plain_error(size: int, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> float:
    """The worst of the output's and the three gradients' errors, of plain attention in this dtype."""
    q, k, v, grad = inputs(333, size, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = attention_mask(333, **dict(options)).cuda()
    scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True).backward(grad)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    attention_reference(*exact, **dict(options)).backward(grad.double())
    with torch.no_grad():
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        found = [error(out, attention_reference(q, k, v, **dict(options)))]
    return max([*found, *(error(mine.grad, leaf.grad) for mine, leaf in zip(leaves, exact, strict=True))])


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
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = attention_reference(*leaves, **options)
    truth.backward(grad.double())
    bound = TIMES_PLAIN * plain_error(size, dtype, tuple(options.items()))
    assert error(out, truth) <= bound
    for mine, leaf in zip(local, leaves, strict=True):
        assert error(mine.grad, leaf.grad) <= bound


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention in three documents with scores capped at 3, as a model's own code has it, in q's dtype."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = 3.0 * (q @ k.mT * q.shape[-1] ** -0.5 / 3.0).tanh()
    seen = attention_mask(q.shape[2], cu_seqlens=(0, 3, 200, 333)).to(q.device)
    wide = torch.promote_types(q.dtype, torch.float32)  # softmax is fp32 in bf16 models
    return scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide).to(q.dtype) @ v


def capped_errors(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[float]:
    """Against fp64: of the output of inputs(333, 128), and of the three gradients, which `leaves` have."""
    q, k, v, grad = inputs(333, 128)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = capped(*exact)
    truth.backward(grad.double())
    return [error(out, truth), *(error(mine.grad, leaf.grad) for mine, leaf in zip(leaves, exact, strict=True))]


@pytest.mark.parametrize("backend", [None, "flash_attn", "flash_attn_3", "flex", "math"])
def test_capped_scores_equal_fp64(backend):
    q, k, v, grad = inputs(333, 128)
    try:
        select_backend(backend, q, k, 3.0)
    except ValueError as refusal:
        pytest.skip(str(refusal))  # this device or its packages do not have the kernel
    local = [x.clone().requires_grad_() for x in (q, k, v)]
    out = ring_attention(*local, None, backend=backend, soft_cap=3.0, cu_seqlens=(0, 3, 200, 333))
    out.backward(grad)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = capped(*leaves)
    plain.backward(grad)
    assert max(capped_errors(out, local)) <= TIMES_PLAIN * max(capped_errors(plain, leaves))


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
