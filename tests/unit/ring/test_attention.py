"""One block: every backend's output, lse and gradients against fp64; merging; who is chosen."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fourfold.parallel import ring_attention
from fourfold.parallel.attention import backends, flex
from fourfold.parallel.attention.backends import BACKENDS, choose_backend, fast_path, merge, select_backend
from fourfold.parallel.attention.blocks import Block
from fourfold.parallel.attention.calls import calls, takes_window
from fourfold.parallel.attention.efficient import EfficientAttention
from fourfold.parallel.attention.flex import FlexAttention
from fourfold.parallel.attention.kernels import CudaFlash, CudnnAttention, Hardware, SavedAttention
from fourfold.parallel.attention.merged import Merged
from fourfold.parallel.attention.packed import PackedCudaFlash
from fourfold.parallel.attention.soft_cap import SoftCapAttention
from fourfold.parallel.testing.reference import attention_reference

# Rounding of each dtype: bf16 has 8 bits of mantissa.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-13}


def block(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 6, num_queries, 32), (2, 3, num_keys, 32), (2, 3, num_keys, 32), (2, 6, num_queries, 32)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", ["cpu_flash", "math"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-13)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_square_block_equals_fp64(name, dtype, tolerance, causal):
    q, k, v, grad = block(45, 45, dtype)
    backend = select_backend(name, q, k)
    out, lse = backend.forward(q, k, v, causal=causal, scale=0.2)
    gradients = backend.backward(grad, SavedAttention(q, k, v, out, lse), causal=causal, scale=0.2)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = attention_reference(*leaves, causal=causal, scale=0.2)
    truth.backward(grad.double())
    assert error(out, truth) < tolerance
    for mine, leaf in zip(gradients, leaves, strict=True):
        assert mine.dtype == (lse.dtype if name == "math" else dtype)
        assert error(mine, leaf.grad) < tolerance
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("soft_cap", [None, 50.0])
def test_weights_of_a_row_sum_to_one_where_scores_are_large(soft_cap):
    """Divided by their sum: by an lse of about 20, rows would be off by its rounding."""
    q, k, _, _ = block(45, 45)
    ones = torch.ones_like(k)
    out, _ = select_backend("math", q, ones, soft_cap).forward(q + 2, k + 2, ones, causal=True, scale=0.2)
    assert error(out, ones.double().repeat_interleave(2, 1)) < 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["cpu_flash", "math"])
def test_blocks_of_keys_merge_to_the_whole(name):
    q, k, v, grad = block(20, 70)
    backend = BACKENDS[name]
    out, lse = torch.zeros(2, 6, 20, 32), torch.full((2, 6, 20), -torch.inf)
    parts = [slice(0, 1), slice(1, 50), slice(50, 70)]
    for part in parts:
        merge(out, lse, *backend.forward(q, k[:, :, part], v[:, :, part], causal=False, scale=0.2))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth = dense(*leaves)
    truth.backward(grad.double())
    assert error(out, truth) < 2e-6
    scores = leaves[0].detach() @ leaves[1].detach().repeat_interleave(2, 1).mT * 0.2
    assert error(lse, scores.logsumexp(-1)) < 2e-6  # natural log
    dq = torch.zeros_like(q)
    for part in parts:
        saved = SavedAttention(q, k[:, :, part], v[:, :, part], out, lse)
        part_dq, dk, dv = backend.backward(grad, saved, causal=False, scale=0.2)
        dq += part_dq
        assert error(dk, leaves[1].grad[:, :, part]) < 4e-6  # a single key's gradient has few terms to average over
        assert error(dv, leaves[2].grad[:, :, part]) < 4e-6
    assert error(dq, leaves[0].grad) < 2e-6


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return (q @ k.mT * 0.2).softmax(-1) @ v


def test_merging_with_nothing_changes_nothing():
    nothing, minus = torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -torch.inf)
    out, lse = nothing.clone(), minus.clone()
    merge(out, lse, nothing, minus)
    assert not out.any()
    assert (lse == -torch.inf).all()
    something, finite = torch.randn(1, 1, 2, 4), torch.tensor([[[3.0, -200.0]]])
    merge(out, lse, something, finite)
    assert torch.equal(out, something)
    assert torch.equal(lse, finite)
    merge(out, lse, nothing, minus)
    assert torch.equal(out, something)


@pytest.mark.parametrize("triton", [True, False])
def test_the_merge_is_compiled_where_triton_is(triton, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: triton)
    assert (backends._fused_merge.__wrapped__() is backends._merge) is not triton


CHOICES = [
    ("cpu", (0, 0), (), torch.float32, 64, "cpu_flash"),
    ("cuda", (9, 0), (), torch.bfloat16, 128, "cudnn"),  # H100, H200
    ("cuda", (9, 0), (), torch.float16, 64, "cudnn"),
    ("cuda", (9, 0), (), torch.bfloat16, 256, "cuda_flash"),
    ("cuda", (9, 0), (), torch.float32, 128, "efficient"),
    ("cuda", (9, 0), ("flash_attn_interface",), torch.float32, 96, "efficient"),
    ("cuda", (9, 0), (), torch.float32, 30, "math"),
    ("cuda", (9, 0), (), torch.float64, 128, "math"),
    ("cuda", (9, 0), (), torch.bfloat16, 100, "math"),
    ("cuda", (9, 0), ("flash_attn",), torch.bfloat16, 128, "cudnn"),
    ("cuda", (9, 0), ("flash_attn_interface",), torch.bfloat16, 128, "flash_attn_3"),
    ("cuda", (10, 0), (), torch.bfloat16, 128, "cudnn"),  # B200
    ("cuda", (10, 0), ("flash_attn_interface",), torch.bfloat16, 128, "cudnn"),
    ("cuda", (10, 0), ("flash_attn", "flash_attn.cute"), torch.bfloat16, 128, "flash_attn_4"),
    ("cuda", (12, 0), (), torch.bfloat16, 128, "cudnn"),
    ("cuda", (8, 0), (), torch.bfloat16, 128, "cuda_flash"),  # A100
    ("cuda", (8, 0), ("flash_attn",), torch.bfloat16, 128, "flash_attn"),
    ("cuda", (7, 5), ("flash_attn",), torch.float16, 64, "math"),  # T4
    ("mps", (0, 0), (), torch.float32, 64, "math"),
]


@pytest.mark.parametrize(("kind", "capability", "packages", "dtype", "head_size", "name"), CHOICES)
def test_what_a_device_gets(kind, capability, packages, dtype, head_size, name):
    assert choose_backend(Hardware(kind, capability, frozenset(packages)), dtype, head_size) == name


CAPPED = [
    ("cpu", (0, 0), (), "math"),
    ("cuda", (9, 0), (), "math"),  # neither cuDNN's nor torch's own kernel caps scores
    ("cuda", (9, 0), ("flash_attn",), "flash_attn"),
    ("cuda", (9, 0), ("flash_attn", "flash_attn_interface"), "flash_attn_3"),
    ("cuda", (10, 0), ("flash_attn.cute",), "math"),
]


@pytest.mark.parametrize(("kind", "capability", "packages", "name"), CAPPED)
def test_what_a_device_gets_for_capped_scores(kind, capability, packages, name):
    hardware = Hardware(kind, capability, frozenset(packages))
    assert choose_backend(hardware, torch.bfloat16, 128, soft_cap=True) == name


def test_capped_scores_are_done_some_rows_at_a_time(monkeypatch):
    """The same numbers to the rounding, whatever the rows; causal and full."""
    q, k, v, grad = block(40, 40)
    for causal in (True, False):
        results = []
        for rows in (512, 7):
            monkeypatch.setattr("fourfold.parallel.attention.soft_cap.ROWS", rows)
            backend = select_backend(None, q, v, 1.5)
            out, lse = backend.forward(q, k, v, causal=causal, scale=0.3)
            saved = SavedAttention(q, k, v, out, lse)
            results.append([out, lse, *backend.backward(grad, saved, causal=causal, scale=0.3)])
        assert max(error(mine, truth.double()) for mine, truth in zip(*results, strict=True)) < 2e-6


@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_blocks_of_plain_products_are_rounded_once(soft_cap):
    """A window of several blocks a query and a key, in bf16, against fp64's own rounding."""
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v, grad = (x.bfloat16().to(dtype) for x in block(90, 90))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = ring_attention(*leaves, None, backend="math", window=(20, 0), soft_cap=soft_cap)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for mine, truth in zip(*results, strict=True):
        # Queries' gradients also have the rounding of the output, which is an input of theirs.
        assert error(mine, truth) <= 1.3 * error(truth.bfloat16(), truth)


