"""`layout-advisor explain` and `compare`: why a layout costs what it costs, and what else would."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourfold.launch.commands.plan import cluster_in_nodes
from fourfold.layouts.cost.asynchronous import convergence_text, schedule_of
from fourfold.layouts.cost.price import GIB, PricedLayout, price, software_for
from fourfold.layouts.inputs.cluster import Cluster
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.inputs.software import Software, load_software
from fourfold.layouts.output.tables import launch_text, seconds_text
from fourfold.layouts.search.explain import TERMS, difference, draw_schedule, neighbours
from fourfold.layouts.search.rank import advice, rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.layouts.search.space import check_in_space

Config = Annotated[str, typer.Argument(help="A Hugging Face config.json, or a preset such as llama-3.1-8b.")]
ClusterName = Annotated[str, typer.Option(help="A measured cluster.toml, or a preset such as A100-80GB.")]
Gpus = Annotated[int, typer.Option(help="Devices in all.")]
GlobalBatch = Annotated[int, typer.Option(help="Sequences a step, over all devices.")]
SeqLen = Annotated[int, typer.Option(help="Tokens a sequence.")]
GpusPerNode = Annotated[int, typer.Option(help="Devices that share a node's fast links; 0: as the cluster says.")]
SoftwareName = Annotated[str, typer.Option(help="What runs the layouts, a name or a file; default: as --space means.")]
Space = Annotated[str, typer.Option(help="runtime: what fourfold launches; full: also what can be exported.")]


def explain(
    config: Config,
    cluster: ClusterName,
    gpus: Gpus,
    global_batch: GlobalBatch,
    seq_len: SeqLen,
    layout: Annotated[str, typer.Option(help='A layout as plan prints it, "tp2 pp4 mb1 z1"; default: the best.')] = "",
    space: Space = "runtime",
    gpus_per_node: GpusPerNode = 0,
    software: SoftwareName = "",
) -> None:
    """Show where a layout's step time and memory go, its schedule, and what each neighbouring layout would change."""
    model, machine = load_model(config), cluster_in_nodes(cluster, gpus, gpus_per_node)
    runner = load_software(software) if software else None
    request = SearchRequest(num_devices=gpus, global_batch=global_batch, seq_len=seq_len, space=space)
    if layout:
        priced = _price(layout, model, machine, request, runner)
    else:
        result = rank_layouts(model, machine, request, top=1, software=runner)
        if not result.layouts:
            raise ValueError(advice(result))
        priced = result.layouts[0]
    console = Console(markup=False, emoji=False)
    console.print(
        Text(str(priced.layout), style="bold")
        + f"  step {seconds_text(priced.step_s)} ({seconds_text(priced.step_low_s)} to "
        f"{seconds_text(priced.step_high_s)} in 8 cases of 10), MFU {priced.mfu:.1%}"
    )
    if priced.launch_bound:
        console.print(launch_text(priced), soft_wrap=True, highlight=False)
    console.print(_bars("Time of a step", {TERMS[n]: s for n, s in priced.time_parts_s.items()}, seconds_text))
    held = {**priced.memory_parts_bytes, "reserve": priced.reserve_bytes}
    room = f"of {priced.capacity_bytes / GIB:.3g} GiB: P(fits) {priced.fit_probability:.2f}"
    console.print(_bars(f"Memory of the worst stage, {room}", held, lambda size: f"{size / GIB:.3g} GiB"))
    if priced.host_bytes:
        console.print(f"  pinned in host memory, a rank: {priced.host_bytes / GIB:.3g} GiB")
    for stage, peak in priced.stage_peaks_bytes.items():
        if priced.layout.pp > 1:
            console.print(f"  {stage} stage: {peak / GIB:.3g} GiB")
    if priced.layout.asynchronous:
        console.print("\n" + convergence_text(priced.layout), soft_wrap=True, highlight=False)
        schedule = schedule_of(priced.layout)
        if priced.layout.pp <= 8:  # beyond, a line would not fit
            console.print(f"\nSchedule (F forward, B backward): {schedule}")
            console.print(str(schedule.program(10)), soft_wrap=True, highlight=False)
    elif 1 < priced.layout.pp <= 16:
        kind = "interleaved 1F1B" if priced.layout.vp > 1 else "1F1B"
        halves = priced.layout.schedule == "zero-bubble"
        kind = "zero-bubble, weight gradients in capitals" if halves else kind
        console.print(f"\nSchedule ({kind}; digits forward, letters backward, dots idle)")
        sizes = priced.layout.pp, priced.layout.num_micro_batches
        for line in draw_schedule(*sizes, vp=priced.layout.vp, zero_bubble=halves):
            console.print("  " + line, highlight=False)
    table = Table(title="Neighbours", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("change", "step", "GiB", "why"):
        table.add_column(name)
    runner = runner or _of_space(machine, space, priced.layout.precision)
    for near in neighbours(priced, model, machine, software=runner, space=space):
        step = f"{near.priced.step_s / priced.step_s - 1:+.1%}" if near.priced else "-"
        memory = f"{near.priced.peak_bytes / GIB:.3g}" if near.priced else "-"
        table.add_row(near.change, step, memory, near.reason)
    console.print(table)


def compare(
    config: Config,
    first: Annotated[str, typer.Argument(help='A layout as plan prints it, "tp2 pp4 mb1 z1".')],
    second: Annotated[str, typer.Argument(help="Another one.")],
    cluster: ClusterName,
    gpus: Gpus,
    global_batch: GlobalBatch,
    seq_len: SeqLen,
    space: Space = "runtime",
    gpus_per_node: GpusPerNode = 0,
    software: SoftwareName = "",
) -> None:
    """Set two layouts side by side: every term of the step, every part of the memory."""
    model, machine = load_model(config), cluster_in_nodes(cluster, gpus, gpus_per_node)
    request = SearchRequest(num_devices=gpus, global_batch=global_batch, seq_len=seq_len, space=space)
    runner = load_software(software) if software else None
    a, b = (_price(words, model, machine, request, runner) for words in (first, second))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for priced in (a, b):
        table.add_column(str(priced.layout), justify="right")
    table.add_row("step", seconds_text(a.step_s), seconds_text(b.step_s), style="bold")
    table.add_row("MFU", f"{a.mfu:.1%}", f"{b.mfu:.1%}")
    for name, words in TERMS.items():
        if a.time_parts_s[name] or b.time_parts_s[name]:
            table.add_row(words, seconds_text(a.time_parts_s[name]), seconds_text(b.time_parts_s[name]))
    table.add_row("peak GiB", f"{a.peak_bytes / GIB:.3g}", f"{b.peak_bytes / GIB:.3g}", style="bold")
    for name in a.memory_parts_bytes:
        table.add_row(name, f"{a.memory_parts_bytes[name] / GIB:.3g}", f"{b.memory_parts_bytes[name] / GIB:.3g}")
    table.add_row("P(fits)", f"{a.fit_probability:.2f}", f"{b.fit_probability:.2f}")
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"{b.layout} against {a.layout}: {b.step_s / a.step_s - 1:+.1%} step; {difference(a, b)}.")


def _price(
    words: str, model: ModelConfig, cluster: Cluster, request: SearchRequest, software: Software | None
) -> PricedLayout:
    layout = parse_layout(
        words, num_devices=request.num_devices, global_batch=request.global_batch, seq_len=request.seq_len
    )
    check_in_space(layout, model, request.space)
    runner = software or _of_space(cluster, request.space, layout.precision)
    return price(model, cluster, [layout], software=runner)[0]


def _of_space(cluster: Cluster, space: str, precision: str) -> Software | None:
    """What runs the layouts of the full space; None for this runtime, which may compile some and not others."""
    return software_for(cluster, space, precision) if space == "full" else None


def _bars(title: str, parts: dict[str, float], text: Callable[[float], str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    whole = sum(parts.values())
    for name, value in parts.items():
        if value > 0.0005 * whole:
            table.add_row(name, text(value), f"{value / whole:6.1%} " + "█" * round(40 * value / whole))
    return table
