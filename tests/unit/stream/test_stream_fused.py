"""Fused kernels take the place of a model's own code where they compute the same, and nowhere else.

The kernels here are plain torch (support.fused_kernels): Liger-Kernel's have the same arguments and run on CUDA
(tests/gpu).
"""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.fused_kernels import FusedKernels
from torch import Tensor
from transformers.models.llama import modeling_llama

from fourfold.parallel.stream import streaming
from fourfold.parallel.stream.fused import Fused, liger
from fourfold.parallel.stream.model import stream_backprop, stream_backprop_disable
from fourfold.parallel.testing.compare import assert_gradients, gradients
from fourfold.parallel.testing.tiny_models import FAMILIES, batch, tiny

TOLERANCE = 2e-6
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}


@pytest.fixture
def calls(monkeypatch) -> FusedKernels:
    found = FusedKernels()
    monkeypatch.setattr(streaming, "liger", lambda: Fused(found.kernels()))
    return found


@pytest.mark.parametrize("head_groups", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_plain_gradients(family, head_groups, calls):
    model, ids = tiny(family), batch(2, 21)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS, head_groups=head_groups)
    assert_gradients(gradients(model, model(input_ids=ids, labels=ids).loss), plain, TOLERANCE)
    stream_backprop_disable(model)
    used = {name for name, count in calls.count.items() if count > 4}
    # Phi has layer norms and a plain MLP; Phi-3's and the experts' MLPs are their own.
    expected = {"rms_norm", "rotary", "gelu_mul" if family.startswith("gemma") else "silu_mul"}
    if family in ("phi3", "mixtral", "qwen3_moe"):
        expected.discard("silu_mul")
    assert used == ({"rotary"} if family == "phi" else expected)


