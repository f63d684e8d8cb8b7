"""Streamed against plain backpropagation: loss to 1e-6, every parameter's gradient to 2e-6 relative L2, in fp32.

2e-6 is a few roundings of fp32 (6e-8) over sums of some hundred terms; plain backpropagation is 1e-6 from fp64 itself.
"""

import copy

import pytest
import torch
from support.dropout import slope_along_gradient
from torch import nn

from fourfold.parallel.stream.gradients import ParameterSums, SummedLinears, find_unread
from fourfold.parallel.stream.model import stream_backprop, stream_backprop_disable
from fourfold.parallel.stream.patching import Patches
from fourfold.parallel.stream.statistics import token_logprobs
from fourfold.parallel.testing.compare import assert_errors, assert_gradients, gradients, relative_error, worst_error
from fourfold.parallel.testing.tiny_models import FAMILIES, batch, tiny

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


def check(model: nn.Module, inputs: dict[str, object], **settings: object) -> None:
    plain_loss = model(**inputs).loss
    plain = gradients(model, plain_loss)
    stream_backprop(model, **{**CHUNKS, **settings})
    model.zero_grad()  # as in a first micro-batch: where gradients exist, they are added to
    loss = model(**inputs).loss
    assert abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss)
    assert_gradients(gradients(model, loss), plain, TOLERANCE)
    stream_backprop_disable(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_plain_gradients(family):
    ids = batch(2, 21)
    check(tiny(family), {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("length", [1, 2, 8, 17])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_any_length_and_chunk(length, chunk_size):
    ids = batch(1, length + 1)
    check(tiny("qwen3"), {"input_ids": ids, "labels": ids}, chunk_size=chunk_size)


def test_one_token_alone():
    model, ids = stream_backprop(tiny("qwen3")), batch(1, 1)
    assert token_logprobs(model, ids, ids).tolist() == [[0.0]]


def test_kept_attention_changes_nothing():
    ids = batch(2, 21)
    for family in ("qwen3", "gemma3, windows"):
        for keep_attention in (True, 1):
            check(tiny(family), {"input_ids": ids, "labels": ids}, keep_attention=keep_attention)
    with pytest.raises(ValueError, match="keep_attention=-1"):
        stream_backprop(tiny("qwen3"), keep_attention=-1)


def test_kept_attention_of_other_weights_is_refused():
    ids, model = batch(1, 9), stream_backprop(tiny("qwen3"), keep_attention=1)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="leave keep_attention out"):
        loss.backward()


@pytest.mark.parametrize("keep_attention", [False, True])
def test_offloading_changes_nothing(keep_attention):
    # Without CUDA it is only the order of putting and getting that is tested: see tests/gpu for the copies.
    ids = batch(2, 21)
    check(
        tiny("qwen3", num_hidden_layers=4), {"input_ids": ids, "labels": ids},
        offload="host", keep_attention=keep_attention,
    )  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_padding_and_masked_prompts(side):
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
        check(tiny(family), {"input_ids": ids, "labels": labels, "attention_mask": mask})


@pytest.mark.parametrize("family", ["gemma2, soft caps", "gpt_oss"])
def test_padding_that_predicts_a_rows_first_token(family):
    """Eager attention gives it the mean of all values, which nothing else does: exact without it, refused with it."""
    ids = batch(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[2, :13] = 0
    inputs = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    if family != "gpt_oss":  # whose sinks leave it nothing, here as there
        with pytest.raises(ValueError, match="rows 0 to 0 have padding at tokens 0 to 5 that"):
            stream_backprop(tiny(family), **CHUNKS)(**inputs)
        inputs["labels"][[0, 2], [6, 13]] = -100
    check(tiny(family), inputs)


@pytest.mark.parametrize("family", ["gemma2, soft caps", "mistral, window"])
def test_padding_out_of_a_windows_reach(family):
    """A window of 7: tokens 5 to 10 see some of the row's five tokens, those from 11 on see padding alone."""
    ids = batch(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}

    def eager():
        model = tiny(family)
        model.set_attn_implementation("eager")
        return model

    with pytest.raises(ValueError, match="rows 1 to 1 have padding at tokens 11 to 19 that"):
        stream_backprop(eager(), **CHUNKS)(**inputs)
    inputs["labels"][1, 12:] = -100
    check(eager(), inputs)


def test_labels_of_right_padding_too():
    ids = batch(2, 13)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    check(tiny("llama"), {"input_ids": ids, "labels": ids, "attention_mask": mask})


def test_packed_documents():
    ids = batch(2, 24)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ([9, 1, 14], [24])])
    for family in ("qwen2", "gemma3, windows"):
        # With a cache, which is the default, transformers does not look for documents.
        check(tiny(family), {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False})


def test_no_worse_than_plain_against_fp64():
    model, ids = tiny("qwen3"), batch(2, 40)
    exact_model = copy.deepcopy(model).double()
    exact = gradients(exact_model, exact_model(input_ids=ids, labels=ids).loss)
    plain = worst_error(gradients(model, model(input_ids=ids, labels=ids).loss), exact)
    stream_backprop(model, **CHUNKS)
    streamed = worst_error(gradients(model, model(input_ids=ids, labels=ids).loss), exact)
    assert streamed <= 1.5 * plain  # two roundings of the same size
    stream_backprop(exact_model, **CHUNKS)
    # transformers does norms and rotary embeddings in fp32 even then.
    assert_gradients(gradients(exact_model, exact_model(input_ids=ids, labels=ids).loss), exact, 1e-6)


def test_accumulation_scaling_and_hooks_as_usual():
    model, ids = tiny("qwen3"), batch(2, 21)
    plain = gradients(model, 8 * model(input_ids=ids, labels=ids, num_items_in_batch=7).loss)
    stream_backprop(model, **CHUNKS)
    calls = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.update({name: calls[name] + 1}))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.update({name: calls[name] + 1}))
    streamed = gradients(model, 8 * model(input_ids=ids, labels=ids, num_items_in_batch=7).loss)
    assert_gradients(streamed, plain, TOLERANCE)
    assert set(calls.values()) == {2}
    loss = 8 * model(input_ids=ids, labels=ids, num_items_in_batch=7).loss
    loss.backward()  # accumulates
    doubled = {name: p.grad for name, p in model.named_parameters()}
    assert_gradients(doubled, {name: 2 * grad for name, grad in plain.items()}, TOLERANCE)
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("family", ["llama, tied", "phi", "gemma2, soft caps"])
def test_later_micro_batches_are_added_where_the_gradients_are(family):
    model, ids = tiny(family), batch(2, 21)
    ids[0, 4:6] = 0  # padding_idx, whose row of the embedding gets no gradient
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    model.zero_grad()
    places = {}
    for count in (1, 2, 3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found = {name: p.grad / count for name, p in model.named_parameters()}
        assert_gradients(found, plain, TOLERANCE)
        assert places in ({}, {name: p.grad.data_ptr() for name, p in model.named_parameters()})
        places = {name: p.grad.data_ptr() for name, p in model.named_parameters()}


def test_gradients_asked_for_alone_leave_the_others_be():
    model, ids = tiny("qwen3"), batch(2, 21)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
    assert_gradients(dict(zip(names, found, strict=True)), plain, TOLERANCE)
    model(input_ids=ids, labels=ids).loss.backward(inputs=parameters[:3])
    asked = {name: parameter.grad for name, parameter in zip(names[:3], parameters[:3], strict=True)}
    assert_gradients(asked, {name: plain[name] for name in asked}, TOLERANCE)
    assert [name for name, p in zip(names[3:], parameters[3:], strict=True) if p.grad.any()] == []
    # A hook that waits for the gradient sees all of it.
    seen = {}
    for name, parameter in zip(names, parameters, strict=True):
        parameter.grad = torch.zeros_like(parameter)
        parameter.register_hook(lambda grad, name=name: seen.update({name: grad.clone()}))
    model(input_ids=ids, labels=ids).loss.backward()
    assert_gradients(seen, plain, TOLERANCE)


def test_frozen_parameters_and_lora():
    peft = pytest.importorskip("peft")
    model, ids = tiny("llama"), batch(2, 21)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    check(peft.get_peft_model(model, config), {"input_ids": ids, "labels": ids})


def test_dropout_is_repeated():
    model = stream_backprop(tiny("phi", resid_pdrop=0.2, embd_pdrop=0.1).double(), **CHUNKS)
    found, expected = slope_along_gradient(model, "model.layers.0.mlp.fc1.weight", batch(2, 21), step=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_autocast():
    # bf16 has 8 bits: plain and streamed each lie 2^-8 or so from the truth, in different places.
    model, ids = tiny("qwen3"), batch(2, 21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradients(model, model(input_ids=ids, labels=ids).loss)
        stream_backprop(model, **CHUNKS)
        loss = model(input_ids=ids, labels=ids).loss
    streamed = gradients(model, loss)
    assert_gradients(streamed, plain, 0.04)
    assert {name: grad.dtype for name, grad in streamed.items()} == dict.fromkeys(streamed, torch.float32)


def test_without_labels_the_model_is_as_before_and_disabling_undoes():
    model, ids = tiny("qwen3").eval(), batch(1, 12)
    logits = model(input_ids=ids).logits
    keys = set(vars(model))
    stream_backprop(model, **CHUNKS)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits[:, 2:], logits[:, 2:])
    assert model.train()(input_ids=ids, labels=ids).logits is None
    model.eval()
    with torch.no_grad():
        assert not model(input_ids=ids, labels=ids).loss.requires_grad
    stream_backprop_disable(model)
    assert set(vars(model)) == keys
    assert model(input_ids=ids, labels=ids).logits is not None


def test_verify_passes_a_right_model_and_stops_a_wrong_one(monkeypatch):
    model = tiny("gemma3, windows")
    model.model.embed_tokens.weight.grad = kept = torch.ones_like(model.model.embed_tokens.weight)
    stream_backprop(model, verify=True)
    assert model.model.embed_tokens.weight.grad is kept
    stream_backprop_disable(model)
    wrong = tiny("llama")
    monkeypatch.setattr(type(wrong.config), "logits_scaling", 1.01, raising=False)  # which Llama does not read
    with pytest.raises(ValueError, match="do not stream this model"):
        stream_backprop(wrong, verify=True)
    assert "fourfold_stream" not in vars(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"logits_chunk": "all"}, "logits_chunk='all'"),
        ({"backend": "nope"}, "nope"),
        ({"offload": "disk"}, "offload='disk'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    ids = batch(1, 5)
    with pytest.raises(ValueError, match=message):
        stream_backprop(tiny("llama"), **arguments)(input_ids=ids, labels=ids)


def test_calls_that_are_not_understood_are_refused():
    ids = batch(1, 9)
    model = stream_backprop(tiny("llama"))
    for extra in ({"output_hidden_states": True}, {"cu_seq_lens_q": [0, 9]}, {"something": 1}, {"logits_to_keep": 3}):
        with pytest.raises(ValueError, match=next(iter(extra))):
            model(input_ids=ids, labels=ids, **extra)
    with pytest.raises(ValueError, match="4 dims"):
        model(input_ids=ids, labels=ids, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(ValueError, match="attention dropout"):
        stream_backprop(tiny("llama", attention_dropout=0.1))(input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="stream_backprop"):
        token_logprobs(tiny("llama"), ids, ids)


def test_models_that_are_not_understood_are_refused():
    import transformers

    with pytest.raises(ValueError, match="gpt2"):
        stream_backprop(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)))
    with pytest.raises(ValueError, match="causal language model"):
        stream_backprop(nn.Linear(2, 2))
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(ValueError, match="persimmon"):
        stream_backprop(transformers.PersimmonForCausalLM(transformers.PersimmonConfig(**sizes, intermediate_size=8)))


@pytest.mark.parametrize(("family", "unread"), [("llama", 1), ("phi", 1), ("gemma3, windows", 0), ("olmo2", 0)])
def test_only_products_that_nothing_reads_are_left_out(family, unread):
    # A layer's last projection is only added to the residual, unless a norm follows it.
    layer = tiny(family).eval().model.layers[0]
    projections = [module for module in layer.mlp.modules() if isinstance(module, nn.Linear)]
    sums = ParameterSums([projection.weight for projection in projections])
    x = torch.randn(1, 4, 32)
    patches = Patches()
    patches.add(layer.self_attn, lambda plain, *a, **k: (x, None))
    with SummedLinears(layer.mlp, patches).into(sums):
        found = find_unread(layer(x, position_embeddings=None))
    assert found == set(projections[-1:] if unread else [])


def streaming_llama() -> nn.Module:
    return stream_backprop(tiny("llama"), **CHUNKS)


def test_a_copy_is_refused():
    model = streaming_llama()
    with pytest.raises(ValueError, match="stream_backprop_disable before copying"):
        copy.deepcopy(model)
    copy.deepcopy(stream_backprop_disable(model))


def test_gradients_that_others_hold_are_not_overwritten():
    model, ids, held = tiny("llama", num_hidden_layers=3), batch(2, 21), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: held.append(out))
    plain = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, held)
    held.clear()
    stream_backprop(model, **CHUNKS)
    streamed = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, held)
    names = [f"hidden states after layer {layer}" for layer in range(3)]
    errors = {name: relative_error(mine, right) for name, mine, right in zip(names, streamed, plain, strict=True)}
    assert_errors(errors, TOLERANCE)


