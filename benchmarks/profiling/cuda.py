"""Plan against launch on this machine's GPUs: what `profile` and `plan` say of a layout, and what it then takes.

    PYTHONPATH=src python -m benchmarks.profiling.cuda
    PYTHONPATH=src python -m benchmarks.profiling.cuda --print     # the tables of what was measured
    PYTHONPATH=src python -m benchmarks.profiling.cuda --device cpu --model launch/data/byte-llama.json --seq-len 64 \
        --global-batch 4 --layouts 2 --profile-seconds 8 --steps 4   # tries the script out

A profile of the model first, then the layouts of all devices by rank: the quickest, the slowest that fits, and between
them as evenly as --layouts allows, so that the table does not show the planner's favourites alone. Seconds are the
median step without the first quarter; bytes are the allocator's peak and what it reserved, on the rank that had most.

Rows are appended to cuda_samples.csv as they come, and a layout that is there for this device, model and batch is not
run again; one that failed (said to fit, and out of memory, say) is there with its error. After --budget seconds no
further layout starts; called again, it goes on.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.arguments import amount, count, stored_rows, table_file
from benchmarks.rows import ORIGIN, append_row, origin

from fourfold.launch.commands.launch import run_layout
from fourfold.launch.commands.profile import profile_machine
from fourfold.launch.processes import RankFailure
from fourfold.launch.runs import read_result, typical_step_s
from fourfold.layouts.cost.price import PricedLayout
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.search.rank import Plan, advice, rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.profiling.settings import ProfileSettings

HERE = Path(__file__).parent
GIB = 2**30
CASE = ("device", "num_devices", "model", "global_batch", "seq_len")
FIELDS = (
    *CASE, "layout", "software", "compiled", "said_s", "ran_s",
    "said_gib", "held_gib", "reserved_gib", "error", *ORIGIN,
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


def measured(priced: PricedLayout, model: ModelConfig, steps: int) -> dict[str, Any]:
    """Of a launch of the layout: what it took, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_layout(priced.layout, model, out=Path(folder) / "run", steps=steps, held_out_batches=0, quiet=True)
        except RankFailure as failure:
            return {"error": (str(failure).strip().splitlines() or ["failed"])[-1][:160]}
        result = read_result(Path(folder) / "run")
    return {
        "compiled": result["compiled"], "ran_s": f"{typical_step_s(result['steps_s']):.6g}",
        "held_gib": f"{result['peak_bytes'] / GIB:.6g}", "reserved_gib": f"{result['reserved_bytes'] / GIB:.6g}",
    }  # fmt: skip


def table(rows: list[dict[str, str]]) -> str:
    """The samples as tables in Markdown, one a case, each prediction with its error."""
    lines = []
    for case in dict.fromkeys(tuple(row[name] for name in CASE) for row in rows):
        device, num_devices, model, batch, seq_len = case
        lines += [
            f"\n{model} on {num_devices} x {device}, {batch} sequences of {seq_len}:\n",
            "| layout | said s | ran s | off | said GiB | held GiB | off | reserved GiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows if tuple(row[name] for name in CASE) == case]
    return "\n".join(lines)


def _line(row: dict[str, str]) -> str:
    said_s, said = float(row["said_s"]), float(row["said_gib"])
    if row["error"]:
        return f"| {row['layout']} | {said_s:.3f} | {row['error']} | | {said:.2f} | | | |"
    ran_s, held = float(row["ran_s"]), float(row["held_gib"])
    return (
        f"| {row['layout']} | {said_s:.3f} | {ran_s:.3f} | {said_s / ran_s - 1:+.1%} "
        f"| {said:.2f} | {held:.2f} | {said / held - 1:+.1%} | {float(row['reserved_gib']):.2f} |"
    )


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    usage = "python -m benchmarks.profiling.cuda [options]; --help lists them"
    parser = argparse.ArgumentParser(
        description=__doc__, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=count, help="default: one a GPU, or a core")
    parser.add_argument("--model", type=Path, help="a Hugging Face config.json; default: a Llama of 1.24B")
    parser.add_argument("--seq-len", type=count, default=2048)
    parser.add_argument("--global-batch", type=count, default=16)
    parser.add_argument("--layouts", type=count, default=6)
    parser.add_argument("--steps", type=count, default=8)
    parser.add_argument("--profile-seconds", type=amount, default=90.0)
    parser.add_argument("--budget", type=amount, default=400.0, help="seconds after which no further layout starts")
    parser.add_argument("--out", type=table_file, default=HERE / "cuda_samples.csv")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    return parser, parser.parse_args()


def main() -> None:
    parser, options = arguments()
    rows = stored_rows(parser, options.out, FIELDS)
    if options.print:
        print(table(rows) if rows else f"{options.out} has no rows: nothing was measured yet")
        return
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu tries the script out")
    try:
        measure(options, rows)
    except ValueError as error:  # of the profile, the plan or the launch, which name their mend
        parser.error(str(error))


def measure(options: argparse.Namespace, rows: list[dict[str, str]]) -> None:
    """Profile, plan and launch, as far as `rows` have not; prints the table of this case.

    Raises:
        ValueError: a model, a batch or a machine for which there is nothing to launch.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "llama-1.2b.json"
        config.write_text(json.dumps(MODEL))
        if options.model is not None:
            if not options.model.is_file():
                raise ValueError(f"{options.model}: no such file; --model takes a Hugging Face config.json")
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
            raise ValueError(advice(plan))
        here = (
            cluster.device.name, str(cluster.num_devices), config.stem, str(options.global_batch), str(options.seq_len)
        )  # fmt: skip
        case = dict(zip(CASE, here, strict=True))
        rows = [row for row in rows if case.items() <= row.items()]
        for priced in spread(plan, options.layouts):
            if any(row["layout"] == str(priced.layout) for row in rows):
                continue
            if time.monotonic() - started > options.budget:
                print("the budget is spent: call again to go on")
                break
            row = dict.fromkeys(FIELDS, "") | case | {
                "layout": str(priced.layout), "software": plan.software.name, "said_s": f"{priced.step_s:.6g}",
                "said_gib": f"{priced.peak_bytes / GIB:.6g}", **measured(priced, model, options.steps), **origin(),
            }  # fmt: skip
            rows.append({name: str(value) for name, value in row.items()})
            append_row(options.out, row, FIELDS)
            print(_line(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
