"""Every family of decoders: counts equal transformers' own models, absent fields have transformers' own defaults."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.layouts.inputs.families import DEFAULTS, READERS, SAME_AS
from fourfold.layouts.inputs.model import load_model

SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 128}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 12, "n_routed_experts": 8, **MOE}  # fmt: skip
TYPES = ["full_attention", "sliding_attention"] * 3
CASES: list[tuple[str, dict]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 24}),
    ("llama", {"head_dim": None, "num_key_value_heads": None}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"head_dim": 16, "layer_types": TYPES}),
    ("gemma3_text", {"head_dim": 16}),
    ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 80, "n_positions": 96}),
    ("gpt_neox", {"attention_bias": False}),
    ("phi", {"qk_layernorm": True}),
    ("phi3", {}),
    ("mixtral", {"num_local_experts": 4}),
    ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 80, "decoder_sparse_step": 2, **MOE}),
    ("qwen3_moe", {"num_local_experts": 4, "mlp_only_layers": [0, 5, 9], **MOE}),
    ("olmo2", {"tie_word_embeddings": True}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": None}),
    ("olmo3", {}),
    ("smollm3", {}),
    ("smollm3", {"attention_bias": True, "tie_word_embeddings": False}),
    ("glm4_moe", {"n_routed_experts": 8, "head_dim": 16, "attention_bias": True, "use_qk_norm": True, **MOE}),
    ("glm4_moe", {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 3, **MOE}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("starcoder2", {}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    ("gpt_oss", {"num_local_experts": 8, "head_dim": 16, "num_experts_per_tok": 2}),
    ("deepseek_v3", {"q_lora_rank": 24, "first_k_dense_replace": 1, **LATENT}),
    ("deepseek_v3", {"q_lora_rank": None, "n_shared_experts": 2, "attention_bias": True, **LATENT}),
    ("qwen3_next", {"num_experts": 8, "shared_expert_intermediate_size": 40, "head_dim": 16, **MOE,
                    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12,
                    "linear_value_head_dim": 10}),
    ("llama4_text", {"num_local_experts": 8, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2,
                     "head_dim": 16}),
    # A field under its other name, as published files have it, beside a default under the first.
    ("mixtral", {"num_experts": 4}),
    ("qwen3_moe", {"num_experts": 4, **MOE}),
    ("gpt_oss", {"num_experts": 8, "head_dim": 16, "num_experts_per_tok": 2}),
    ("glm4_moe", {"num_local_experts": 16, "head_dim": 16, **MOE}),
    ("deepseek_v3", {key: value for key, value in LATENT.items() if key != "n_routed_experts"}
     | {"num_local_experts": 16, "first_k_dense_replace": 1}),
    ("gpt2", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 96}),
]  # fmt: skip
NEW = ["olmo2", "olmo3", "smollm3", "glm4_moe", "granite", "starcoder2", "gpt_oss", "deepseek_v3", "qwen3_next",
       "llama4_text"]  # fmt: skip


def built(kind: str, config: dict) -> int:
    """Parameters of transformers' own model; tied ones once."""
    settings = {key: value for key, value in config.items() if key != "model_type"} | {"pad_token_id": None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return sum(parameter.numel() for parameter in model.parameters())


def case(kind: str, changes: dict) -> dict:
    small = {} if kind == "gpt2" else SMALL
    return {"model_type": kind, "vocab_size": 128, **small, **changes}


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(CASES)])
def test_a_family_counts_as_transformers_does(kind, changes):
    config = case(kind, changes)
    assert load_model(config).num_params == built(kind, config)


def test_every_family_is_among_the_cases():
    assert {kind for kind, _ in CASES} == set(READERS) == set(DEFAULTS)


