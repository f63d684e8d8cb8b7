"""Megatron-Core beside fourfold, without ranks: weights there and back, groups, and what the ring refuses."""

from types import SimpleNamespace

import pytest
import torch

from fourfold.parallel.decoder.megatron_weights import from_megatron, to_megatron
from fourfold.parallel.grid import AXES, Grid
from fourfold.parallel.ring.megatron import MegatronRingAttention
from fourfold.parallel.testing.compare import assert_same
from fourfold.parallel.testing.tiny_models import tiny

CONFIG = SimpleNamespace(attention_dropout=0.0, window_size=None, softmax_type="vanilla")
CAUSAL = SimpleNamespace(name="causal")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama, tied", {}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
    ],
)
def test_weights_there_and_back_bit_for_bit(family, changes):
    model = tiny(family, **changes)
    state = model.state_dict()
    back = from_megatron(to_megatron(state, model.config), model.config)
    assert_same(back.items(), state.items(), family)


def test_queries_keys_and_values_stand_group_after_group():
    model = tiny("llama")  # 4 query heads, 2 key heads of 8
    state = model.state_dict()
    packed = to_megatron(state, model.config)["decoder.layers.1.self_attention.linear_qkv.weight"]
    q, k, v = (state[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    expected = torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
    assert torch.equal(packed, expected)


def test_weights_without_a_place_are_named():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"\['model.layers.0.extra'\] have no place in a Llama-like GPTModel"):
        to_megatron(model.state_dict() | {"model.layers.0.extra": torch.zeros(1)}, model.config)
    whole = to_megatron(model.state_dict(), model.config)
    with pytest.raises(ValueError, match=r"\['decoder.extra'\] have no place in a Llama-like decoder"):
        from_megatron(whole | {"decoder.extra": torch.zeros(1)}, model.config)


def test_experts_are_one_by_one():
    model = tiny("mixtral")
    state = model.state_dict()
    found = to_megatron(state, model.config)
    for expert in range(model.config.num_local_experts):
        one = found[f"decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc1.weight"]
        assert torch.equal(one, state["model.layers.1.mlp.experts.gate_up_proj"][expert])
    assert torch.equal(found["decoder.layers.1.mlp.router.weight"], state["model.layers.1.mlp.gate.weight"])


def test_what_is_no_whole_model_is_refused():
    model = tiny("llama")
    state = model.state_dict()
    whole = to_megatron(state, model.config)
    down = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=f"{down} is missing: give the state dict of the whole model"):
        to_megatron({name: value for name, value in state.items() if name != down}, model.config)
    with pytest.raises(ValueError, match=rf"{down} is \(32, 24\) and not \(32, 48\): give the whole weights"):
        to_megatron(state | {down: state[down][:, :24]}, model.config)
    qkv = "decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is missing"):
        from_megatron({name: value for name, value in whole.items() if name != qkv}, model.config)
    bias = {f"decoder.layers.{layer}.mlp.linear_fc2.bias": torch.zeros(32) for layer in range(2)}
    with pytest.raises(ValueError, match=r"\['model.layers.0.mlp.down_proj.bias', .*are not in a model of this config"):
        from_megatron(whole | bias, model.config)


@pytest.mark.parametrize("family", ["gemma", "granite", "cohere", "phi3"])
def test_a_family_that_a_gptmodel_does_not_compute_is_refused(family):
    """Their weights have the names of Llama's, most of them; norms, scales or rotations are others."""
    config = SimpleNamespace(model_type=family)
    with pytest.raises(ValueError, match=f"model_type='{family}': a GPTModel with these weights would compute"):
        to_megatron({}, config)


def test_biases_that_a_gptmodel_has_not_alone_are_refused():
    model = tiny("llama", attention_bias=True)
    with pytest.raises(ValueError, match=r"attention_bias=true without mlp_bias: .*add_bias_linear"):
        to_megatron(model.state_dict(), model.config)


@pytest.mark.parametrize("grid", [Grid(dp=2, pp=3, cp=2, tp=4), Grid(dp=3, cp=4), Grid(pp=2, tp=2)], ids=str)
def test_groups_are_those_of_parallel_state(grid):
    """Megatron run with --use-tp-pp-dp-mapping, rank by rank."""
    state = pytest.importorskip("megatron.core.parallel_state")
    theirs = state.RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order="tp-cp-ep-pp-dp")
    for axis in AXES:
        ours: dict[tuple[int, ...], list[int]] = {}
        for rank in range(grid.world_size):
            others = tuple(place for name, place in grid.coordinates(rank).items() if name != axis)
            ours.setdefault(others, []).append(rank)
        assert sorted(ours.values()) == sorted(theirs.get_ranks(axis)), axis


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({}, "cross", "attention_type='cross': the ring has self-attention only"),
        ({"attention_dropout": 0.1}, "self", "set attention_dropout=0.0"),
        ({"softmax_type": "learnable"}, "self", "softmax_type='learnable'"),
    ],
)
def test_what_a_layer_may_not_ask_for(changes, kind, message):
    config = SimpleNamespace(**{**vars(CONFIG), **changes})
    with pytest.raises(ValueError, match=message):
        MegatronRingAttention(config, 1, CAUSAL, kind)


def test_what_a_call_may_not_ask_for():
    layer = MegatronRingAttention(CONFIG, 1, CAUSAL, "self", pg_collection=SimpleNamespace(cp=object()))
    x = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match="give attention_mask=None"):
        layer(x, x, x, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="leave packed_seq_params out"):
        layer(x, x, x, None, packed_seq_params=object())
    with pytest.raises(ValueError, match="'arbitrary': the ring takes causal and no_mask"):
        layer(x, x, x, None, attn_mask_type=SimpleNamespace(name="arbitrary"))
