"""The planner against this machine: every runnable layout of its ranks, what was said and what was measured.

    PYTHONPATH=src python -m benchmarks.layout_search.machine --every 3
    PYTHONPATH=src python -m benchmarks.layout_search.machine --cluster run/cluster.toml --space stream

The machine is profiled first (or --cluster gives what `layout-advisor profile` wrote), then layouts run some steps
each, in an order that mixes fast and slow ones. Rows are added to machine.csv as they come, and those that are there
are not taken again. Step times are wall times of the slowest rank: leave the machine alone meanwhile.
"""

import argparse
import csv
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median

from benchmarks.rows import commit

from fourfold.launch.commands.launch import run_layout
from fourfold.launch.commands.profile import profile_machine
from fourfold.launch.runs import read_result, typical_step_s
from fourfold.layouts.cost.price import PricedLayout, price
from fourfold.layouts.evidence.validation import spearman
from fourfold.layouts.inputs.cluster import Cluster, load_cluster
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.profiling.settings import ProfileSettings

HERE = Path(__file__).parent
STEPS = 12
FIELDS = (
    "kind", "layout", "said_s", "measured_s", "time_error", "said_mib", "measured_mib", "memory_error", "machine",
    "commit",
)  # fmt: skip
Row = dict[str, str]


def profiled(out: Path, config: Path, seq_len: int, seconds: float) -> Cluster:
    settings = ProfileSettings(out=out, seconds=seconds, model=config, seq_len=seq_len)
    profile_machine(settings, num_ranks=2)
    return load_cluster(out)


def layouts(model: ModelConfig, machine: Cluster, global_batch: int, seq_len: int, every: int) -> list[PricedLayout]:
    """Of the layouts that drain every `every`-th by price, the cheapest first; of the others likewise, and streamed."""
    batch = {"global_batch": global_batch, "seq_len": seq_len}
    found = rank_layouts(model, machine, SearchRequest(num_devices=machine.num_devices, asynchronous=True, **batch))
    chosen = []
    for late in (False, True):
        chosen += [priced for priced in found.layouts if priced.layout.asynchronous == late][::every]
    streamed = [
        Layout(
            **{axis: 2},
            checkpointing="stream",
            stream_chunks=4,
            micro_batch=2,
            global_batch=global_batch,
            seq_len=seq_len,
        )
        for axis in ("dp", "pp", "cp")
    ]
    return chosen + price(model, machine, streamed)


def kind(layout: Layout) -> str:
    if layout.asynchronous:
        return layout.schedule
    if layout.checkpointing == "stream":
        return "stream"
    return next((axis for axis in ("pp", "cp", "tp") if getattr(layout, axis) > 1), "dp")


def measured(priced: PricedLayout, model: ModelConfig, machine: Cluster) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        run_layout(priced.layout, model, out=Path(folder), steps=STEPS, held_out_batches=0, quiet=True)
        result = read_result(Path(folder))
    step_s, peak = typical_step_s(result["steps_s"]), result["peak_bytes"]
    return {
        "kind": kind(priced.layout),
        "layout": str(priced.layout),
        "said_s": f"{priced.step_s:.4f}",
        "measured_s": f"{step_s:.4f}",
        "time_error": f"{priced.step_s / step_s - 1:+.4f}",
        "said_mib": f"{priced.peak_bytes / 2**20:.2f}",
        "measured_mib": f"{peak / 2**20:.2f}",
        "memory_error": f"{priced.peak_bytes / peak - 1:+.4f}",
        "machine": machine.name,
        "commit": commit(),
    }


def table(rows: Sequence[Row]) -> str:
    """Errors by kind of layout, as markdown."""
    lines = [
        "| layouts | number | time, median error | worst | memory, median error | worst |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*dict.fromkeys(row["kind"] for row in rows), "all"):
        some = [row for row in rows if name in (row["kind"], "all")]
        cells = [name, str(len(some))]
        for column in ("time_error", "memory_error"):
            errors = [float(row[column]) for row in some]
            cells += [f"{median(map(abs, errors)):.1%}", f"{max(errors, key=abs):+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    for what in ("s", "mib"):
        said, seen = ([float(row[f"{name}_{what}"]) for row in rows] for name in ("said", "measured"))
        lines.append(f"\nSpearman of {'step times' if what == 's' else 'peaks'}: {spearman(said, seen):.3f}")
    best = min(rows, key=lambda row: float(row["said_s"]))
    fastest = min(rows, key=lambda row: float(row["measured_s"]))
    loss = float(best["measured_s"]) / float(fastest["measured_s"]) - 1
    lines.append(
        f"\nThe planner's first, {best['layout']}, is {loss:.1%} slower than the fastest, {fastest['layout']}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", type=Path, help="a cluster.toml of this machine")
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--profile-seconds", type=float, default=30.0)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path, default=HERE / "machine.csv")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    rows: list[Row] = []
    if arguments.out.exists():
        with arguments.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    if not arguments.print:
        config = Path(str(files("fourfold.launch").joinpath("data/byte-llama.json")))
        with tempfile.TemporaryDirectory() as folder:
            cluster = arguments.cluster and load_cluster(arguments.cluster)
            machine = cluster or profiled(
                Path(folder) / "cluster.toml", config, arguments.seq_len, arguments.profile_seconds
            )
        model = load_model(config)
        chosen = layouts(model, machine, arguments.global_batch, arguments.seq_len, arguments.every)
        done = {row["layout"] for row in rows}
        for priced in chosen[::2] + chosen[1::2]:
            if str(priced.layout) not in done:
                rows.append(measured(priced, model, machine))
                print(rows[-1]["layout"], rows[-1]["time_error"], rows[-1]["memory_error"], flush=True)
                with arguments.out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
