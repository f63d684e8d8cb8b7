"""Plan against launch on this machine's GPUs: what `profile` and `plan` say of a layout, and what it then takes.

    PYTHONPATH=src python -m benchmarks.profiling.cuda
    PYTHONPATH=src python -m benchmarks.profiling.cuda --device cpu --model launch/data/byte-llama.json --seq-len 64 \
        --global-batch 4 --layouts 2 --profile-seconds 8 --steps 4   # tries the script out

A profile of the model first, then the layouts of all devices by rank: the quickest, the slowest that fits, and between
them as evenly as --layouts allows, so that the table does not show the planner's favourites alone. Seconds are the
median step without the first quarter; bytes are the allocator's peak and what it reserved, on the rank that had most.

Rows are appended to cuda_samples.csv as they come, and a layout that is there for this device, model and batch is not
run again. After --budget seconds no further layout starts; called again, it goes on.
"""

import argparse
import csv
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rows import append_row, commit

from fourfold.launch.commands.launch import run_layout
from fourfold.launch.commands.profile import profile_machine
from fourfold.launch.runs import read_result, typical_step_s
from fourfold.layouts.cost.price import PricedLayout
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.search.rank import Plan, advice, rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.profiling.settings import ProfileSettings

HERE = Path(__file__).parent
GIB = 2**30
FIELDS = (
    "device", "num_devices", "model", "global_batch", "seq_len", "layout", "software", "compiled", "said_s", "ran_s",
    "said_gib", "held_gib", "reserved_gib", "commit",
)  # fmt: skip
MODEL = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_dropout": 0.0,
}  # fmt: skip
"""A Llama of 1.24 billion parameters."""


def spread(plan: Plan, count: int) -> list[PricedLayout]:
    """The quickest layout, the slowest, and others evenly between them by rank; `count` in all, or fewer."""
    found = plan.layouts
    count = min(count, len(found))
    places = {round(index * (len(found) - 1) / max(count - 1, 1)) for index in range(count)}
    return [found[place] for place in sorted(places)]


def read_samples(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(priced: PricedLayout, model: ModelConfig, steps: int) -> dict[str, Any]:
    """A launch of the layout, and what it took."""
    with tempfile.TemporaryDirectory() as folder:
        run_layout(priced.layout, model, out=Path(folder) / "run", steps=steps, held_out_batches=0, quiet=True)
        return read_result(Path(folder) / "run")


def table(rows: list[dict[str, str]]) -> str:
    """The samples as a table in Markdown, each prediction with its error."""
    lines = [
        "| layout | said s | ran s | off | said GiB | held GiB | off | reserved GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said_s, ran_s, said, held = (float(row[name]) for name in ("said_s", "ran_s", "said_gib", "held_gib"))
        lines.append(
            f"| {row['layout']} | {said_s:.3f} | {ran_s:.3f} | {said_s / ran_s - 1:+.1%} "
            f"| {said:.2f} | {held:.2f} | {said / held - 1:+.1%} | {float(row['reserved_gib']):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="default: one a GPU, or a core")
    parser.add_argument("--model", type=Path, help="a Hugging Face config.json; default: a Llama of 1.24B")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--layouts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile-seconds", type=float, default=90.0)
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no further layout starts")
    parser.add_argument("--out", type=Path, default=HERE / "cuda_samples.csv")
    options = parser.parse_args()
    started = time.monotonic()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "llama-1.2b.json"
        config.write_text(json.dumps(MODEL))
        if options.model is not None:
            config = Path(shutil.copy(options.model, folder / options.model.name))
        model = load_model(config)
        settings = ProfileSettings(
            out=folder / "cluster.toml", seconds=options.profile_seconds, model=config, seq_len=options.seq_len
        )
        profile_machine(settings, num_ranks=options.ranks)
        cluster = load_cluster(folder / "cluster.toml")
        request = SearchRequest(
            num_devices=cluster.num_devices, global_batch=options.global_batch, seq_len=options.seq_len
        )
        plan = rank_layouts(model, cluster, request)
        if not plan.layouts:
            raise SystemExit(advice(plan))
        case = {
            "device": cluster.device.name, "num_devices": str(cluster.num_devices), "model": config.stem,
            "global_batch": str(options.global_batch), "seq_len": str(options.seq_len),
        }  # fmt: skip

        def of_this_case() -> list[dict[str, str]]:
            return [row for row in read_samples(options.out) if case.items() <= row.items()]

        for priced in spread(plan, options.layouts):
            if any(row["layout"] == str(priced.layout) for row in of_this_case()):
                continue
            if time.monotonic() - started > options.budget:
                print("the budget is spent: call again to go on")
                break
            result = measured(priced, model, options.steps)
            append_row(
                options.out,
                {
                    **case, "layout": str(priced.layout), "software": plan.software.name,
                    "compiled": result["compiled"], "said_s": f"{priced.step_s:.6g}",
                    "ran_s": f"{typical_step_s(result['steps_s']):.6g}",
                    "said_gib": f"{priced.peak_bytes / GIB:.6g}", "held_gib": f"{result['peak_bytes'] / GIB:.6g}",
                    "reserved_gib": f"{result['reserved_bytes'] / GIB:.6g}", "commit": commit(),
                },
                FIELDS,
            )  # fmt: skip
            print(table(of_this_case()[-1:]).splitlines()[-1], flush=True)
    print(f"{case['model']} on {case['num_devices']} x {case['device']}:")
    print(table(of_this_case()))


if __name__ == "__main__":
    main()
