"""How a model streams, and what follows from it for one pass over a batch and for the head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fourfold.parallel.stream.attention import RowMask
from fourfold.parallel.stream.gradients import autocast_now
from fourfold.parallel.stream.head import Head
from fourfold.parallel.stream.heads_layer import by_heads
from fourfold.parallel.stream.host_memory import HostMemory, HostStore
from fourfold.parallel.stream.layer_run import StreamRun
from fourfold.parallel.stream.memory import Asked, auto_sizes
from fourfold.parallel.stream.passing import PassingGradient
from fourfold.parallel.stream.work_space import (
    Auto,
    check_sizes,
    kept_layers,
    logits_chunk_size,
    logits_tile,
    loss_chunk_size,
)


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
    fused: bool = True
    host: HostStore = field(default_factory=HostStore, compare=False, repr=False)
    """Where offloaded tensors wait; whoever replaces a field shares it."""

    def __post_init__(self) -> None:
        if self.offload not in (None, "host"):
            raise ValueError(f"offload={self.offload!r}: give 'host', or None")
        names = ("chunk_size", "mlp_chunk", "logits_chunk", "head_groups", "keep_attention")
        check_sizes({name: getattr(self, name) for name in names})

    def keeps(self, layer: int, layers: int) -> bool:
        """Whether layer number `layer` of `layers` keeps attention's output."""
        return layer >= layers - kept_layers(self.keep_attention, layers)


def new_run(
    settings: StreamSettings, config: Any, masks: Sequence[RowMask], shape: tuple[int, int], device: torch.device,
    dtype: torch.dtype, can_cut: bool = True,
) -> StreamRun:  # fmt: skip
    """What the layers of one pass over a batch share; autocast is as it is now.

    Args:
        config: the model's.
        masks: row_masks of the batch, of `shape` (B, T) on this rank.
        dtype: of the hidden states.
        can_cut: see memory.Asked.
    """
    kind = device.type
    cpu_or_cuda = "cpu" if kind == "cpu" else "cuda"  # any other device wants few large pieces too
    asked = Asked(
        head_groups=settings.head_groups, chunk_size=settings.chunk_size, mlp_chunk=settings.mlp_chunk, can_cut=can_cut
    )
    sizes = auto_sizes(
        config, shape[1], asked=asked, device_type=cpu_or_cuda, free_bytes=free_memory(device), batch=shape[0],
        keep_attention=settings.keep_attention, offload=settings.offload is not None and kind == "cuda",
        itemsize=dtype.itemsize,
    )  # fmt: skip
    run = StreamRun(
        masks=masks,
        chunk=sizes.chunk,
        mlp_chunk=sizes.mlp_chunk,
        backend=settings.backend,
        autocast=autocast_now(kind),
        host=HostMemory(device, settings.host) if settings.offload and torch.is_grad_enabled() else None,
    )
    return by_heads(run, sizes.groups) if sizes.groups else run


def free_memory(device: torch.device) -> int | None:
    """Bytes that a step may still allocate on the device; None where nobody tells."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class LogitsForm(NamedTuple):
    """Logits are soft_cap(scale * the projection's output); as they are in the families that `parallelize` cuts."""

    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitsForm":
        """As a model's own code may read its config; where it does not, streaming's comparison with it fails."""
        scaling = getattr(config, "logits_scaling", None)  # Granite's: logits are divided by it
        factor = getattr(config, "logit_scale", None)  # Cohere's: they are multiplied by it
        scale = (1.0 if scaling is None else 1 / scaling) * (1.0 if factor is None else factor)
        return cls(scale, getattr(config, "final_logit_softcapping", None))


def new_head(
    settings: StreamSettings,
    run: StreamRun | None,
    logits: LogitsForm,
    norm: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    projection: nn.Linear,
) -> Head:
    """The end of the model for the same pass.

    Args:
        run: None where the layers do not stream: then the head is to take no more time than whole logits would.
        logits: what becomes of the projection's output.
        norm, normalise, projection: see Head.
    """
    asked, kind = settings.logits_chunk, projection.weight.device.type
    size = logits_chunk_size if run is not None else loss_chunk_size
    return Head(
        norm=norm,
        normalise=normalise,
        projection=projection,
        scale=logits.scale,
        soft_cap=logits.soft_cap,
        chunk=size(projection.out_features, kind) if asked == "auto" else asked,
        tile=logits_tile(projection.out_features, None if asked == "auto" else asked, kind),
        autocast=autocast_now(kind) if run is None else run.autocast,
        passing=PassingGradient() if run is None else run.passing,
        single_pass=run is None,
    )
