"""What ring_attention checks before any message: an error that all ranks see alike, or each from its own tensors."""

from torch import Tensor

from fourfold.parallel.communication import Place, gather_lengths
from fourfold.parallel.sequence.sharding import shard_length, shard_ranges


def sequence_length(q: Tensor, place: Place, sharding: str, ends: tuple[int, ...] | None, seq_len: int | None) -> int:
    """The global length, with every rank's shard checked against it as far as this rank can know."""
    if seq_len is None:
        lengths = gather_lengths(place, q.shape[2], q)
        seq_len = sum(lengths)
        expected = [shard_length(shard) for shard in shard_ranges(seq_len, place.size, sharding, ends)]
        if lengths != expected:
            raise ValueError(
                f"the ranks hold {lengths} tokens, but {sharding} shards of {seq_len} are {expected}: "
                "shard with shard_sequence, with the same sharding and cu_seqlens"
            )
        return seq_len
    expected_here = shard_length(shard_ranges(seq_len, place.size, sharding, ends)[place.rank])
    if q.shape[2] != expected_here:
        raise ValueError(
            f"rank {place.rank} holds {q.shape[2]} tokens, but its {sharding} shard of seq_len={seq_len} has "
            f"{expected_here}: shard with shard_sequence, with the same sharding and cu_seqlens"
        )
    return seq_len


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
