"""Which models and calls stream_backprop understands: what it does not is refused, never streamed wrongly."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

# Model types that are tested against plain backpropagation; others are refused.
SUPPORTED = frozenset({
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2",
    "qwen3", "qwen3_moe",
})  # fmt: skip
# What a call may ask for that does not exist when logits and whole layers never do.
REFUSED_ARGUMENTS = {
    "output_attentions": "attention weights are never computed",
    "output_hidden_states": "keeping them is what streaming avoids",
    "past_key_values": "a cache is for generation: call the model without labels",
    "cu_seq_lens_q": "give position_ids that restart with each document",
}


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, peft or DeepSpeed wrappers."""
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found = [module for module in found if module.get_output_embeddings() is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} holds no transformers causal language model")
    return found[0]


def final_norm(base: nn.Module) -> nn.Module:
    norm = getattr(base, "norm", None) or getattr(base, "final_layernorm", None)
    if not isinstance(norm, nn.Module):
        raise ValueError(f"{type(base).__name__} has neither norm nor final_layernorm: streaming does not know its end")
    return norm


def check_model(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{name}: model type {config.model_type!r} is not among the tested {', '.join(sorted(SUPPORTED))}"
        )
    if not name.endswith("ForCausalLM"):
        raise ValueError(f"{name} is not a causal language model: streaming knows ...ForCausalLM")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} attends both ways: streaming needs causal attention")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{name}: its head is a {type(head).__name__}, not a Linear")
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ValueError(f"{name} is sharded already: call stream_backprop before fully_shard; tp is not supported")


def check_call(model: PreTrainedModel, layers: list[nn.Module], arguments: dict[str, Any]) -> None:
    """Raises ValueError for a model in a state, or arguments of a call, that streaming does not reproduce.

    Args:
        arguments: those of the call that the streamed forward does not know by name, and attention_mask.
    """
    mask: Tensor | None = arguments.pop("attention_mask")
    for name, why in REFUSED_ARGUMENTS.items():
        if arguments.pop(name, None):
            raise ValueError(f"{name} while streaming: {why}")
    if arguments:
        raise ValueError(f"streaming does not know the arguments {sorted(arguments)}: leave them out")
    config = model.config
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"an attention_mask of {mask.dim()} dims: give [B, T], 0 at padding")
    if config.output_attentions or config.output_hidden_states:
        raise ValueError("output_attentions or output_hidden_states is set in the config: unset it")
    dropout = getattr(config, "attention_dropout", 0.0)
    if model.training and dropout:
        raise ValueError(f"attention dropout of {dropout}: set attention_dropout=0, no kernel repeats it exactly")
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ValueError("gradient checkpointing is on: streaming replaces it, call gradient_checkpointing_disable()")


def check_shard(
    mask: Tensor | None,
    position_ids: Tensor | None,
    shift_labels: Tensor | None,
    num_items: Tensor | int | None,
    statistics: bool,
) -> None:
    """Raises ValueError for arguments that mean something else on a shard than on the whole sequence."""
    if mask is not None and not mask.all():
        raise ValueError("an attention_mask with padding around a ring: pack the documents and give ring_cu_seqlens")
    missing = [
        name for name, value in {"position_ids": position_ids, "shift_labels": shift_labels}.items() if value is None
    ]
    if num_items is None and not statistics:
        missing.append("num_items_in_batch")
    if missing:
        raise ValueError(f"a shard without {', '.join(missing)}: make the arguments with shard_batch")
