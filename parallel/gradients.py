"""What keeps replicas alike: the same weights at the start, averaged gradients, and a norm to clip by.

DistributedDataParallel and FSDP2 average gradients themselves. DDP takes no DTensor parameters, so data parallelism
over tensor parallelism without sharding is averaged here, in buckets. torch's `clip_grad_norm_` wants all parameters on
one mesh; a pipeline stage knows only its own, so the norm over all four axes is here too.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fourfold.parallel.grid import AXES

_BUCKET_BYTES = 32 * 2**20


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average every gradient over `group`, in place, as DDP does.

    A gradient that several calls add to may be averaged after each of them: the earlier part, the same on every rank by
    then, is its own average.

    Args:
        parameters: plain or DTensor parameters, in the same order on every rank; a DTensor's local part is averaged
            with the same part of its replicas. Those without a gradient are skipped.
        group: the ranks that hold replicas; every rank of it must call.
    Cost: one all-reduce a bucket of 32 MiB; 2 (n-1)/n times the gradients' bytes a rank.
    """
    gradients = [local for parameter in parameters if (local := local_gradient(parameter)) is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat, group=group)
        flat /= group.size()
        for gradient, averaged in zip(bucket, torch.split(flat, [part.numel() for part in bucket]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


def copy_weights(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Give every rank of `group` the weights of its first, in place.

    Args:
        tensors: parameters and buffers, plain or DTensors, in the same order on every rank.
    Cost: one broadcast a tensor.
    """
    for tensor in tensors:
        dist.broadcast(local_part(tensor).data, group=group, group_src=0)


def resolve_partial_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum over tp the gradients that each tp rank knows only a part of (a norm over heads, say).

    Cost: one all-reduce of the gradient for each such parameter.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if (
            isinstance(gradient, DTensor)
            and isinstance(parameter, DTensor)
            and gradient.placements != parameter.placements
        ):
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    mesh: DeviceMesh,
    *,
    max_norm: float,
    counted_elsewhere: nn.Parameter | None = None,
) -> Tensor:
    """Scale all gradients so that their 2-norm over the whole model is at most `max_norm`.

    Args:
        parameters: this rank's parameters, as the layout left them: plain, or DTensors on axes of `mesh`.
        mesh: (dp, pp, cp, tp); every rank of it must call.
        counted_elsewhere: one of `parameters` whose gradient another pipeline stage has too, and counts: it is scaled
            with the rest.
    Returns:
        The norm before clipping, a float64 scalar, the same on every rank.
    Raises:
        ValueError: a `max_norm` that is negative or no number.
    Cost: one all-reduce of 8 bytes for each axis longer than 1.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm}: give a number of at least 0, or math.inf to know the norm alone")
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    replicas = mesh.size() // mesh["pp"].size()
    total = torch.zeros((), dtype=torch.float64, device=mesh.device_type)
    for parameter in parameters:
        if parameter is counted_elsewhere:
            continue
        gradient = local_gradient(parameter)
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)  # no copy of the gradient
        total += norm.square() * (_parts(parameter) / replicas)
    for axis in AXES:
        if mesh[axis].size() > 1:
            dist.all_reduce(total, group=mesh.get_group(axis))
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        gradient = local_gradient(parameter)
        assert gradient is not None
        gradient.mul_(scale.to(gradient.dtype))
    return norm


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be a DTensor, without a graph, sharing its memory."""
    alone = tensor.detach()
    return alone.to_local() if isinstance(alone, DTensor) else alone


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The part of the gradient that lies on this rank, sharing its memory; None where there is none."""
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _parts(parameter: nn.Parameter) -> int:
    """Over how many ranks of a stage one copy of the parameter is cut."""
    if not isinstance(parameter, DTensor):
        return 1
    parts = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        parts *= 1 if placement.is_replicate() else size
    return parts


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut into runs of one dtype and at most about `_BUCKET_BYTES`."""
    for _, run in groupby(gradients, key=lambda gradient: gradient.dtype):
        bucket: list[Tensor] = []
        size = 0
        for gradient in run:
            bucket.append(gradient)
            size += gradient.numel() * gradient.element_size()
            if size >= _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
