"""Windows, documents, padding and soft caps in a GPU's kernels: the right calls, and fp64's numbers, by stand-ins."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.emulated_kernels import Calls, emulated
from torch import Tensor

from fourfold.parallel.attention import calls as calls_module
from fourfold.parallel.attention.backends import BACKENDS, CAPPING
from fourfold.parallel.attention.blocks import Block
from fourfold.parallel.attention.efficient import EfficientAttention
from fourfold.parallel.attention.flash_packages import FlashAttn, FlashAttn3
from fourfold.parallel.attention.kernels import CudaFlash, CudnnAttention, SavedAttention
from fourfold.parallel.attention.merged import Merged
from fourfold.parallel.attention.packed import PackedCudaFlash, PackedFlashAttn, PackedFlashAttn3
from fourfold.parallel.stream.attention import RowMask, ScoreOptions
from fourfold.parallel.stream.block_attention import attend_blocks, attend_blocks_backward
from fourfold.parallel.stream.model import stream_backprop, stream_backprop_disable
from fourfold.parallel.stream.whole_attention import attend_whole, attend_whole_backward
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

TOKENS = 23
ALL = ((0, TOKENS),)
DOCUMENTS = ((0, 9), (9, 10), (10, 17), (17, 23))
# What the rows of a batch of two may see, and how many keys a query sees.
MASKS = {
    "causal": ([RowMask((0, 2), ALL, ALL)], None),
    "window": ([RowMask((0, 2), ALL, ALL)], 4),
    "a window of one": ([RowMask((0, 2), ALL, ALL)], 1),
    "documents": ([RowMask((0, 2), ALL, DOCUMENTS)], None),
    "documents and window": ([RowMask((0, 2), ALL, DOCUMENTS)], 4),
    "rows of other documents": ([RowMask((0, 1), ALL, DOCUMENTS), RowMask((1, 2), ALL, ((0, 5), (5, 23)))], None),
    "right and left padding": ([RowMask((0, 1), ((0, 15),), ALL), RowMask((1, 2), ((6, 23),), ALL)], None),
    "padding and window": ([RowMask((0, 1), ((0, 15),), ALL), RowMask((1, 2), ((6, 23),), ALL)], 4),
    "holes": ([RowMask((0, 1), ((0, 3), (5, 11)), ALL), RowMask((1, 2), ALL, ALL)], 6),
}
KERNELS = {
    "flash_attn": lambda: FlashAttn(PackedFlashAttn()),
    "flash_attn_3": lambda: FlashAttn3(PackedFlashAttn3()),
    "cuda_flash": lambda: CudaFlash(PackedCudaFlash()),
    "cudnn": lambda: CudnnAttention(PackedCudaFlash()),
    "efficient": EfficientAttention,
}


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the output's gradient: two rows, 4 heads on 2 key heads."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, TOKENS, heads, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


def truth(q: Tensor, k: Tensor, v: Tensor, masks: list[RowMask], window: int | None, cap: float | None) -> Tensor:
    """Dense attention under the masks; rows that see nothing are zeros."""
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None]
    seen = torch.zeros(len(q), 1, TOKENS, TOKENS, dtype=torch.bool)
    for mask in masks:
        for row in range(*mask.rows):
            for first, last in mask.documents:
                seen[row, 0, first:last, first:last] = True
            real = torch.zeros(TOKENS, dtype=torch.bool)
            for first, last in mask.keys:
                real[first:last] = True
            seen[row] &= real & (distance >= 0) & (distance < (window or TOKENS))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.mT * 0.3
    scores = scores if cap is None else (scores / cap).tanh() * cap
    return scores.masked_fill(~seen, -1e300).softmax(-1).masked_fill(~seen, 0.0) @ v


def errors(backend: object, name: str, cap: float | None = None) -> list[float]:
    """Of the output and the three gradients, from fp64 autograd through dense attention."""
    masks, window = MASKS[name]
    run = SimpleNamespace(masks=masks, backend=backend, chunk=TOKENS)
    options = ScoreOptions(scale=0.3, window=window, soft_cap=None)  # the backend has its cap
    q, k, v, grad = tensors()
    out, lse = attend_whole(run, q, k, v, options)
    found = [out, *attend_whole_backward(run, grad, SavedAttention(q, k, v, out, lse), options)]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = truth(*leaves, masks, window, cap)
    expected.backward(grad)
    return [
        float((mine - right).norm() / right.norm().clamp_min(1.0))
        for mine, right in zip(found, (expected.detach(), *(leaf.grad for leaf in leaves)), strict=True)
    ]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_under_every_mask(kernel, mask):
    with emulated() as seen:
        assert max(errors(KERNELS[kernel](), mask)) < 1e-13
    assert {name.partition(",")[0] for name, *_ in seen.seen} <= {kernel, "cuda_flash"}


@pytest.mark.parametrize("mask", ["causal", "documents and window", "right and left padding"])
@pytest.mark.parametrize("kernel", ["flash_attn", "flash_attn_3"])
def test_packages_cap_scores_by_themselves(kernel, mask):
    with emulated():
        assert max(errors(CAPPING[kernel](1.5), mask, cap=1.5)) < 1e-13


@pytest.mark.parametrize("mask", MASKS)
def test_large_blocks_stay_with_the_fastest_kernel(mask, monkeypatch):
    """As on an H100 with long documents: cuDNN does each block, and a window is cut into tiles."""
    monkeypatch.setattr(calls_module, "WORTH_A_CALL_FLOPS", 1.0)
    calls_module._grouped.cache_clear()
    with emulated() as seen:
        assert max(errors(KERNELS["cudnn"](), mask)) < 1e-13
    calls_module._grouped.cache_clear()
    assert {name for name, *_ in seen.seen} <= {"cudnn", "cuda_flash"}  # blocks of one token are cuda_flash's


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("tokens", [(1, 64), (33, 7), (32, 32)])
def test_the_fp32_kernel_of_a_gpu_in_what_it_takes(heads, tokens):
    """Slices of a longer row at odd places, heads that are far apart, a merged output, a tail of rows: two blocks."""
    generator, backend = torch.Generator().manual_seed(4), EfficientAttention()
    (queries, keys), (many, few) = tokens, heads
    q, k, v, grad = (
        torch.randn(2, count, heads, 18 if odd else 12, generator=generator).transpose(1, 2)[..., -12:]
        for count, heads, odd in ((queries, many, 1), (2 * keys, few, 1), (2 * keys, few, 0), (queries, many, 0))
    )
    causal, parts = queries == keys, (slice(0, keys), slice(keys, None))
    merged = Merged(q, [(0, queries)] * 2)
    with emulated() as seen:
        for number, part in enumerate(parts):
            found = backend.forward(q, k[:, :, part], v[:, :, part], causal=causal and number == 0, scale=0.3)
            merged.add((0, queries), *found)
        out = merged.out.contiguous()  # head by head: not as the kernel takes it
        saved = [SavedAttention(q, k[:, :, part], v[:, :, part], out, merged.lse) for part in parts]
        one, other = (
            backend.backward(grad, rows, causal=causal and number == 0, scale=0.3) for number, rows in enumerate(saved)
        )
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(many // few, dim=1) for x in leaves[1:]]
    scores = leaves[0] @ wide[0].mT * 0.3
    hidden = torch.ones(queries, 2 * keys, dtype=torch.bool).triu(1) & (torch.arange(2 * keys) < keys) & causal
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ wide[1]
    expected.backward(grad.double())
    results = [
        merged.out,
        one[0] + other[0],
        *(torch.cat(pair, dim=2) for pair in zip(one[1:], other[1:], strict=True)),
    ]
    for mine, right in zip(results, (expected.detach(), *(leaf.grad for leaf in leaves)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() < 2e-6 * right.norm()  # roundings of fp32, in sums of up to 128 keys
    assert len(seen.seen) == 2


def forwards(kernel: str, mask: str) -> Calls:
    with emulated() as seen:
        errors(KERNELS[kernel](), mask)
    return seen


# (kernel, sequences, causal, left, right) of the forward: one call each, where nothing is masked but by its arguments.
ONE_CALL = [
    ("flash_attn", "window", ("flash_attn, packed", 2, True, 3, 0)),
    ("flash_attn_3", "documents", ("flash_attn_3, packed", 8, True, -1, 0)),
    ("flash_attn", "documents and window", ("flash_attn, packed", 8, True, 3, 0)),
    ("cuda_flash", "documents and window", ("cuda_flash, packed", 8, False, 3, 0)),
    ("cuda_flash", "rows of other documents", ("cuda_flash, packed", 6, True, -1, 0)),
    ("cudnn", "window", ("cuda_flash, packed", 2, False, 3, 0)),
    ("cudnn", "documents", ("cuda_flash, packed", 8, True, -1, 0)),
    ("cudnn", "causal", ("cudnn", 2, True, -1, -1)),
]


@pytest.mark.parametrize(("kernel", "mask", "call"), ONE_CALL)
def test_masks_that_a_kernel_knows_are_one_call(kernel, mask, call):
    assert forwards(kernel, mask).seen == [call]


def test_padded_rows_are_a_few_calls_whatever_their_number():
    """The rows' triangles are one call, and what the padding sees of right-padded rows another."""
    assert [call[:3] for call in forwards("cudnn", "right and left padding").seen] == [
        ("cuda_flash, packed", 2, True), ("cudnn", 1, False)
    ]  # fmt: skip


