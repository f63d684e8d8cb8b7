"""Ring attention as the `core_attention` of a Megatron-Core layer spec.

Megatron-Core has context parallelism through TransformerEngine alone; its own DotProductAttention refuses it. This
module takes its place in a local layer spec, on any device, and attends around the context-parallel group that
Megatron's parallel_state has made:

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = MegatronRingAttention

Megatron's get_batch_on_this_cp_rank and its rotary embedding cut the sequence as "zigzag" does here. Nothing of
Megatron is imported before a layer is built.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.ring.attention import ring_attention


class MegatronRingAttention(nn.Module):
    """Exact attention around the context-parallel ring, with Megatron-Core's arguments.

    Args:
        config: a TransformerConfig.
        layer_number: from 1.
        attn_mask_type: AttnMaskType.causal or no_mask.
        attention_type: "self".
        softmax_scale: of the scores; None is kv_channels**-0.5.
        pg_collection: whose `cp` is the ring's group; None takes parallel_state's.
        others: attention_dropout, of which 0 alone is taken; cp_comm_type, which is TransformerEngine's and not read.
    Raises:
        ValueError: cross-attention, dropout, a softmax with sinks, or another mask.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, *,
        softmax_scale: float | None = None, pg_collection: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        dropout = others.get("attention_dropout")
        dropout = config.attention_dropout if dropout is None else dropout
        softmax = getattr(config, "softmax_type", "vanilla")
        if attention_type != "self":
            raise ValueError(f"attention_type={attention_type!r}: the ring has self-attention only")
        if dropout:
            raise ValueError(f"attention dropout of {dropout}: set attention_dropout=0.0 in the TransformerConfig")
        if softmax != "vanilla":
            raise ValueError(f"softmax_type={softmax!r}: give ring_attention's sinks in code of your own, or 'vanilla'")
        self.scale, self.window = softmax_scale, _window(config, layer_number)
        self._mask_type = _checked(attn_mask_type)
        self.group = _context_group(pg_collection)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        attn_mask_type: Any = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """Attend: query [S_local, B, H, D], key and value [S_local, B, H_kv, D] to [S_local, B, H*D].

        Raises:
            ValueError: a mask given as a tensor, an attention bias, or packed sequences.
        """
        if attention_mask is not None:
            raise ValueError("an attention_mask around a ring: give attention_mask=None, the layer's mask type says it")
        for name, wanted in others.items():
            if wanted is not None:
                raise ValueError(f"{name}: the ring in Megatron takes one sequence a row; leave {name} out")
        causal = (self._mask_type if attn_mask_type is None else _checked(attn_mask_type)) == "causal"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = ring_attention(
            q, k, v, self.group, causal=causal, scale=self.scale, window=self.window if causal else None
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _checked(mask_type: Any) -> str:
    name: str = getattr(mask_type, "name", str(mask_type))
    if name not in ("causal", "no_mask"):
        raise ValueError(f"attn_mask_type {name!r}: the ring takes causal and no_mask")
    return name


def _window(config: Any, layer_number: int) -> tuple[int, int] | None:
    """(left, right) keys that a query sees in this layer; None for all."""
    if getattr(config, "window_size", None) is None:
        return None
    from megatron.core.transformer.utils import is_layer_window_attention

    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return tuple(config.window_size) if windowed else None


def _context_group(pg_collection: Any) -> dist.ProcessGroup:
    group: dist.ProcessGroup | None = getattr(pg_collection, "cp", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
    return group
