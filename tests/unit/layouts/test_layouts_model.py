"""Parameter counts equal transformers' own models; what is no decoder is refused in one line."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.layouts.inputs.model import human_count, load_model, model_presets

# One preset a family, and those whose counts a reader knows by heart.
FAMILIES = [
    "llama-3.1-8b", "llama-3.1-405b", "llama-3.2-1b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "gemma-7b", "gemma-2-9b",
    "gpt2", "gpt3-175b", "gpt-neox-20b", "phi-2", "phi-3-mini", "mixtral-8x7b", "qwen3-30b-a3b",
]  # fmt: skip
GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "vocab_size": 128}  # fmt: skip
QWEN2_MOE = {"model_type": "qwen2_moe", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128, "num_experts": 4,
             "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
             "decoder_sparse_step": 2, "mlp_only_layers": []}  # fmt: skip
BIASED = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 96, "vocab_size": 128, "attention_bias": True, "mlp_bias": True,
          "tie_word_embeddings": True}  # fmt: skip


def transformers_count(config: dict) -> int:
    settings = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    return sum(parameter.numel() for parameter in model.parameters())  # tied ones once


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_count_as_transformers_does(name):
    assert load_model(name).num_params == transformers_count(model_presets()[name]["config"])


@pytest.mark.parametrize("config", [GEMMA3, QWEN2_MOE, BIASED], ids=["gemma3", "qwen2-moe", "biased llama"])
def test_configs_count_as_transformers_does(config):
    assert load_model(config).num_params == transformers_count(config)


def test_a_folder_and_a_file_are_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BIASED))
    assert load_model(tmp_path).num_params == load_model(tmp_path / "config.json").num_params


def test_active_parameters_leave_idle_experts_out():
    model = load_model("mixtral-8x7b")
    assert human_count(model.num_params) == "46.7B"
    assert human_count(model.num_active_params) == "12.9B"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "not a decoder-only"),
        ({"model_type": "mamba"}, "not known here"),
        ({"hidden_size": 8}, "no 'model_type'"),
        ({**BIASED, "hidden_size": None}, "no 'hidden_size'"),
        ({**BIASED, "num_hidden_layers": 0}, "num_hidden_layers=0, but it is a whole number of at least 1"),
        ({**BIASED, "num_attention_heads": 3}, "hidden_size=64 is no multiple of num_attention_heads=3"),
        ({**BIASED, "num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({**BIASED, "attention_bias": "yes"}, "attention_bias='yes', but it is true or false"),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        load_model(config)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither a config\.json nor a preset; the presets are .*gpt2"):
        load_model("no-such-model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load_model(tmp_path)
