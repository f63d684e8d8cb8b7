"""The load-balancing loss of streamed mixtures of experts: transformers' loss and gradients, to fp32 rounding."""

import pytest
import torch
from support.streamed_layers import counted_layers

from fourfold.parallel import stream_backprop
from fourfold.parallel.stream import token_statistics
from fourfold.parallel.stream.losses import sft_loss
from fourfold.parallel.testing.compare import assert_gradients, gradients, worst_error
from fourfold.parallel.testing.tiny_models import batch, tiny

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}
LARGE = {"router_aux_loss_coef": 0.5}  # so that the auxiliary part of a gradient is as large as the rest


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mean_over_all_tokens_in_chunks(family, padded):
    ids = batch(2, 33)
    arguments = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 20:] = 0
        arguments |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model = tiny(family, **LARGE)
    plain = model(**arguments)
    expected = gradients(model, plain.loss)
    streamed = stream_backprop(model, **CHUNKS)(**arguments)
    assert torch.isclose(streamed.loss, plain.loss, rtol=LOSS_TOLERANCE, atol=0)
    assert torch.isclose(streamed.aux_loss, plain.aux_loss, rtol=LOSS_TOLERANCE, atol=0)
    assert_gradients(gradients(model, streamed.loss), expected, TOLERANCE)


def test_dense_layers_have_no_router_and_the_config_may_ask():
    model, ids = tiny("qwen3_moe", mlp_only_layers=[0], output_router_logits=True, **LARGE), batch(1, 21)
    expected = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    assert_gradients(gradients(model, model(input_ids=ids, labels=ids).loss), expected, TOLERANCE)
    without = model(input_ids=ids, labels=ids, output_router_logits=False)
    assert worst_error(gradients(model, without.loss), expected) > 0.1


def test_losses_of_tokens_may_add_it():
    model, ids = tiny("mixtral", **LARGE), batch(2, 21)
    expected = gradients(model, model(input_ids=ids, labels=ids, output_router_logits=True).loss)
    statistics = token_statistics(stream_backprop(model, **CHUNKS), ids, ids, output_router_logits=True)
    loss = sft_loss(statistics) + 0.5 * statistics.aux_loss
    assert_gradients(gradients(model, loss), expected, TOLERANCE)


def test_the_noise_that_routers_see_is_repeated():
    model, ids = tiny("mixtral", router_jitter_noise=0.2, **LARGE), batch(1, 21)
    arguments = {"input_ids": ids, "labels": ids, "output_router_logits": True}

    def step():
        torch.manual_seed(3)
        return gradients(model, model(**arguments).loss)

    expected = step()
    stream_backprop(model, chunk_size=64, mlp_chunk=64)  # one chunk: the noise is drawn in plain's order
    assert_gradients(step(), expected, TOLERANCE)


@pytest.mark.parametrize("way", [{}, {"keep_attention": True}, {"head_groups": 2}], ids=str)
@pytest.mark.parametrize(("family", "changes"), [("mixtral", {}), ("qwen3_moe", {"mlp_only_layers": [0]})])
def test_a_caller_who_makes_the_loss_himself_gets_whole_router_logits(family, changes, way):
    """TRL's trainers call without labels, and take the load-balancing loss, or the logits of the routers."""
    model, ids = tiny(family, **changes, **LARGE), batch(2, 21)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0

    def loss(out):
        return out.logits[mask.bool()].square().mean() + 0.5 * out.aux_loss + out.router_logits[-1].square().mean()

    plain = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    expected = gradients(model, loss(plain))
    stream_backprop(model, **CHUNKS, **way)
    with counted_layers() as layers:
        streamed = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        found = gradients(model, loss(streamed))
    assert len(layers) == 2
    assert [part.shape for part in streamed.router_logits] == [part.shape for part in plain.router_logits]
    assert torch.isclose(loss(streamed), loss(plain), rtol=LOSS_TOLERANCE, atol=0)
    assert_gradients(found, expected, TOLERANCE)


def test_router_logits_that_cannot_be_had_are_plain_and_say_so():
    model, ids = stream_backprop(tiny("mixtral"), **CHUNKS), batch(2, 21)
    with counted_layers() as layers, pytest.warns(UserWarning, match="does not stream.*return_dict.*router_aux_loss"):
        out = model.model(input_ids=ids, output_router_logits=True, return_dict=False)
    assert layers == []
    assert len(out[-1]) == 2


def test_a_model_without_routers_is_refused():
    ids = batch(1, 5)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routers"):
        stream_backprop(tiny("llama"))(input_ids=ids, labels=ids, output_router_logits=True)
