"""Models that change between forward and backward, and adapters put in and out in any order.

Backward recomputes with what the forward had: training mode, dropout, adapters; or says that it cannot.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from support.streamed_layers import counted_layers
from torch import nn

from fourfold.parallel.stream import stream_backprop, stream_backprop_disable
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

peft = pytest.importorskip("peft")

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}
WHOLE = {"chunk_size": 64, "mlp_chunk": 64}  # one chunk: random numbers are drawn in the plain model's order


def lora(**changes):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**{**settings, **changes})


def with_lora(model, **changes):
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora(**changes)).train()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return model(input_ids=ids, labels=ids).loss


SWITCHES = {
    "eval": lambda model: model.eval(),
    "dropout's rate": lambda model: [setattr(m, "p", 0.9) for m in model.modules() if isinstance(m, nn.Dropout)],
    "adapters off": lambda model: [
        vars(m).update(_disable_adapters=True) for m in model.modules() if hasattr(m, "_disable_adapters")
    ],
    "another adapter on": lambda model: [
        vars(m).update(_active_adapter=["other"]) for m in model.modules() if hasattr(m, "_active_adapter")
    ],
    "adapter's scale": lambda model: [
        m.scaling.update(default=9.0) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)
    ],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_backward_recomputes_with_the_forwards_switches(switch):
    ids = batch(1, 21)
    model = with_lora(tiny("llama"), lora_dropout=0.3)
    model.add_adapter("other", lora())
    model.set_adapter("default")
    plain = gradients(model, loss_of(model, ids))
    stream_backprop(model, **WHOLE)
    loss = loss_of(model, ids)
    SWITCHES[switch](model)
    before = [dict(vars(module)) for module in model.modules()]
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_gradients(found, plain, TOLERANCE, switch)
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("how", ["disabled", "exchanged"])
def test_backward_that_would_lose_an_adapters_gradients_is_refused(how):
    """peft freezes the adapter, and torch accumulates no gradient in what is frozen: so it is with plain models."""
    ids, model = batch(2, 21), with_lora(tiny("llama"))
    model.add_adapter("other", lora())
    plain = gradients(model, loss_of(model, ids))
    stream_backprop(model, **CHUNKS)
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, ids)
    if how == "exchanged":
        model.set_adapter("other")
    meanwhile = model.disable_adapter() if how == "disabled" else nullcontext()
    with meanwhile, pytest.raises(ValueError, match="run backward before"):
        loss.backward()
    model.set_adapter("default")
    assert_gradients(gradients(model, loss_of(model, ids)), plain, TOLERANCE)


def test_merging_in_between_is_refused():
    ids, model = batch(2, 21), stream_backprop(with_lora(tiny("llama")), **CHUNKS)
    loss = loss_of(model, ids)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merge after backward"):
        loss.backward()
    model.unmerge_adapter()
    gradients(model, loss_of(model, ids))


def test_dropout_of_the_model_itself():
    ids = batch(1, 21)
    model = tiny("phi", resid_pdrop=0.2, embd_pdrop=0.1)
    plain = gradients(model, loss_of(model, ids))
    stream_backprop(model, **WHOLE)
    loss = loss_of(model, ids)
    model.eval()
    assert_gradients(gradients(model, loss), plain, TOLERANCE)
    assert not any(module.training for module in model.modules())


PEFT = {
    "lora": {},
    "head saved": {"modules_to_save": ["lm_head"]},
    "head and embedding saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "norms saved": {"modules_to_save": ["input_layernorm"]},
    "mlp saved": {"modules_to_save": ["mlp"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("first", ["peft first", "streaming first"])
@pytest.mark.parametrize("kind", PEFT)
def test_peft_in_any_order(kind, first):
    ids = batch(2, 21)
    plain_model = with_lora(tiny("llama"), **PEFT[kind])
    plain_loss = loss_of(plain_model, ids)
    plain = gradients(plain_model, plain_loss)
    model = tiny("llama")
    if first == "streaming first":
        model = with_lora(stream_backprop(model, **CHUNKS), **PEFT[kind])
    else:
        model = stream_backprop(with_lora(model, **PEFT[kind]), **CHUNKS)
    own_head = pytest.warns(UserWarning, match="the head is a") if kind == "lora on the head" else nullcontext()
    with counted_layers() as layers, own_head:
        loss = loss_of(model, ids)
    assert len(layers) == 2
    assert abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss)
    assert_gradients(gradients(model, loss), plain, TOLERANCE, f"{kind}, {first}")
    with model.disable_adapter(), plain_model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(loss_of(model, ids), loss_of(plain_model, ids))
    stream_backprop_disable(model)
    torch.testing.assert_close(loss_of(model, ids), plain_loss)


def test_merged_and_unloaded():
    ids, model = batch(2, 21), with_lora(stream_backprop(tiny("llama"), **CHUNKS))
    with torch.no_grad():
        expected = loss_of(model, ids)
    merged = model.merge_and_unload().requires_grad_()
    plain = stream_backprop_disable(copy.deepcopy(stream_backprop_disable(merged)))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(plain, ids), expected, rtol=1e-5, atol=1e-5)
    stream_backprop(merged, **CHUNKS)
    plain_gradients = gradients(plain, loss_of(plain, ids))
    assert_gradients(gradients(merged, loss_of(merged, ids)), plain_gradients, TOLERANCE)
