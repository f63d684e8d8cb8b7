"""Tiny decoders, one of every family that StreamBP runs, and token ids for them."""

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


def tiny(family: str, **changes: Any) -> nn.Module:
    """Build a decoder of two layers, fp32, whose weights are large enough that attention is not uniform.

    Args:
        family: a key of FAMILIES.
        changes: fields of the config that differ from the family's.
    Returns:
        A transformers model in training mode, the same weights at every call.
    """
    name, extra = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**{**SMALL, **extra, **changes})
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation="eager" if name == "Gemma2" else "sdpa"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def batch(rows: int, length: int, vocab: int = 97) -> Tensor:
    """[rows, length] of token ids from 3 (no padding, start or end) below `vocab`, the same at every call."""
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    return torch.randint(3, vocab, (rows, length), generator=generator)
