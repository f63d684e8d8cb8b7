"""Weights of a Llama-like decoder between transformers' and Megatron-Core's names and layouts, exactly.

Megatron's GPTModel (local layer spec, SwiGLU, RMSNorm, one tensor-parallel rank) holds the same numbers in another
order: queries, keys and values in one matrix, group after group of key heads, gate and up projection in one, and each
expert by itself (SequentialMLP).

    linear_qkv = [q of group 0 | k of head 0 | v of head 0 | q of group 1 | k of head 1 | ...]
    linear_fc1 = [gate | up]

Nothing is computed, so there and back is bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""model_type of what a GPTModel computes as transformers does. Others have weights of the same names, and scale hidden
states, shift norms or turn heads otherwise."""
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
    "self_attn.o_proj.bias": "self_attention.linear_proj.bias",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.down_proj.bias": "mlp.linear_fc2.bias",
    "mlp.gate.weight": "mlp.router.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
}
# Of all experts in one tensor: of one expert.
EXPERTS = {"mlp.experts.gate_up_proj": "linear_fc1.weight", "mlp.experts.down_proj": "linear_fc2.weight"}


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
        state: of a causal language model of FAMILIES.
        config: its config: family, heads, layers, whether the ends are tied.
    Raises:
        ValueError: another family; a weight that is missing, of another shape (a rank's shard), or without a place in a
            Llama-like GPTModel; biases of attention's output and not of the feed-forward layer, which a GPTModel has
            both or neither.
    Cost: a copy of the attention and gate projections; the rest is the same tensors.
    """
    _check(state, config)
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
            gates = [left.pop(name) for name in _gates(here, kind) if name in left]
            if gates:
                found[f"{there}mlp.linear_fc1.{kind}"] = torch.cat(gates)
        for name, experts in EXPERTS.items():
            for expert, weight in enumerate(left.pop(f"{here}{name}", ())):
                found[f"{there}mlp.experts.local_experts.{expert}.{experts}"] = weight
        for theirs, ours in LAYER.items():
            if here + theirs in left:
                found[there + ours] = left.pop(here + theirs)
        if f"{there}self_attention.linear_proj.bias" in found and f"{there}mlp.linear_fc2.bias" not in found:
            raise ValueError(
                "attention_bias=true without mlp_bias: a GPTModel has biases on attention's output and in the "
                "feed-forward layer, or on neither (add_bias_linear); convert them yourself"
            )
    if left:
        raise ValueError(f"{sorted(left)[:4]} have no place in a Llama-like GPTModel: convert them yourself")
    return found


def from_megatron(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A GPTModel's state dict as one that the transformers model of `config` loads; the inverse of to_megatron.

    Args:
        state: of one tensor-parallel and pipeline rank that holds the whole model; `_extra_state` entries are skipped.
        config: the transformers config to load it into.
    Raises:
        ValueError: another family; a weight that is missing, of another shape, or without a place in a Llama-like
            decoder.
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
            if f"{there}mlp.linear_fc1.{kind}" in left:
                found |= zip(_gates(here, kind), left.pop(f"{there}mlp.linear_fc1.{kind}").chunk(2), strict=True)
        for name, experts in EXPERTS.items():
            weights: list[Tensor] = []
            while (one := f"{there}mlp.experts.local_experts.{len(weights)}.{experts}") in left:
                weights.append(left.pop(one))
            if weights:
                found[f"{here}{name}"] = torch.stack(weights)
        for theirs, ours in LAYER.items():
            if there + ours in left:
                found[here + theirs] = left.pop(there + ours)
    if left:
        raise ValueError(f"{sorted(left)[:4]} have no place in a Llama-like decoder: convert them yourself")
    extra = sorted(set(found) - set(_check(found, config)))
    if extra:
        raise ValueError(f"{extra[:4]} are not in a model of this config: give the config that it was trained with")
    return found


def _gates(layer: str, kind: str) -> tuple[str, str]:
    """transformers' names of what linear_fc1 holds."""
    return f"{layer}mlp.gate_proj.{kind}", f"{layer}mlp.up_proj.{kind}"


def _check(state: Mapping[str, Tensor], config: Any) -> dict[str, torch.Size]:
    """Refuse another family, and a state dict that is not a whole model of `config`; returns its shapes by name."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r}: a GPTModel with these weights would compute something else; known to "
            f"agree are {', '.join(FAMILIES)}"
        )
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, torch.Size] = {name: value.shape for name, value in whole.state_dict().items()}
    for name, shape in shapes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in state:
            raise ValueError(f"{name} is missing: give the state dict of the whole model, of all its stages")
        if state[name].shape != shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} and not {tuple(shape)}: give the whole weights, of all "
                "tensor-parallel ranks, and the config that they were trained with"
            )
    return shapes
