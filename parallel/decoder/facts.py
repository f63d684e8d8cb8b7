"""What of a decoder its limits depend on, read from a Hugging Face config in either of its forms; without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies follow from the length that a rank sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderFacts:
    """What of a decoder the limits depend on; counts as in a Hugging Face config.

    With the defaults RUNTIME and FORMS judge a layout by itself, for any model. A model known by its sizes alone
    (a published run) has no family.
    """

    family: str = ""
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    hidden_size: int = 0
    head_size: int = 0
    ffn_size: int = 0
    vocab_size: int = 0
    num_experts: int = 0
    tied_embeddings: bool = False
    attention_dropout: float = 0.0
    rope_type: str = "default"
    adapters: bool = False
    """Whether peft's adapters stand beside its matrices; no config says so."""


def decoder_facts(config: Any) -> DecoderFacts:
    """The facts of a Hugging Face config: an object of transformers, or the mapping of a config.json.

    A field that a mapping lacks has here the neutral value, not the family's default: `layouts` knows those.
    """

    def read(name: str, default: Any) -> Any:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        return default if value is None else value

    heads, hidden_size = read("num_attention_heads", 1), read("hidden_size", 1)
    return DecoderFacts(
        family=read("model_type", ""),
        num_layers=read("num_hidden_layers", 1),
        num_heads=heads,
        num_kv_heads=read("num_key_value_heads", heads),
        hidden_size=hidden_size,
        head_size=read("head_dim", hidden_size // heads),
        ffn_size=read("intermediate_size", 1),
        vocab_size=read("vocab_size", 1),
        tied_embeddings=read("tie_word_embeddings", False),
        attention_dropout=read("attention_dropout", 0.0),
        rope_type=_rope_type(read("rope_parameters", None) or read("rope_scaling", None) or {}),
    )


def _rope_type(rope: Mapping[str, Any]) -> str:
    """Of parameters for all layers, or for each kind of layer: then the one that depends on the length, if any does."""
    tables = [table for table in rope.values() if isinstance(table, Mapping)] or [rope]
    types = [str(table.get("rope_type") or table.get("type") or "default") for table in tables]
    return next((kind for kind in types if kind in LENGTH_DEPENDENT_ROPE), types[0])
