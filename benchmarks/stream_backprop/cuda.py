"""StreamBP on one CUDA device beside what people run: time, memory, and the longest sequence that fits.

    PYTHONPATH=src python -m benchmarks.stream_backprop.cuda                     # the tables; eight minutes, resumes
    PYTHONPATH=src python -m benchmarks.stream_backprop.cuda --print             # the tables of what was measured
    PYTHONPATH=src python -m benchmarks.stream_backprop.cuda --cases 8B:32768    # other shapes and lengths
    PYTHONPATH=src python -m benchmarks.stream_backprop.cuda --longest --shape 4B --minutes 120
    PYTHONPATH=src python -m benchmarks.stream_backprop.cuda --device cpu --cases tiny:256 --providers ours

Qwen3's shapes with random weights in bf16, batch 1, gradients allocated, no optimizer, as StreamBP's paper measures.
Each measurement is a fresh process: the allocator's peak above weights and gradients, and seconds of forward and
backward by the device's clock, the best of --steps after one that warms up. No measurement is begun after --minutes,
and one of the tables is ended a minute later; what is left is measured by the next call. Samples are appended to
cuda_samples.csv; those of the same device that are there are not taken again, but for errors other than out of memory,
which are not kept. --memory-gib caps what the process may allocate, so that a larger device answers for one of 80 GB.
On a CPU the script can be tried out; peaks are 0 there.

The longest sequence is bisected by running (--longest), which at a million tokens takes an hour a step; the table
also has the length at which a line through the peaks of the two greatest lengths meets the device's memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.arguments import amount, count, stored_rows, table_file
from benchmarks.rows import ORIGIN, append_row, measurement, origin, write_rows
from benchmarks.stream_backprop.shapes import SHAPES
from benchmarks.stream_backprop.step import Step, known, provider
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
FIELDS = (
    "shape", "memory_gib", "provider", "seq_len", "peak_gib", "step_s", "base_gib", "device_gib",
    "loss", "error", "device", *ORIGIN,
)  # fmt: skip
PROVIDERS = (
    "liger+checkpoint", "ours", "ours,keep,offload", "checkpoint+ce", "ours,offload", "checkpoint", "ours,groups=0",
    "ours,keep", "liger+checkpoint,offload",
)  # fmt: skip
# The one that people pick, which the others are compared with.
BASE = "liger+checkpoint"
# (shape, tokens) in the order of measuring.
CASES = (("4B", 8192), ("4B", 32768), ("4B, 2 layers", 131072))
OUT_OF_MEMORY = "OutOfMemoryError"
# After --minutes, until a measurement that still runs is ended.
GRACE_S = 60.0
Rows = Sequence[dict[str, Any]]


def build(shape: dict[str, Any], max_len: int, device: str) -> nn.Module:
    """A Qwen3 decoder in bf16 with random weights, and its gradients, on the device."""
    torch.manual_seed(0)
    config = Qwen3Config(**shape, max_position_embeddings=max_len, sliding_window=None, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def offloading(step: Step) -> Step:
    """The step with what autograd saves kept in pinned host memory: torch's own way, for checkpointing's inputs."""

    def run(ids: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return step(ids)

    return run


def one(name: str, seq_len: int, shape: str, steps: int, memory_gib: float, device: str) -> dict[str, Any]:
    """One measurement, in this process."""
    cuda = device == "cuda"
    if cuda and memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * 2**30 / total))
    model = build(SHAPES[shape], max(seq_len, 1024), device)
    kind, *options = name.split(",")
    step = provider(name, model)
    if "offload" in options and kind != "ours":
        step = offloading(step)
    ids = torch.randint(0, 1000, (1, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    before = torch.cuda.memory_allocated() if cuda else 0
    seconds, losses = [], []

    def work() -> None:
        loss = step(ids)
        loss.backward()
        losses.append(loss.item())

    for _ in range(steps + 1):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(timed(work, cuda))
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return {
        "peak_gib": peak / 2**30, "step_s": min(seconds[1:] or seconds), "base_gib": before / 2**30,
        "device_gib": device_gib(memory_gib) if cuda else 0.0, "loss": losses[-1],
    }  # fmt: skip


def device_name(kind: str) -> str:
    """The name of the device, asked in another process: this one would take memory there that a measurement lacks."""
    if kind != "cuda":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name(0))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def device_gib(memory_gib: float) -> float:
    """What the process may allocate."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return min(total, memory_gib) if memory_gib else total


