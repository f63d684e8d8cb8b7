"""`layout-advisor demo`: the whole loop on this machine, from measuring it to comparing what ran with what was said."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import tomli_w
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourfold.launch.commands.launch import fresh_folder, run_layout, start_training
from fourfold.launch.commands.plan import prediction_of
from fourfold.launch.commands.profile import profile_machine
from fourfold.launch.main_job import Machine, main_job, this_machine
from fourfold.launch.runs import append_runs, read_result, run_row, typical_step_s
from fourfold.launch.verdict import read_phases, verdict
from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.inputs.cluster import Cluster, load_cluster
from fourfold.layouts.inputs.layout import write_layout_file
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.inputs.reading import whole
from fourfold.layouts.output.report import write_report
from fourfold.layouts.output.tables import gib_text, plan_table, seconds_text, why_not, write_csv
from fourfold.layouts.search.rank import Plan, advice, candidates_of, rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.profiling.settings import ProfileSettings

NUM_MEASURED = 3
MEASURED_STEPS = 12


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("run"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the training on the best layout.")] = 200,
    model: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face config.json; default: a byte-level Llama, on GPUs as large as has room."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a sequence; default: 256, with the default model on GPUs 1024.")
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sequences a step; default: 8, with the default model on GPUs 32, or the next multiple of ranks.",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to use; default: one a GPU, or a core (at most 4).")
    ] = None,
    profile_seconds: Annotated[float, typer.Option(help="Time budget of the measurement of the machine.")] = 30.0,
    cluster: Annotated[
        Path | None, typer.Option(help="A cluster.toml measured before, instead of measuring now.")
    ] = None,
) -> None:
    """Measure this machine, rank its layouts, train on the best, and compare with the prediction."""
    console = Console(markup=False, emoji=False)
    started = time.monotonic()
    for name, size in (("--seq-len", seq_len), ("--global-batch", global_batch), ("--steps", steps)):
        if size is not None:
            whole(size, name)  # before the minute of a profile
    devices = _known_machine(cluster) if cluster is not None else this_machine(ranks)
    # For somebody's own model the job is no more than a batch, on GPUs as on processors.
    job = main_job(devices if model is None else replace(devices, device_type="cpu"), steps=steps)
    seq_len, global_batch = seq_len or job.seq_len, global_batch or job.global_batch
    name, read = (job.name, job.model) if model is None else (model.stem, load_model(model))
    decoder = replace(read, name=name)
    request = SearchRequest(num_devices=devices.num_devices, global_batch=global_batch, seq_len=seq_len)
    candidates_of(decoder, request)  # what no layout can cut is told before the minute of a profile, too
    out.mkdir(parents=True, exist_ok=True)
    config = model
    if config is None:
        config = out / f"{job.name}.json"
        config.write_text(json.dumps(dict(job.config), indent=1) + "\n", encoding="utf-8")

    _headline(console, "1. profile", "what this machine can do")
    machine = _measured_cluster(out, config, cluster, seq_len, ranks, profile_seconds)
    _show_machine(console, machine)

    _headline(console, "2. plan", f"every layout of {machine.num_devices} ranks, priced")
    plan = rank_layouts(decoder, machine, request)
    if not plan.layouts:
        raise ValueError(advice(plan))
    write_csv(out / "plan.csv", plan.layouts)
    console.print(plan_table(plan, plan.layouts[:10]))
    if why_not(plan):
        console.print(f"Ruled out: {why_not(plan)}.", style="dim", soft_wrap=True, highlight=False)

    _headline(console, "3. launch", f"the best {NUM_MEASURED} and the last that fits, {MEASURED_STEPS} steps each")
    compared = _measure(console, out, plan, machine)
    console.print(_comparison_table(compared))

    best = min(compared, key=lambda row: row["measured_step_s"])["priced"]
    write_layout_file(out / "layout.toml", best.layout, decoder)
    _headline(console, "4. train", f"on the fastest of them, {best.layout}")
    result = _train(console, out, best, decoder, machine, {"steps": steps, "learning_rate": job.learning_rate})
    console.print(
        f"loss {result['losses'][0]:.3f} at the first step, {result['losses'][-1]:.3f} at the last; "
        f"held-out loss {result['heldout_loss']:.3f} nats a byte "
        f"(byte frequencies alone: {result['byte_frequency_loss']:.3f})"
    )

    _headline(console, "5. report", "everything in one file")
    summary = _summary(compared, best, result, decoder, machine, wall_s=time.monotonic() - started)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _write_report(out, plan, summary, result)
    console.print(f"{out / 'report.html'}  {out / 'summary.json'}  {out / 'runs.csv'}")
    console.print(f"Done in {summary['wall_s']:.0f} s.")


def _known_machine(cluster: Path) -> Machine:
    """What a cluster.toml says of the machine that it was measured on."""
    known = load_cluster(cluster)
    if known.num_devices < 1:
        raise ValueError(
            f"--cluster {cluster} was not measured on a machine: give a file that `layout-advisor profile` wrote, or "
            f"leave it out"
        )
    return Machine(
        device_type=known.device.type,
        num_devices=known.num_devices,
        memory_bytes=known.device.memory_bytes,
        peak_flops_per_s=known.device.peak_flops_per_s,
    )


def _measured_cluster(
    out: Path, config: Path, cluster: Path | None, seq_len: int, ranks: int | None, seconds: float
) -> Cluster:
    target = out / "cluster.toml"
    if cluster is not None:
        machine = load_cluster(cluster)  # refuses a broken file before it replaces anything
        if cluster.resolve() != target.resolve():
            target.write_bytes(cluster.read_bytes())
        return machine
    settings = ProfileSettings(out=target, seconds=seconds, model=config, seq_len=seq_len)
    profile_machine(settings, num_ranks=ranks)
    return load_cluster(target)


def _measure(console: Console, out: Path, plan: Plan, machine: Cluster) -> list[dict[str, Any]]:
    """Run the best layouts and the last feasible one; one row each, with the priced layout under `priced`."""
    chosen = plan.layouts[:NUM_MEASURED]
    if plan.slowest is not None and plan.slowest.layout not in [priced.layout for priced in chosen]:
        chosen = [*chosen, plan.slowest]
    rows = []
    for priced in chosen:
        folder = fresh_folder(out / "runs" / str(priced.layout).replace(" ", "_").replace("/", "-"))
        with console.status(f"running {priced.layout}"):
            run_layout(priced.layout, plan.model, out=folder, steps=MEASURED_STEPS, held_out_batches=0, quiet=True)
        result = read_result(folder)
        append_runs(out / "runs.csv", [run_row(priced.layout, plan.model, machine, result)])
        for line in verdict(prediction_of(plan, priced), result, read_phases(folder))[1:]:
            console.print(f"{priced.layout}: {line}", highlight=False)
        rows.append(
            {
                "priced": priced,
                "layout": priced.layout.as_dict(),
                "predicted_step_s": priced.step_s,
                "measured_step_s": typical_step_s(result["steps_s"]),
                "predicted_peak_gib": priced.peak_bytes / GIB,
                "measured_peak_gib": result["peak_bytes"] / GIB,
                "reserved_gib": result["reserved_bytes"] / GIB,
            }
        )
    return rows


def _train(
    console: Console,
    out: Path,
    best: PricedLayout,
    model: ModelConfig,
    machine: Cluster,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Train as a file says that is left for the user, who can read it, change it and run it again."""
    steps = int(options["steps"])
    folder, file = fresh_folder(out / "training"), out / "train.toml"
    keys = {
        "layout": str(out / "layout.toml"), "out": str(folder), **options,
        "checkpoint_every": max(1, steps // 2), "resume": "auto",
        "peak_flops_per_s": machine.device.peak_flops_per_s * best.layout.world_size,
    }  # fmt: skip
    file.write_text(tomli_w.dumps(keys), encoding="utf-8")
    console.print(file.read_text(encoding="utf-8").rstrip(), style="dim", highlight=False)
    console.print(
        f"As {file} says. Longer: layout-advisor train {quote(str(file))} --steps {2 * steps}", highlight=False
    )
    start_training(best.layout, model, ["--config", str(file)])
    result = read_result(folder)
    append_runs(out / "runs.csv", [run_row(best.layout, model, machine, result, notes=f"training, {steps} steps")])
    return result


def _summary(
    compared: Sequence[Mapping[str, Any]],
    best: PricedLayout,
    result: Mapping[str, Any],
    model: ModelConfig,
    machine: Cluster,
    *,
    wall_s: float,
) -> dict[str, Any]:
    layout = best.layout
    tokens_per_s = layout.global_batch * layout.seq_len / typical_step_s(result["steps_s"])
    return {
        "layouts": [{name: value for name, value in row.items() if name != "priced"} for row in compared],
        "trained_layout": layout.as_dict(),
        "loss_first": result["losses"][0],
        "loss_last": result["losses"][-1],
        "heldout_loss": result["heldout_loss"],
        "byte_frequency_loss": result["byte_frequency_loss"],
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s
        * model.flops_per_token(layout.seq_len)
        / (machine.device.peak_flops_per_s * layout.world_size),
        "num_params": model.num_params,
        "cluster": machine.name,
        "wall_s": wall_s,
    }


def _write_report(out: Path, plan: Plan, summary: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    with (out / "training" / "metrics.csv").open(newline="") as file:
        losses = [(float(row["step"]) + 1, float(row["loss"])) for row in csv.DictReader(file)]
    write_report(
        out / "report.html",
        plan,
        title=f"fourfold on {plan.cluster.name}",
        measured=summary["layouts"],
        losses=losses,
        facts={
            "held-out loss": f"{summary['heldout_loss']:.3f}",
            "byte frequencies alone": f"{summary['byte_frequency_loss']:.3f}",
            "measured tokens/s": f"{summary['tokens_per_s']:,.0f}",
        },
    )


def _headline(console: Console, title: str, text: str) -> None:
    console.print()
    console.rule(Text(title, style="bold") + f"  {text}", align="left")


def _show_machine(console: Console, machine: Cluster) -> None:
    device = machine.device
    console.print(
        f"{machine.num_devices} x {device.name}: matmul {device.peak_flops_per_s / 1e9:,.0f} GFLOP/s a rank "
        f"({device.dtype}), memory {device.memory_bandwidth_bytes_per_s / 1e9:.1f} GB/s and "
        f"{device.memory_bytes / GIB:.1f} GiB a rank"
    )
    for link in machine.links:
        for operation in link.operations:
            console.print(
                f"  {link.name}: {operation.operation} of {operation.group_size} ranks "
                f"{operation.latency_s * 1e6:,.0f} us + {operation.bandwidth_bytes_per_s / 1e9:.2f} GB/s"
            )


def _comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Predicted against measured", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layout", no_wrap=True)
    reserved = any(row["reserved_gib"] for row in rows)  # by CUDA's allocator, which a CPU has not
    for name in ("said", "step", "off by", "said", "GiB", "off by", *["reserved"] * reserved):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["priced"].layout),
            seconds_text(row["predicted_step_s"]),
            seconds_text(row["measured_step_s"]),
            f"{row['predicted_step_s'] / row['measured_step_s'] - 1:+.1%}",
            gib_text(row["predicted_peak_gib"] * GIB),
            gib_text(row["measured_peak_gib"] * GIB),
            f"{row['predicted_peak_gib'] / row['measured_peak_gib'] - 1:+.1%}",
            *[gib_text(row["reserved_gib"] * GIB)] * reserved,
        )
    return table
