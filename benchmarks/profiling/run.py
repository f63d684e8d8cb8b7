"""Are the profile's parts the step, and is the memory dry run the memory? See step_time.py and memory_peak.py.

PYTHONPATH=src python -m benchmarks.profiling.run
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.profiling.step_time import config_of
from benchmarks.rows import measurement, write_rows

from fourfold.profiling.memory import TracedStep, step_memory

STEPS = [(256, 4, 256), (256, 6, 512), (256, 8, 1024)]
MEMORY = [("none", "float32", 1), ("none", "float32", 2), ("none", "bfloat16", 1), ("full", "float32", 1),
          ("full", "bfloat16", 1)]  # fmt: skip
# glibc raises its threshold for returning memory as a process frees large blocks; setting it, here to its start
# value, stops that.
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "mmap_128KiB": {"MALLOC_MMAP_THRESHOLD_": "131072"}}
HERE = Path(__file__).parent


def step_rows(clock: str, seconds: float) -> list[dict[str, Any]]:
    """Predicted over measured seconds of a step."""
    rows = []
    for hidden, layers, seq_len in STEPS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "answer.json"
            ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            options = {"out": out, "seconds": seconds, "clock": clock}
            options |= {"hidden": hidden, "layers": layers, "seq-len": seq_len}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            subprocess.run(
                [*ranks, "-m", "benchmarks.profiling.step_time", *words], check=True, env=environment, timeout=900
            )
            answers = json.loads(out.read_text())
        for answer in answers:
            case = f"hidden={hidden} layers={layers} seq_len={seq_len} {answer['axis']}=2 clock={clock}"
            shared: dict[str, Any] = {"benchmark": "profiling", "case": case, "kind": "cpu", "world_size": 2}
            rows.append(
                measurement(provider="torch", metric="step", unit="s", samples=answer["measured_rounds_s"], **shared)
            )
            for name in ("parts", "curves"):
                ratio = answer[f"{name}_s"] / answer["measured_s"]
                rows.append(
                    measurement(
                        provider=f"fourfold {name}", metric="predicted / measured step", unit="ratio",
                        samples=[ratio], **shared,
                    )
                )  # fmt: skip
                print(f"{case}: {name} {ratio:.3f} of {answer['measured_s']:.3f} s", flush=True)
    return rows


def memory_rows(repeats: int) -> list[dict[str, Any]]:
    """Bytes by the dry run over resident bytes of a real step, and the CPU time of that step."""
    config = {**config_of(512, 4, 512), "vocab_size": 8192}
    rows = []
    for checkpointing, dtype, count in MEMORY:
        sizes = {"micro_batch": 2, "seq_len": 512, "num_micro_batches": count, "checkpointing": checkpointing}
        step = TracedStep(**sizes, dtype=getattr(torch, dtype))  # type: ignore[arg-type]
        traced = step_memory(config, step).peak_bytes
        words = ["--config", json.dumps(config), "--dtype", dtype]
        words += [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "benchmarks.profiling.memory_peak", *words]
        real: dict[str, list[dict[str, float]]] = {name: [] for name in ALLOCATORS}
        for _ in range(repeats):
            for name, variables in ALLOCATORS.items():
                environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
                answer = subprocess.run(command, check=True, capture_output=True, env=environment, timeout=900)
                real[name].append(json.loads(answer.stdout))
        for name, answers in real.items():
            case = " ".join(f"{key}={value}" for key, value in {**sizes, "dtype": dtype, "malloc": name}.items())
            shared: dict[str, Any] = {"benchmark": "profiling", "case": case, "kind": "cpu"}
            peaks = [answer["peak_bytes"] for answer in answers]
            times = [answer["cpu_s"] for answer in answers]
            ratios = [traced / peak for peak in peaks]
            rows += [
                measurement(provider="torch", metric="resident peak", unit="bytes", samples=peaks, **shared),
                measurement(provider="torch", metric="CPU time of the step", unit="s", samples=times, **shared),
                measurement(
                    provider="fourfold dry run", metric="traced / resident peak", unit="ratio", samples=ratios, **shared
                ),
            ]
            print(f"{case}: traced {traced / 2**20:.0f} MiB, {rows[-1]['median']} of resident", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="budget of each step comparison")
    parser.add_argument("--repeats", type=int, default=2, help="fresh processes for each peak")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="wall only where nobody else computes")
    options = parser.parse_args()
    rows = step_rows(options.clock, options.seconds) + memory_rows(options.repeats)
    write_rows(HERE / "results.csv", rows)


if __name__ == "__main__":
    main()