@pytest.mark.parametrize("hook", ["skip", "in place"])
def test_hooks_that_change_hidden_states(hook):
    model, ids = tiny("llama", num_hidden_layers=3), batch(2, 21)
    if hook == "skip":
        model.model.layers[1].register_forward_hook(lambda module, args, out: out + args[0])
    else:
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.mul_(3.0))
    check(model, {"input_ids": ids, "labels": ids})


def test_a_head_put_in_later_is_refused():
    model, ids = streaming_llama(), batch(2, 21)
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match="after peft"):
        model(input_ids=ids, labels=ids)


def test_gradients_of_gradients_are_refused():
    model, ids = streaming_llama(), batch(2, 21)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model(input_ids=ids, labels=ids).loss, model.lm_head.weight, create_graph=True)


def test_verification_does_not_pass_nan():
    model = tiny("granite")
    model.config.logits_scaling = float("nan")
    with pytest.raises(ValueError, match="differ by nan"):
        stream_backprop(model, verify=True)


def test_fp16_under_a_loss_scale():
    model, ids = tiny("llama"), batch(2, 21)
    items, scale = 2**17, 2.0**16
    exact = gradients(model, model(input_ids=ids, labels=ids, num_items_in_batch=items).loss)
    stream_backprop(model, **CHUNKS).zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
    scaled = gradients(model, loss * scale)
    assert_gradients({name: grad / scale for name, grad in scaled.items()}, exact, 0.01)