def timed(work: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Samples:
    """cuda_samples.csv: measures what of this device is not in it."""

    def __init__(self, rows: Rows, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.end, self.left = time.monotonic() + 60 * arguments.minutes, 0
        self.device = device_name(arguments.device)
        self.rows = list(rows)

    def key(self, shape: str, name: str, seq_len: int) -> dict[str, str]:
        """What tells a sample from others."""
        memory = f"{self.arguments.memory_gib:g}"
        return {
            "device": self.device, "shape": shape, "memory_gib": memory, "provider": name, "seq_len": str(seq_len)
        }  # fmt: skip

    def take(self, shape: str, name: str, seq_len: int, steps: int) -> dict[str, Any] | None:
        """That sample, measured where it was not; `error` is "" where it ran. None: no time was left, or it failed."""
        key, given = self.key(shape, name, seq_len), self.arguments
        found = next((row for row in self.rows if key.items() <= row.items()), None)
        if found is not None:
            return found
        if time.monotonic() > self.end:
            self.left += 1
            return None
        command = [sys.executable, "-m", "benchmarks.stream_backprop.cuda", "--one", name, str(seq_len)]
        command += ["--shape", shape, "--steps", str(steps), "--memory-gib", str(given.memory_gib)]
        command += ["--device", given.device]
        environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        environment["PYTORCH_CUDA_ALLOC_CONF"] = environment["PYTORCH_ALLOC_CONF"]  # its name before torch 2.9
        rest = None if given.longest else self.end + GRACE_S - time.monotonic()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=rest
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{name} at {seq_len} tokens was ended: no minutes were left", flush=True)
            self.left += 1
            return None
        if done.returncode and OUT_OF_MEMORY not in done.stderr:
            print(
                name, seq_len, (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200], flush=True
            )
            return None
        result = {"error": OUT_OF_MEMORY} if done.returncode else json.loads(done.stdout.splitlines()[-1])
        row = {**dict.fromkeys(FIELDS, ""), **{field: str(value) for field, value in result.items()}, **key, **origin()}
        print(row, flush=True)
        append_row(given.samples, row, FIELDS)
        self.rows.append(row)
        return row

    def longest(self, name: str, resolution: int, most: int) -> int:
        """The longest length, a multiple of `resolution` up to `most`, that does not run out of memory; by bisection.

        Raises:
            RuntimeError: a step that fails for another reason, or no time left.
        """

        def fits(length: int) -> bool:
            sample = self.take(self.arguments.shape, name, length, steps=1)
            if sample is None:
                raise RuntimeError(f"{name} at {length} tokens was not measured: call again, or give more --minutes")
            return not sample["error"]

        low, high = 0, resolution
        while high <= most and fits(high):
            low, high = high, high * 2
        high = min(high, most + resolution)
        while high - low > resolution:
            middle = (low + high) // 2 // resolution * resolution
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def results(rows: Rows) -> list[dict[str, Any]]:
    """Rows for cuda_results.csv: of each shape and provider, peaks and times by length, and the longest that ran."""
    found = []
    ran = [row for row in rows if not row["error"]]

    def measured(row: dict[str, Any], metric: str, unit: str, case: str, value: str) -> dict[str, Any]:
        made = measurement(
            benchmark="stream_backprop_cuda", provider=row["provider"], metric=metric, unit=unit,
            case=f"shape={row['shape']} {case}memory_gib={row['memory_gib']}", samples=[float(value)],
            kind="cpu" if row["device"] == "cpu" else "gpu", device=row["device"],
        )  # fmt: skip
        return made | {name: row[name] for name in ORIGIN}  # of the measurement, not of this printing

    for row in ran:
        for metric, unit in (("peak_gib", "GiB"), ("step_s", "s")):
            found.append(measured(row, metric, unit, f"seq_len={row['seq_len']} ", row[metric]))
    series = ("device", "shape", "memory_gib", "provider")
    limits = {tuple(row[name] for name in series): row for row in rows if row["error"] == OUT_OF_MEMORY}
    # Without one that failed, the longest that ran is no limit.
    for key, failed in sorted(limits.items()):
        same = [row for row in ran if tuple(row[name] for name in series) == key]
        longest = max(same, key=lambda row: int(row["seq_len"]), default={**failed, "seq_len": "0"})
        found.append(measured(longest, "longest", "tokens", "", longest["seq_len"]))
    return found


def tables(rows: Rows) -> str:
    """Of each device, shape and length, time and memory of every provider and their ratios to BASE, as markdown."""
    lines = []
    case = ("device", "memory_gib", "shape", "seq_len")
    for key in dict.fromkeys(tuple(row[name] for name in case) for row in rows):
        here = [row for row in rows if tuple(row[name] for name in case) == key]
        base = next((row for row in here if row["provider"] == BASE and not row["error"]), None)
        cap = f", {key[1]} GiB of it" if float(key[1]) else ""
        lines += [f"\n{key[2]}, T {key[3]}, {key[0]}{cap}\n"]
        lines += [
            "| provider | s | GiB | time of it | memory of it | longest by its line |",
            "|---|---|---|---|---|---|",
        ]
        for row in here:
            if row["error"]:
                lines.append(f"| {row['provider']} | {row['error']} | | | | |")
                continue
            ratios = [f"{float(row[name]) / float(base[name]):.2f}" if base and float(base[name]) else "" for name in
                      ("step_s", "peak_gib")]  # fmt: skip
            seconds, gib = float(row["step_s"]), float(row["peak_gib"])
            end = longest_by_line(rows, row)
            lines.append(f"| {row['provider']} | {seconds:.3f} | {gib:.2f} | {ratios[0]} | {ratios[1]} | {end or ''} |")
    return "\n".join(lines)


def longest_by_line(rows: Rows, like: dict[str, Any]) -> int | None:
    """Tokens at which a line through the peaks of the two greatest lengths meets the device's memory; None without.

    Args:
        like: a sample, whose device, memory, shape and provider are meant.
    """
    series = {name: like[name] for name in ("device", "memory_gib", "shape", "provider")}
    ran = [row for row in rows if series.items() <= row.items() and not row["error"]]
    ran = sorted(ran, key=lambda row: int(row["seq_len"]))[-2:]
    if len(ran) < 2 or not float(ran[-1]["peak_gib"]):
        return None
    (first, low), (last, high) = ((int(row["seq_len"]), float(row["peak_gib"])) for row in ran)
    slope = (high - low) / (last - first)
    room = float(ran[-1]["device_gib"]) - float(ran[-1]["base_gib"])
    return int(last + (room - high) / slope) if slope > 0 else None


def case(text: str) -> tuple[str, int]:
    """A shape and a length, as 4B:8192."""
    shape, _, length = text.rpartition(":")
    if shape not in SHAPES or not length.isdigit() or not int(length):
        raise argparse.ArgumentTypeError(f"{text!r}: give SHAPE:TOKENS, a shape of {', '.join(SHAPES)}")
    return shape, int(length)


def provider_name(text: str) -> str:
    try:
        return known(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    usage = "python -m benchmarks.stream_backprop.cuda [options]; --help lists them"
    parser = argparse.ArgumentParser(
        description=__doc__, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", type=case, default=list(CASES), metavar="SHAPE:TOKENS")
    parser.add_argument("--providers", nargs="+", type=provider_name, default=list(PROVIDERS))
    parser.add_argument("--minutes", type=amount, default=7.0, help="after which no measurement is begun")
    parser.add_argument("--longest", action="store_true", help="bisect for the longest sequence of --shape")
    parser.add_argument("--shape", default="4B", choices=SHAPES)
    parser.add_argument("--resolution", type=count, default=1024, help="tokens, of the bisection")
    parser.add_argument("--most", type=count, default=1 << 20, help="tokens, where the bisection stops")
    parser.add_argument("--memory-gib", type=amount, default=0.0, help="cap of the device's memory, 0 is all of it")
    parser.add_argument("--steps", type=count, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--samples", type=table_file, default=HERE / "cuda_samples.csv")
    parser.add_argument("--out", type=table_file, default=HERE / "cuda_results.csv")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--one", nargs=2, metavar=("PROVIDER", "LENGTH"), help="one measurement, in this process")
    given = parser.parse_args()
    if given.one:
        print(
            json.dumps(one(given.one[0], int(given.one[1]), given.shape, given.steps, given.memory_gib, given.device))
        )
        return
    if given.device == "cuda" and not given.print and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu tries the script out")
    stored = stored_rows(parser, given.samples, FIELDS)
    if given.print:
        print(tables(stored) if stored else f"{given.samples} has no rows: nothing was measured yet")
        return
    samples = Samples(stored, given)
    if given.longest:
        for name in given.providers:
            try:
                found = samples.longest(name, given.resolution, given.most)
                print(f"{name}, {given.shape}: {found} tokens", flush=True)
            except RuntimeError as error:
                print(error, flush=True)
    else:
        for shape, length in given.cases:
            for name in given.providers:
                samples.take(shape, name, length, given.steps)
    print(tables(samples.rows))
    if samples.left:
        print(f"\n{samples.left} measurements are left: call again")
    if given.device == "cuda" and samples.rows:
        write_rows(given.out, results(samples.rows))


if __name__ == "__main__":
    main()
