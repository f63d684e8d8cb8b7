"""This rank's part of a tensor that may be a DTensor: its memory, its bits, and how it is written to a file."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fourfold.parallel.gradients import local_part
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


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """gradients.local_part of each."""
    return [local_part(tensor) for tensor in tensors]


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
    first, second = bit_sums(tensor).tolist()
    return first, second


def bit_sums(tensor: Tensor) -> Tensor:
    """The `fingerprint` where the tensor is, [2] int64: nobody waits for it."""
    flat = resolved(tensor).view(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
    return torch.stack([bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)])


def numbers_of(parameters: Sequence[Tensor], is_cut: Callable[[Tensor], bool] = lambda _: False) -> list[int]:
    """What ranks that hold the same weights must have alike: three numbers a parameter, of its bits and its training.

    Args:
        is_cut: whether each rank has another part of it, whose bits then do not count.
    """
    prints = [(0, 0) if is_cut(p) else fingerprint(local_part(p)) for p in parameters]
    return [number for p, own in zip(parameters, prints, strict=True) for number in (*own, int(p.requires_grad))]


def first_unlike(rows: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """(rank, parameter) of the first `numbers_of` that are not the first rank's; None where all are alike."""
    for rank, row in enumerate(rows):
        for at, (one, other) in enumerate(zip(row, rows[0], strict=True)):
            if one != other:
                return rank, at // 3
    return None