@pytest.mark.parametrize("kernel", ["cudnn", "flash_attn"])
@pytest.mark.parametrize("family", ["mistral, window", "gemma3, windows", "qwen3"])
def test_a_model_of_packed_documents_has_plain_gradients(family, kernel):
    ids = batch(2, 21)
    positions = torch.cat([torch.arange(n) for n in (9, 5, 7)]).expand(2, -1)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    model = tiny(family).double()
    plain = gradients(model, model(**inputs).loss)
    with emulated() as seen:
        stream_backprop(
            model, head_groups=2, chunk_size=8, mlp_chunk=5, backend=KERNELS[kernel](), verify=False
        )  # fmt: skip
        assert_gradients(gradients(model, model(**inputs).loss), plain, 2e-6)
        stream_backprop_disable(model)
    assert any(name.endswith("packed") for name, *_ in seen.seen)
    assert not math.isnan(float(sum(gradient.sum() for gradient in plain.values())))


def test_a_single_block_s_results_are_in_the_inputs_dtype():
    """Plain products leave theirs in fp32, for those that have more blocks to add."""
    q, k, v, grad = tensors(torch.bfloat16)
    blocks = (Block((0, TOKENS), (0, TOKENS), "causal"),)
    out, lse = attend_blocks(BACKENDS["math"], q, k, v, blocks, 0.3)
    found = attend_blocks_backward(BACKENDS["math"], grad, SavedAttention(q, k, v, out, lse), blocks, 0.3)
    assert [x.dtype for x in (out, *found)] == [torch.bfloat16] * 4
