"""Sequence parallelism with ring self-attention (Li et al. 2021)."""

from typing import TYPE_CHECKING

from fourfold.parallel.lazy import exported

if TYPE_CHECKING:
    from fourfold.parallel.ring.attention import ring_attention as ring_attention
    from fourfold.parallel.ring.batch import shard_batch as shard_batch
    from fourfold.parallel.ring.linformer import linformer_attention as linformer_attention
    from fourfold.parallel.ring.transformers import stop_ring_attention as stop_ring_attention
    from fourfold.parallel.ring.transformers import use_ring_attention as use_ring_attention
    from fourfold.parallel.ring.two_pass import two_pass_ring_attention as two_pass_ring_attention

__getattr__, __dir__, __all__ = exported(
    __name__,
    {
        "linformer_attention": "linformer",
        "ring_attention": "attention",
        "shard_batch": "batch",
        "stop_ring_attention": "transformers",
        "two_pass_ring_attention": "two_pass",
        "use_ring_attention": "transformers",
    },
)
