"""Memory and CPU time of one training step over a long sequence, by provider, each in a fresh process.

    PYTHONPATH=src python -m benchmarks.stream_backprop.run                            # all: takes hours, resumes
    PYTHONPATH=src python -m benchmarks.stream_backprop.run --lengths 8192 --providers checkpoint ours --repeats 1
    PYTHONPATH=src python -m benchmarks.stream_backprop.run --print                    # the tables of what was measured
    PYTHONPATH=src python -m benchmarks.stream_backprop.run --longest-in-gib 8 --shape 0.5B --providers plain ours

Rounds over the providers are interleaved, so that a busy machine is busy for all. Every measurement is appended to
samples.csv at once, and one that is there is not taken again; results.csv is made of it. A provider that fails leaves
its error there too.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from benchmarks.rows import append_row, commit, measurement, write_rows
from benchmarks.stream_backprop.shapes import SHAPES

from fourfold.parallel.stream.memory import stream_memory

HERE = Path(__file__).parent
FIELDS = ("shape", "allocator", "seq_len", "provider", "round", "peak_mib", "cpu_s", "loss", "error", "commit")
PROVIDERS = ("plain", "checkpoint", "checkpoint+ce", "checkpoint+ce+mlp", "ours", "ours,keep")
PEERS = ("liger", "liger+checkpoint", "streambp,chunk=512")
FRONTIER = (
    "ours,chunk=256,mlp=128", "ours,chunk=512,mlp=128", "ours,chunk=1024,mlp=256", "ours,chunk=2048,mlp=512",
    "ours,chunk=1024,mlp=256,keep",
)  # fmt: skip
# glibc as it is, and with a fixed size from which freed tensors go back to the system at once: the peak is then closer
# to what is alive. The second is kinder to checkpointing's memory, and charges every large tensor its page faults.
ALLOCATORS = {"default": {}, "mmap8": {"MALLOC_MMAP_THRESHOLD_": str(8 << 20)}}
Sample = dict[str, Any]


def step(provider: str, seq_len: int, shape: str, allocator: str, python: str, limit_mib: int = 0) -> dict[str, Any]:
    """One measurement, or {"error": its last line} where the process failed."""
    command = [python, "-m", "benchmarks.stream_backprop.step", provider, str(seq_len), "--shape", shape]
    command += ["--limit-mib", str(limit_mib)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ALLOCATORS[allocator]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"signal {-done.returncode}"]
        return {"error": lines[-1][:200]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(arguments: argparse.Namespace) -> None:
    """Take and append what samples.csv does not have yet."""
    path: Path = arguments.samples
    have = {(s["shape"], s["allocator"], s["seq_len"], s["provider"], s["round"]) for s in read(path)}
    for number in range(arguments.repeats):
        for length in arguments.lengths:
            for provider in arguments.providers:
                key = (arguments.shape, arguments.allocator, str(length), provider, str(number))
                if key in have:
                    continue
                python = arguments.peer_python if provider.split(",")[0].split("+")[0] in PEER_KINDS else sys.executable
                result = step(provider, length, arguments.shape, arguments.allocator, python)
                row = {**dict(zip(FIELDS[:5], key, strict=True)), **result, "commit": commit()}
                append_row(path, row, FIELDS)
                print(*key, result, flush=True)


PEER_KINDS = ("liger", "streambp")


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


Case = tuple[str, str, int, str]


def grouped(samples: list[dict[str, str]]) -> dict[Case, list[dict[str, str]]]:
    """Samples that measured something, by (shape, allocator, length, provider)."""
    groups: dict[Case, list[dict[str, str]]] = {}
    for sample in samples:
        if not sample["error"]:
            key = (sample["shape"], sample["allocator"], int(sample["seq_len"]), sample["provider"])
            groups.setdefault(key, []).append(sample)
    return groups


def results(samples: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Rows of results.csv."""
    found = []
    for (shape, allocator, length, provider), group in grouped(samples).items():
        for metric, unit in (("peak_mib", "MiB"), ("cpu_s", "s")):
            found.append(measurement(
                benchmark="stream_backprop", provider=provider, metric=metric, unit=unit, kind="cpu",
                case=f"shape={shape} seq_len={length} malloc={allocator}",
                samples=[float(sample[metric]) for sample in group],
            ) | {"commit": group[-1]["commit"]})  # fmt: skip
    for shape, length in sorted({(shape, length) for shape, _, length, _ in grouped(samples)}):
        found.append(measurement(
            benchmark="stream_backprop", provider="stream_memory", case=f"shape={shape} seq_len={length}",
            metric="peak_mib", unit="MiB", samples=[predicted(shape, length)], kind="modelled",
        ))  # fmt: skip
    return found


def predicted(shape: str, length: int) -> float:
    """stream_memory's peak of `ours`, MiB."""
    return stream_memory(SHAPES[shape], length).total_bytes / 2**20


