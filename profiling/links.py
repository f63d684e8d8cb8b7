"""Cases for what ranks send each other, by tier of the network and by group size.

Tier "host" joins ranks of one host; tier "network" joins ranks of the same local number on different hosts. Every rank
works at once: with groups of 2 among 8 ranks, four groups share the links, as four tensor-parallel groups would.

`bytes` is the largest buffer that a rank holds in the operation (the convention of nccl-tests): the message of send and
ring_shift, the tensor of all_reduce, the output of all_gather, the input of reduce_scatter and of all_to_all.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fourfold.profiling.clock import Clock
from fourfold.profiling.session import Case

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)

# torch 2.13 renames the two and warns of the names that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
OPERATIONS = ("send", "ring_shift", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """The groups of one tier that this rank belongs to, by size."""

    name: str
    num_ranks: int
    groups: dict[int, dist.ProcessGroup]


def find_tiers(device_type: str) -> list[Tier]:
    """The tiers of this world, innermost first; every rank must call.

    Hosts come from torchrun's LOCAL_WORLD_SIZE; without it, all ranks are on one host.

    Raises:
        ValueError: hosts of unequal numbers of ranks.
    Cost: one group a divisor of the ranks of a host, and one a divisor of the number of hosts.
    """
    world_size = dist.get_world_size()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    sizes = torch.tensor([per_host, -per_host])
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    if sizes[0] != -sizes[1] or world_size % per_host:
        raise ValueError(
            f"between {-sizes[1]} and {sizes[0]} ranks a host: start the same number on every host (--nproc-per-node)"
        )
    num_hosts = world_size // per_host
    tiers = []
    for name, size, inner in (("host", per_host, 1), ("network", num_hosts, per_host)):
        if size > 1:
            groups = {
                part: init_device_mesh(
                    device_type, (world_size // part // inner, part, inner), mesh_dim_names=("outer", "group", "inner")
                ).get_group("group")
                for part in range(2, size + 1)
                if size % part == 0
            }
            tiers.append(Tier(name=name, num_ranks=size, groups=groups))
    return tiers


def link_cases(tier: Tier, device: torch.device, sizes_bytes: Sequence[int], essential: Sequence[int]) -> list[Case]:
    """Every operation, group size and message size of a tier; send in pairs only, of the smallest group.

    Args:
        sizes_bytes: message sizes in bytes; rounded up to whole elements a rank.
        essential: those of them that are measured whatever the time budget.
    """
    cases = []
    for group_size, group in tier.groups.items():
        for operation in OPERATIONS:
            if operation == "send" and group_size != min(tier.groups):
                continue
            for size in sizes_bytes:
                share = max(1, -(-size // (4 * group_size)))
                cases.append(_case(tier.name, operation, group, share, device, size in essential))
    return cases


def _case(
    tier: str, operation: str, group: dist.ProcessGroup, share: int, device: torch.device, essential: bool
) -> Case:
    size = group.size()

    def run(clock: Clock, iterations: int) -> tuple[float]:
        call = _operation(operation, group, share, device)
        if operation != "send":
            return (clock.repeat(call, iterations),)
        # A ping and its pong are two messages; ranks beyond the pair have nothing to do.
        return (clock.repeat(call, iterations) / 2 if group.rank() < 2 else 0.0,)

    return Case(
        table="link",
        fields={
            "tier": tier,
            "operation": operation,
            "group_size": 2 if operation == "send" else size,
            "bytes": 4 * share * size,
        },
        run=run,
        essential=essential,
    )


def _operation(operation: str, group: dist.ProcessGroup, share: int, device: torch.device) -> Callable[[], object]:
    """One call of `operation` with fp32 buffers of `share` elements a rank, `share * size` in all."""
    size, rank = group.size(), group.rank()
    whole, part = torch.zeros(share * size, device=device), torch.zeros(share, device=device)
    if operation == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if operation == "all_gather":
        return lambda: _all_gather(whole, part, group=group)
    if operation == "reduce_scatter":
        return lambda: _reduce_scatter(part, whole, group=group)
    other = torch.zeros_like(whole)
    if operation == "all_to_all":
        return lambda: dist.all_to_all_single(other, whole, group=group)
    following, previous = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))

    def ring_shift() -> None:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, whole, following, group), dist.P2POp(dist.irecv, other, previous, group)]
        )
        for work in works:
            work.wait()

    def ping_pong() -> None:
        if rank == 0:
            dist.send(whole, following, group=group)
            dist.recv(other, following, group=group)
        elif rank == 1:
            dist.recv(other, previous, group=group)
            dist.send(whole, previous, group=group)

    return ring_shift if operation == "ring_shift" else ping_pong
