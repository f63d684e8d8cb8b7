"""The CUDA backends against fp64, alone and under every kind of block the ring makes."""

import pytest
import torch

from fourfold.parallel import ring_attention
from fourfold.parallel.attention.backends import merge, select_backend
from fourfold.parallel.attention.kernels import hardware_of
from fourfold.parallel.testing.reference import attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# None is what the device gets: with documents and windows, two kernels side by side.
BACKENDS = [None, "cuda_flash", "cudnn", "flash_attn", "flash_attn_3", "flash_attn_4", "flex", "math"]
TOLERANCE = 1e-2  # bf16: 8 bits of mantissa


def inputs(seq_len: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 8, seq_len, size), (1, 2, seq_len, size), (1, 2, seq_len, size), (1, 8, seq_len, size)]
    return [torch.randn(shape, generator=generator).to("cuda", torch.bfloat16) for shape in shapes]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
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
def test_ring_blocks_equal_fp64(backend, size, options):
    q, k, v, grad = inputs(333, size)
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
    assert error(out, truth) < TOLERANCE
    for mine, leaf in zip(local, leaves, strict=True):
        assert error(mine.grad, leaf.grad) < TOLERANCE


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
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = ring_attention(*leaves, None, backend="math", soft_cap=3.0, cu_seqlens=(0, 3, 200, 333))
    truth.backward(grad.double())
    assert error(out, truth) < TOLERANCE
    for mine, leaf in zip(local, leaves, strict=True):
        assert error(mine.grad, leaf.grad) < TOLERANCE


def test_fp32_falls_back_to_math():
    q, k, _, _ = (x.float() for x in inputs(16, 64))
    assert select_backend(None, q, k).name == "math"


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
    on_cpu = [x.cpu() for x in (out, lse)]
    merge(out[:, :, 100:200], lse[:, :, 100:200], block_out, block_lse)
    merge(on_cpu[0][:, :, 100:200], on_cpu[1][:, :, 100:200], block_out.cpu(), block_lse.cpu())
    assert error(out, on_cpu[0].double().cuda()) < 1e-6
    assert torch.equal(lse.isinf().cpu(), on_cpu[1].isinf())
