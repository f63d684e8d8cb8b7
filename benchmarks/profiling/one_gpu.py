"""What the planner says of runs of a Llama of 1.24B on one H100, from the data sheet alone, beside what they took.

    PYTHONPATH=src python -m benchmarks.profiling.one_gpu

Nothing runs. The rows of one_gpu.csv are launches of this runtime (torch 2.11, 26 November 2026) of 7 to 12 steps, its
layers eager and its logits whole, as they were then: seconds are the median step, GiB torch's max_memory_allocated. Two
constants of the memory formulas were seen in them, 12 bytes a logit and 70 MB of work spaces; all else is counted from
the operators. The seconds' constants were fitted to these runs, so that their errors say how well a formula can follow
them, not how well it foretells.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from benchmarks.profiling.cuda import MODEL

from fourfold.layouts.cost.price import GIB, PricedLayout, price, software_for
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.huggingface import model_from_config
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.software import load_software


class Run(NamedTuple):
    """A row of one_gpu.csv, and what is said of it."""

    said: PricedLayout
    ran_s: float
    held_gib: float


def runs() -> list[Run]:
    model, cluster = model_from_config(MODEL, name="Llama of 1.24B"), load_cluster("H100-80GB")
    found = []
    with (Path(__file__).parent / "one_gpu.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            sizes = {name: int(row[name]) for name in ("global_batch", "seq_len")}
            layout = parse_layout(row["layout"], num_devices=1, **sizes)
            usual = software_for(cluster, precision=layout.precision, compiled=bool(layout.compile))
            said = price(model, cluster, [layout], software=load_software(f"{usual.name}-whole-head"))[0]
            found.append(Run(said, float(row["ran_s"]), float(row["held_gib"])))
    return found


def main() -> None:
    print("| layout | tokens | said s | ran s | off | said GiB | held GiB | off |\n|---|---|---|---|---|---|---|---|")
    for said, ran_s, held_gib in runs():
        peak, layout = said.peak_bytes / GIB, said.layout
        print(
            f"| {layout} | {layout.seq_len} | {said.step_s:.3f} | {ran_s:.3f} | {said.step_s / ran_s - 1:+.0%} "
            f"| {peak:.2f} | {held_gib:.2f} | {peak / held_gib - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
