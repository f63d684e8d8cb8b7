"""Point-to-point messages between the ranks of one group: the only file that sends them.

torch.distributed gives batched isend and irecv; this adds the three things every user of them here needs: start now
and wait later, keep the tensors alive in between, and skip what is empty on both sides alike. Messages between two
ranks match in the order they are listed. With NCCL nothing here waits on the host: `wait` orders the current stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[Tensor, int]


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands in a group; a group of None with torch.distributed not started is a world of one."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


def place_in(group: dist.ProcessGroup | None) -> Place:
    """This process's rank and the group's size.

    Raises:
        ValueError: this process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise ValueError("a group was given, but torch.distributed is not started: call init_mesh first")
        return Place(None, 0, 1)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in this group: only its members may call")
    return Place(group, rank, dist.get_world_size(group))


class Exchange:
    """Messages in flight. Their tensors must not be read (received) or written (sent) before `wait`."""

    def __init__(self, works: list[dist.Work], tensors: list[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._tensors = [], []


def exchange(place: Place, sends: Sequence[Message], receives: Sequence[Message]) -> Exchange:
    """Start sending and receiving; returns at once.

    Args:
        place: from `place_in`.
        sends, receives: (contiguous tensor, rank in the group) pairs. Empty tensors are skipped, so both sides must
            know what is empty. Shapes and dtypes are not sent: both sides must agree on them.
    Cost: the bytes listed. On NCCL the first use of a group must be a call that all its ranks take part in;
        the groups of init_mesh are past that.
    """
    operations = [
        dist.P2POp(operation, tensor, group=place.group, group_peer=peer)
        for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
        for tensor, peer in messages
        if tensor.numel()
    ]
    works = dist.batch_isend_irecv(operations) if operations else []
    return Exchange(works, [operation.tensor for operation in operations])


def gather_lengths(place: Place, length: int, like: Tensor) -> list[int]:
    """Every rank's length, in rank order. Cost: 8 bytes a rank, and on CUDA one wait of the host for the device."""
    if place.size == 1:
        return [length]
    mine = like.new_tensor([length], dtype=torch.int64)
    lengths = [mine.new_empty(1) for _ in range(place.size)]
    dist.all_gather(lengths, mine, group=place.group)
    return [int(other) for other in lengths]
