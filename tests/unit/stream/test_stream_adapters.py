"""Adapters that are not LoRA on a layer's projections: prompts, rows of a batch with adapters of their own."""

import warnings

import pytest
import torch
from support.streamed_layers import counted_layers
from torch import Tensor, nn

from fourfold.parallel.stream import stream_backprop
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

peft = pytest.importorskip("peft")

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


def adapted(config: object) -> nn.Module:
    torch.manual_seed(2)
    return peft.get_peft_model(tiny("llama"), config).train()


def loss_of(model: nn.Module, **arguments: object) -> Tensor:
    ids = batch(2, 21)
    return model(input_ids=ids, labels=ids, **arguments).loss


def test_prompts_are_trained_before_a_frozen_model():
    model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    loss = loss_of(model)
    plain = gradients(model, loss)
    stream_backprop(model, **CHUNKS)
    with counted_layers() as layers:
        found = gradients(model, loss_of(model))
    assert len(layers) == 2
    assert_gradients(found, plain, TOLERANCE)


def test_adapters_by_row_are_the_forwards_in_backward():
    """peft chooses them by hooks that it takes off again before backward."""
    model = adapted(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    names = ["default", "__base__"]
    plain = gradients(model, loss_of(model, adapter_names=names))
    stream_backprop(model, **CHUNKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(model, loss_of(model, adapter_names=names))
    assert_gradients(found, plain, TOLERANCE)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_attention_module_in_place_of_another_is_refused():
    model = adapted(peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))
    with pytest.raises(ValueError, match="AdaptedAttention"):
        stream_backprop(model)


def test_prefixes_in_a_cache_are_refused():
    model = stream_backprop(adapted(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), **CHUNKS)
    with pytest.raises(ValueError, match="past_key_values"):
        loss_of(model)
