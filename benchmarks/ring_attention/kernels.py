"""Which attention kernels a device gets, and what windows, documents, padding and soft caps keep of them.

    PYTHONPATH=src python -m benchmarks.ring_attention.kernels

It asks attention.backends.fast_path, which StreamBP and the ring ask too: nothing is measured, and no device is needed.
docs/ring.md has the table.
"""

import torch

from fourfold.parallel.attention.backends import fast_path
from fourfold.parallel.attention.kernels import Hardware

DEVICES = {
    "A100": Hardware("cuda", (8, 0)),
    "A100, flash-attn": Hardware("cuda", (8, 0), frozenset({"flash_attn"})),
    "H100, H200": Hardware("cuda", (9, 0)),
    "H100, flash-attn": Hardware("cuda", (9, 0), frozenset({"flash_attn"})),
    "H100, FlashAttention 3": Hardware("cuda", (9, 0), frozenset({"flash_attn_interface"})),
    "B200": Hardware("cuda", (10, 0)),
    "B200, FlashAttention 4": Hardware("cuda", (10, 0), frozenset({"flash_attn.cute"})),
    "CPU": Hardware("cpu"),
}
CASES = ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128))


def table() -> str:
    """The table as markdown."""
    lines = [
        "| device | dtype | head size | a block | small blocks, narrow windows | capped scores |",
        "|---|---|---|---|---|---|",
    ]
    for name, hardware in DEVICES.items():
        for dtype, size in CASES:
            plain, capped = (fast_path(hardware, dtype, size, soft_cap=cap) for cap in (False, True))
            words = (
                name,
                str(dtype).removeprefix("torch."),
                str(size),
                plain.kernel,
                plain.packed or "-",
                capped.kernel,
            )
            lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
