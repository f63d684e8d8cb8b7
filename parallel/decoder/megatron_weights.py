"""Weights of a Llama-like decoder between transformers' and Megatron-Core's names and layouts, exactly.

Megatron's GPTModel (local layer spec, SwiGLU, RMSNorm, one tensor-parallel rank) holds the same numbers in another
order: queries, keys and values in one matrix, group after group of key heads, and gate and up projection in one.

    linear_qkv = [q of group 0 | k of head 0 | v of head 0 | q of group 1 | k of head 1 | ...]
    linear_fc1 = [gate | up]

Nothing is computed, so there and back is bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# transformers' name: Megatron's, of what has the same layout in both.
ENDS = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
}


@dataclass(frozen=True, slots=True)
class _Heads:
    """Query and key heads, and the size of each."""

    query: int
    key: int
    size: int

    @classmethod
    def of(cls, config: Any) -> "_Heads":
        key = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_attention_heads, key, size)

    @property
    def rows(self) -> list[int]:
        """Rows of q, k and v in one group of linear_qkv."""
        return [self.query // self.key * self.size, self.size, self.size]


def to_megatron(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A transformers state dict as one that Megatron-Core's GPTModel loads.

    Args:
        state: of a Llama, Mistral, Qwen2 or Qwen3 causal language model.
        config: its config: heads, layers, whether the ends are tied.
    Raises:
        ValueError: a weight that has no place in a Llama-like GPTModel.
    Cost: a copy of the attention and gate projections; the rest is the same tensors.
    """
    left, found, heads = dict(state), {}, _Heads.of(config)
    if config.tie_word_embeddings:
        left.pop("lm_head.weight", None)
    for theirs, ours in ENDS.items():
        if theirs in left:
            found[ours] = left.pop(theirs)
    for layer in range(config.num_hidden_layers):
        here, there = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            names = [f"{here}self_attn.{name}_proj.{kind}" for name in "qkv"]
            if names[0] in left:
                parts = [(left.pop(name), rows) for name, rows in zip(names, heads.rows, strict=True)]
                split = [part.reshape(heads.key, rows, *part.shape[1:]) for part, rows in parts]
                found[f"{there}self_attention.linear_qkv.{kind}"] = torch.cat(split, dim=1).flatten(0, 1)
        gates = [left.pop(f"{here}mlp.{name}_proj.weight") for name in ("gate", "up")]
        found[f"{there}mlp.linear_fc1.weight"] = torch.cat(gates)
        for theirs, ours in LAYER.items():
            if here + theirs in left:
                found[there + ours] = left.pop(here + theirs)
    if left:
        raise ValueError(f"{sorted(left)[:4]} have no place in a Llama-like GPTModel: convert them yourself")
    return found


def from_megatron(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A GPTModel's state dict as one that the transformers model of `config` loads; the inverse of to_megatron.

    Args:
        state: of one tensor-parallel and pipeline rank that holds the whole model; `_extra_state` entries are skipped.
        config: the transformers config to load it into.
    Raises:
        ValueError: a weight that has no place in a Llama-like decoder.
    """
    left = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    found, heads = {}, _Heads.of(config)
    for theirs, ours in ENDS.items():
        if ours in left:
            found[theirs] = left.pop(ours)
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        here, there = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            packed = left.pop(f"{there}self_attention.linear_qkv.{kind}", None)
            if packed is not None:
                groups = packed.reshape(heads.key, sum(heads.rows), *packed.shape[1:])
                parts = torch.split(groups, heads.rows, dim=1)
                for name, part in zip("qkv", parts, strict=True):
                    found[f"{here}self_attn.{name}_proj.{kind}"] = part.flatten(0, 1)
        gate, up = left.pop(f"{there}mlp.linear_fc1.weight").chunk(2)
        found |= {f"{here}mlp.gate_proj.weight": gate, f"{here}mlp.up_proj.weight": up}
        for theirs, ours in LAYER.items():
            if there + ours in left:
                found[here + theirs] = left.pop(there + ours)
    if left:
        raise ValueError(f"{sorted(left)[:4]} have no place in a Llama-like decoder: convert them yourself")
    return found
