"""A cluster.toml as a profile writes it, small: every table with one or two rows."""

from typing import Any


def measured_cluster(num_devices: int = 2) -> dict[str, Any]:
    """Its tables; with one device there is no link."""
    shape = {"dtype": "float32", "micro_batch": 1, "seq_len": 64}
    seconds = {"forward_s": 1e-3, "backward_s": 2e-3}
    link = {
        "name": "loopback", "num_ranks": num_devices,
        "operation": [{"operation": "send", "group_size": 2, "latency_s": 1e-5, "bandwidth_bytes_per_s": 1e9}],
    }  # fmt: skip
    return {
        "schema": 1, "name": f"{num_devices} x test", "provenance": "made up", "num_devices": num_devices,
        "devices_per_node": num_devices, "link": [link] if num_devices > 1 else [],
        "device": {
            "name": "test", "type": "cpu", "dtype": "float32", "memory_bytes": 8 << 30, "peak_flops_per_s": 1e11,
            "memory_bandwidth_bytes_per_s": 1e10, "operator_overhead_s": 1e-6,
        },
        "matmul": [
            {"dtype": "float32", "m": size, "n": size, "k": size, "seconds": size**3 / 4e10} for size in (64, 512)
        ],
        "attention": [
            {"dtype": "float32", "batch": 1, "heads": 4, "kv_heads": 4, "seq_len": 64, "head_dim": 64, "causal": True,
             "forward_s": 1e-4, "backward_s": 3e-4},
        ],
        "elementwise": [{"dtype": "float32", "bytes": 1 << 20, "seconds": 2e-4}],
        "layer": [{**shape, "tp": 1, **seconds, "activation_bytes": 1 << 20}],
        "ends": [
            {**shape, "tp": 1, "embedding_forward_s": 1e-4, "embedding_backward_s": 1e-4, "head_forward_s": 1e-4,
             "head_backward_s": 2e-4},
        ],
        "tp_layer": [{**shape, "tp": 2, **seconds}],
        "cp_layer": [{**shape, "cp": 2, **seconds}],
        "optimizer": [{"parameters": 1 << 20, "fused": True, "step_s": 1e-3, "clip_s": 1e-4}],
    }  # fmt: skip
