"""What a ring is asked to compute, and the checks that come before any message.

An error is one that all ranks see alike, or each from its own tensors, so that none is left waiting for the others.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import Place, agree, digest, gather_numbers
from fourfold.parallel.sequence.sharding import ShardedSequence


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
    soft_cap: float | None = None

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


class AgreedLength(int):
    """Tokens of the whole sequence, on which all ranks of the group were found to agree in this very step."""


def shared_sequence(
    tensors: tuple[Tensor, Tensor, Tensor], place: Place, options: RingOptions, problem: str | None = None
) -> ShardedSequence:
    """The whole sequence, with every rank's shard checked against it.

    Args:
        tensors: this rank's q, k and v.
        problem: what this rank found wrong with its arguments, None for nothing.
    Raises:
        ValueError: on every rank, where one holds another shard than it should, has a problem or calls differently.
            Messages of other sizes than a rank expects would end its process, without a word of Python's.
    """
    q, k, v = tensors
    hint = "shard with shard_sequence, with the same sharding and cu_seqlens"
    sizes = dict.fromkeys(("the batch size", "query heads", "key heads", "head size", "head size of the values"), -1)
    if problem is None:
        sizes = dict(zip(sizes, (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3]), strict=True))
    alike = {
        **sizes,
        "seq_len": -1 if options.seq_len is None else options.seq_len,
        "dtype or options": digest((q.dtype, options)),
    }
    if options.seq_len is None:
        agree(place, alike, q.device, problem)
        lengths = [there[0] for there in gather_numbers(place, [q.shape[2]], q.device)]
        sequence = options.shared_by(place.size, sum(lengths))
        if lengths != sequence.lengths:
            problem = (
                f"the ranks hold {lengths} tokens, but {options.sharding} shards of {sequence.seq_len} are "
                f"{sequence.lengths}: {hint}"
            )
    else:
        sequence = options.shared_by(place.size, options.seq_len)
        try:
            expected = sequence.lengths[place.rank]
            if problem is None and q.shape[2] != expected:
                problem = (
                    f"rank {place.rank} holds {q.shape[2]} tokens, but its {options.sharding} shard of "
                    f"seq_len={options.seq_len} has {expected}: {hint}"
                )
        except ValueError as error:  # options that mean nothing
            problem = str(error)
        if not isinstance(options.seq_len, AgreedLength):
            agree(place, alike, q.device, problem)
    if problem is not None:
        raise ValueError(problem)
    return sequence


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for shapes, dtypes or devices that do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{shapes}: q is [B, H, S_local, D], k [B, H_kv, S_local, D] and v [B, H_kv, S_local, D_v]")
    if (q.shape[0], q.shape[2], q.shape[3]) != (k.shape[0], k.shape[2], k.shape[3]):
        raise ValueError(f"{shapes}: batch, tokens and head size must be the same")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads over {k.shape[1]} key heads: the latter must divide the former")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}: "
            "cast and move them to one dtype and device"
        )
