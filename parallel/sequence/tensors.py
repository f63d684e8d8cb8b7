"""Shard tensors over a group by the rules of sequence.sharding, gather them back, and what a model needs beside them.

The gradient of every function here is that of the sum of all ranks' losses, each rank's inputs being its own: the
convention under which parameter gradients are summed over the context-parallel group, and never divided by its size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import Place, exchange, gather_lengths, place_in
from fourfold.parallel.sequence.sharding import Shard, positions, shard_length, shard_ranges

Documents = Sequence[int] | Tensor | None
# A process group, or (rank, size) where nobody communicates, or None: torch's default group, or one process alone.
Group = dist.ProcessGroup | tuple[int, int] | None
IGNORED_LABEL = -100


def document_ends(cu_seqlens: Documents) -> tuple[int, ...] | None:
    """cu_seqlens as whole numbers. A CUDA tensor costs a wait of the host: keep a copy on the CPU."""
    if cu_seqlens is None:
        return None
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    return tuple(int(value) for value in values)


def on_device(x: Tensor, device: torch.device | str | None) -> Tensor:
    """x on `device`. On its way to CUDA it passes through pinned memory, so that the host does not wait for the copy.

    Cost: a copy on the host, in memory that torch keeps pinned for the next one.
    """
    if x.device.type == "cpu" and device is not None and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def on_host(*tensors: Tensor) -> list[Tensor]:
    """Whole numbers as int64 on the CPU, each as it is shaped. Cost: on CUDA the host waits once, for all of them."""
    found = [x.detach().long() for x in tensors]
    for device in {x.device for x in found if x.device.type != "cpu"}:
        places = [place for place, x in enumerate(found) if x.device == device]
        there = torch.cat([found[place].flatten() for place in places]).cpu()
        parts = torch.split(there, [found[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(found[place].shape)
    return found


def shard_sequence(
    x: Tensor, group: Group, *, dim: int, sharding: str = "zigzag", cu_seqlens: Documents = None
) -> Tensor:
    """This rank's tokens of a tensor that every rank holds whole.

    Args:
        x: any shape, the whole sequence along `dim`, any length.
        group: the context-parallel group, or (rank, size); None is torch's default group, or one process alone.
        sharding, cu_seqlens: see sequence.sharding.shard_ranges.
    Returns:
        x with its shard along `dim`, contiguous, possibly empty. Differentiable: the rank's own copy of x gets the
        gradient of its shard, zero elsewhere.
    Raises:
        ValueError: see shard_ranges.
    """
    rank, size = _rank_and_size(group)
    return take(x, shard_ranges(x.shape[dim], size, sharding, document_ends(cu_seqlens))[rank], dim).contiguous()


def unshard_sequence(
    x: Tensor, group: dist.ProcessGroup | None, *, dim: int, sharding: str = "zigzag", cu_seqlens: Documents = None
) -> Tensor:
    """The whole sequence on every rank, from the shards: the exact inverse of `shard_sequence`.

    Args:
        x: this rank's shard along `dim`; the other dims are equal on all ranks, all of which must call.
    Returns:
        x with the whole sequence along `dim`. Differentiable: a shard gets the sum of all ranks' gradients for it,
        in rank order. A loss computed alike on all N ranks from the whole is therefore counted N times.
    Raises:
        ValueError: the shards are not those of this sharding.
    Cost: each rank sends its shard to every other, and receives theirs; backward the same.
    """
    place = place_in(group)
    lengths = gather_lengths(place, x.shape[dim], x)
    shards = shard_ranges(sum(lengths), place.size, sharding, document_ends(cu_seqlens))
    expected = [shard_length(shard) for shard in shards]
    if lengths != expected:
        raise ValueError(
            f"the ranks hold {lengths} tokens, but {sharding} shards of {sum(lengths)} are {expected}: "
            "give the sharding and cu_seqlens that shard_sequence was given"
        )
    whole: Tensor = _Unshard.apply(x, place, shards, dim % x.dim())  # type: ignore[no-untyped-call]
    return whole


def shard_positions(
    seq_len: int,
    group: Group,
    sharding: str = "zigzag",
    cu_seqlens: Documents = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Position ids of this rank's tokens, for rotary embeddings: they follow the sharding and restart with documents.

    Args:
        seq_len: tokens of the whole sequence.
        group: the context-parallel group, or (rank, size).
    Returns:
        [S_local], int64.
    """
    rank, size = _rank_and_size(group)
    ends = document_ends(cu_seqlens)
    shard = shard_ranges(seq_len, size, sharding, ends)[rank]
    if ends is None:
        return indices(shard, device)
    return on_device(torch.tensor(positions(shard, ends), dtype=torch.int64), device)


