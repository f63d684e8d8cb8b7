"""Ways of cutting packed documents over ranks: ours and those of published rings."""

from collections.abc import Callable
from itertools import accumulate, pairwise
from random import Random

from fourfold.parallel.sequence.sharding import Shard, join_ranges, shard_ranges

Cut = Callable[[int, int, tuple[int, ...]], tuple[Shard, ...]]


def few_long_many_short(seq_len: int, seed: int = 0) -> tuple[int, ...]:
    """cu_seqlens: a document of a quarter, four of a sixteenth each, and short ones for the other half.

    The short ones are log-normal, some 1,400 tokens in the mean, in random order with the long ones.
    """
    if seq_len < 128:
        raise ValueError(f"seq_len={seq_len}: a row of a few long and many short documents has at least 128 tokens")
    random = Random(seed)
    lengths = [seq_len // 4 - 7] + [seq_len // 16 - 5] * 4
    while sum(lengths) < seq_len:
        length = int(random.lognormvariate(6.5, 1.2)) + 1
        lengths.append(min(length, seq_len - sum(lengths)))
    random.shuffle(lengths)
    return (0, *accumulate(lengths))


def contiguous(seq_len: int, size: int, cu_seqlens: tuple[int, ...]) -> tuple[Shard, ...]:
    return shard_ranges(seq_len, size, "contiguous")


def zigzag_of_the_row(seq_len: int, size: int, cu_seqlens: tuple[int, ...]) -> tuple[Shard, ...]:
    """As rings do that do not look at documents."""
    return shard_ranges(seq_len, size, "zigzag")


def zigzag_of_each_document(seq_len: int, size: int, cu_seqlens: tuple[int, ...]) -> tuple[Shard, ...]:
    """Every document over all ranks (Megatron, ring-flash-attn's varlen zigzag, without their padding)."""
    held: list[list[range]] = [[] for _ in range(size)]
    for start, stop in pairwise(cu_seqlens):
        for rank, shard in enumerate(shard_ranges(stop - start, size, "zigzag")):
            held[rank] += [range(start + part.start, start + part.stop) for part in shard]
    return tuple(join_ranges(parts) for parts in held)


def ours(seq_len: int, size: int, cu_seqlens: tuple[int, ...]) -> tuple[Shard, ...]:
    return shard_ranges(seq_len, size, "zigzag", cu_seqlens)


SHARDINGS: dict[str, Cut] = {
    "contiguous": contiguous,
    "zigzag of the row": zigzag_of_the_row,
    "zigzag of each document": zigzag_of_each_document,
    "fourfold": ours,
}
