"""The decoder inside a model of several kinds of input: absent fields, sizes too, are transformers' own."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModel

from fourfold.layouts.inputs.defaults import NESTED, NORM_EPSILON, OWN, ROTARY_BASE, ROTARY_SHARE
from fourfold.layouts.inputs.families import SAME_AS, TEXT_OF
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.output.megatron import megatron_arguments

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 128}  # fmt: skip
GEMMA3_4B = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
             "model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
LLAVA_7B = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
PIXTRAL_12B = {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "num_hidden_layers": 40,
               "num_key_value_heads": 8, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072}  # fmt: skip
# Decoders that transformers builds inside their wrapper alone.
INSIDE = [
    ("ministral", {"head_dim": 24}),  # without a head_dim transformers builds none
    ("ministral3", {"head_dim": 24}),
    ("qwen2_vl_text", {}),
    ("qwen2_5_vl_text", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    ("qwen3_vl_text", {"head_dim": 16, "attention_bias": True}),
    ("qwen3_vl_moe_text", {"num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1]}),
    ("qwen3_vl_moe_text", {}),
    ("glm4v_moe_text", {"n_routed_experts": 8, "moe_intermediate_size": 40, "head_dim": 16, "num_experts_per_tok": 2}),
]


def built(config: dict, *, tied: bool) -> int:
    """Parameters of transformers' own decoder, with a head as its wrapper gives it one."""
    settings = {key: value for key, value in config.items() if key != "model_type"} | {"pad_token_id": None}
    own = AutoConfig.for_model(config["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModel.from_config(own)
    return sum(map(torch.Tensor.numel, model.parameters())) + (0 if tied else own.vocab_size * own.hidden_size)


def wrapped(text: dict, outer: str = "llava", **fields) -> dict:
    return {"model_type": outer, "vision_config": {"hidden_size": 32}, "text_config": text, **fields}


@pytest.mark.parametrize(("kind", "changes"), INSIDE, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(INSIDE)])
def test_a_decoder_of_a_wrapper_counts_as_transformers_does(kind, changes):
    config = {"model_type": kind, **SMALL, **changes}
    assert load_model(wrapped(config)).num_params == built(config, tied=False)
    tied = load_model(wrapped(config, tie_word_embeddings=True))
    assert tied.num_params == built(config, tied=True)


@pytest.mark.parametrize(
    ("outer", "text", "tied", "count"),
    [
        ("gemma3", GEMMA3_4B, True, 3_880_263_168),
        ("llava", LLAVA_7B, False, 6_738_939_904),
        ("llava", PIXTRAL_12B, False, 12_247_782_400),
    ],
    ids=["gemma-3-4b", "llava-1.5-7b", "pixtral-12b"],
)
def test_published_text_configs_that_leave_sizes_out_are_read(outer, text, tied, count):
    model = load_model(wrapped(text, outer))
    assert model.num_params == count == built(text, tied=tied)
    # What the launcher builds from has every size in it.
    assert {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} <= set(model.config)
    assert load_model(model.config).num_params == count


@pytest.mark.parametrize("kind", sorted(NESTED))
def test_sizes_that_a_text_config_leaves_out_are_those_of_transformers(kind):
    theirs = AutoConfig.for_model(kind)
    assert {name: getattr(theirs, name) for name in NESTED[kind]} == NESTED[kind]
    for name, value in OWN.get(kind, {}).items():
        if name == "head_dim":
            assert theirs.head_dim == value
        elif name != "sliding_window" or value is None:  # in the others it is None until use_sliding_window
            assert getattr(theirs, name) == value, name
    assert set(OWN) <= set(SAME_AS)


@pytest.mark.parametrize("outer", sorted(set(TEXT_OF) - {"kimi_vl"}))  # which transformers does not have
def test_a_text_config_without_a_family_is_of_the_one_that_transformers_takes(outer):
    assert AutoConfig.for_model(outer).text_config.model_type == TEXT_OF[outer]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "glm4_moe", "gpt_neox", "qwen3_moe"])
def test_an_export_has_the_rotary_base_and_the_epsilon_that_transformers_takes(kind):
    theirs = AutoConfig.for_model(kind)
    epsilon = getattr(theirs, "rms_norm_eps", None) or theirs.layer_norm_eps
    assert NORM_EPSILON.get(kind, 1e-6) == epsilon
    assert ROTARY_BASE.get(kind, 10000.0) == theirs.rope_parameters["rope_theta"]
    assert ROTARY_SHARE.get(kind, 1.0) == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    size = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    size = {name: value for name, value in size.items() if name == "head_dim" or "moe" in kind or kind == "mixtral"}
    config = {"model_type": kind, **SMALL, **size, "use_parallel_residual": False}
    words = megatron_arguments(Layout(global_batch=2, seq_len=64), load_model(config))
    said = dict(itertools.pairwise(words))
    assert float(said["--norm-epsilon"]) == epsilon
    assert float(said["--rotary-base"]) == theirs.rope_parameters["rope_theta"]
    assert float(said["--rotary-percent"]) == theirs.rope_parameters.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize("outer", ["qwen2_vl", "qwen2_5_vl"])
def test_a_published_file_with_the_decoder_at_its_top_is_read(outer):
    flat = {"model_type": outer, "vision_config": {"hidden_size": 32}, **SMALL, "tie_word_embeddings": True}
    model = load_model(flat)
    assert model.num_params == built({"model_type": TEXT_OF[outer], **SMALL}, tied=True)
    assert model.config["model_type"] == TEXT_OF[outer]
    with pytest.raises(ValueError, match="rotary embedding of time, height and width"):
        megatron_arguments(Layout(global_batch=2, seq_len=64), model)


@pytest.mark.parametrize("outer", ["t5gemma", "blip"])
def test_a_wrapper_with_an_encoder_is_refused(outer):
    with pytest.raises(ValueError, match="not a decoder-only language model"):
        load_model(wrapped({"model_type": "llama", **SMALL}, outer, is_encoder_decoder=True))