def test_a_device_gets_nothing_for_whole_numbers():
    with pytest.raises(ValueError, match=r"no attention backend takes torch\.int64 tensors on cuda"):
        choose_backend(Hardware("cuda", (9, 0)), torch.int64, 128)


def test_merging_copies_what_comes_first():
    """Blocks of queries that overlap in part, in bf16, against the softmax over all keys."""
    q, k, v, _ = block(20, 70)
    spans = [((5, 20), slice(0, 30)), ((0, 12), slice(30, 60)), ((0, 20), slice(60, 70))]
    merged = Merged(q, [span for span, _ in spans])
    for span, keys in spans:
        part = BACKENDS["math"].forward(q[:, :, slice(*span)], k[:, :, keys], v[:, :, keys], causal=False, scale=0.2)
        merged.add(span, *part)
    mask = torch.zeros(20, 70, dtype=torch.bool)
    for span, keys in spans:
        mask[slice(*span), keys] = True
    wide = [x.double().repeat_interleave(2, 1) for x in (k, v)]
    scores = (q.double() @ wide[0].mT * 0.2).masked_fill(~mask, -torch.inf)
    assert error(merged.out, scores.softmax(-1) @ wide[1]) < 2e-6
    assert error(merged.lse, scores.logsumexp(-1)) < 2e-6


