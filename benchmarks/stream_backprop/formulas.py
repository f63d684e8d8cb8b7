"""What the closed forms say of Qwen3's shapes on one GPU: memory by length, and the longest sequence; nothing runs.

PYTHONPATH=src python -m benchmarks.stream_backprop.formulas
"""

from typing import Any

from benchmarks.stream_backprop.shapes import SHAPES

from fourfold.parallel.stream.memory import max_seq_len, stream_memory

DEVICE_BYTES, STATE_BYTES = 79e9, 4.0  # of a GPU of 80 GB; weights and gradients in bf16
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "offload": {"offload": True},
    "keep, offload": {"offload": True, "keep_attention": True},
}


def main() -> None:
    on_gpu: dict[str, Any] = {"itemsize": 2, "device_type": "cuda"}
    print(f"4B, GiB above weights and gradients\n\n| T | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for seq_len in (8192, 32768, 131072):
        held = [stream_memory(SHAPES["4B"], seq_len, **on_gpu, **way).total_bytes / 2**30 for way in WAYS.values()]
        print(f"| {seq_len} | {' | '.join(f'{gib:.1f}' for gib in held)} |")
    print(f"\nLongest sequence in {DEVICE_BYTES:.0f} bytes, and KB a token of pinned host memory\n")
    for shape in ("4B", "8B"):
        for name, way in WAYS.items():
            longest = max_seq_len(SHAPES[shape], DEVICE_BYTES, state_bytes_a_parameter=STATE_BYTES, **on_gpu, **way)
            pinned = stream_memory(SHAPES[shape], longest, free_bytes=0, **on_gpu, **way).host_bytes / longest / 1e3
            print(f"{shape}, {name}: {longest} tokens, {pinned:.0f} KB")


if __name__ == "__main__":
    main()
