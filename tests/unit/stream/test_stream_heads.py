"""Attention by groups of key heads over the whole sequence: plain backpropagation's gradients, whatever is cut."""

import copy

import pytest
import torch
from support.dropout import slope_along_gradient
from torch import nn

from fourfold.parallel.attention.backends import BACKENDS
from fourfold.parallel.stream.gradients import ParameterSums
from fourfold.parallel.stream.heads_layer import HeadsRun
from fourfold.parallel.stream.model import stream_backprop, stream_backprop_disable
from fourfold.parallel.testing.compare import assert_gradients, gradient_errors, gradients
from fourfold.parallel.testing.tiny_models import FAMILIES, batch, tiny

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6
HEADS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5, "head_groups": 2, "verify": False}
# Families whose projections of q, k and v are not cut by heads: a norm over all heads, one fused projection.
WHOLE = ("olmo2", "phi3")


def check(model: nn.Module, inputs: dict[str, object], **settings: object) -> None:
    plain_loss = model(**inputs).loss
    plain = gradients(model, plain_loss)
    stream_backprop(model, **{**HEADS, **settings})
    loss = model(**inputs).loss
    assert abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss)
    assert_gradients(gradients(model, loss), plain, TOLERANCE)
    stream_backprop_disable(model)


@pytest.fixture
def groups_used(monkeypatch) -> list[int]:
    """How many groups of heads each layer's attention was done in, in the order of the layers' calls."""
    seen, plain = [], HeadsRun.function

    def function(run, here, x):
        found = plain(run, here, x)
        seen.append(len(here.groups))
        return found

    monkeypatch.setattr(HeadsRun, "function", function)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_plain_gradients(family, groups_used):
    ids = batch(2, 21)
    check(tiny(family), {"input_ids": ids, "labels": ids})
    assert groups_used == [1 if family in WHOLE else 2] * 2


@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_any_length_and_chunk(length, chunk_size):
    ids = batch(1, length + 1)
    check(tiny("qwen3"), {"input_ids": ids, "labels": ids}, chunk_size=chunk_size, mlp_chunk=chunk_size)


@pytest.mark.parametrize("head_groups", [1, 3, 64])
def test_as_many_groups_as_the_key_heads_allow(head_groups, groups_used):
    ids = batch(2, 21)
    check(
        tiny("llama", num_attention_heads=8, num_key_value_heads=4), {"input_ids": ids, "labels": ids},
        head_groups=head_groups,
    )  # fmt: skip
    assert groups_used == [{1: 1, 3: 2, 64: 4}[head_groups]] * 2


@pytest.mark.parametrize("keep_attention", [False, 1, True])
@pytest.mark.parametrize("offload", [None, "host"])
def test_kept_attention_and_offloading_change_nothing(keep_attention, offload):
    ids = batch(2, 21)
    for family in ("qwen3", "gemma3, windows"):
        inputs = {"input_ids": ids, "labels": ids}
        check(tiny(family, num_hidden_layers=2), inputs, keep_attention=keep_attention, offload=offload)


@pytest.mark.parametrize("backend", [None, "math"])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_padding_and_masked_prompts(side, backend):
    ids = batch(4, 23)
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, 5, 5, 20]):
        mask[row, 23 - padding :] = 0
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask[1, 4:7] = mask[2, 9] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :9] = -100  # a prompt
    for family in ("llama", "mistral, window"):
        check(tiny(family), {"input_ids": ids, "labels": labels, "attention_mask": mask}, backend=backend)


def test_packed_documents():
    ids = batch(2, 24)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ([9, 1, 14], [24])])
    for family in ("qwen2", "gemma3, windows"):
        check(tiny(family), {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [HEADS, {"head_groups": 2}, {"head_groups": 2, "keep_attention": True}])
def test_no_worse_than_plain_against_fp64(dtype, settings):
    model, ids = tiny("qwen3", num_attention_heads=8, num_key_value_heads=4, hidden_size=64).to(dtype), batch(2, 40)
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, exact_model(input_ids=ids, labels=ids).loss)
    plain = gradient_errors(gradients(model, model(input_ids=ids, labels=ids).loss), exact)
    stream_backprop(model, **{**settings, "head_groups": 4})
    streamed = gradient_errors(gradients(model, model(input_ids=ids, labels=ids).loss), exact)
    assert max(streamed.values()) <= 1.5 * max(plain.values())


def test_attention_with_a_hook_or_an_adapter_is_not_cut(groups_used):
    peft = pytest.importorskip("peft")
    ids = batch(2, 21)
    hooked, seen = tiny("llama"), []
    hooked.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    check(hooked, {"input_ids": ids, "labels": ids})
    assert set(seen) == {32}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    check(peft.get_peft_model(tiny("llama"), config), {"input_ids": ids, "labels": ids})
    assert groups_used == [1, 2, 1, 1]


