"""Code of somebody else's between the user and streaming: followed exactly, or refused with what to do instead.

What classes, hooks, adapters and wrappers do is compared with the plain model; what cannot be followed is a ValueError.
"""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.streamed_layers import counted_layers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, LlamaForCausalLM, LlamaModel

from fourfold.parallel.stream import stream_backprop
from fourfold.parallel.stream import streaming as streaming_module
from fourfold.parallel.stream.attention import row_masks
from fourfold.parallel.testing.compare import assert_gradients, gradients, relative_error
from fourfold.parallel.testing.tiny_models import batch, tiny

LOSS_TOLERANCE, TOLERANCE = 1e-6, 2e-6  # as in test_stream_backprop.py
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}
WHOLE = {"chunk_size": 64, "mlp_chunk": 64}  # one chunk: random numbers are drawn in the plain model's order


def loss_of(model: nn.Module, **arguments: object) -> Tensor:
    ids = batch(2, 21)
    torch.manual_seed(3)
    return model(input_ids=ids, labels=ids, **arguments).loss


def check(model: nn.Module, plain_model: nn.Module, where: str = "", **arguments: object) -> None:
    """A streaming model against the same, plain."""
    plain_loss = loss_of(plain_model, **arguments)
    plain = gradients(plain_model, plain_loss)
    with counted_layers() as layers, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = loss_of(model, **arguments)
        found = gradients(model, loss)
    assert len(layers) == 2
    assert abs(loss - plain_loss) <= LOSS_TOLERANCE * abs(plain_loss)
    assert_gradients(found, plain, TOLERANCE, where)


def with_term(self, *args, **kwargs):
    out = STOCK_FORWARD(self, *args, **kwargs)
    if out.loss is not None:
        out.loss = out.loss + self.model.norm.weight.sum()
    return out


STOCK_FORWARD = LlamaForCausalLM.forward
NORM = type(tiny("llama").model.norm)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, NORM, type(tiny("llama").model.layers[0].mlp)])
def test_a_class_that_is_given_another_forward(kind, order, monkeypatch):
    plain = kind.forward
    forward = with_term if kind is LlamaForCausalLM else lambda self, x: 1.5 * plain(self, x)
    model = tiny("llama")
    if order == "after":
        stream_backprop(model, **CHUNKS)
    monkeypatch.setattr(kind, "forward", forward)
    if order == "before":
        stream_backprop(model, **CHUNKS)
    check(model, tiny("llama"))


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        ("register_module_forward_hook", lambda module, args, out: 1.1 * out if type(module) is NORM else None),
        ("register_module_forward_pre_hook", lambda module, args: (2 * args[0],) if type(module) is NORM else None),
        (
            "register_module_full_backward_hook",
            lambda module, ins, outs: (2 * ins[0],) if type(module) is nn.Linear else None,
        ),
    ],
)
def test_hooks_on_all_modules(register, hook):
    plain_model, model = tiny("llama"), stream_backprop(tiny("llama"), **CHUNKS)
    handle = getattr(torch.nn.modules.module, register)(hook)
    try:
        check(model, plain_model, register)
    finally:
        handle.remove()


class Noise(nn.Module):
    """Random in training by no module of torch's."""

    def forward(self, x):
        return x * (1 + 0.1 * torch.randn_like(x)) if self.training else x


