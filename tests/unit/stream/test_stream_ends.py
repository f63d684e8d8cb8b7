"""Ends of a model that are not transformers' own are honoured: loss, head, norm, forward and hooks of somebody else's.

Each case changes a model, before streaming or after; streamed gradients must be plain backpropagation's of the changed
model, and its layers must have streamed.
"""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.streamed_layers import counted_layers
from torch import nn
from transformers import LlamaForCausalLM

from fourfold.parallel.stream import stream_backprop, stream_backprop_disable, token_logprobs
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


def shift(x):
    return torch.roll(x, 1, dims=1)


class WithTerm(LlamaForCausalLM):
    """A loss of its own on top."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            out.loss = out.loss + 0.1 * out.logits.square().mean()
        return out


class WithLayer(LlamaForCausalLM):
    """The first layer once more, after the model."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = self.lm_head(hidden + shift(hidden))
        return {"loss": self.loss_function(logits, labels, vocab_size=97), "logits": logits}


class DoublingNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return 2 * F.rms_norm(x, x.shape[-1:], self.weight)


def smoothed(logits, labels, vocab_size, **kwargs):
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.view(-1, vocab_size), targets.reshape(-1), label_smoothing=0.3)


def own_loss(model):
    model.loss_function = smoothed


def replaced_forward(model):
    plain = model.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.loss = 3 * out.loss
        return out

    model.forward = forward


def capped_head(model):
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: 5 * (plain(x) / 5).tanh()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "loss function": own_loss,
    "forward of the model": replaced_forward,
    "forward of the head": capped_head,
    "hook on the head": lambda model: model.lm_head.register_forward_hook(lambda module, args, out: 0.5 * out),
    "pre-hook on the head": lambda model: model.lm_head.register_forward_pre_hook(
        lambda module, args: (args[0] + 0.5,)
    ),
    "backward hook on the head": lambda model: model.lm_head.register_full_backward_hook(
        lambda module, ins, outs: (3 * ins[0],)
    ),
    "hook on the final norm": lambda model: model.model.norm.register_forward_hook(
        lambda module, args, out: out.tanh()
    ),
    "pre-hook on the final norm": lambda model: model.model.norm.register_forward_pre_hook(
        lambda module, args: (args[0] + shift(args[0]),)
    ),
    "hook on the base model": lambda model: model.model.register_forward_hook(
        lambda module, args, out: setattr(out, "last_hidden_state", out.last_hidden_state.flip(-1))
    ),
}  # fmt: skip


def changed(kind: str) -> nn.Module:
    model = tiny("llama")
    CHANGES[kind](model)
    return model


@pytest.mark.parametrize("first", ["changed first", "streaming first"])
@pytest.mark.parametrize("kind", CHANGES)
def test_an_end_of_somebody_elses_is_honoured(kind, first):
    ids = batch(2, 21)
    plain_model = changed(kind)
    plain_loss = plain_model(input_ids=ids, labels=ids).loss
    plain = gradients(plain_model, plain_loss)
    model = tiny("llama")
    if first == "changed first":
        CHANGES[kind](model)
    stream_backprop(model, **CHUNKS)
    if first == "streaming first":
        CHANGES[kind](model)
    for attempt in range(2):
        with counted_layers() as layers, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loss = model(input_ids=ids, labels=ids).loss
        assert len(layers) == 2
        # Around a forward that runs ours, streaming's head is right, and there is nothing to say.
        wrapped = kind == "forward of the model" and first == "streaming first"
        assert len(said) == (0 if attempt or wrapped else 1), [str(each.message) for each in said]
        assert abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss)
        assert_gradients(gradients(model, loss), plain, TOLERANCE)


@pytest.mark.parametrize("kind", [WithTerm, WithLayer])
def test_a_subclass_keeps_its_forward(kind):
    ids = batch(2, 21)
    model = kind(tiny("llama").config).train()
    loss = model(input_ids=ids, labels=ids)["loss"]
    plain = gradients(model, loss)
    stream_backprop(model, **CHUNKS)
    with counted_layers() as layers, pytest.warns(UserWarning, match=kind.__name__):
        streamed = model(input_ids=ids, labels=ids)["loss"]
    assert len(layers) == 2
    assert torch.isclose(streamed, loss, rtol=LOSS_TOLERANCE, atol=0)
    assert_gradients(gradients(model, streamed), plain, TOLERANCE)


def test_a_norm_of_ones_own():
    ids, model = batch(2, 21), tiny("llama")
    model.model.norm = DoublingNorm(model.model.norm)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    with pytest.warns(UserWarning, match="DoublingNorm"):
        loss = model(input_ids=ids, labels=ids).loss
    assert_gradients(gradients(model, loss), plain, TOLERANCE)


def test_a_norm_put_in_later_is_refused():
    ids, model = batch(2, 21), stream_backprop(tiny("llama"), **CHUNKS)
    model.model.norm = DoublingNorm(model.model.norm)
    with pytest.raises(ValueError, match="final norm"):
        model(input_ids=ids, labels=ids)


def test_a_head_of_ones_own():
    class Head(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = linear.weight

        def forward(self, x):
            return F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=-1).T

    ids, model = batch(2, 21), tiny("llama")
    model.lm_head = Head(model.lm_head)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    with pytest.warns(UserWarning, match="the head is a Head"):
        loss = model(input_ids=ids, labels=ids).loss
    assert_gradients(gradients(model, loss), plain, TOLERANCE)


def test_statistics_of_a_changed_end_are_refused():
    ids, model = batch(2, 21), stream_backprop(changed("hook on the head"), **CHUNKS)
    with pytest.raises(ValueError, match="the head has a hook"):
        token_logprobs(model, ids, ids)


def test_a_stock_model_says_nothing_and_has_no_logits():
    ids, model = batch(2, 21), stream_backprop(tiny("llama"), **CHUNKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(input_ids=ids, labels=ids).logits is None


def test_positional_labels_stream():
    ids, model = batch(2, 21), tiny("llama")
    plain_loss = model(ids, labels=ids).loss
    plain = gradients(model, plain_loss)
    stream_backprop(model, **CHUNKS)
    with counted_layers() as layers:
        loss = model(ids, None, None, None, None, ids).loss
    assert len(layers) == 2
    assert_gradients(gradients(model, loss), plain, TOLERANCE)
    with pytest.raises(TypeError):
        model(*[None] * 20)


def test_the_base_model_copied_alone_is_plain():
    ids, model = batch(1, 9), stream_backprop(tiny("llama").eval(), **CHUNKS)
    alone = copy.deepcopy(model.model)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.zero_()
    assert not alone(ids).last_hidden_state.any()
    assert model.model(ids).last_hidden_state.any()
    assert stream_backprop_disable(model) is model