def tables(samples: list[dict[str, str]]) -> str:
    """Memory and time against checkpointing, the slope in the length, and the errors, as markdown."""
    groups = grouped(samples)
    lines = []
    for shape, allocator in sorted({key[:2] for key in groups}):
        lines += [f"\nshape {shape}, glibc {allocator}\n"]
        lines += ["| T | provider | peak MiB | CPU s | rounds | memory: checkpointing / this | time: this / it |"]
        lines += ["|---|---|---|---|---|---|---|"]
        here = {key[2:]: group for key, group in groups.items() if key[:2] == (shape, allocator)}
        for length, provider in sorted(here, key=lambda key: (key[0], -middle(here[key], "peak_mib"))):
            group, base = here[length, provider], here.get((length, "checkpoint"))
            peak, spent = middle(group, "peak_mib"), middle(group, "cpu_s")
            ratios = "| |"
            if base:
                ratios = f"{middle(base, 'peak_mib') / peak:.1f} | {time_ratio(group, base)} |"
            lines.append(f"| {length} | {provider} | {peak:.0f} | {spent:.1f} | {len(group)} | {ratios}")
        lines += slopes(shape, here)
    failed = {(s["provider"], s["error"]) for s in samples if s["error"]}
    return "\n".join([*lines, *(f"\n{provider}: {error}" for provider, error in sorted(failed))])


def time_ratio(group: list[dict[str, str]], base: list[dict[str, str]]) -> str:
    """The median over rounds of the ratio within a round."""
    by_round = {sample["round"]: float(sample["cpu_s"]) for sample in base}
    ratios = [float(s["cpu_s"]) / by_round[s["round"]] for s in group if s["round"] in by_round]
    return f"{median(ratios):.2f}" if ratios else ""


def slopes(shape: str, here: dict[tuple[int, str], list[dict[str, str]]]) -> list[str]:
    """Bytes a token of the providers whose chunks are fixed, by least squares over the lengths, and stream_memory's."""
    lines = []
    for provider in dict.fromkeys(name for _, name in here if name.startswith("ours,chunk=") and "keep" not in name):
        lengths = sorted(length for length, name in here if name == provider)
        if len(lengths) < 3:
            continue
        peaks = [middle(here[length, provider], "peak_mib") * 2**20 for length in lengths]
        seen, said = linear_regression(lengths, peaks).slope, stream_memory(SHAPES[shape], lengths[-1]).bytes_a_token
        lines.append(
            f"\n{provider}, T {lengths[0]} to {lengths[-1]}: {seen:.0f} bytes a token, stream_memory {said:.0f} "
            f"({seen / said:.3f})"
        )
    return lines


def middle(group: list[dict[str, str]], metric: str) -> float:
    return median(float(sample[metric]) for sample in group)


def longest(provider: str, shape: str, limit_mib: int, resolution: int, most: int) -> int:
    """The longest sequence, to `resolution` tokens, whose step ends within `limit_mib` of data memory.

    Lengths grow by doubling until one fails, then the gap is halved; a length that fits is never doubted again.
    """
    fits, over = 0, resolution
    while over <= most and _fits(provider, over, shape, limit_mib):
        fits, over = over, over * 2
    while over - fits > resolution and fits < most:
        middle_length = (fits + over) // 2 // resolution * resolution
        if _fits(provider, middle_length, shape, limit_mib):
            fits = middle_length
        else:
            over = middle_length
    return fits


def _fits(provider: str, length: int, shape: str, limit_mib: int) -> bool:
    result = step(provider, length, shape, "mmap8", sys.executable, limit_mib)
    out_of_memory = any(word in result.get("error", "") for word in ("memory", "Memory", "alloc", "signal"))
    if "error" in result and not out_of_memory:
        raise RuntimeError(f"{provider} at {length} failed, and not for memory: {result['error']}")
    print(f"  {provider} {length}: {result}", flush=True)
    return "error" not in result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", nargs="+", default=[*PROVIDERS, *FRONTIER])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--shape", default="page", choices=SHAPES)
    parser.add_argument("--allocator", default="default", choices=ALLOCATORS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help=f"for {', '.join(PEERS)}: see the README")
    parser.add_argument("--samples", type=Path, default=HERE / "samples.csv")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--longest-in-gib", type=float, help="bisect for the longest sequence in so much memory")
    parser.add_argument("--resolution", type=int, default=256, help="tokens, of the bisection")
    parser.add_argument("--most", type=int, default=1 << 16, help="tokens, where the bisection stops")
    arguments = parser.parse_args()
    if arguments.longest_in_gib:
        for provider in arguments.providers:
            limit = int(arguments.longest_in_gib * 1024)
            found = longest(provider, arguments.shape, limit, arguments.resolution, arguments.most)
            print(f"{provider}, {arguments.shape}, {arguments.longest_in_gib} GiB: {found} tokens", flush=True)
        return
    if not arguments.print:
        measure(arguments)
    samples = read(arguments.samples)
    write_rows(arguments.out, results(samples))
    print(tables(samples))


if __name__ == "__main__":
    main()
