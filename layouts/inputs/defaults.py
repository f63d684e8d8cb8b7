"""What transformers takes where a config leaves out a size, a rotary base or a norm's epsilon; held to it by a test.

A file's own top level always states its sizes. A decoder's text_config inside a model of several kinds of input does
not: transformers has long written there only what differs from the family's defaults (LLaVA 1.5's states no width).
"""

from typing import Any

from fourfold.layouts.inputs.families import SAME_AS

_NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_SIZES = {
    "llama": (32000, 4096, 11008, 32, 32, 2048),
    "mistral": (32000, 4096, 14336, 32, 32, 131072),
    "ministral": (32000, 4096, 14336, 32, 32, 131072),
    "ministral3": (131072, 4096, 14336, 34, 32, 262144),
    "qwen2": (151936, 4096, 22016, 32, 32, 32768),
    "qwen2_vl_text": (152064, 8192, 29568, 80, 64, 32768),
    "qwen2_5_vl_text": (152064, 8192, 29568, 80, 64, 32768),
    "qwen3": (151936, 4096, 22016, 32, 32, 32768),
    "qwen3_vl_text": (151936, 4096, 22016, 32, 32, 128000),
    "gemma": (256000, 3072, 24576, 28, 16, 8192),
    "gemma2": (256000, 2304, 9216, 26, 8, 8192),
    "gemma3_text": (262208, 2304, 9216, 26, 8, 131072),
    "gpt_neox": (50432, 6144, 24576, 44, 64, 2048),
    "phi": (51200, 2048, 8192, 24, 32, 2048),
    "phi3": (32064, 3072, 8192, 32, 32, 4096),
    "mixtral": (32000, 4096, 14336, 32, 32, 131072),
    "qwen2_moe": (151936, 2048, 5632, 24, 16, 32768),
    "qwen3_moe": (151936, 2048, 6144, 24, 32, 32768),
    "qwen3_vl_moe_text": (151936, 2048, 5632, 24, 16, 128000),
    "olmo2": (50304, 4096, 11008, 32, 32, 2048),
    "olmo3": (50304, 4096, 11008, 32, 32, 2048),
    "smollm3": (128256, 2048, 11008, 36, 16, 32768),
    "glm4_moe": (151552, 4096, 10944, 46, 96, 131072),
    "glm4v_moe_text": (151424, 4096, 10944, 46, 96, 65536),
    "granite": (32000, 4096, 11008, 32, 32, 2048),
    "starcoder2": (49152, 3072, 12288, 30, 24, 4096),
    "gpt_oss": (201088, 2880, 2880, 36, 64, 131072),
    "deepseek_v3": (129280, 7168, 18432, 61, 128, 4096),
    "qwen3_next": (151936, 2048, 5632, 48, 16, 32768),
    "llama4_text": (202048, 5120, 8192, 48, 40, 131072),
}
NESTED: dict[str, dict[str, int]] = {kind: dict(zip(_NAMES, sizes, strict=True)) for kind, sizes in _SIZES.items()}
"""Sizes of a text_config of each family that leaves them out."""

OWN: dict[str, dict[str, Any]] = {
    "ministral3": {"head_dim": 128, "sliding_window": None},
    "qwen2_vl_text": {"num_key_value_heads": 8, "max_window_layers": 80},
    "qwen2_5_vl_text": {"num_key_value_heads": 8, "max_window_layers": 80},
    "qwen3_vl_moe_text": {
        "num_key_value_heads": 16, "num_local_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    },
    "glm4v_moe_text": {"attention_bias": True},
}  # fmt: skip
"""Where a family that is another one under its own name has other defaults than that one."""

NORM_EPSILON = {"gpt_neox": 1e-5, "gpt2": 1e-5, "phi3": 1e-5, "mixtral": 1e-5, "glm4_moe": 1e-5, "starcoder2": 1e-5}
"""Of the families that an export can write; the others have 1e-6."""
ROTARY_BASE = {"mixtral": 1_000_000.0}
"""The others have 10,000."""
ROTARY_SHARE = {"gpt_neox": 0.25, "glm4_moe": 0.5, "phi": 0.5, "qwen3_next": 0.25}
"""Part of a head's width that is rotated; all of it in the others."""


def nested_sizes(kind: str) -> dict[str, int]:
    """Sizes of a text_config of this family that states none. Empty where the family is not known."""
    return dict(NESTED.get(kind) or NESTED.get(SAME_AS.get(kind, kind), {}))
