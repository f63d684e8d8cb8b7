"""This rank's part of a tensor that may be a DTensor: its memory, its bits, and how it is written to a file."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fourfold.parallel.pipeline.values import copied, resolved

Fingerprint = tuple[int, int]


def written(gradients: Sequence[Tensor | None]) -> list[Any]:
    """Gradients for a file; of a DTensor its local part, and how that lies on the ranks. `read_back` is the inverse."""
    return [
        (local_part(each).clone(), _as_number(each.placements[0])) if isinstance(each, DTensor) else copied(each)
        for each in gradients
    ]


def read_back(saved: Sequence[Any], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The inverse of `written`, for the gradients of `parameters`."""
    found: list[Tensor | None] = []
    for p, each in zip(parameters, saved, strict=True):
        if isinstance(each, tuple) and isinstance(p, DTensor):
            local, number = each
            each = DTensor.from_local(
                local, p.device_mesh, [_of_number(number)], run_check=False, shape=p.shape, stride=p.stride()
            )
        found.append(copied(each))
    return found


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    alone = tensor.detach()
    return alone.to_local() if isinstance(alone, DTensor) else alone


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local_part` of each."""
    return [local_part(tensor) for tensor in tensors]


def copy_from_first(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Give every rank of `group` the parts of its first, in place."""
    for tensor in tensors:
        dist.broadcast(local_part(tensor).data, group=group, group_src=0)


def _as_number(placement: Placement) -> int:
    """The dim that a gradient is cut along; -1 where each rank has all of it, -2 where each has a summand."""
    if isinstance(placement, Shard):
        return placement.dim
    return -2 if placement.is_partial() else -1


def _of_number(number: int) -> Placement:
    """The inverse of `_as_number`."""
    return Shard(number) if number >= 0 else Partial() if number == -2 else Replicate()


def share_storage(master: nn.Parameter, p: nn.Parameter) -> None:
    """Let `master` have the storage of `p`, and a count of writes of its own."""
    if isinstance(master, DTensor):
        master._local_tensor = local_part(p).data  # of a DTensor, `.data = ` would set the wrapper's alone
    else:
        master.data = p.data


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Two sums over the bits: other weights have others, but for a coincidence."""
    flat = resolved(tensor).view(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
    return int(bits.sum(dtype=torch.int64)), int(bits[::2].sum(dtype=torch.int64))
