"""Tiny decoders, one of every family that StreamBP runs, and token ids for them.

FAMILIES go through every test of streaming and of the ring; MORE_FAMILIES, whose layers differ from one of these in a
detail, through one test each (test_stream_families.py).
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOWED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
# The words after a comma say what the entry is there for.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "gemma": ("Gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2, soft caps": (
        "Gemma2",
        {"head_dim": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 7},
    ),
    "gemma3, windows": ("Gemma3", {"head_dim": 16, "final_logit_softcapping": 5.0, **WINDOWED}),
    "granite": ("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "olmo2": ("Olmo2", {}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}

PLAIN_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Experts chosen by a sigmoid and a bias that has no gradient, after a dense first layer.
GROUPED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# Keys and values of all heads from one small vector a token; a value is smaller than a key.
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", PLAIN_ROTARY),
    "arcee": ("Arcee", {"head_dim": 16}),
    "cohere": ("Cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25, "head_dim": 16, **WINDOWED}),
    "cwm": ("Cwm", {"head_dim": 16, **PLAIN_ROTARY, **WINDOWED}),
    "deepseek_v2": ("DeepseekV2", {**GROUPED, **LATENT}),
    "deepseek_v3": ("DeepseekV3", {**GROUPED, **LATENT}),
    "dots1": ("Dots1", {**GROUPED, "head_dim": 16}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "exaone4": ("Exaone4", WINDOWED),
    "flex_olmo": ("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4_moe": ("Glm4Moe", {**GROUPED, "head_dim": 16}),
    "gpt_oss": ("GptOss", {**LOCAL, "head_dim": 16, **PLAIN_ROTARY, **WINDOWED}),
    "granitemoe": ("GraniteMoe", {**LOCAL, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "granitemoeshared": ("GraniteMoeShared", {**LOCAL, "shared_intermediate_size": 24}),
    "helium": ("Helium", {"head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 16}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    "minimax_m2": ("MiniMaxM2", {**LOCAL, "head_dim": 16}),
    "ministral": ("Ministral", {"head_dim": 16, **WINDOWED}),
    "ministral3": ("Ministral3", {"head_dim": 16}),
    "nemotron": ("Nemotron", {}),
    "olmo": ("Olmo", {"clip_qkv": 0.5}),
    "olmo3": ("Olmo3", WINDOWED),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**ROUTED, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "seed_oss": ("SeedOss", {"head_dim": 16, "residual_dropout": 0.0, "attention_dropout": 0.0}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": 7, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
}  # fmt: skip


def tiny(family: str, **changes: Any) -> nn.Module:
    """Build a decoder of two layers, fp32, whose weights are large enough that attention is not uniform.

    Args:
        family: a key of FAMILIES or of MORE_FAMILIES.
        changes: fields of the config that differ from the family's.
    Returns:
        A transformers model in training mode, the same weights at every call.
    """
    name, extra = {**FAMILIES, **MORE_FAMILIES}[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**{**SMALL, **extra, **changes})
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="eager" if name in ("Gemma2", "GptOss") else "sdpa"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("bias"):  # of routers, which begins as zeros
                buffer.normal_()
    return model.train()


def batch(rows: int, length: int, vocab: int = 97) -> Tensor:
    """[rows, length] of token ids from 3 (no padding, start or end) below `vocab`, the same at every call."""
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    return torch.randint(3, vocab, (rows, length), generator=generator)
