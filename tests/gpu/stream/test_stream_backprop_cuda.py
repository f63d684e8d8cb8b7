"""StreamBP on CUDA: plain gradients, with and without offloading, and less memory with it."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fourfold.parallel import stream_backprop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def model_on_cuda(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).train().cuda()


def step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """(gradients, peak bytes above what was there)."""
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {name: p.grad.clone() for name, p in model.named_parameters()}, peak


@pytest.mark.parametrize("keep_attention", [False, True])
@pytest.mark.parametrize("offload", [None, "host"])
def test_plain_gradients(offload, keep_attention):
    model, ids = model_on_cuda(4), torch.randint(0, 512, (1, 1500), device="cuda")
    plain, _ = step(model, ids)
    stream_backprop(model, offload=offload, keep_attention=keep_attention)
    for _ in range(2):  # a second time, when pinned memory and device memory are used again
        found, _ = step(model, ids)
        for name, grad in plain.items():
            assert (found[name] - grad).norm() <= 2e-6 * grad.norm(), name


def test_offloading_takes_the_layer_inputs_off_the_device():
    ids = torch.randint(0, 512, (1, 16384), device="cuda")
    model = model_on_cuda(12).bfloat16()
    here = step(stream_backprop(model), ids)[1]
    there = step(stream_backprop(model, offload="host"), ids)[1]
    layer_input = 16384 * 256 * 2
    assert here - there >= 7 * layer_input
