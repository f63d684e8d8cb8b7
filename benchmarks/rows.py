"""The one row format of every benchmark: one measurement a row, with what is needed to judge it; and a printer of rows.

python -m benchmarks.rows stream_backprop seq_len=8192 peak_mib     # the committed rows that have all these words
"""

import argparse
import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

# What a measurement was taken with.
ORIGIN = ("torch", "python", "commit")
FIELDS = (
    "benchmark", "provider", "case", "metric", "unit", "median", "low", "high", "repeats", "kind",
    "world_size", "seed", "device", *ORIGIN,
)  # fmt: skip


def measurement(
    *,
    benchmark: str,
    provider: str,
    case: str,
    metric: str,
    unit: str,
    samples: Sequence[float],
    kind: str,
    world_size: int = 1,
    seed: int = 0,
    device: str = "",
) -> dict[str, Any]:
    """One row: the median of `samples` and their extremes.

    Args:
        provider: who was measured ("fourfold", "torch", a peer's name and version).
        case: the configuration, as `key=value` words.
        kind: "cpu" or "gpu" for a measurement there, "modelled" for a figure from formulas.
        device: the device's name; this machine's processor when empty.
    """
    if kind not in ("cpu", "gpu", "modelled"):
        raise ValueError(f"kind={kind!r}: a row is measured on 'cpu' or 'gpu', or 'modelled'")
    return {
        "benchmark": benchmark, "provider": provider, "case": case, "metric": metric, "unit": unit,
        "median": f"{median(samples):.6g}", "low": f"{min(samples):.6g}", "high": f"{max(samples):.6g}",
        "repeats": len(samples), "kind": kind, "world_size": world_size, "seed": seed,
        "device": device or processor(), **origin(),
    }  # fmt: skip


def origin() -> dict[str, str]:
    """The columns ORIGIN of what is measured now."""
    return {"torch": version("torch"), "python": platform.python_version(), "commit": commit()}


def append_row(path: Path, row: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Add a row to a table of these columns, whose header is written first where there is no file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace `path` by `rows`."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def processor() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of this tree, with a '+' where files differ from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def matching(benchmark: str, words: Sequence[str]) -> list[dict[str, str]]:
    """The rows of benchmarks/BENCHMARK/results.csv whose provider, case and metric contain every one of `words`."""
    with (Path(__file__).parent / benchmark / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(word in f"{row['provider']} {row['case']} {row['metric']}" for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print committed measurements: median, (low-high, repeats).")
    parser.add_argument("benchmark", help="a folder beside this file")
    parser.add_argument("words", nargs="*", help="of provider, case and metric; a row is printed if it has all")
    given = parser.parse_args()
    for row in matching(given.benchmark, given.words):
        spread = f"({row['low']}-{row['high']}, {row['repeats']} repeats)"
        unit = "" if row["unit"] == "1" else row["unit"]
        print(f"{row['provider']:24} {row['case']}  {row['metric']}  {row['median']} {unit} {spread}  {row['device']}")


if __name__ == "__main__":
    main()
