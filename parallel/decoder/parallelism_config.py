"""Accelerate's ParallelismConfig as arguments of `parallelize`, for a training that moves from one to the other.

Both arrange ranks in the same order, replicas first and tp fastest, so that a rank has the same peers in both.
"""

from typing import Any

from fourfold.parallel.mesh import init_mesh


def from_parallelism_config(config: Any, *, device_type: str | None = None) -> dict[str, Any]:
    """`parallelize(model, **from_parallelism_config(config))`; every rank calls.

    Args:
        config: an accelerate.ParallelismConfig. dp_shard_size shards weights, gradients and optimizer states over so
            many ranks (zero_stage=3), dp_replicate_size keeps them whole, cp_size is a ring and tp_size cuts matrices.
            Its handlers and backends are Accelerate's own and not read: the ring moves keys and values itself.
        device_type: as init_mesh takes it.
    Returns:
        `mesh` and `zero_stage`.
    Raises:
        ValueError: shards within replicas (both dp sizes above 1), heads exchanged for the sequence (sp_size above 1),
            or sizes whose product is not the number of ranks.
    Cost: as init_mesh's.
    """
    names = ("dp_replicate_size", "dp_shard_size", "cp_size", "sp_size", "tp_size")
    replicas, shards, cp, sp, tp = (int(getattr(config, name)) for name in names)
    if replicas > 1 and shards > 1:
        raise ValueError(
            f"dp_replicate_size={replicas} with dp_shard_size={shards}: weights are sharded over all replicas or over "
            f"none here; use dp_shard_size={replicas * shards} and dp_replicate_size=1"
        )
    if sp > 1:
        raise ValueError(
            f"sp_size={sp}: parallelize cuts a sequence around a ring alone; use cp_size={sp}, or "
            f"use_ring_attention(model, group, heads_degree={sp}) in a loop of your own"
        )
    # FSDP2 in Accelerate shards over cp, too, as parallelize does.
    mesh = init_mesh(dp=replicas * shards, cp=cp, tp=tp, device_type=device_type)
    return {"mesh": mesh, "zero_stage": 3 if shards > 1 else 0}
