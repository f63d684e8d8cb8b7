"""What a ring is asked to compute, and the checks that come before any message.

An error is one that all ranks see alike, or each from its own tensors, so that none is left waiting for the others.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import Place, digest, gather_numbers
from fourfold.parallel.sequence.sharding import ShardedSequence, shard_length


@dataclass(frozen=True, kw_only=True, slots=True)
class RingOptions:
    """The options of ring_attention, which explains them; the same on every rank of the group."""

    causal: bool = True
    scale: float | None = None
    sharding: str = "zigzag"
    window: tuple[int, int] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    heads_degree: int = 1
    backend: str | None = None
    seq_len: int | None = None

    def shared_by(self, size: int, seq_len: int) -> ShardedSequence:
        """A sequence of seq_len tokens under these options, over `size` ranks."""
        return ShardedSequence(
            size, seq_len, self.sharding, causal=self.causal, window=self.window, cu_seqlens=self.cu_seqlens,
            heads_degree=self.heads_degree,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RingSettings:
    """The ring that a model attends around: its group, and what every layer's options have in common."""

    group: dist.ProcessGroup | None
    options: RingOptions = RingOptions()

    def __deepcopy__(self, memo: object) -> "RingSettings":
        """Itself: a copy of a model is in the same group, of which there are no copies."""
        return self


def shared_sequence(q: Tensor, k: Tensor, place: Place, options: RingOptions) -> ShardedSequence:
    """The whole sequence, with every rank's shard checked against it as far as this rank can know."""
    hint = "shard with shard_sequence, with the same sharding and cu_seqlens"
    if options.seq_len is None:
        lengths = _lengths(q, k, place, options)
        sequence = options.shared_by(place.size, sum(lengths))
        if lengths != sequence.lengths:
            raise ValueError(
                f"the ranks hold {lengths} tokens, but {options.sharding} shards of {sequence.seq_len} are "
                f"{sequence.lengths}: {hint}"
            )
        return sequence
    sequence = options.shared_by(place.size, options.seq_len)
    expected = shard_length(sequence.shards[place.rank])
    if q.shape[2] != expected:
        raise ValueError(
            f"rank {place.rank} holds {q.shape[2]} tokens, but its {options.sharding} shard of "
            f"seq_len={options.seq_len} has {expected}: {hint}"
        )
    return sequence


def _lengths(q: Tensor, k: Tensor, place: Place, options: RingOptions) -> list[int]:
    """Every rank's tokens, once all ranks were found to call alike but for them."""
    # Messages of other sizes than a rank expects would end its process, without a word of Python's.
    alike = {
        "the batch size": q.shape[0],
        "query heads": q.shape[1],
        "key heads": k.shape[1],
        "head size": q.shape[3],
        "dtype or options": digest((q.dtype, options)),
    }
    everyone = gather_numbers(place, [q.shape[2], *alike.values()], q.device)
    for index, name in enumerate(alike, start=1):
        values = [theirs[index] for theirs in everyone]
        if len(set(values)) > 1:
            seen = "" if name.endswith("options") else f": {values} in rank order"
            raise ValueError(f"the ranks of one group differ in {name}{seen}; all of them call alike")
    return [theirs[0] for theirs in everyone]


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for shapes, dtypes or devices that do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
        raise ValueError(f"{shapes}: q is [B, H, S_local, D], k and v are both [B, H_kv, S_local, D]")
    if (q.shape[0], q.shape[2], q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3]):
        raise ValueError(f"{shapes}: batch, tokens and head size must be the same")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads over {k.shape[1]} key heads: the latter must divide the former")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: "
            "cast and move them to one dtype and device"
        )
