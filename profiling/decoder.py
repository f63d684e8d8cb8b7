"""The decoder that is timed and whose memory is traced: transformers' own, at the sizes of one rank."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourfold.profiling.shapes import model_shape

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

CHECKPOINTING = ("none", "full")


def local_model(config: dict[str, Any], *, tp: int = 1, num_layers: int) -> Any:
    """transformers' model of `config` with `num_layers` layers of the sizes that one of `tp` ranks holds.

    fp32, on the current default device (inside FakeTensorMode or `torch.device("meta")`: without memory).

    Raises:
        ValueError: not a Llama-like causal decoder that transformers can build, or sizes that tp does not divide.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # two seconds: only where a model is measured

    shape = model_shape(config)
    uneven = [name for name in ("heads", "kv_heads", "ffn") if getattr(shape, name) % tp]
    if uneven:
        raise ValueError(f"tp={tp} does not divide {uneven[0]}={getattr(shape, uneven[0])}: choose a divisor")
    changed = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": shape.heads // tp,
        "num_key_value_heads": shape.kv_heads // tp,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn // tp,
        "vocab_size": -(-shape.vocab // tp),
        "layer_types": None,
        "pad_token_id": None,
    }
    kept = {name: value for name, value in config.items() if name not in ("model_type", *changed)}
    try:
        local = AutoConfig.for_model(config.get("model_type", "llama"), **kept, **changed)
        model = AutoModelForCausalLM.from_config(local, attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:
        raise ValueError(f"transformers cannot build this config ({error})") from error
    if not all(hasattr(getattr(model, "model", None), name) for name in ("layers", "rotary_emb", "embed_tokens")):
        raise ValueError(f"model_type {config.get('model_type')!r} is no decoder of the Llama family")
    return model


def run_layers(
    model: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor,
    *,
    num_layers: int | None = None,
    checkpointing: str = "none",
    **attention_arguments: Any,
) -> Tensor:
    """The first `num_layers` decoder layers (all, if None) on hidden [B, S, hidden]; positions [1, S].

    `attention_arguments` go to the attention function with every call.
    """
    arguments: dict[str, Any] = {
        "attention_mask": None,
        "position_ids": positions,
        "position_embeddings": rotary,
        "use_cache": False,
        **attention_arguments,
    }
    for layer in model.model.layers[:num_layers]:
        if checkpointing == "full":
            hidden = cast(Tensor, checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False, **arguments))
        else:
            hidden = layer(hidden, **arguments)
    return hidden


def summed_loss(model: Any, tokens: Tensor, *, checkpointing: str = "none") -> Tensor:
    """The whole model's summed cross-entropy on tokens [B, S], in fp32 from the logits on."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    hidden = model.model.embed_tokens(tokens)
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    hidden = run_layers(model, hidden, rotary, positions, checkpointing=checkpointing)
    return loss_of_logits(model.lm_head(model.model.norm(hidden)), tokens)


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of logits [B, S, V] against targets [B, S], in fp32 as training computes it."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
