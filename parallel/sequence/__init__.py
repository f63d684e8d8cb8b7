"""Which tokens of a sequence each context-parallel rank holds, and tensors cut that way."""

from typing import TYPE_CHECKING

from fourfold.parallel.lazy import exported

if TYPE_CHECKING:
    from fourfold.parallel.sequence.sharding import attended_pairs as attended_pairs
    from fourfold.parallel.sequence.tensors import shard_labels as shard_labels
    from fourfold.parallel.sequence.tensors import shard_positions as shard_positions
    from fourfold.parallel.sequence.tensors import shard_sequence as shard_sequence
    from fourfold.parallel.sequence.tensors import unshard_sequence as unshard_sequence

__getattr__, __dir__, __all__ = exported(
    __name__,
    {
        "attended_pairs": "sharding",
        "shard_labels": "tensors",
        "shard_positions": "tensors",
        "shard_sequence": "tensors",
        "unshard_sequence": "tensors",
    },
)
