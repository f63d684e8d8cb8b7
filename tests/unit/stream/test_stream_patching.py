"""What streaming changes in a model: once, when enabled; wholly undone; never half, whatever fails in between."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fourfold.parallel.stream
from fourfold.parallel.stream import stream_backprop, stream_backprop_disable
from fourfold.parallel.stream.patching import ATTRIBUTE, PATCHES
from fourfold.parallel.testing.compare import gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

TOLERANCE = 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each module holds, itself; parameters and submodules by identity."""
    found = {}
    for name, module in model.named_modules():
        own = dict(vars(module))
        own["_parameters"] = {key: id(value) for key, value in module._parameters.items()}
        own["_modules"] = {key: id(value) for key, value in module._modules.items()}
        own["_buffers"] = {key: id(value) for key, value in module._buffers.items()}
        found[name] = own
    return found


def forwards(model: nn.Module) -> dict[str, Any]:
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


def worst(model: nn.Module, plain: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    found = gradients(model, model(input_ids=ids, labels=ids).loss)
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in plain.items())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2, soft caps", "phi"])
def test_disabling_leaves_no_trace(family):
    model, ids = tiny(family), batch(2, 21)
    before, name = attributes(model), model.config._attn_implementation
    stream_backprop(model, **CHUNKS)
    gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop_disable(model)
    assert attributes(model) == before
    assert model.config._attn_implementation == name


def test_nothing_is_patched_again_while_a_step_runs():
    model, ids = stream_backprop(tiny("llama"), **CHUNKS), batch(2, 21)
    enabled, seen = forwards(model), []
    plain = model.model.layers[0].input_layernorm.forward

    def forward(x):  # runs for every chunk, in forward and in backward
        seen.append({name: found for name, found in forwards(model).items() if "input_layernorm" not in name})
        return plain(x)

    model.model.layers[0].input_layernorm.forward = forward
    gradients(model, model(input_ids=ids, labels=ids).loss)
    assert len(seen) > 6
    assert all(each == enabled for each in seen)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_leaves_the_model_whole(when):
    model, ids = tiny("llama"), batch(2, 21)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS, verify=False)
    before, name = attributes(model), model.config._attn_implementation
    calls, layer = [], model.model.layers[1]
    own = layer.mlp.forward

    def fails(x):
        calls.append(x)
        if len(calls) == (5 if when == "forward" else 10):  # a step's forward has 9 pieces
            raise RuntimeError("in the middle")
        return own(x)

    layer.mlp.forward = fails
    with pytest.raises(RuntimeError, match="in the middle"):
        model(input_ids=ids, labels=ids).loss.backward()
    assert bool(len(calls) == 5) == (when == "forward")
    del layer.mlp.forward
    assert attributes(model) == before
    assert model.config._attn_implementation == name
    assert worst(model, plain, ids) <= TOLERANCE


def test_backward_after_disabling():
    model, ids = tiny("llama"), batch(2, 21)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    model.zero_grad()
    loss = stream_backprop(model, **CHUNKS)(input_ids=ids, labels=ids).loss
    stream_backprop_disable(model)
    before = attributes(model)
    found = gradients(model, loss)
    assert attributes(model) == before
    assert max(float((found[name] - grad).norm() / grad.norm()) for name, grad in plain.items()) <= TOLERANCE


def test_a_model_refused_is_left_as_it_was():
    model = tiny("granite", logits_scaling=float("nan"))
    before = attributes(model)
    with pytest.raises(ValueError, match="differ by nan"):
        stream_backprop(model, verify=True)
    assert attributes(model) == before
    assert ATTRIBUTE not in vars(model)


def test_changes_and_private_names_stand_in_the_table_alone():
    """No other file of the package sets a forward or uses a private name of torch or transformers."""
    private = re.compile(
        r"\.forward = |__dict__\[\"|torch\._C|\._use_count|\._backward_hooks|\._forward_|\._parameters|\._version"
        r"|\._backward_cls|_attn_implementation_internal|_z3_leaf"
    )
    folder = Path(fourfold.parallel.stream.__file__).parent
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(folder.glob("*.py"))
        if path.name != "patching.py"
        for line in path.read_text().splitlines()
        if private.search(line)
    ]
    assert found == []
    assert len({patch.what for patch in PATCHES}) == len(PATCHES)
