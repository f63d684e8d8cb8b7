"""How a model streams, and what follows from it for one pass over a batch and for the head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fourfold.parallel.stream.attention import RowMask
from fourfold.parallel.stream.head import Head
from fourfold.parallel.stream.heads_layer import by_heads
from fourfold.parallel.stream.host_memory import HostMemory, HostStore
from fourfold.parallel.stream.layer_run import StreamRun
from fourfold.parallel.stream.memory import Auto, auto_chunks, head_groups, kept_layers, logits_chunk_size, logits_tile


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """How a model streams; the fields are stream_backprop's arguments."""

    chunk_size: Auto = "auto"
    mlp_chunk: Auto = "auto"
    logits_chunk: Auto = "auto"
    offload: Literal["host"] | None = None
    keep_attention: bool | int = False
    backend: str | None = None
    head_groups: Auto = "auto"
    host: HostStore = field(default_factory=HostStore, compare=False, repr=False)
    """Where offloaded tensors wait; whoever replaces a field shares it."""

    def __post_init__(self) -> None:
        if self.offload not in (None, "host"):
            raise ValueError(f"offload={self.offload!r}: give 'host', or None")
        for name in ("chunk_size", "mlp_chunk", "logits_chunk"):
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: give a number of tokens, at least 1, or 'auto'")
        groups = self.head_groups
        if groups != "auto" and (not isinstance(groups, int) or isinstance(groups, bool) or groups < 0):
            raise ValueError(f"head_groups={groups!r}: give a number of groups, 0 for chunks of queries, or 'auto'")
        if not isinstance(self.keep_attention, int) or self.keep_attention < 0:
            raise ValueError(f"keep_attention={self.keep_attention!r}: give True, or a number of layers")

    def keeps(self, layer: int, layers: int) -> bool:
        """Whether layer number `layer` of `layers` keeps attention's output."""
        return layer >= layers - kept_layers(self.keep_attention, layers)


def new_run(
    settings: StreamSettings, config: Any, masks: Sequence[RowMask], shape: tuple[int, int], device: torch.device,
    dtype: torch.dtype,
) -> StreamRun:  # fmt: skip
    """What the layers of one pass over a batch share; autocast is as it is now.

    Args:
        config: the model's.
        masks: row_masks of the batch, of `shape` (B, T) on this rank.
        dtype: of the hidden states.
    """
    kind = device.type
    chunk, mlp_chunk = settings.chunk_size, settings.mlp_chunk
    if chunk == "auto" or mlp_chunk == "auto":
        found = auto_chunks(
            config, shape[1], batch=shape[0], device_type=kind, chunk_size=chunk,
            keep_attention=settings.keep_attention, offload=settings.offload is not None and kind == "cuda",
            itemsize=dtype.itemsize,
        )  # fmt: skip
        chunk, mlp_chunk = found[0], found[1] if mlp_chunk == "auto" else mlp_chunk
    run = StreamRun(
        masks=masks,
        chunk=chunk,
        mlp_chunk=mlp_chunk,
        backend=settings.backend,
        autocast=(kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        host=HostMemory(device, settings.host) if settings.offload and torch.is_grad_enabled() else None,
    )
    groups = head_groups(kind) if settings.head_groups == "auto" else settings.head_groups
    return by_heads(run, groups) if groups else run


def new_head(
    settings: StreamSettings,
    run: StreamRun,
    config: Any,
    norm: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    projection: nn.Linear,
) -> Head:
    """The end of the model for the same pass.

    Args:
        config: the model's, which may scale or cap logits.
        norm, normalise, projection: see Head.
    """
    chunk, kind = settings.logits_chunk, projection.weight.device.type
    scaling = getattr(config, "logits_scaling", None)  # Granite's: logits are divided by it
    return Head(
        norm=norm,
        normalise=normalise,
        projection=projection,
        scale=1.0 if scaling is None else 1 / scaling,
        soft_cap=getattr(config, "final_logit_softcapping", None),
        chunk=logits_chunk_size(projection.out_features, kind) if chunk == "auto" else chunk,
        tile=logits_tile(projection.out_features, None if chunk == "auto" else chunk, kind),
        autocast=run.autocast,
        passing=run.passing,
    )
