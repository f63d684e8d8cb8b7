"""Point-to-point messages between the ranks of one group: the only file that sends them.

torch.distributed gives batched isend and irecv; this adds the three things every user of them here needs: start now
and wait later, keep the tensors alive in between, and skip what is empty on both sides alike. Messages between two
ranks match in the order they are listed. With NCCL nothing here waits on the host: `wait` orders the current stream.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[Tensor, int]
_READABLE = 1 << 40  # larger numbers are digests, which tell a reader nothing


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands in a group; a group of None with torch.distributed not started is a world of one."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


def new_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """A group of these ranks of the world, this one among them; they alone call.

    A world that is bound to a device (init_process_group's device_id, as init_mesh has it) has torch split NCCL's
    communicator of the world for a new group, for which every rank of the world has to call: a rank outside of the
    group does not, and these would wait for it. So torch is not told of the device while the group is made.

    Args:
        ranks: of the world.
        backend: None for the world's.
    Cost: with NCCL a communicator of these ranks is made at once, also in a world that is not bound: there each message
        between two of them would otherwise make one of its own, and wait on the host until the other rank is there.
    """
    world = dist.group.WORLD
    assert world is not None
    bound, world.bound_device_id = world.bound_device_id, None
    device = None
    if backend is None and "nccl" in dist.get_backend_config(world):
        device = bound or torch.device("cuda", torch.cuda.current_device())
    try:
        made = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True, device_id=device)
    finally:
        world.bound_device_id = bound
    return cast(dist.ProcessGroup, made)


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


def gather_numbers(place: Place, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Every rank's whole numbers, as many on each, in rank order.

    Args:
        device: where the group's messages may lie. A group that also takes the CPU's gets them there, and on CUDA
            nothing then waits for the device.
    Cost: 8 bytes a number and rank; with NCCL alone, one wait of the host for the device.
    """
    mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return [theirs.tolist() for theirs in gather_rows(place, mine, device)]


def gather_rows(place: Place, row: Tensor, device: torch.device) -> list[Tensor]:
    """Every rank's row of numbers, as long and of one dtype on each, where `row` is; else as gather_numbers."""
    if place.size == 1:
        return [row]
    mine = row.to(_meeting(place, device))
    everyone = [torch.empty_like(mine) for _ in range(place.size)]
    dist.all_gather(everyone, mine, group=place.group)
    return [theirs.to(row.device) for theirs in everyone]


def agree(place: Place, numbers: Mapping[str, int], device: torch.device, problem: str | None = None) -> None:
    """Make sure that all ranks of a group are about to do the same; every rank calls, also one that has a problem.

    Args:
        numbers: what must be equal, by the name to call it in the error; the same names in the same order everywhere.
        problem: what this rank found wrong, None for nothing.
    Raises:
        ValueError: on every rank, where one has a problem or the numbers differ.
    Cost: an all-reduce of 24 bytes, whatever the number of ranks; on NCCL see gather_numbers.
    """
    if place.size > 1:
        # The largest and the smallest digest of all ranks are one number where nothing is wrong.
        mine = digest(list(numbers.items()))
        extremes = torch.tensor([problem is not None, mine, -mine], dtype=torch.int64, device=_meeting(place, device))
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=place.group)
        failed_somewhere, largest, smallest = extremes.tolist()
        if not failed_somewhere and largest == -smallest:
            return
    everyone = gather_numbers(place, [problem is not None, *numbers.values()], device)
    if problem is not None:
        raise ValueError(problem)
    failed = [rank for rank, theirs in enumerate(everyone) if theirs[0]]
    if failed:
        raise ValueError(f"ranks {failed} of the group refuse their arguments: see their own messages")
    for index, name in enumerate(numbers, start=1):
        values = [theirs[index] for theirs in everyone]
        if len(set(values)) > 1:
            seen = f": {values} in rank order" if max(values) < _READABLE else ""
            raise ValueError(
                f"the ranks of one group differ in {name}{seen}. All of them take the same batch and the same options, "
                "and each its own shard of it"
            )


def _meeting(place: Place, device: torch.device) -> torch.device:
    """Where numbers travel: the CPU if the group's messages may lie there."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(place.group) else device


def gather_lengths(place: Place, length: int, like: Tensor) -> list[int]:
    """Every rank's length, in rank order. Cost: see gather_numbers."""
    return [lengths[0] for lengths in gather_numbers(place, [length], like.device)]


def digest(value: object) -> int:
    """A number that differs where `repr(value)` does, the same on every rank and in every process."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7])
