"""The models of this benchmark, as fields of a Qwen3Config."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "page": {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 1536, "vocab_size": 32000, "head_dim": 64,
    },
    # Qwen2-0.5B's: tied embeddings, a large vocabulary.
    "0.5B": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "head_dim": 64, "tie_word_embeddings": True,
    },
    # Qwen3's of these names.
    "4B": {
        "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 9728, "vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 12288, "vocab_size": 151936, "head_dim": 128,
    },
    # Two of the 4B's layers and a small vocabulary: time and memory of a layer at lengths that all of it would not end.
    "4B, 2 layers": {
        "hidden_size": 2560, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 9728, "vocab_size": 1024, "head_dim": 128, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 1024, "head_dim": 16,
    },
}  # fmt: skip