class Centred(nn.Module):
    """Mixes tokens in training alone."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True) if self.training else x


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def followed_by(*parts: nn.Module) -> nn.Module:
    model = tiny("llama")
    for layer, part in zip(model.model.layers, parts, strict=True):
        layer.mlp = nn.Sequential(layer.mlp, part)
    return model.train()


@pytest.mark.parametrize("kind", [Noise, partial(nn.AlphaDropout, 0.5), partial(nn.FeatureAlphaDropout, 0.2)])
def test_whatever_draws_random_numbers_draws_them_again(kind):
    model, plain_model = (followed_by(kind(), kind()) for _ in range(2))
    check(stream_backprop(model, **WHOLE), plain_model)


@pytest.mark.parametrize(("kind", "why"), [(Centred, "do not stream this model"), (Normalized, "over tokens")])
def test_what_mixes_tokens_in_training_alone_is_refused(kind, why):
    with pytest.raises(ValueError, match=why):
        loss_of(stream_backprop(followed_by(kind(), kind()), **CHUNKS))


def test_layers_that_do_not_run_on_a_chunk_are_refused():
    class Positioned(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1])[:, None] * torch.ones(12, 1)

    with pytest.raises(ValueError, match="runs plain and fails in chunks"):
        loss_of(stream_backprop(followed_by(Positioned(), Positioned()), **CHUNKS))


def test_a_comparison_leaves_buffers_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    model = followed_by(Counting(), Counting())
    stream_backprop(model, verify=True)
    assert all(buffer == 0 for name, buffer in model.named_buffers() if name.endswith("calls"))


def test_parameters_exchanged_for_one_call_are_refused():
    model = stream_backprop(tiny("llama"), **CHUNKS)
    ids = {"input_ids": batch(2, 21), "labels": batch(2, 21)}
    others = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    loss = torch.func.functional_call(model, others, (), ids).loss
    with pytest.raises(ValueError, match="exchange them after backward"):
        loss.backward()
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(lambda some: torch.func.functional_call(model, some, (), ids).loss)(others)


@pytest.mark.parametrize("side", ["labels", "shift_labels"])
def test_labels_of_another_length_are_refused(side):
    model, ids = stream_backprop(tiny("llama"), **CHUNKS), batch(2, 21)
    with pytest.raises(ValueError, match=rf"{side} of shape \(2, 20\)"):
        model(input_ids=ids, **{side: ids[:, 1:]})


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny("llama").config).train()
    stream_backprop(model)
    with pytest.raises(ValueError, match="meta device"):
        model(input_ids=batch(2, 21).to("meta"), labels=batch(2, 21).to("meta"))


def test_an_attention_function_of_ones_own_is_refused():
    def doubled(module, q, k, v, mask, **arguments):
        return 2 * F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register("doubled", doubled)
    model = stream_backprop(tiny("llama"), **CHUNKS)
    model.set_attn_implementation("doubled")
    with pytest.raises(ValueError, match="attends by 'doubled'"):
        loss_of(model)
    with pytest.raises(ValueError, match="attends by 'doubled'"):
        stream_backprop(model)


def test_attention_put_in_later_is_refused():
    model = stream_backprop(tiny("llama"), **CHUNKS)
    model.model.layers[0].self_attn = tiny("llama").model.layers[0].self_attn
    with pytest.raises(ValueError, match="call stream_backprop again"):
        loss_of(model)
    stream_backprop(model, **CHUNKS)
    loss_of(model).backward()


def test_a_base_model_alone_streams():
    model = LlamaModel(tiny("llama").config).train()
    weights = torch.randn(2, 21, 32)
    plain = gradients(model, (model(batch(2, 21)).last_hidden_state * weights).sum())
    stream_backprop(model, **CHUNKS)
    with counted_layers() as layers:
        found = gradients(model, (model(batch(2, 21)).last_hidden_state * weights).sum())
    assert len(layers) == 2
    assert_gradients(found, plain, TOLERANCE)


@pytest.mark.parametrize("order", ["before", "after"])
def test_layers_inside_torch_compiles_wrapper(order):
    model = tiny("llama")
    if order == "after":
        stream_backprop(model, **CHUNKS)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    if order == "before":
        stream_backprop(model, **CHUNKS)
    plain = tiny("llama")
    loss = loss_of(plain)
    expected = gradients(plain, loss)
    with counted_layers() as layers:
        found = gradients(model, loss_of(model))
    assert len(layers) == 2
    assert_gradients({name.replace("._orig_mod", ""): value for name, value in found.items()}, expected, TOLERANCE)


def wrap(model: nn.Module, kind: str) -> None:
    from torch.distributed._composable import checkpoint as composable

    for layer in model.model.layers:
        if kind == "composable":
            composable(layer)
            continue
        contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        options = {"context_fn": contexts} if kind == "selective" else {}
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=kind == "reentrant", **options)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["plain", "selective", "composable"])
def test_checkpoints_around_layers_are_refused(kind, order):
    def step() -> None:
        model = tiny("llama")
        if order == "before":
            wrap(model, kind)
        stream_backprop(model, **CHUNKS)
        if order == "after":
            wrap(model, kind)
        loss_of(model).backward()

    with pytest.raises(ValueError, match="streaming replaces"):
        step()


def test_packed_documents_are_compared_by_themselves(monkeypatch):
    """With each document alone: gpt-oss's own attention sees across them, and streaming parts them all the same."""
    ids, positions = batch(1, 21), torch.cat([torch.arange(9), torch.arange(12)]).unsqueeze(0)
    packed = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
    model = tiny("gpt_oss")
    parts = [model(input_ids=part, labels=part).loss * (part.shape[1] - 1) for part in ids.split((9, 12), dim=1)]
    expected = gradients(model, torch.stack(parts).sum() / 19)
    stream_backprop(model, **CHUNKS)
    assert_gradients(gradients(model, model(**packed, use_cache=False).loss), expected, TOLERANCE)
    # Who does not part them is stopped.
    monkeypatch.setattr(streaming_module, "row_masks", lambda mask, _, shape: row_masks(mask, None, shape))
    model = stream_backprop(tiny("gpt_oss"), **CHUNKS)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="with packed documents"):
        model.__dict__["fourfold_stream"].verify(packed=True)


