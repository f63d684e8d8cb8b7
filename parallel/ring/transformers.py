"""Ring attention inside Hugging Face models: attn_implementation="fourfold_ring".

transformers lets a model call any registered attention function. Ours finds the context-parallel group on the attention
module itself, where `use_ring_attention` puts it, so two models in one process may use two groups. `shard_batch` makes
what the model's forward takes from a whole batch: the shard, its positions, its shifted labels.

What the model then computes is what it would compute on one process, for the whole sequence; anything the ring does not
do (dropout, padding masks, soft caps, sinks, caches) is refused, never dropped.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fourfold.parallel.communication import place_in
from fourfold.parallel.ring.attention import ring_attend
from fourfold.parallel.ring.heads import check_heads
from fourfold.parallel.ring.options import RingOptions, RingSettings
from fourfold.parallel.sequence.tensors import (
    IGNORED_LABEL,
    Documents,
    document_ends,
    shard_labels,
    shard_positions,
    shard_sequence,
)

NAME = "fourfold_ring"
# Keyword arguments by which models ask for what the ring does not do.
UNSUPPORTED = {
    "softcap": "a soft cap on the scores: no backend has one",
    "s_aux": "attention sinks",
    "head_mask": "a head mask",
    "position_bias": "an attention bias",
}


def use_ring_attention(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    *,
    sharding: str = "zigzag",
    heads_degree: int = 1,
    backend: str | None = None,
) -> None:
    """Make a transformers model attend around the ring of `group`; call it before FSDP, DDP or compile.

    Args:
        model: of the Llama family or alike (Llama, Qwen, Mistral and Gemma 3 are tested), on any device.
        group, sharding, heads_degree, backend: see ring_attention.
    Raises:
        ValueError: the model has no attention modules, cannot take attention functions, or its heads do not fit.
    """
    size = place_in(group).size
    options = RingOptions(sharding=sharding, heads_degree=heads_degree, backend=backend)
    settings = RingSettings(group=group, options=options)
    modules = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    if not modules or not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} does not call transformers' attention interface: use ring_attention in its code"
        )
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    if getattr(config, "attention_chunk_size", None):
        raise ValueError(f"attention_chunk_size={config.attention_chunk_size}: the ring has windows, but no chunks")
    check_heads(config.num_attention_heads, config.num_key_value_heads, heads_degree, size)
    AttentionInterface.register(NAME, ring_attention_forward)
    AttentionMaskInterface.register(NAME, _refuse_masks)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    for module in modules:
        module.ring_settings = settings  # type: ignore[assignment]


def shard_batch(
    batch: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    *,
    sharding: str = "zigzag",
    cu_seqlens: Documents = None,
) -> dict[str, Any]:
    """What this rank passes to the model, from a batch that every rank of the group holds whole.

    Args:
        batch: "input_ids" [B, S], and "labels" [B, S] (not shifted, -100 ignored) where a loss is wanted.
        group, sharding: as given to use_ring_attention.
        cu_seqlens: documents packed in the one row of the batch; see ring_attention.
    Returns:
        Keyword arguments for the model. The loss it returns is this rank's part of the mean over the global label
        count: sum losses, and gradients, over the group.
    """
    unknown = set(batch) - {"input_ids", "labels"}
    if unknown:
        raise ValueError(f"{sorted(unknown)} in the batch: give input_ids and labels; pack instead of padding")
    ids = batch["input_ids"]
    ends = document_ends(cu_seqlens)
    seq_len = ids.shape[1]
    positions = shard_positions(seq_len, group, sharding, ends, device=ids.device)
    arguments: dict[str, Any] = {
        "input_ids": shard_sequence(ids, group, dim=1, sharding=sharding, cu_seqlens=ends),
        "position_ids": positions.expand(ids.shape[0], -1),
        "ring_seq_len": seq_len,
    }
    if ends is not None:
        arguments["ring_cu_seqlens"] = ends
    if "labels" in batch:
        everything = shard_labels(batch["labels"], (0, 1), cu_seqlens=ends)
        labels = shard_sequence(everything, group, dim=1, sharding=sharding, cu_seqlens=ends)
        count = (everything != IGNORED_LABEL).sum()
        # A rank may hold no label: the sum of nothing over the count is a zero with a gradient, as it should be.
        arguments |= {"labels": labels, "shift_labels": labels, "num_items_in_batch": count}
    return arguments


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    ring_seq_len: int | None = None,
    ring_cu_seqlens: Documents = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, S_local, D] in, [B, S_local, H, D] out.

    Raises:
        ValueError: use_ring_attention was not called, or the model asks for something the ring does not do.
    """
    settings: RingSettings | None = getattr(module, "ring_settings", None)
    if settings is None:
        raise ValueError(f"attn_implementation={NAME!r} without a group: call use_ring_attention(model, group)")
    if attention_mask is not None:
        raise ValueError("an attention mask: give ring_cu_seqlens for packed documents instead; padding is not needed")
    if dropout:
        raise ValueError(f"attention dropout of {dropout}: set attention_dropout=0 in the model's config")
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {what}; choose another attn_implementation for {type(module).__name__}")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seq_lens_q counts one rank's tokens: give the whole sequence's as ring_cu_seqlens")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None and not causal:
        raise ValueError(
            f"a window of {sliding_window} without causal: models disagree on what it means, so ask for one"
        )
    options = replace(
        settings.options,
        causal=causal,
        scale=scaling,
        # transformers counts the query itself among the window's keys.
        window=None if sliding_window is None else (sliding_window - 1, -1),
        cu_seqlens=document_ends(ring_cu_seqlens),
        seq_len=ring_seq_len,
    )
    out = ring_attend(*_as_autocast_does(query, key, value), settings.group, options)
    return out.transpose(1, 2).contiguous(), None


def _as_autocast_does(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its dtype, as torch does for its own attention: rotary tables have made q and k fp32."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _refuse_masks(*args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """transformers' mask function: the ring makes its own; one that masks anything else is refused."""
    if use_vmap:
        raise ValueError("the model asks for a mask of its own making: the ring does causal, windows and documents")
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("an attention_mask with padding: pack the documents into one row and give ring_cu_seqlens")
