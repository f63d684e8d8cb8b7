"""Memory and CPU time of one training step over a long sequence, by provider, each in a fresh process.

    PYTHONPATH=src python -m benchmarks.stream_backprop.run --lengths 2048 4096 8192 16384
    PYTHONPATH=src python -m benchmarks.stream_backprop.run --longest-in-gib 8 --shape 0.5B

Rounds over the providers are interleaved, so that a busy machine is busy for all. Rows go to results.csv as they come.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import measurement, write_rows
from benchmarks.stream_backprop.shapes import SHAPES

from fourfold.parallel.stream_peak import stream_memory

HERE = Path(__file__).parent
PROVIDERS = ("plain", "checkpoint", "checkpoint+ce", "checkpoint+ce+mlp", "ours", "ours,keep")
FRONTIER = ("ours,chunk=256", "ours,chunk=1024,mlp=512", "ours,chunk=2048,mlp=512")
# glibc gives tensors of this size and more back to the system when they are freed, instead of keeping holes: the peak
# is then of what is alive. The same for every provider.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "OMP_NUM_THREADS": "1"}


def step(provider: str, seq_len: int, shape: str, limit_mib: int = 0) -> dict[str, float] | None:
    """One measurement, or None where the process failed, which under a limit is what running out looks like."""
    command = [sys.executable, "-m", "benchmarks.stream_backprop.step", provider, str(seq_len), "--shape", shape]
    command += ["--limit-mib", str(limit_mib)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    if done.returncode:
        if not limit_mib:
            print(done.stderr[-2000:], file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(providers: list[str], lengths: list[int], shape: str, repeats: int, path: Path) -> None:
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    for length in lengths:
        for _ in range(repeats):
            for provider in providers:
                result = step(provider, length, shape)
                if result is not None:
                    samples.setdefault((provider, length), []).append(result)
                    write_rows(path, rows(samples, shape))
                print(provider, length, result, flush=True)
    print(markdown(samples))


def rows(samples: dict[tuple[str, int], list[dict[str, float]]], shape: str) -> list[dict[str, Any]]:
    found = []
    for (provider, length), results in samples.items():
        for metric, unit in (("peak_mib", "MiB"), ("cpu_s", "s")):
            found.append(measurement(
                benchmark="stream_backprop", provider=provider, case=f"shape={shape} seq_len={length}", metric=metric,
                unit=unit, samples=[result[metric] for result in results], kind="cpu",
            ))  # fmt: skip
    for length in sorted({length for _, length in samples}):
        predicted = stream_memory(SHAPES[shape], length).total_bytes / 2**20
        found.append(measurement(
            benchmark="stream_backprop", provider="stream_memory", case=f"shape={shape} seq_len={length}",
            metric="peak_mib", unit="MiB", samples=[predicted], kind="modelled",
        ))  # fmt: skip
    return found


def markdown(samples: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    lines = ["| T | provider | peak MiB | CPU s | memory: checkpointing / this | time: this / checkpointing |"]
    lines.append("|---|---|---|---|---|---|")
    for (provider, length), results in samples.items():
        peak, spent = (sorted(r[name] for r in results)[len(results) // 2] for name in ("peak_mib", "cpu_s"))
        base = samples.get(("checkpoint", length))
        ratios = "| | |"
        if base:
            base_peak, base_spent = (sorted(r[name] for r in base)[len(base) // 2] for name in ("peak_mib", "cpu_s"))
            ratios = f"| {base_peak / peak:.1f} | {spent / base_spent:.2f} |"
        lines.append(f"| {length} | {provider} | {peak:.0f} | {spent:.1f} {ratios}")
    return "\n".join(lines)


def longest(provider: str, shape: str, limit_mib: int, resolution: int = 256, most: int = 1 << 17) -> int:
    """The longest sequence, to `resolution` tokens, whose step ends within `limit_mib` of data memory."""
    fits, over = 0, resolution
    while over <= most and step(provider, over, shape, limit_mib) is not None:
        fits, over = over, over * 2
    while over - fits > resolution:
        middle = (fits + over) // 2 // resolution * resolution
        if step(provider, middle, shape, limit_mib) is not None:
            fits = middle
        else:
            over = middle
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", nargs="+", default=[*PROVIDERS, *FRONTIER])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--shape", default="page", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--longest-in-gib", type=float, help="bisect for the longest sequence in so much memory instead"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    arguments = parser.parse_args()
    if arguments.longest_in_gib:
        for provider in arguments.providers:
            found = longest(provider, arguments.shape, int(arguments.longest_in_gib * 1024))
            print(provider, arguments.shape, f"{arguments.longest_in_gib} GiB:", found, "tokens", flush=True)
        return
    table(arguments.providers, arguments.lengths, arguments.shape, arguments.repeats, arguments.out)


if __name__ == "__main__":
    main()
