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


@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen2", "qwen3"])
def test_weights_there_and_back_bit_for_bit(family):
    model = tiny(family)
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
