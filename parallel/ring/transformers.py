"""Ring attention inside Hugging Face models: attn_implementation="fourfold_ring".

transformers lets a model call any registered attention function. Ours finds the context-parallel group on the attention
module itself, where `use_ring_attention` puts it, so two models in one process may use two groups. `shard_batch` makes
what the model's forward takes from a whole batch: the shard, its positions, its shifted labels.

What the model then computes is what it would compute on one process, for the whole sequence; anything the ring does not
do (dropout, padding masks, caches, layers that mix tokens otherwise) is refused, never dropped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fourfold.parallel.communication import place_in
from fourfold.parallel.ring.attention import ring_attend
from fourfold.parallel.ring.heads import check_heads
from fourfold.parallel.ring.model_call import ModelCalls
from fourfold.parallel.ring.options import RingOptions, RingSettings
from fourfold.parallel.ring.trial import attention_modules
from fourfold.parallel.ring.unchanged import Snapshot
from fourfold.parallel.ring.whole_length import depends_on_length
from fourfold.parallel.sequence.tensors import Documents, document_ends

NAME = "fourfold_ring"
TRIAL = "fourfold_ring_trial"
ATTRIBUTE = "fourfold_ring"
# Keyword arguments by which models ask for what the ring does not do.
UNSUPPORTED = {
    "head_mask": "a head mask",
    "position_bias": "an attention bias",
}
# Without weights nothing can be tried; these are tested against one process.
KNOWN = frozenset({
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3",
    "qwen3_moe",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Before:
    """What use_ring_attention changed in a model, for its undoing."""

    implementation: str
    modules: list[nn.Module]
    calls: ModelCalls


def use_ring_attention(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    *,
    sharding: str = "zigzag",
    heads_degree: int = 1,
    backend: str | None = None,
) -> None:
    """Make a transformers model attend around the ring of `group`; call it before FSDP, DDP or compile.

    From then on it is called with what `shard_batch` makes of a batch, for evaluation too, until
    `stop_ring_attention(model)`. Called again, it takes the new arguments.

    Args:
        model: a decoder whose layers mix tokens in attention alone (Llama, Qwen, Mistral, Gemma 3, Mixtral and their
            like), on any device. It is tried on some tokens; one on the meta device must be of a known type.
        group, sharding, heads_degree, backend: see ring_attention.
    Raises:
        ValueError: the model has no attention modules, cannot take attention functions, mixes tokens elsewhere too (a
            convolution, a state space), has positions that are not rotary, or its heads do not fit.
    Cost: see ring.trial. Then at each call of the model two messages of at most 64 bytes a rank, and on CUDA the host
        waits once, before anything is computed, to read position ids, the labels' count and the range of all ids. The
        first call reads every weight, to see that all ranks have the same.
    """
    stop_ring_attention(model)
    model = _inner(model)
    size = place_in(group).size
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            f"{type(model).__name__} does not call transformers' attention interface: use ring_attention in its code"
        )
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    _check_config(model, config)
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    check_heads(config.num_attention_heads, key_heads, heads_degree, size)
    modules = _attention_modules(model, config)
    rotary = [module for module in model.modules() if "Rotary" in type(module).__name__]
    if not rotary:
        raise ValueError(
            f"{type(model).__name__} has no rotary embedding: learned positions end with their table, and biases by "
            "distance need a mask; the ring takes models with rotary embeddings"
        )
    options = RingOptions(sharding=sharding, heads_degree=heads_degree, backend=backend)
    settings = RingSettings(group=group, options=options)
    calls = ModelCalls(settings, [module for module in rotary if depends_on_length(module)])
    AttentionInterface.register(NAME, ring_attention_forward)
    AttentionMaskInterface.register(NAME, _refuse_masks)
    before = _Before(config._attn_implementation, modules, calls)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    for module in modules:
        module.ring_settings = settings  # type: ignore[assignment]
    calls.tried = Snapshot(model, modules, NAME)
    calls.watch([each for each in model.modules() if isinstance(each, PreTrainedModel) and _holds(each, modules)])
    model.__dict__[ATTRIBUTE] = before


def stop_ring_attention(model: nn.Module) -> None:
    """Undo use_ring_attention: the model attends as before, and takes whole batches; without a ring, nothing."""
    model = _inner(model)
    before: _Before | None = model.__dict__.pop(ATTRIBUTE, None)
    if before is None:
        return
    before.calls.stop()
    model.set_attn_implementation(before.implementation)  # type: ignore[operator]
    for module in before.modules:
        del module.ring_settings


def _holds(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether some of `modules` lie in it."""
    return not set(modules).isdisjoint(model.modules())


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model in peft's or anybody's wrapper; the model itself where there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def _check_config(model: nn.Module, config: Any) -> None:
    """Refuse what no trial of a few tokens shows."""
    if getattr(config, "attention_chunk_size", None):
        raise ValueError(f"attention_chunk_size={config.attention_chunk_size}: the ring has windows, but no chunks")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder: the ring has no cross-attention")
    targets = {"labels", "start_positions"} & set(signature(type(model).forward).parameters)
    if targets and model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(
            f"{type(model).__name__} makes its loss of something else than next tokens: use_ring_attention on its "
            "base_model, and make the loss of what the shards give"
        )


def _attention_modules(model: nn.Module, config: Any) -> list[nn.Module]:
    """The modules that call the attention function."""
    if any(parameter.is_meta for parameter in model.parameters()):
        if config.model_type not in KNOWN:
            raise ValueError(
                f"{type(model).__name__} has no weights yet (meta device), and model type {config.model_type!r} is not "
                f"among the known {', '.join(sorted(KNOWN))}: make its weights first, so that it can be tried"
            )
        return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]

    @contextmanager
    def replaced(function: Callable[..., Any]) -> Iterator[None]:
        before = config._attn_implementation
        AttentionInterface.register(TRIAL, function)
        AttentionMaskInterface.register(TRIAL, _no_mask)
        model.set_attn_implementation(TRIAL)  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_attn_implementation(before)  # type: ignore[operator]
            AttentionInterface.register(TRIAL, ring_attention_forward)  # else it would keep the trial's modules alive

    return attention_modules(model, replaced)


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
    s_aux: Tensor | None = None,
    softcap: float | None = None,
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
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} counts one rank's tokens: give the whole sequence's as ring_cu_seqlens, or the whole batch to "
                "shard_batch"
            )
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
        soft_cap=softcap,
    )
    out = ring_attend(*_as_autocast_does(query, key, value), settings.group, options, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _as_autocast_does(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its dtype, as torch does for its own attention: rotary tables have made q and k fp32."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask function of a trial."""


def _refuse_masks(*args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """transformers' mask function: the ring makes its own; one that masks anything else is refused."""
    if use_vmap:
        raise ValueError("the model asks for a mask of its own making: the ring does causal, windows and documents")
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("an attention_mask with padding: pack the documents into one row and give ring_cu_seqlens")
