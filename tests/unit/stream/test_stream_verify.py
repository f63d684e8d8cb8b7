"""The comparison of a tiny batch with plain backpropagation: what it admits, what it stops, what it leaves behind."""

import warnings

import pytest
import torch
import transformers
from torch import nn

import fourfold.parallel.stream.streaming as streaming_module
from fourfold.parallel.stream import stream_backprop, stream_backprop_disable
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import SMALL, batch, tiny

TOLERANCE = 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


@pytest.fixture
def runs(monkeypatch):
    """How often models were verified."""
    counted, plain = [], streaming_module.verify_gradients
    monkeypatch.setattr(
        streaming_module, "verify_gradients", lambda *args, **kwargs: counted.append(plain(*args, **kwargs))
    )
    return counted


class MixingMlp(nn.Module):
    """Adds to each token what the one before it has: no chunk knows of the chunk before."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x + torch.roll(x, 1, dims=1) * torch.arange(x.shape[1]).gt(0)[:, None])


class CenteringMlp(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x - x.mean(1, keepdim=True))


@pytest.mark.parametrize("kind", [MixingMlp, CenteringMlp])
@pytest.mark.parametrize("verify", [None, "first"])
def test_layers_that_mix_tokens_are_stopped_at_the_first_call(kind, verify):
    ids, model = batch(2, 21), tiny("llama")
    model.model.layers[1].mlp = kind(model.model.layers[1].mlp)
    stream_backprop(model, **CHUNKS, verify=verify)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()
    for _ in range(2):
        with pytest.raises(ValueError, match="do not stream this model"):
            model(input_ids=ids, labels=ids)
        with pytest.raises(ValueError, match="do not stream this model"):
            model.model(input_ids=ids)
    stream_backprop(model, **CHUNKS, verify=False)(input_ids=ids, labels=ids).loss.backward()


def test_once_and_nothing_is_left_behind(runs):
    ids, model = batch(2, 21), tiny("llama")
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    model.zero_grad(set_to_none=True)
    seen = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: seen.append(grad))
    stream_backprop(model, **CHUNKS)
    generator = torch.get_rng_state()
    loss = model(input_ids=ids, labels=ids).loss
    assert len(runs) == 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert seen == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert_gradients(gradients(model, loss), plain, TOLERANCE)
    model(input_ids=ids, labels=ids)
    assert len(runs) == 1
    assert runs[0] is not None


@pytest.mark.parametrize("verify", [False, True])
def test_told_off_or_done_before(runs, verify):
    ids, model = batch(2, 21), stream_backprop(tiny("llama"), **CHUNKS, verify=verify)
    done = len(runs)
    model(input_ids=ids, labels=ids).loss.backward()
    assert (done, len(runs)) == (int(verify), int(verify))


def test_where_somebody_could_notice_it_does_not_run_by_itself(runs):
    ids, model = batch(2, 21), tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: None)
    with pytest.warns(UserWarning, match="LlamaMLP in a layer has a hook"):
        stream_backprop(model, **CHUNKS)(input_ids=ids, labels=ids)
    assert runs == []
    stream_backprop(model, **CHUNKS, verify="first")
    with pytest.raises(ValueError, match="it has hooks"):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2, soft caps", "mixtral", "phi"])
def test_right_models_pass_in_any_precision(family, dtype):
    ids = batch(2, 21)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stream_backprop(tiny(family).to(dtype), **CHUNKS)(input_ids=ids, labels=ids).loss.backward()
        model = stream_backprop(tiny(family), **CHUNKS)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()


def test_an_unknown_type_is_admitted_if_it_agrees():
    ids = batch(2, 21)
    config = transformers.HyperCLOVAXConfig(**SMALL)
    torch.manual_seed(0)
    model = transformers.HyperCLOVAXForCausalLM(config).train()
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    with pytest.raises(ValueError, match="verify='first' admits it"):
        stream_backprop(model)
    stream_backprop(model, **CHUNKS, verify="first")
    assert_gradients(gradients(model, model(input_ids=ids, labels=ids).loss), plain, TOLERANCE)
    stream_backprop_disable(model)
