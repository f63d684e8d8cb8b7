"""Calls that are not model(ids, labels=labels): without labels, of the base model, packed, compiled, pickled.

In training a call streams its layers, or says once why it does not; never the one for the other.
"""

import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.streamed_layers import counted_layers
from torch import nn
from transformers import DataCollatorWithFlattening, LlamaForSequenceClassification, LlamaForTokenClassification

from fourfold.parallel.stream import stream_backprop
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


def check(model, loss_of, layers=2):
    """Gradients of loss_of(model), plain and streamed, and how many layers stream."""
    loss = loss_of(model)
    plain = gradients(model, loss)
    stream_backprop(model, **CHUNKS)
    model.zero_grad()
    with counted_layers() as names:
        streamed = loss_of(model)
    assert len(names) == layers
    assert torch.isclose(streamed, loss, rtol=LOSS_TOLERANCE, atol=0)
    assert_gradients(gradients(model, streamed), plain, TOLERANCE)


def own_loss(model, **arguments):
    logits = model(**arguments).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch(2, 21)[:, 1:].flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("family", ["llama", "gemma3, windows", "phi", "mixtral"])
def test_without_labels_the_layers_stream(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(tiny(family), lambda model: own_loss(model, input_ids=batch(2, 21)))


def test_the_base_model_called_alone_streams():
    check(tiny("llama"), lambda model: model.model(batch(2, 21)).last_hidden_state.square().mean())
    check(tiny("llama"), lambda model: model.base_model(batch(2, 21), use_cache=False, return_dict=False)[0].std())


def test_embeddings_and_masks_without_labels():
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, :6] = 0
    embeddings = torch.randn(2, 21, 32)

    def loss_of(model):
        hidden = model.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        return hidden.square()[mask.bool()].mean()

    check(tiny("llama"), loss_of)


def test_packed_documents_without_labels():
    positions = torch.cat([torch.arange(n) for n in (9, 1, 11)]).expand(2, -1)
    check(tiny("llama"), lambda model: own_loss(model, input_ids=batch(2, 21), position_ids=positions, use_cache=False))


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaForTokenClassification])
def test_classifiers_stream_their_layers(kind):
    labels = torch.tensor([0, 1]) if kind is LlamaForSequenceClassification else batch(2, 21) % 2
    config = tiny("llama").config
    config.classifier_dropout = 0.0
    model = kind(config).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(model, lambda model: model(input_ids=batch(2, 21), labels=labels).loss)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(2, 1, 21, 21).tril().bool()}, "4 dims"),
        ({"cu_seq_lens_q": torch.tensor([0, 21])}, "position_ids"),
    ],
)
def test_what_cannot_stream_says_so_once_and_is_plain(arguments, why):
    model = stream_backprop(tiny("llama"), **CHUNKS)
    model.set_attn_implementation("eager")
    with counted_layers() as layers, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            own_loss(model, input_ids=batch(2, 21), **arguments).backward()
    assert layers == []
    ours = [str(each.message) for each in said if "does not stream" in str(each.message)]
    assert len(ours) == 1
    assert why in ours[0]


def test_nothing_streams_where_no_gradient_is_asked_for():
    model, ids = stream_backprop(tiny("llama"), **CHUNKS), batch(2, 21)
    with counted_layers() as layers:
        with torch.no_grad():
            model(input_ids=ids)
        model.requires_grad_(False)
        model(input_ids=ids)
        model.requires_grad_().eval()
        model(input_ids=ids)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert layers == []


def test_collators_that_flatten():
    rows = [{"input_ids": row[:length].tolist()} for row, length in zip(batch(3, 21), (9, 5, 21), strict=True)]
    plain = DataCollatorWithFlattening(return_tensors="pt")(rows)
    full = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    assert "cu_seq_lens_q" in full
    assert "seq_idx" in full
    model = tiny("llama")
    expected = gradients(model, model(**plain, use_cache=False).loss)
    stream_backprop(model, **CHUNKS)
    with counted_layers() as layers:
        found = gradients(model, model(**full).loss)
    assert len(layers) == 2
    assert_gradients(found, expected, TOLERANCE)
    wrong = dict(full, cu_seq_lens_q=torch.tensor([0, 10, 14, 35]))
    with pytest.raises(ValueError, match=r"tokens \[0, 10, 14\], but position_ids at \[0, 9, 14\]"):
        model(**wrong)


@pytest.mark.parametrize("items", [torch.tensor([40]), torch.tensor(40), 40, torch.tensor([[40]])])
def test_the_number_of_items_in_any_shape(items):
    model, ids = stream_backprop(tiny("llama"), **CHUNKS), batch(2, 21)
    loss, mean = model(input_ids=ids, labels=ids, num_items_in_batch=items).loss, model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, mean)
    with pytest.raises(ValueError, match=r"num_items_in_batch of shape \(2,\)"):
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor([20, 20]))


@pytest.mark.parametrize("what", ["model", "layer", "forward and backward"])
def test_compiled(what):
    """Compiled code goes around what streams."""
    model, ids = tiny("llama"), batch(2, 21)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    called = model
    if what == "layer":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    elif what == "model":
        called = torch.compile(model, backend="eager")
    else:
        called = torch.compile(lambda **arguments: model(**arguments), backend="eager")
    with counted_layers() as layers:
        loss = called(input_ids=ids, labels=ids).loss
    assert len(layers) == 2
    assert_gradients(gradients(model, loss), plain, TOLERANCE)


def test_activation_checkpointing_wrappers_are_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    def is_layer(module):
        return type(module).__name__ == "LlamaDecoderLayer"

    model, ids = tiny("llama"), batch(2, 21)
    apply_activation_checkpointing(model, check_fn=is_layer)
    with pytest.raises(ValueError, match="wrapped for activation checkpointing"):
        stream_backprop(model)
    model = stream_backprop(tiny("llama"), **CHUNKS)
    apply_activation_checkpointing(model, check_fn=is_layer)
    with pytest.raises(ValueError, match="wrapped for activation checkpointing"):
        model(input_ids=ids, labels=ids)


def test_layers_put_in_later_are_refused():
    model, ids = stream_backprop(tiny("llama"), **CHUNKS), batch(2, 21)
    model.model.layers[1] = tiny("llama").model.layers[1]
    with pytest.raises(ValueError, match="call stream_backprop again"):
        model(input_ids=ids, labels=ids)
    model.model.layers = nn.ModuleList(list(model.model.layers)[:1])
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="call stream_backprop again"):
        own_loss(model, input_ids=ids)
    plain = gradients(model, stream_backprop(model, **CHUNKS)(input_ids=ids, labels=ids).loss)
    assert plain


def test_pickling_is_refused_and_state_dicts_are_not():
    model = stream_backprop(tiny("llama"), **CHUNKS)
    for save in (lambda: torch.save(model, io.BytesIO()), lambda: pickle.dumps(model.model.layers[0])):
        with pytest.raises(ValueError, match="stream_backprop_disable before copying or pickling"):
            save()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file).keys() == tiny("llama").state_dict().keys()


def test_a_whole_step_under_torchs_own_checkpoint():
    def loss_of(model):
        def loss(ids):
            return model(input_ids=ids, labels=ids).loss

        return torch.utils.checkpoint.checkpoint(loss, batch(2, 21), use_reentrant=False)

    check(tiny("llama"), loss_of, layers=2)
