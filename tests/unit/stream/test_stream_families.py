"""Families whose layers differ in a detail from those that every test runs: all of streaming in one test each.

Outputs, and gradients of every parameter, against plain backpropagation in fp32, chunks that do not divide; a row of
packed documents; attention by groups of heads; router losses where there are some.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from fourfold.parallel.stream import stream_backprop, stream_backprop_disable
from fourfold.parallel.stream.checks import SUPPORTED
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import FAMILIES, MORE_FAMILIES, batch, tiny

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6  # as in test_stream_backprop.py
# Scalars that are sums of both signs over all tokens and channels: plain backpropagation is further from fp64, too.
CANCELLING = {"apertus": 1e-4}
CHUNKS = {"chunk_size": 6, "mlp_chunk": 4, "logits_chunk": 5}


def inputs(*, packed: bool) -> dict[str, Tensor | bool]:
    ids = batch(2, 24)
    if not packed:
        return {"input_ids": ids, "labels": ids}
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ([9, 1, 14], [20, 4])])
    labels = ids.masked_fill(positions == 0, -100)
    # With a cache, which is the default, transformers does not look for documents.
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}


def check(model: nn.Module, arguments: dict[str, Tensor | bool], family: str, **settings: object) -> None:
    plain_loss = model(**arguments).loss
    plain = gradients(model, plain_loss)
    # Streamed in chunks of its own: a tiny batch beforehand would only repeat this test.
    stream_backprop(model, **{**CHUNKS, **settings}, verify=False)
    loss = model(**arguments).loss
    assert abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss)
    assert_gradients(gradients(model, loss), plain, CANCELLING.get(family, TOLERANCE), family)
    stream_backprop_disable(model)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_plain_gradients(family):
    model = tiny(family)
    assert model.config.model_type in SUPPORTED
    check(model, inputs(packed=False), family)
    # gpt-oss's own attention does not part documents by their positions: see test_stream_other_code.py.
    check(model, inputs(packed=family != "gpt_oss"), family, head_groups=2)
    if hasattr(model, "router_aux_loss_coef"):
        check(model, {**inputs(packed=False), "output_router_logits": True}, family)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("settings", [{"keep_attention": True}, {"head_groups": 2, "keep_attention": True}])
def test_kept_attention_of_sinks_and_of_heads_of_two_sizes(family, settings):
    check(tiny(family), inputs(packed=False), family, **settings)


@pytest.mark.parametrize("settings", [{}, {"head_groups": 2}, {"keep_attention": True}])
def test_packed_documents_with_sinks_and_windows_are_each_document_alone(settings):
    """gpt-oss's own attention sees across documents, so the truth is one run a document, in fp64."""
    model, ids, lengths = tiny("gpt_oss").double(), batch(1, 24), (9, 1, 14)
    model.set_experts_implementation("eager")  # grouped products do not exist in fp64
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    parts = [part for part in ids.split(lengths, dim=1) if part.shape[1] > 1]
    targets = sum(part.shape[1] - 1 for part in parts)
    truth = torch.stack([model(input_ids=part, labels=part).loss * (part.shape[1] - 1) / targets for part in parts])
    expected = gradients(model, truth.sum())
    stream_backprop(model, **CHUNKS, **settings, verify=False)
    loss = model(input_ids=ids, labels=ids.masked_fill(positions == 0, -100), position_ids=positions).loss
    assert abs(loss - truth.sum()) <= LOSS_TOLERANCE * truth.sum()
    assert_gradients(gradients(model, loss), expected, TOLERANCE)


def test_every_type_that_is_admitted_is_tested():
    language = {tiny(family).config.model_type for family in (*FAMILIES, *MORE_FAMILIES)}
    # Of vision-language models: see test_stream_vision.py.
    assert language | {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"} == SUPPORTED


def test_scalars_that_cancel_are_as_near_to_fp64_as_plain_ones():
    model = tiny("apertus")
    name = "model.layers.0.mlp.act_fn.alpha_n"
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, exact_model(**inputs(packed=False)).loss)[name]
    plain = gradients(model, model(**inputs(packed=False)).loss)[name]
    stream_backprop(model, **CHUNKS, verify=False)
    streamed = gradients(model, model(**inputs(packed=False)).loss)[name]
    # Both are roundings of sums that nearly cancel: neither may be more than some of the other's off.
    assert abs(streamed - exact) <= 4 * abs(plain - exact) + 1e-5 * abs(exact)


@pytest.mark.parametrize("settings", [{}, {"head_groups": 2}])
def test_dropout_by_a_function_is_repeated(settings):
    """Seed-OSS drops out what attention adds without a module for it."""
    model, ids = tiny("seed_oss", residual_dropout=0.3), batch(1, 21)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return model(input_ids=ids, labels=ids).loss

    plain = gradients(model, loss())
    # One chunk of all tokens: random numbers are drawn in the plain model's order.
    stream_backprop(model, chunk_size=64, mlp_chunk=64, verify=False, **settings)
    assert_gradients(gradients(model, loss()), plain, TOLERANCE)