class MixesHeads(nn.Module):
    """A norm of a head's size whose result depends on the other heads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x + x.mean(dim=2, keepdim=True))


def test_heads_that_are_not_made_alone_are_found_by_trying(groups_used):
    model, ids = tiny("qwen3"), batch(2, 21)
    model.model.layers[1].self_attn.k_norm = MixesHeads(16)
    check(model, {"input_ids": ids, "labels": ids})
    assert groups_used == [2, 1]


def test_dropout_is_repeated():
    model = stream_backprop(tiny("phi", resid_pdrop=0.2, embd_pdrop=0.1).double(), **HEADS)
    found, expected = slope_along_gradient(model, "model.layers.0.self_attn.k_proj.weight", batch(2, 21), step=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_later_micro_batches_are_added_where_the_gradients_are():
    model, ids = tiny("qwen3"), batch(2, 21)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **HEADS)
    model.zero_grad()
    places = {}
    for count in (1, 2, 3):
        model(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad / count for name, p in model.named_parameters()}
        assert_gradients(found, plain, TOLERANCE)
        assert places in ({}, {name: p.grad.data_ptr() for name, p in model.named_parameters()})
        places = {name: p.grad.data_ptr() for name, p in model.named_parameters()}


def test_autocast_and_frozen_parameters():
    model, ids = tiny("qwen3"), batch(2, 21)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" not in name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradients(model, model(input_ids=ids, labels=ids).loss)
        stream_backprop(model, **HEADS)
        loss = model(input_ids=ids, labels=ids).loss
    assert_gradients(gradients(model, loss), plain, 0.04)


def test_groups_below_zero_are_refused():
    for groups in (-1, True, "all"):
        with pytest.raises(ValueError, match="head_groups="):
            stream_backprop(tiny("llama"), head_groups=groups)


@pytest.mark.parametrize("settings", [HEADS, {**HEADS, "head_groups": 0}])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama, tied"])
def test_autocast_is_no_worse_than_plain_against_fp64(family, settings):
    model, ids = tiny(family), batch(2, 40)
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, exact_model(input_ids=ids, labels=ids).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradient_errors(gradients(model, model(input_ids=ids, labels=ids).loss), exact)
        stream_backprop(model, **settings)
        loss = model(input_ids=ids, labels=ids).loss
    found = gradients(model, loss)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert max(gradient_errors(found, exact).values()) <= 1.5 * max(plain.values())


class Counted:
    """The CPU's kernel, called as a GPU's is, and how often; see attention.keys_a_call."""

    name, leaf = "counted", 0

    def __init__(self) -> None:
        self.calls = []

    def refusal(self, q, k):
        return None

    def forward(self, q, k, v, *, causal, scale):
        self.calls.append(("forward", q.shape[2], causal))
        return BACKENDS["cpu_flash"].forward(q, k, v, causal=causal, scale=scale)

    def backward(self, grad_out, saved, *, causal, scale):
        self.calls.append(("backward", saved.q.shape[2], causal))
        return BACKENDS["cpu_flash"].backward(grad_out, saved, causal=causal, scale=scale)


@pytest.mark.parametrize("keep_attention", [False, True])
def test_a_group_is_one_call_of_a_gpus_kernel(keep_attention):
    backend, ids = Counted(), batch(1, 21)
    check(
        tiny("llama", num_hidden_layers=1), {"input_ids": ids, "labels": ids}, backend=backend,
        keep_attention=keep_attention,
    )  # fmt: skip
    forwards = 2 if keep_attention else 4
    assert backend.calls == [("forward", 21, True)] * forwards + [("backward", 21, True)] * 2
    # A packed document is one call, too.
    documents = Counted()
    positions = torch.cat([torch.arange(9), torch.arange(12)]).unsqueeze(0)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    check(tiny("llama", num_hidden_layers=1), inputs, backend=documents, keep_attention=True)
    lengths = [("forward", 9, True), ("forward", 12, True)] * 2 + [("backward", 9, True), ("backward", 12, True)] * 2
    assert documents.calls == lengths


@pytest.mark.parametrize("settings", [HEADS, {**HEADS, "head_groups": 0}])
@pytest.mark.parametrize("pieces", [1, 4, 8])
@pytest.mark.parametrize("family", ["qwen3", "llama, tied"])
def test_bf16_is_no_worse_than_plain_against_fp64(family, pieces, settings):
    """Whether gradients are summed in bf16, as those of few pieces are, or in fp32."""
    model, ids = tiny(family).bfloat16(), batch(2, 40)
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, exact_model(input_ids=ids, labels=ids).loss)
    plain = gradient_errors(gradients(model, model(input_ids=ids, labels=ids).loss), exact)
    size = 40 // pieces
    stream_backprop(model, **{**settings, "chunk_size": size, "mlp_chunk": size})
    found = gradients(model, model(input_ids=ids, labels=ids).loss)
    assert max(gradient_errors(found, exact).values()) <= 1.5 * max(plain.values())


@pytest.mark.parametrize(("length", "wide"), [(16, False), (17, True)])
@pytest.mark.parametrize("groups", [0, 2])
def test_few_pieces_are_summed_in_the_weights_own_dtype(length, wide, groups, monkeypatch):
    """Four pieces of four tokens have no fp32 sum; a fifth has."""
    seen: set[torch.dtype] = set()
    plain = ParameterSums.values

    def values(sums, like):
        if type(sums) is ParameterSums:  # the layers', not the head's
            seen.update(total.dtype for total in sums._sums if total is not None)
            seen.update(total.dtype for rows in sums._rows.values() for total in rows.values())
        return plain(sums, like)

    monkeypatch.setattr(ParameterSums, "values", values)
    model, ids = tiny("llama").bfloat16(), batch(1, length)
    stream_backprop(model, chunk_size=4, mlp_chunk=4, logits_chunk=5, head_groups=groups, verify=False)
    model(input_ids=ids, labels=ids).loss.backward()
    assert (torch.float32 in seen) == wide
