"""StreamBP on CUDA: no further from fp64 than plain backpropagation is there, and less memory where it offloads.

Every bound is a multiple of what plain backpropagation itself is off from fp64 on that device, in that dtype. In fp32
torch holds all scores where heads share keys, and its kernels that hold none are further off, ours being one of them:
there the slope of a query's scores comes from its output, whose rounding all its keys share. Plain backpropagation may
use those, too.
"""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from fourfold.parallel import stream_backprop
from fourfold.parallel.stream import stream_backprop_disable
from fourfold.parallel.testing.compare import assert_gradients, gradients, worst_error
from fourfold.parallel.testing.tiny_models import FAMILIES, batch, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
# Two roundings of the same size, in other places.
FACTOR = 1.5
BY_HEADS = {"head_groups": 2, "chunk_size": 256, "mlp_chunk": 192}
BY_QUERIES = {"head_groups": 0, "chunk_size": 256, "mlp_chunk": 192}


def model_on_cuda(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train().cuda()


def check(model: nn.Module, inputs: dict[str, Any], steps: int = 1, **settings: Any) -> None:
    """Against fp64, streamed gradients are off by at most FACTOR times what plain ones are."""
    exact_model = copy.deepcopy(model).double()
    exact_model.config._experts_implementation = "eager"  # grouped products of experts know no fp64
    exact = gradients(exact_model, exact_model(**inputs).loss)
    plain = worst_error(gradients(model, model(**inputs).loss), exact)
    # Keys are repeated for each query head, for which torch has a kernel that holds no scores in fp32.
    with mock.patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", return_value=False):
        plain = max(plain, worst_error(gradients(model, model(**inputs).loss), exact))
    stream_backprop(model, **settings)
    for _ in range(steps):  # later ones use pinned memory, and the device's, again
        assert_gradients(gradients(model, model(**inputs).loss), exact, FACTOR * plain, f"plain is off by {plain:.3g}")
    stream_backprop_disable(model)


@pytest.mark.parametrize("cut", [BY_HEADS, BY_QUERIES, {}])
@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("offload", [None, "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_fp64_than_plain(dtype, offload, keep_attention, cut):
    model, ids = model_on_cuda(4).to(dtype), torch.randint(0, 512, (1, 1500), device="cuda")
    inputs = {"input_ids": ids, "labels": ids}
    check(model, inputs, steps=2, offload=offload, keep_attention=keep_attention, **cut)


# In bf16 a router's choice of experts is not that of fp64, for plain backpropagation as for streamed: nothing to bound.
CASES = [(family, torch.float32) for family in FAMILIES] + [
    (family, torch.bfloat16) for family in FAMILIES if family not in ("mixtral", "qwen3_moe")
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_every_family(family, dtype):
    ids = batch(2, 85).cuda()
    check(tiny(family).cuda().to(dtype), {"input_ids": ids, "labels": ids}, head_groups=2, chunk_size=32, mlp_chunk=24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "mistral, window", "gemma3, windows"])
def test_documents_and_padding(family, dtype):
    ids = batch(2, 85).cuda()
    positions = torch.cat([torch.arange(n) for n in (9, 1, 40, 35)]).expand(2, -1).cuda()
    documents = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    check(tiny(family).cuda().to(dtype), documents, **BY_HEADS)
    mask = torch.ones_like(ids)
    mask[1, 60:] = 0
    padded = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    check(tiny(family).cuda().to(dtype), padded, **BY_HEADS)


def peak(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes of a step above what was there."""
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("cut", [BY_HEADS, BY_QUERIES])
def test_offloading_takes_the_layer_inputs_off_the_device(cut):
    ids = torch.randint(0, 512, (1, 16384), device="cuda")
    model = model_on_cuda(12).bfloat16()
    here = peak(stream_backprop(model, **cut), ids)
    there = peak(stream_backprop(model, offload="host", **cut), ids)
    layer_input = 16384 * 256 * 2
    assert here - there >= 7 * layer_input


def test_kept_attention_is_taken_off_the_device_too():
    ids = torch.randint(0, 512, (1, 16384), device="cuda")
    model = model_on_cuda(12).bfloat16()
    here = peak(stream_backprop(model, keep_attention=True, **BY_HEADS), ids)
    there = peak(stream_backprop(model, keep_attention=True, offload="host", **BY_HEADS), ids)
    layer = 16384 * (256 + 4 * 64) * 2
    assert here - there >= 7 * layer


@pytest.mark.parametrize("settings", [{}, {"offload": "host"}, {"offload": "host", "keep_attention": True}])
def test_memory_is_as_the_closed_form_says(settings):
    from fourfold.parallel.stream import stream_memory

    model, seq_len = model_on_cuda(12).bfloat16(), 32768
    ids = torch.randint(0, 512, (1, seq_len), device="cuda")
    sizes = {"head_groups": 2, "chunk_size": 4096, "mlp_chunk": 4096, "logits_chunk": 1024}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = peak(stream_backprop(model, **sizes, **settings), ids)
    closed = {"keep_attention": settings.get("keep_attention", False), "offload": "offload" in settings}
    said = stream_memory(model.config, seq_len, itemsize=2, device_type="cuda", **sizes, **closed).total_bytes
    assert abs(found - said) <= 0.1 * said


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_fused_kernels_are_no_further_from_fp64_than_plain(family, dtype):
    pytest.importorskip("liger_kernel")
    ids = batch(2, 85).cuda()
    check(tiny(family).cuda().to(dtype), {"input_ids": ids, "labels": ids}, head_groups=2, fused=True)


def test_a_layer_takes_ligers_kernels_where_they_are_installed():
    pytest.importorskip("liger_kernel")
    from fourfold.parallel.stream.fused import liger

    model, ids = stream_backprop(tiny("qwen3").cuda().bfloat16()), batch(2, 85).cuda()
    model(input_ids=ids, labels=ids).loss.backward()
    fused = liger()
    assert fused is not None
    assert min(fused.taken().values()) >= 1