@pytest.mark.parametrize("wrong", ["rms_norm", "silu_mul", "rotary"])
def test_a_kernel_that_computes_something_else_is_not_taken(wrong, calls, monkeypatch):
    kernels, seen = calls.kernels(), []
    right = getattr(kernels, wrong)

    def off(*arguments):
        seen.append(wrong)
        found = right(*arguments)
        return tuple(x * 1.001 for x in found) if wrong == "rotary" else found * 1.001

    monkeypatch.setattr(streaming, "liger", lambda: Fused(replace(kernels, **{wrong: off})))
    model, ids = tiny("llama"), batch(2, 21)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    for _ in range(2):
        assert_gradients(gradients(model, model(input_ids=ids, labels=ids).loss), plain, TOLERANCE)
    assert 1 <= len(seen) <= 3  # it was tried, once in each form
    assert min(calls.count[name] for name in ("rms_norm", "silu_mul", "rotary") if name != wrong) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_only_rounds_elsewhere_is_taken(dtype, calls, monkeypatch):
    """As each on a GPU does: these compute in fp64, and round once."""

    def exact(kernel):
        def run(*arguments):
            out = kernel(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
            given = arguments[0].dtype
            return tuple(x.to(given) for x in out) if isinstance(out, tuple) else out.to(given)

        return run

    kernels = calls.kernels()
    names = ("rms_norm", "silu_mul", "gelu_mul", "rotary")
    fused = Fused(replace(kernels, **{name: exact(getattr(kernels, name)) for name in names}))
    monkeypatch.setattr(streaming, "liger", lambda: fused)
    model, ids = stream_backprop(tiny("qwen3").to(dtype), **CHUNKS, verify=False), batch(2, 21)
    model(input_ids=ids, labels=ids).loss.backward()
    assert fused.taken() == {"norms": 1, "gates": 1, "rotary": 1}


def test_what_was_taken_is_told(calls, monkeypatch):
    fused = Fused(calls.kernels())
    monkeypatch.setattr(streaming, "liger", lambda: fused)
    model, ids = stream_backprop(tiny("qwen3"), **CHUNKS), batch(2, 21)
    model(input_ids=ids, labels=ids).loss.backward()
    assert fused.taken() == {"norms": 1, "gates": 1, "rotary": 1}


def test_activations_are_compared_in_the_dtype_of_their_products(calls, monkeypatch):
    """Under autocast: hidden states are wider, and a kernel rounds elsewhere than the module's own operators do."""

    def once_rounded(a: Tensor, b: Tensor) -> Tensor:
        return (F.silu(a.float()) * b.float()).to(a.dtype)

    fused = Fused(replace(calls.kernels(), silu_mul=once_rounded))
    monkeypatch.setattr(streaming, "liger", lambda: fused)
    model, ids = stream_backprop(tiny("llama"), **CHUNKS, verify=False), batch(2, 21)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    assert fused.taken()["gates"] == 1


def hook(activation, seen, stack):
    activation.register_forward_hook(lambda *_: seen.append(1))


def hook_of_all(activation, seen, stack):
    def note(module, *_):
        if module is activation:
            seen.append(1)

    stack.callback(torch.nn.modules.module.register_module_forward_hook(note).remove)


def own_forward(activation, seen, stack):
    plain = activation.forward
    activation.forward = lambda x: (seen.append(1), plain(x))[1]


@pytest.mark.parametrize("watch", [hook, hook_of_all, own_forward])
def test_an_activation_that_is_watched_keeps_its_own_code(watch, calls):
    model, ids, seen = tiny("llama"), batch(2, 21), []
    stream_backprop(model, **CHUNKS)
    with ExitStack() as stack:
        for layer in model.model.layers:
            watch(layer.mlp.act_fn, seen, stack)
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen
    assert calls.count["silu_mul"] == 0


def scaled_norm(model):
    """One norm does what somebody gave it, the others what their class does."""
    norm = model.model.layers[-1].post_attention_layernorm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def scaled_gate(model):
    mlp = model.model.layers[-1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def other_activation(model):
    """Two of one class, made with something else."""
    for number, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = Swish(1.0 + number)


class Swish(torch.nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope * x)


@pytest.mark.parametrize("change", [scaled_norm, scaled_gate, other_activation])
def test_a_module_that_is_unlike_the_others_of_its_class_keeps_its_own_code(change, calls):
    model, ids = tiny("llama"), batch(2, 21)
    change(model)
    plain = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop(model, **CHUNKS)
    assert_gradients(gradients(model, model(input_ids=ids, labels=ids).loss), plain, TOLERANCE)
    assert min(calls.count["rms_norm"], calls.count["silu_mul"]) > 4  # the others took theirs


def small_gates(model):
    """GELU and SiLU have one slope at zero."""
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data.zero_()
        layer.mlp.act_fn = torch.nn.GELU(approximate="tanh")


class OutsideRMSNorm(modeling_llama.LlamaRMSNorm):
    """Its epsilon is added to the root."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        root = hidden_states.square().mean(-1, keepdim=True).sqrt()
        return self.weight * (hidden_states / (root + self.variance_epsilon))


def epsilon_outside(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm = OutsideRMSNorm(model.config.hidden_size)


def exact_gelu(model):
    """In bf16 the kernel's formula is the same but for rounding."""
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    model.bfloat16()


@pytest.mark.parametrize(
    ("change", "gate"), [(small_gates, "gelu_mul"), (epsilon_outside, "silu_mul"), (exact_gelu, None)]
)
def test_a_try_goes_where_kernels_differ(change, gate, calls, monkeypatch):
    """Numbers of usual size would not tell these from what a kernel computes."""
    fused = Fused(calls.kernels())
    monkeypatch.setattr(streaming, "liger", lambda: fused)
    model, ids = tiny("llama"), batch(2, 21)
    change(model)
    stream_backprop(model, **CHUNKS, verify=False)
    model(input_ids=ids, labels=ids).loss.backward()
    assert fused.taken() == {"norms": 1, "gates": int(gate is not None), "rotary": 1}
    assert {name for name in ("silu_mul", "gelu_mul") if calls.count[name] > 3} == ({gate} if gate else set())


def test_a_class_that_is_given_another_forward_later_keeps_that(calls, monkeypatch):
    model, ids = stream_backprop(tiny("llama"), **CHUNKS), batch(2, 21)
    before = model(input_ids=ids, labels=ids).loss
    norm = modeling_llama.LlamaRMSNorm
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, hidden_states: 2 * plain(self, hidden_states=hidden_states))
    found = gradients(model, model(input_ids=ids, labels=ids).loss)
    stream_backprop_disable(model)
    loss = model(input_ids=ids, labels=ids).loss
    assert abs(loss - before) > 1e-3
    assert_gradients(found, gradients(model, loss), TOLERANCE)


def test_nothing_of_it_is_left():
    found = FusedKernels()
    before = modeling_llama.apply_rotary_pos_emb
    model, ids = tiny("llama"), batch(2, 21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "liger", lambda: Fused(found.kernels()))
        stream_backprop(model, **CHUNKS)
        model(input_ids=ids, labels=ids).loss.backward()
    assert modeling_llama.apply_rotary_pos_emb is before
    stream_backprop_disable(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    count = dict(found.count)
    model(input_ids=ids, labels=ids).loss.backward()
    assert found.count == count


def test_a_try_runs_no_hook_and_leaves_no_gradient(calls):
    model, ids, seen = tiny("llama"), batch(2, 21), []
    model.model.layers[0].input_layernorm.weight.register_hook(seen.append)
    stream_backprop(model, **CHUNKS)
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    assert calls.count["rms_norm"] > 0
    assert seen == []
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []


def test_off_when_told_off_and_where_liger_is_not(calls):
    model, ids = tiny("llama"), batch(2, 21)
    stream_backprop(model, **CHUNKS, fused=False)
    model(input_ids=ids, labels=ids).loss.backward()
    assert not calls.count
    if not torch.cuda.is_available():
        found = liger()
        assert found is None or found.kernels.device_type == "cuda"
