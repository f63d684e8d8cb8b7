"""The layers and the head of a pipeline stage, streamed: what stream_backprop does to a whole model, for a part of it.

Nothing in the modules changes between calls, so a stage shares them with whoever has them too: each layer is patched
for its forward, and again for its backward (LayerStream.patched).
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fourfold.parallel.ring.options import RingSettings
from fourfold.parallel.sequence.tensors import Documents
from fourfold.parallel.stream.attention import row_masks
from fourfold.parallel.stream.checks import end_is_watched
from fourfold.parallel.stream.fused import liger
from fourfold.parallel.stream.layer import Current, LayerStream
from fourfold.parallel.stream.layer_run import StreamRun
from fourfold.parallel.stream.patching import attention_function
from fourfold.parallel.stream.ring_layer import around_ring
from fourfold.parallel.stream.settings import LogitsForm, StreamSettings, new_head, new_run


class RowsOfStage(NamedTuple):
    """What the rows of a stage's pass are.

    Attributes:
        position_ids: [B, S], whose falls begin documents; None where each row is one, and around a ring.
        seq_len, cu_seqlens: of the whole sequence, for a ring.
    """

    position_ids: Tensor | None = None
    seq_len: int | None = None
    cu_seqlens: Documents = None


def stage_run(settings: StreamSettings, config: Any, layer: nn.Module, hidden: Tensor, rows: RowsOfStage) -> StreamRun:
    """What a stage's layers share in one pass over hidden [B, S_local, d], around the ring where there is one.

    Args:
        config: the model's.
        layer: any of the stage's.
    """
    shape = (hidden.shape[0], hidden.shape[1])
    ring: RingSettings | None = getattr(layer.self_attn, "ring_settings", None)
    masks = row_masks(None, rows.position_ids if ring is None else None, shape)
    run = new_run(settings, config, masks, shape, hidden.device, hidden.dtype)
    return run if ring is None else around_ring(run, ring, rows.seq_len, rows.cu_seqlens)


def stream_layers(
    settings: StreamSettings, layers: Collection[nn.Module], hidden: Tensor, arguments: Mapping[str, Any],
    run: StreamRun,
) -> Tensor:  # fmt: skip
    """hidden [B, S_local, d] after the layers; each is called, hooks and all, once."""
    current, fused = Current(), liger() if settings.fused else None
    with current.entered(run):
        for index, layer in enumerate(layers):
            stream = LayerStream(layer, current, keep=settings.keeps(index, len(layers)), fused=fused)
            with attention_function(stream.attention.config), stream.patched():
                hidden = layer(hidden, **arguments)
    return hidden


def stream_loss(
    settings: StreamSettings, run: StreamRun | None, norm: nn.Module, projection: nn.Linear, hidden: Tensor,
    targets: Tensor,
) -> Tensor:  # fmt: skip
    """The cross-entropy of hidden [B, S_local, d] after the last layer, summed over targets [B, S_local] from 0 on.

    Args:
        run: stage_run's; None where the layers do not stream.
    Raises:
        ValueError: somebody has a say in the norm or the projection that would be passed by.
    Cost: see Head.loss; the device is not waited for.
    """
    whose = end_is_watched(norm, projection)
    if whose is not None:
        raise ValueError(f"{whose}, which the streamed loss would pass by: take it off, or stream no layers")
    head = new_head(settings, run, LogitsForm(), norm, norm.forward, projection)
    head = replace(head, skips=targets.device.type == "cpu")
    return head.loss(hidden, targets, torch.ones((), dtype=torch.float64, device=hidden.device))