def test_documents_that_a_plain_call_would_not_part_are_said(recwarn):
    """A call that makes a cache has transformers attend across documents; ours parts them, and says so once."""
    ids, positions = batch(1, 21), torch.cat([torch.arange(9), torch.arange(12)]).unsqueeze(0)
    model = stream_backprop(tiny("llama"), **CHUNKS)
    model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False)
    assert not [each for each in recwarn if "part documents" in str(each.message)]
    for _ in range(2):
        model(input_ids=ids, labels=ids, position_ids=positions)
    assert len([each for each in recwarn if "part documents" in str(each.message)]) == 1


@pytest.mark.parametrize("wrong", [-5, 97, 1000])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_labels_outside_of_the_vocabulary_are_errors(wrong, has_gradient):
    """As in cross_entropy, whichever way the head goes."""
    ids, model = batch(2, 21), stream_backprop(tiny("llama"), **CHUNKS)
    if has_gradient:
        model(input_ids=ids, labels=ids).loss.backward()
    labels = ids.clone()
    labels[0, 4] = wrong
    with pytest.raises((IndexError, RuntimeError, ValueError), match="bounds"):
        model(input_ids=ids, labels=labels).loss.backward()


def share_mlp(model: nn.Module) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def share_layer(model: nn.Module) -> None:
    model.model.layers[1] = model.model.layers[0]


def share_projection(model: nn.Module) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def tie_keys_and_values(model: nn.Module) -> None:
    model.model.layers[0].self_attn.k_proj.weight = model.model.layers[0].self_attn.v_proj.weight


@pytest.mark.parametrize("head_groups", [0, 2])
@pytest.mark.parametrize("share", [share_mlp, share_layer, share_projection, tie_keys_and_values])
def test_weights_in_several_places_get_the_sum_of_their_gradients(share, head_groups):
    model = tiny("llama")
    share(model)
    plain = gradients(model, loss_of(model, use_cache=False))
    stream_backprop(model, **CHUNKS, head_groups=head_groups)
    assert_gradients(gradients(model, loss_of(model, use_cache=False)), plain, TOLERANCE)


POSITIONS = {
    "each twice": torch.arange(21) // 2,
    "a gap": torch.cat([torch.arange(9), torch.arange(12, 24)]),
    "falling": torch.arange(21).flip(0),
    "from seven": torch.arange(7, 28),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_part_documents_where_transformers_parts_them(kind):
    model, positions = tiny("llama"), POSITIONS[kind].expand(2, -1)
    plain = gradients(model, loss_of(model, position_ids=positions, use_cache=False))
    stream_backprop(model, **CHUNKS)
    assert_gradients(gradients(model, loss_of(model, position_ids=positions, use_cache=False)), plain, TOLERANCE)


@pytest.mark.parametrize("head_groups", [0, 2])
@pytest.mark.parametrize("kept", ["itself", "detached", "of the module"])
def test_gradients_that_a_hook_keeps_are_not_overwritten(kept, head_groups):
    held: list[Tensor] = []

    def keep(grad: Tensor) -> None:
        held.append(grad.detach() if kept == "detached" else grad)

    model = tiny("llama", num_hidden_layers=3)
    for layer in model.model.layers:
        if kept == "of the module":
            layer.register_full_backward_hook(lambda module, given, grads: keep(grads[0]))
        else:
            layer.register_forward_hook(lambda module, args, out: out.register_hook(keep) and None)
    loss_of(model).backward()
    plain = held[:]
    held.clear()
    stream_backprop(model, **CHUNKS, head_groups=head_groups)
    loss_of(model).backward()
    for mine, right in zip(held, plain, strict=True):
        assert relative_error(mine, right) <= TOLERANCE