@pytest.mark.parametrize("kind", sorted(READERS))
def test_absent_fields_have_the_defaults_of_transformers(kind):
    own = AutoConfig.for_model(kind)
    qwen_window = {"use_sliding_window": True} if hasattr(own, "use_sliding_window") else {}
    theirs = AutoConfig.for_model(kind, **qwen_window).to_dict()
    for field, value in DEFAULTS[kind].items():
        if field in ("no_rope_layer_interval", "sliding_window_pattern", "full_attention_interval"):
            continue  # kept in the layer types that follow from them, which are compared below
        name = "num_experts" if field == "num_local_experts" and field not in theirs else field
        assert theirs[name] == value, field


@pytest.mark.parametrize("kind", [kind for kind in sorted(READERS) if kind != "gpt2"])
def test_a_config_of_required_fields_alone_counts_as_transformers_does(kind):
    """As real files leave fields out: key heads of Mistral and Mixtral, head_dim of Qwen3."""
    needed = {"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "intermediate_size": 512,
              "vocab_size": 1000}  # fmt: skip
    if kind in ("glm4_moe", "gemma2", "gemma3_text"):
        needed["num_attention_heads"] = 8
    assert load_model({"model_type": kind, **needed}).num_params == built(kind, needed)


WINDOWS = [
    ("mistral", {}, 6), ("mistral", {"sliding_window": None}, 0), ("qwen2", {"sliding_window": 32}, 0),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}, 2),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "layer_types": TYPES}, 3),
    ("gemma2", {}, 3), ("gemma3_text", {}, 5), ("gemma3_text", {"sliding_window_pattern": 2}, 3), ("olmo3", {}, 5),
    ("gpt_oss", {"num_experts_per_tok": 2}, 3), ("phi3", {"sliding_window": 32}, 6), ("starcoder2", {}, 0),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 32}, 1), ("llama4_text", {}, 5),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "windowed"), WINDOWS, ids=[f"{i}-{w[0]}" for i, w in enumerate(WINDOWS)])
def test_windows_are_those_of_transformers(kind, changes, windowed):
    config = case(kind, changes)
    assert load_model(config).num_windowed_layers == windowed
    settings = {key: value for key, value in config.items() if key != "model_type"}
    theirs = AutoConfig.for_model(kind, **settings)
    size = getattr(theirs, "sliding_window", None) or getattr(theirs, "attention_chunk_size", None)
    types = getattr(theirs, "layer_types", None)
    if types is not None:
        local = sum(word in ("sliding_attention", "chunked_attention") for word in types) if size else 0
        assert windowed == local


@pytest.mark.parametrize("outer", ["gemma3", "llama4", "mistral3", "qwen3_vl", "some_vision_model"])
def test_the_decoder_of_a_nested_config_is_read(outer):
    inner = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral", "qwen3_vl": "qwen3"}
    kind = inner.get(outer, "llama")
    text = case(kind, {"head_dim": 16, "tie_word_embeddings": False})
    alone = load_model(text)
    assert load_model({"model_type": outer, "text_config": text, "vision_config": {}}).num_params == alone.num_params
    nameless = {key: value for key, value in text.items() if key != "model_type"}
    if outer in inner:
        assert load_model({"model_type": outer, "text_config": nameless}).num_params == alone.num_params
    else:
        with pytest.raises(ValueError, match="text_config has no 'model_type'"):
            load_model({"model_type": outer, "text_config": nameless})
    with pytest.raises(ValueError, match="it is the config of a decoder"):
        load_model({"model_type": outer, "text_config": [text]})