def test_blocks_side_by_side_stay_in_their_dtype():
    q = torch.zeros(1, 2, 6, 8, dtype=torch.bfloat16)
    assert Merged(q, [(0, 4), (4, 6)]).out.dtype == torch.bfloat16
    assert Merged(q, [(0, 4), (3, 6)]).out.dtype == torch.float32
    nothing = Merged(q, [(0, 2)])
    assert not nothing.out.any()
    assert (nothing.lse == -torch.inf).all()


def test_the_choice_and_its_refusals():
    q, k, *_ = block(4, 4)
    assert select_backend(None, q, k).name == "cpu_flash"
    with pytest.raises(ValueError, match="backend='fast': choose one of cpu_flash, flash_attn, cuda_flash"):
        select_backend("fast", q, k)
    with pytest.raises(ValueError, match=r"flash_attn is not installed|needs tensors on a CUDA device"):
        select_backend("flash_attn", q, k)
    with pytest.raises(ValueError, match="cuda_flash needs tensors on a CUDA device, not on cpu"):
        select_backend("cuda_flash", q, k)
    with pytest.raises(ValueError, match="backend='cpu_flash' has no soft cap: choose one of flash_attn, flash_attn_3"):
        select_backend("cpu_flash", q, k, 2.0)
    with pytest.raises(ValueError, match="soft_cap=0"):
        select_backend(None, q, k, 0.0)
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        select_backend("math", q.long(), k.long())


@pytest.mark.parametrize("backend", [CudaFlash(), CudnnAttention(), EfficientAttention()])
def test_cuda_calls_fit_the_operators(backend):
    """Shapes and arguments against torch's own shape functions; the numbers are checked in tests/gpu."""
    q, k, v, grad = (x.to("meta", backend.limits.dtypes[0]) for x in block(16, 16))
    out, lse = backend.forward(q, k, v, causal=True, scale=0.2)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    gradients = backend.backward(grad, SavedAttention(q, k, v, out, lse), causal=True, scale=0.2)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


# What does a block, and what packs small ones: of a device, its capability, packages, dtype, head size and soft cap.
PATHS = [
    ("cuda", (9, 0), (), torch.bfloat16, 128, False, ("cudnn", "cuda_flash")),  # H100, H200
    ("cuda", (9, 0), (), torch.bfloat16, 256, False, ("cuda_flash", "cuda_flash")),
    ("cuda", (9, 0), (), torch.float32, 128, False, ("efficient", None)),
    ("cuda", (9, 0), (), torch.float32, 128, True, ("math", None)),
    ("cuda", (9, 0), (), torch.bfloat16, 128, True, ("math", None)),
    ("cuda", (9, 0), ("flash_attn",), torch.bfloat16, 128, False, ("cudnn", "flash_attn")),
    ("cuda", (9, 0), ("flash_attn",), torch.bfloat16, 256, True, ("flash_attn", "flash_attn")),
    ("cuda", (9, 0), ("flash_attn_interface",), torch.bfloat16, 128, False, ("flash_attn_3", "flash_attn_3")),
    ("cuda", (9, 0), ("flash_attn_interface",), torch.bfloat16, 128, True, ("flash_attn_3", "flash_attn_3")),
    ("cuda", (10, 0), ("flash_attn.cute",), torch.bfloat16, 128, False, ("flash_attn_4", "cuda_flash")),  # B200
    ("cuda", (10, 0), ("flash_attn_interface",), torch.bfloat16, 128, False, ("cudnn", "cuda_flash")),
    ("cuda", (8, 0), (), torch.bfloat16, 128, False, ("cuda_flash", "cuda_flash")),  # A100
    ("cuda", (8, 0), ("flash_attn",), torch.float16, 64, False, ("flash_attn", "flash_attn")),
    ("cuda", (7, 5), ("flash_attn",), torch.float16, 64, False, ("math", None)),  # T4
    ("cpu", (0, 0), (), torch.float32, 64, False, ("cpu_flash", None)),
    ("cpu", (0, 0), (), torch.bfloat16, 64, True, ("math", None)),
]


