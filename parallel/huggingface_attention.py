"""Ring attention inside transformers' models, through its attention interface.

transformers looks an attention function up by the name in the config and calls it with the module. The function finds
its context-parallel group on the module, so that no global state is needed and two models can use two groups.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from fourfold.parallel.ring_self_attention import ring_attention

NAME = "fourfold_ring"


@dataclass(slots=True)
class RingSetting:
    """What the attention modules of one model share; `seq_len` is set by whoever feeds the model, each step."""

    group: dist.ProcessGroup
    sharding: str = "zigzag"
    seq_len: int | None = None


def use_ring_attention(model: nn.Module, group: dist.ProcessGroup, *, sharding: str = "zigzag") -> RingSetting:
    """Make `model` attend around `group`; feed it shards of the sequence with their position ids.

    Args:
        model: a transformers decoder whose layers hold a `self_attn`.
    Returns:
        The setting its attention modules share.
    """
    setting = RingSetting(group, sharding)
    for module in model.modules():
        if hasattr(module, "self_attn"):
            module.self_attn.ring_setting = setting  # type: ignore[union-attr]
    cast(Any, model).set_attn_implementation(NAME)
    return setting


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: [B, H, S_local, D] in, [B, S_local, H, D] out."""
    if attention_mask is not None:
        raise ValueError("ring attention takes no attention mask: leave it out")
    setting = cast(RingSetting, module.ring_setting)
    out = ring_attention(
        query, key, value, setting.group, scale=scaling, sharding=setting.sharding, seq_len=setting.seq_len
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attend)