def test_kimi_is_deepseek_under_its_own_name():
    config = case("kimi_k2", {"q_lora_rank": 24, **LATENT})
    assert SAME_AS["kimi_k2"] == "deepseek_v3"
    assert load_model(config).num_params == built("deepseek_v3", config)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "llama",
            {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None},
            "no multiple of num_attention",
        ),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 8}, "num_experts_per_tok=8 of 4 experts"),
        ("gemma2", {"layer_types": ["full_attention"] * 99}, "layer_types has 99 words for 6 layers"),
        ("gemma2", {"layer_types": 1}, "layer_types=1, but it is a list"),
        ("gemma2", {"layer_types": [[]] * 6}, r"layer_types has \[\]; known are full_attention"),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "add_cross_attention": True}, "not a decoder-only"),
        ("llama", {"is_encoder_decoder": True}, "not a decoder-only"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers=3, but it is a list of layers' numbers"),
        ("deepseek_v3", {"moe_layer_freq": 2, **LATENT}, "transformers builds a mixture in every layer"),
        ("llama", {"hidden_size": 2**40}, "hidden_size=1099511627776, but it is at most"),
        ("llama", {"vocab_size": 10**400}, "vocab_size=1000"),
        ("smollm3", {"use_sliding_window": True, "no_rope_layers": [1]}, "not a list of 6 numbers"),
        ("llama", {"rope_scaling": 1}, "rope_scaling=1, but it is an object"),
        ("llama", {"rope_parameters": []}, "rope_parameters=.., but it is an object"),
        ("llama", {"attention_dropout": "x"}, "attention_dropout='x'"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta=nan"),
        ("llama", {"rope_theta": 0}, "rope_theta=0, but it is a number above 0"),
        ("llama", {"rope_scaling": {"rope_type": 5}}, "rope_type=5, but it is a word"),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 0}}}, "rope_theta=0"),
        ("llama", {"attention_dropout": 1.5}, "attention_dropout=1.5, but it is a finite number of at most 1"),
        ("gpt_neox", {"rotary_pct": 3.0}, "rotary_pct=3.0"),
        ("llama", {"partial_rotary_factor": 2.0}, "partial_rotary_factor=2.0"),
        ("llama", {"hidden_act": 5}, "hidden_act=5, but it is a word"),
        ("llama", {"head_dim": 15}, "heads of width 15 have no pairs"),
        ("deepseek_v3", {**LATENT, "qk_rope_head_dim": 7}, "heads of width 7 have no pairs"),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types has 1 words for 6 layers"),
        ("gemma2", {"layer_types": ["linear_attention"] * 6}, "models of this family do not have"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 6}, "models of this family do not have"),
        ("mixtral", {"num_local_experts": 4, "num_experts": 8}, "num_local_experts=4 and num_experts=8 are one field"),
        ("deepseek_v3", {"n_group": 3, **LATENT}, "8 experts make no n_group=3 groups"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 3, **LATENT}, "topk_group=3 of n_group=2"),
        ("qwen3_next", {"linear_num_value_heads": 5, "linear_num_key_heads": 2}, "linear_num_value_heads=5 is no"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ("llama", {"_name_or_path": "two\nlines", "hidden_size": -1}, "two lines: hidden_size=-1"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load_model(case(kind, changes))
    assert "\n" not in str(error.value)


def test_new_families_are_priced_in_every_kind_of_layout():
    from fourfold.layouts.cost.price import price
    from fourfold.layouts.inputs.cluster import load_cluster
    from fourfold.layouts.inputs.layout import Layout

    changes = {kind: change for kind, change in CASES if kind in NEW}
    machine = load_cluster("H100-80GB")
    for kind, axis in itertools.product(NEW, ("dp", "tp", "pp", "cp")):
        model = load_model(case(kind, changes[kind]))
        one, two = price(
            model, machine, [Layout(global_batch=8, seq_len=256), Layout(**{axis: 2}, global_batch=8, seq_len=256)]
        )
        assert 0 < one.mfu < 1
        assert two.step_s > 0


def test_a_model_whose_every_layer_is_linear_has_a_price():
    from fourfold.layouts.cost.price import price
    from fourfold.layouts.inputs.cluster import load_cluster
    from fourfold.layouts.inputs.layout import Layout

    config = case("qwen3_next", {"num_experts": 8, "num_experts_per_tok": 2, "full_attention_interval": 7})
    priced = price(load_model(config), load_cluster("H100-80GB"), [Layout(dp=2, global_batch=2, seq_len=64)])[0]
    assert 0 < priced.step_s < 1
    assert 0 < priced.mfu <= 1