@pytest.mark.parametrize(("kind", "capability", "packages", "dtype", "head_size", "cap", "path"), PATHS)
def test_the_fast_path_of_a_device(kind, capability, packages, dtype, head_size, cap, path):
    found = fast_path(Hardware(kind, capability, frozenset(packages)), dtype, head_size, soft_cap=cap)
    assert (found.kernel, found.packed) == path
    assert found.is_fused == (path[0] != "math")


@pytest.mark.parametrize(("pairs", "packed"), [(100, True), (10**9, False)])
def test_only_small_blocks_are_packed_by_a_slower_kernel(pairs, packed):
    """Beside cuDNN; a kernel that packs its own blocks packs them all."""
    side = int(pairs**0.5)
    q = torch.empty(1, 8, 4 * side, 64, device="meta")
    blocks = [Block((n * side, n * side + side), (n * side, n * side + side), "causal") for n in range(3)]
    assert [call.packed for call in calls(CudnnAttention(PackedCudaFlash()), q, blocks)] == [packed] * (3, 1)[packed]
    assert [call.packed for call in calls(CudaFlash(PackedCudaFlash()), q, blocks)] == [True]
    assert [call.packed for call in calls(CudnnAttention(), q, blocks)] == [False] * 3


def test_a_window_is_the_kernels_own_unless_its_tiles_are_worth_their_calls():
    q = torch.empty(1, 32, 1 << 17, 128, device="meta")
    cudnn, flash = CudnnAttention(PackedCudaFlash()), CudaFlash(PackedCudaFlash())
    assert [takes_window(cudnn, q, window) for window in (None, 128, 512, 4096)] == [False, True, True, False]
    assert [takes_window(flash, q, window) for window in (None, 128, 4096)] == [False, True, True]
    assert not takes_window(BACKENDS["cpu_flash"], q, 128)


def test_flex_attention_gives_a_blocks_gradients_of_the_merged_output(monkeypatch):
    """With a stand-in for torch's function, which has no backward on a CPU: causal and full, capped and not."""

    def dense_flex(q, k, v, *, score_mod, block_mask, **options):
        assert set(options) == {"scale", "enable_gqa", "return_aux"}
        assert options["enable_gqa"]
        assert options["return_aux"].lse
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.mT * options["scale"]
        scores = scores if score_mod is None else score_mod(scores, *(None,) * 4)
        if block_mask is not None:
            places = torch.arange(q.shape[2])
            seen = block_mask.mask_mod(None, None, places[:, None], places[None])
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v, SimpleNamespace(lse=scores.logsumexp(-1))

    monkeypatch.setattr(flex, "_compiled", lambda: dense_flex)
    q, k, v, grad = block(40, 40, torch.float64)
    parts = [(slice(0, 20), slice(0, 20), True), (slice(20, 40), slice(20, 40), True),
             (slice(20, 40), slice(0, 20), False)]  # fmt: skip
    for cap in (0.0, 1.5):
        reference = SoftCapAttention(cap) if cap else BACKENDS["math"]
        results = []
        for backend in (FlexAttention(cap), reference):
            merged = Merged(q, [(here.start, here.stop) for here, _, _ in parts])
            for here, keys, causal in parts:
                found = backend.forward(q[:, :, here], k[:, :, keys], v[:, :, keys], causal=causal, scale=0.3)
                merged.add((here.start, here.stop), *found)
            gradients = [merged.out]
            for here, keys, causal in parts:
                out, lse = merged.out[:, :, here], merged.lse[:, :, here]
                saved = SavedAttention(q[:, :, here], k[:, :, keys], v[:, :, keys], out, lse)
                gradients += backend.backward(grad[:, :, here], saved, causal=causal, scale=0.3)
            results.append(gradients)
        assert max(error(mine, truth) for mine, truth in zip(*results, strict=True)) < 1e-13
