"""One small reader a family of decoders, from the fields of its Hugging Face config to widths and counts.

Counts are exact: a test builds every family with transformers on the meta device and compares.
"""

from collections.abc import Callable
from typing import Any

from fourfold.layouts.inputs.config_reader import ConfigReader
from fourfold.layouts.inputs.model import LatentAttention, LinearAttention

Fields = dict[str, Any]

DEFAULTS: dict[str, Fields] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096, "head_dim": 128},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
    "gemma3_text": {
        "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gpt2": {"n_positions": 1024, "tie_word_embeddings": True},
    "gpt_neox": {"attention_bias": True},
    "phi": {},
    "phi3": {},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_key_value_heads": 16, "max_window_layers": 28, "sliding_window": 4096, "qkv_bias": True,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4, "sliding_window": 4096, "num_local_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "decoder_sparse_step": 1,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 4096},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    "glm4_moe": {
        "num_key_value_heads": 8, "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "granite": {},
    "starcoder2": {"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    "gpt_oss": {
        "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "attention_bias": True,
        "num_local_experts": 128, "num_experts_per_tok": 4,
    },
    "deepseek_v3": {
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128,
    },
    "qwen3_next": {
        "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1,
        "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    },
    "llama4_text": {
        "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1,
        "intermediate_size_mlp": 16384, "interleave_moe_layer_step": 1, "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
    },
}  # fmt: skip
"""What transformers takes where a config leaves a field out, of the fields that a count or a price depends on."""


def _llama(read: ConfigReader) -> Fields:
    bias = read.flag("attention_bias")
    return {
        **read.common(), "ffn_size": read.whole("intermediate_size"), "qkv_bias": bias, "out_bias": bias,
        "mlp_bias": read.flag("mlp_bias"),
    }  # fmt: skip


def _mistral(read: ConfigReader) -> Fields:
    common = read.common()
    layers = common["num_layers"]
    return {**common, "ffn_size": read.whole("intermediate_size"), **read.window(layers, layers)}


def _late_window(read: ConfigReader, num_layers: int) -> Fields:
    """Qwen's: only where use_sliding_window says so, in the layers from max_window_layers on."""
    if not read.flag("use_sliding_window"):
        return {}
    return read.window(num_layers, max(0, num_layers - read.whole("max_window_layers", least=0)))


def _qwen2(read: ConfigReader) -> Fields:
    common = read.common()
    window = _late_window(read, common["num_layers"])
    return {**common, "ffn_size": read.whole("intermediate_size"), "qkv_bias": True, **window}


def _qwen3(read: ConfigReader) -> Fields:
    common, bias = read.common(), read.flag("attention_bias")
    return {
        **common, "ffn_size": read.whole("intermediate_size"), "qk_norm": True, "qkv_bias": bias,
        "out_bias": bias, **_late_window(read, common["num_layers"]),
    }  # fmt: skip


def _gemma2(read: ConfigReader) -> Fields:
    fields = {**_llama(read), "norms_per_layer": 4}
    layers = int(fields["num_layers"])
    return {**fields, **read.window(layers, (layers + 1) // 2)}


def _gemma3(read: ConfigReader) -> Fields:
    fields = {**_llama(read), "norms_per_layer": 4, "qk_norm": True}
    layers = int(fields["num_layers"])
    return {**fields, **read.window(layers, layers - layers // read.whole("sliding_window_pattern"))}


def _gpt2(read: ConfigReader) -> Fields:
    if read.flag("add_cross_attention"):
        raise read.refuse("add_cross_attention=true: not a decoder-only language model")
    hidden, heads = read.whole("n_embd", "hidden_size"), read.whole("n_head", "num_attention_heads")
    if hidden % heads:
        raise read.refuse(f"n_embd={hidden} is no multiple of n_head={heads}: change one of them")
    positions = read.whole("n_positions", "max_position_embeddings")
    return {
        "hidden_size": hidden, "num_layers": read.whole("n_layer", "num_hidden_layers"), "num_heads": heads,
        "num_kv_heads": heads, "head_dim": hidden // heads, "vocab_size": read.whole("vocab_size"),
        "ffn_size": read.whole("n_inner", default=4 * hidden), "tied_embeddings": read.flag("tie_word_embeddings"),
        "gated_mlp": False, "norm_params": 2, "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        "learned_positions": positions, "rotary": False, "max_seq_len": positions,
    }  # fmt: skip


def _gpt_neox(read: ConfigReader) -> Fields:
    common, bias = read.common(), read.flag("attention_bias")
    return {
        **common, "num_kv_heads": common["num_heads"],  # it knows no groups
        "ffn_size": read.whole("intermediate_size"), "gated_mlp": False, "norm_params": 2, "qkv_bias": bias,
        "out_bias": bias, "mlp_bias": True,
    }  # fmt: skip


def _phi(read: ConfigReader) -> Fields:
    # One norm a layer (attention and feed-forward run side by side), and a bias on the head.
    return {
        **read.common(), "ffn_size": read.whole("intermediate_size"), "gated_mlp": False, "norm_params": 2,
        "norms_per_layer": 1, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_bias": True,
        "qk_norm": read.flag("qk_layernorm"),
    }  # fmt: skip


def _mixtral(read: ConfigReader) -> Fields:
    common = read.common()
    layers = common["num_layers"]
    experts = read.experts(layers, layers, width="intermediate_size")
    return {**common, **experts, "ffn_size": 0, **read.window(layers, layers)}


def _sparse_layers(read: ConfigReader, num_layers: int) -> int:
    """Qwen's mixtures: a dense feed-forward in `mlp_only_layers` and where the sparse step skips a layer."""
    dense, step = set(read.layers_in("mlp_only_layers", num_layers)), read.whole("decoder_sparse_step")
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _qwen2_moe(read: ConfigReader) -> Fields:
    common = read.common()
    layers = common["num_layers"]
    window = {}
    if read.flag("use_sliding_window"):
        early = min(layers, read.whole("max_window_layers", least=0))
        window = read.window(layers, (early + 1) // 2)
    return {
        **common, **read.experts(layers, _sparse_layers(read, layers), width="moe_intermediate_size"),
        "shared_expert_ffn_size": read.whole("shared_expert_intermediate_size"), "qkv_bias": read.flag("qkv_bias"),
        **window,
    }  # fmt: skip


def _qwen3_moe(read: ConfigReader) -> Fields:
    common, bias = read.common(), read.flag("attention_bias")
    layers = common["num_layers"]
    window = read.window(layers, layers) if read.flag("use_sliding_window") else {}
    return {
        **common, **read.experts(layers, _sparse_layers(read, layers), width="moe_intermediate_size"),
        "qk_norm": True, "qkv_bias": bias, "out_bias": bias, **window,
    }  # fmt: skip


def _olmo2(read: ConfigReader) -> Fields:
    bias = read.flag("attention_bias")
    return {
        **read.common(), "ffn_size": read.whole("intermediate_size"), "qkv_bias": bias, "out_bias": bias,
        "qk_norm": True, "qk_norm_over_heads": True,
    }  # fmt: skip


def _olmo3(read: ConfigReader) -> Fields:
    fields = _olmo2(read)
    layers = int(fields["num_layers"])
    return {**fields, **read.window(layers, layers - layers // 4)}


def _smollm3(read: ConfigReader) -> Fields:
    fields = _llama(read)
    layers = int(fields["num_layers"])
    windowed = layers - _rotary_layers(read, layers)
    return {**fields, **(read.window(layers, windowed) if read.flag("use_sliding_window") else {})}


def _rotary_layers(read: ConfigReader, num_layers: int) -> int:
    """Layers with a rotary embedding, by `no_rope_layers` (1 where a layer has it) or its interval."""
    stated = read.get("no_rope_layers")
    if stated:
        if not isinstance(stated, list | tuple) or len(stated) != num_layers:
            raise read.refuse(f"no_rope_layers is not a list of {num_layers} numbers, one for each layer")
        return sum(bool(entry) for entry in stated)
    return num_layers - num_layers // read.whole("no_rope_layer_interval")


def _after_dense(read: ConfigReader, common: Fields) -> Fields:
    """Mixtures after `first_k_dense_replace` dense layers, with shared experts that no gate weighs."""
    layers = int(common["num_layers"])
    dense = min(layers, read.whole("first_k_dense_replace", default=0, least=0))
    if read.whole("moe_layer_freq", default=1) != 1:
        raise read.refuse(f"moe_layer_freq={read.get('moe_layer_freq')}: transformers builds a mixture in every layer")
    fields = read.experts(layers, layers - dense, width="moe_intermediate_size")
    _check_groups(read, int(fields["num_experts"]))
    shared = read.whole("n_shared_experts", default=0, least=0) * int(fields["expert_ffn_size"])
    return {**fields, "shared_expert_ffn_size": shared, "shared_expert_gate": False}


def _check_groups(read: ConfigReader, num_experts: int) -> None:
    """Experts are chosen in `topk_group` of `n_group` groups as large as each other, where a config has groups."""
    groups = read.whole("n_group", default=1)
    if num_experts % groups:
        raise read.refuse(f"{num_experts} experts make no n_group={groups} groups: give a divisor")
    if groups > 1 and read.whole("topk_group", default=1) > groups:
        raise read.refuse(f"topk_group={read.get('topk_group')} of n_group={groups} groups: give at most as many")


def _glm4_moe(read: ConfigReader) -> Fields:
    common = read.common()
    return {
        **common, **_after_dense(read, common), "qkv_bias": read.flag("attention_bias"),
        "qk_norm": read.flag("use_qk_norm"),
    }  # fmt: skip


def _starcoder2(read: ConfigReader) -> Fields:
    common, bias = read.common(), read.flag("use_bias")
    layers = common["num_layers"]
    return {
        **common, "ffn_size": read.whole("intermediate_size"), "gated_mlp": False, "norm_params": 2,
        "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias, **read.window(layers, layers),
    }  # fmt: skip


def _gpt_oss(read: ConfigReader) -> Fields:
    common, bias = read.common(), read.flag("attention_bias")
    layers = common["num_layers"]
    experts = read.experts(layers, layers, width="intermediate_size")
    return {
        **common, **experts, "ffn_size": 0, "qkv_bias": bias, "out_bias": bias, "mlp_bias": True,
        "router_bias": True, "attention_sinks": True, **read.window(layers, (layers + 1) // 2),
    }  # fmt: skip


def _deepseek_v3(read: ConfigReader) -> Fields:
    latent = LatentAttention(
        q_rank=read.whole("q_lora_rank", default=0), kv_rank=read.whole("kv_lora_rank"),
        nope_dim=read.whole("qk_nope_head_dim"), rope_dim=read.whole("qk_rope_head_dim"),
        value_dim=read.whole("v_head_dim"),
    )  # fmt: skip
    bias = read.flag("attention_bias")
    heads = read.whole("num_attention_heads")
    # Each head has its own key, made of the shared latent; `head_dim` is what q and k have in each.
    defaults = {**read.defaults, "head_dim": latent.nope_dim + latent.rope_dim}
    plain = {key: value for key, value in read.config.items() if key != "head_dim"}
    common = {**ConfigReader(plain, read.name, defaults).common(), "num_kv_heads": heads}
    return {**common, **_after_dense(read, common), "latent": latent, "qkv_bias": bias, "out_bias": bias}


def _qwen3_next(read: ConfigReader) -> Fields:
    common, bias = read.common(), read.flag("attention_bias")
    layers = common["num_layers"]
    types = read.layer_types(layers)
    key_heads, value_heads = read.whole("linear_num_key_heads"), read.whole("linear_num_value_heads")
    if value_heads % key_heads:
        raise read.refuse(
            f"linear_num_value_heads={value_heads} is no multiple of linear_num_key_heads={key_heads}: change one"
        )
    linear = layers - layers // read.whole("full_attention_interval")
    if types is not None:
        linear = sum(word == "linear_attention" for word in types)
    return {
        **common, **read.experts(layers, _sparse_layers(read, layers), width="moe_intermediate_size"),
        "shared_expert_ffn_size": read.whole("shared_expert_intermediate_size"), "qk_norm": True, "qkv_bias": bias,
        "out_bias": bias, "output_gate": True, "num_linear_layers": linear,
        "linear": LinearAttention(
            key_heads=key_heads, value_heads=value_heads,
            key_dim=read.whole("linear_key_head_dim"), value_dim=read.whole("linear_value_head_dim"),
            kernel=read.whole("linear_conv_kernel_dim"),
        ),
    }  # fmt: skip


def _llama4(read: ConfigReader) -> Fields:
    common, bias = read.common(), read.flag("attention_bias")
    layers = common["num_layers"]
    step = read.whole("interleave_moe_layer_step")
    stated = read.get("moe_layers")
    moe = len(read.layers_in("moe_layers", layers)) if stated is not None else layers // step
    # Attention in chunks is priced as a window of the chunk's size.
    chunked = {"sliding_window": read.whole("attention_chunk_size", default=0, least=0)}
    chunked["num_windowed_layers"] = _rotary_layers(read, layers)
    types = read.layer_types(layers)
    if types is not None:
        chunked["num_windowed_layers"] = sum(word == "chunked_attention" for word in types)
    experts = read.experts(layers, moe, width="intermediate_size")
    return {
        **common, **experts, "ffn_size": read.whole("intermediate_size_mlp"),
        "shared_expert_ffn_size": experts["expert_ffn_size"], "shared_expert_gate": False, "qkv_bias": bias,
        "out_bias": bias, **(chunked if all(chunked.values()) else {}),
    }  # fmt: skip


READERS: dict[str, Callable[[ConfigReader], Fields]] = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "gemma": _llama, "gemma2": _gemma2,
    "gemma3_text": _gemma3, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "phi": _phi, "phi3": _mistral, "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "olmo2": _olmo2, "olmo3": _olmo3, "smollm3": _smollm3,
    "glm4_moe": _glm4_moe, "granite": _llama, "starcoder2": _starcoder2, "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3, "qwen3_next": _qwen3_next, "llama4_text": _llama4,
}  # fmt: skip

SAME_AS = {
    "kimi_k2": "deepseek_v3", "ministral": "mistral", "ministral3": "mistral", "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe",
    "glm4v_moe_text": "glm4_moe",
}  # fmt: skip
"""Families that are another one under a name of their own."""
TEXT_OF = {
    "gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral", "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text", "qwen3_vl_moe": "qwen3_vl_moe_text",
    "glm4v_moe": "glm4v_moe_text", "llava": "llama", "llava_next": "llama", "llava_next_video": "llama",
    "video_llava": "llama", "vipllava": "llama", "llava_onevision": "qwen2", "paligemma": "gemma",
    "idefics2": "mistral", "idefics3": "llama", "smolvlm": "llama", "internvl": "qwen2", "janus": "llama",
    "qwen2_audio": "qwen2", "kimi_vl": "deepseek_v3", "kimi_k25": "deepseek_v3",
}  # fmt: skip
"""The decoder inside a model of several kinds of input, where its text_config does not name its own family."""
FLAT = ("qwen2_vl", "qwen2_5_vl")
"""Models of several kinds of input whose published files have the decoder's fields at the top, not in a text_config."""