def shard_labels(
    labels: Tensor,
    group: Group,
    *,
    sharding: str = "zigzag",
    cu_seqlens: Documents = None,
    ignored: int = IGNORED_LABEL,
) -> Tensor:
    """Next-token labels of this rank's tokens: shifted while the sequence is whole, then sharded.

    A shard's last token predicts the first token of another shard, so shifting must come first. The last token of
    each document (and of the sequence) predicts nothing.

    Args:
        labels: [B, S], the whole sequence, not shifted.
    Returns:
        [B, S_local], `ignored` where there is nothing to predict. Do not let the model shift them again: transformers
        takes them as `shift_labels`. Divide the summed loss by the global count of labels.
    """
    shifted = torch.full_like(labels, ignored)
    shifted[:, :-1] = labels[:, 1:]
    ends = document_ends(cu_seqlens)
    if ends is not None:
        last = torch.tensor([end - 1 for end in ends if end > 0], dtype=torch.int64)
        shifted.index_fill_(1, on_device(last, labels.device), ignored)
        shifted[:, ends[-1] :] = ignored
    return shard_sequence(shifted, group, dim=1, sharding=sharding, cu_seqlens=ends)


def take(x: Tensor, shard: Shard, dim: int) -> Tensor:
    """The shard's tokens of x along `dim`; a view where they are one range."""
    if len(shard) == 1 and shard[0].step == 1:
        return x.narrow(dim, shard[0].start, len(shard[0]))
    return x.index_select(dim, indices(shard, x.device))


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place, shards: tuple[Shard, ...], dim: int) -> Tensor:
        ctx.place, ctx.shards, ctx.dim = place, shards, dim
        mine = x.contiguous()
        pieces = [
            mine if rank == place.rank else _resized(x, dim, shard_length(shard)) for rank, shard in enumerate(shards)
        ]
        others = [rank for rank in range(place.size) if rank != place.rank]
        exchange(place, [(mine, rank) for rank in others], [(pieces[rank], rank) for rank in others]).wait()
        whole = _resized(x, dim, sum(map(shard_length, shards)))
        for shard, piece in zip(shards, pieces, strict=True):
            whole.index_copy_(dim, indices(shard, x.device), piece)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        place: Place = ctx.place
        parts = [take(grad, shard, ctx.dim).contiguous() for shard in ctx.shards]
        mine = parts[place.rank]
        received = [mine if rank == place.rank else torch.empty_like(mine) for rank in range(place.size)]
        others = [rank for rank in range(place.size) if rank != place.rank]
        exchange(place, [(parts[rank], rank) for rank in others], [(received[rank], rank) for rank in others]).wait()
        total = received[0].clone()
        for part in received[1:]:
            total += part
        return total, None, None, None


def _rank_and_size(group: Group) -> tuple[int, int]:
    if isinstance(group, tuple):
        return group
    place = place_in(group)
    return place.rank, place.size


def indices(shard: Shard, device: torch.device | str | None) -> Tensor:
    """[S_local], int64: the shard's tokens."""
    runs = [torch.arange(tokens.start, tokens.stop, tokens.step, device=device) for tokens in shard]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)


def _resized(x: Tensor, dim: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length
    return x.new_empty(shape)
