"""`layout-advisor plan`: rank every layout of a model on a cluster, and write the files that launch the best."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fourfold.layouts.cost.asynchronous import convergence_text
from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.inputs.cluster import Cluster, load_cluster
from fourfold.layouts.inputs.layout import CHECKPOINTING, EVERY_SCHEDULE, PRECISIONS, Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.reading import shortened
from fourfold.layouts.inputs.software import load_software
from fourfold.layouts.output.report import write_report
from fourfold.layouts.output.tables import (
    describe,
    doubt_text,
    launch_text,
    legend,
    plan_lines,
    plan_table,
    uncompiled_text,
    why_not,
    write_csv,
)
from fourfold.layouts.search.rank import Plan, advice, rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.parallel.pipeline.mitigation import Mitigation

MOST_DRAWN = 200
"""Layouts of a table with fitted columns; more are plain lines, which are a hundred times quicker to lay out."""
_WORDS = {"checkpointing": CHECKPOINTING, "schedule": EVERY_SCHEDULE, "precision": PRECISIONS}
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def plan(
    config: Annotated[str, typer.Argument(help="A Hugging Face config.json, or a preset such as llama-3.1-8b.")],
    cluster: Annotated[str, typer.Option(help="A measured cluster.toml, or a preset such as A100-80GB.")],
    gpus: Annotated[int, typer.Option(help="Devices in all (ranks, on a cluster of processors).")],
    global_batch: Annotated[int, typer.Option(help="Sequences a step, over all devices.")],
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")],
    gpus_per_node: Annotated[
        int, typer.Option(help="Devices that share a node's fast links; 0: as the cluster says.")
    ] = 0,
    top: Annotated[int, typer.Option(help="How many layouts to show.")] = 10,
    space: Annotated[
        str, typer.Option(help="runtime: what fourfold launches; full: also what the export formats can.")
    ] = "runtime",
    fix: Annotated[list[str] | None, typer.Option(help="Hold a field, as tp=8 or checkpointing=none; repeat.")] = None,
    asynchronous: Annotated[bool, typer.Option("--async", help="Price pipelines that never drain, too.")] = False,
    software: Annotated[
        str, typer.Option(help="What runs the layouts, a name or a file of it; default: as --space means.")
    ] = "",
    tokens: Annotated[float, typer.Option(help="Tokens of the whole training, to tell the days it takes.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for plan.csv, layout.toml of the best, and report.html.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
) -> None:
    """Rank the layouts of MODEL on CLUSTER by predicted step time; show what fits, and how surely."""
    if not 0 <= tokens < float("inf"):
        raise ValueError(f"--tokens {tokens:g}: give a number of at least 0")
    if top < 1:
        raise ValueError(f"--top {top}: give a whole number of at least 1")
    request = SearchRequest(
        num_devices=gpus, global_batch=global_batch, seq_len=seq_len, space=space, fix=parse_fix(fix or []),
        asynchronous=asynchronous,
    )  # fmt: skip
    machine = cluster_in_nodes(cluster, gpus, gpus_per_node)
    chosen = load_software(software) if software else None
    result = rank_layouts(load_model(config), machine, request, top=top, software=chosen)
    if not result.layouts and not as_json:  # before any file: a folder never holds half a plan
        raise ValueError(advice(result))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "plan.csv", result.layouts)
        (out / "layout.toml").unlink(missing_ok=True)
        if result.layouts:
            best = result.layouts[0]
            write_layout_file(out / "layout.toml", best.layout, result.model, prediction_of(result, best))
        html = html or out / "report.html"
    if html is not None:
        write_report(html, result, title=f"Layouts for {result.model.name}")
    if as_json:
        typer.echo(json.dumps(as_document(result), indent=1))
        if not result.layouts:
            raise typer.Exit(2)
        return
    console = Console(markup=False, emoji=False)
    if top <= MOST_DRAWN:
        console.print(plan_table(result, result.layouts, num_tokens=tokens, width=console.width))
    else:
        for line in plan_lines(result, result.layouts, num_tokens=tokens, width=console.width):
            typer.echo(line)
    console.print(doubt_text(result), style="dim", soft_wrap=True, highlight=False)
    if result.layouts[0].launch_bound:
        console.print(launch_text(result.layouts[0]), soft_wrap=True, highlight=False)
    if uncompiled_text(result):
        console.print(uncompiled_text(result), soft_wrap=True, highlight=False)
    for layout in late_layouts(result):
        console.print(convergence_text(layout), soft_wrap=True, highlight=False)
    if why_not(result):
        console.print(f"Ruled out: {why_not(result)}.", style="dim", soft_wrap=True, highlight=False)
    console.print(legend(result.layouts[:top]), style="dim", soft_wrap=True, highlight=False)
    if html is not None:
        console.print(f"Report: {html}")


def cluster_in_nodes(path_or_preset: str, gpus: int, gpus_per_node: int) -> Cluster:
    """The cluster, in nodes of another size where one is asked for (0: as the cluster says).

    Raises:
        ValueError: no such cluster, or devices that do not fill the nodes.
    """
    cluster = load_cluster(path_or_preset)
    if not gpus_per_node:
        return cluster
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ValueError(f"--gpus {gpus} does not fill nodes of {gpus_per_node}: give a multiple")
    return cluster.with_devices_per_node(gpus_per_node)


def prediction_of(result: Plan, priced: PricedLayout) -> dict[str, Any]:
    """What was said of a layout, for whoever launches or exports it: [prediction] of layout.toml."""
    return {
        "cluster": result.cluster.name, "devices_per_node": result.cluster.devices_per_node,
        "software": priced.software.name, "step_s": priced.step_s, "peak_gib": priced.peak_bytes / GIB,
        "fit_probability": priced.fit_probability, "terms_s": dict(priced.time_parts_s),
    }  # fmt: skip


def late_layouts(result: Plan) -> list[Layout]:
    """The fastest layout of the table under each asynchronous schedule."""
    first: dict[str, Layout] = {}
    for priced in result.layouts:
        if priced.layout.asynchronous:
            first.setdefault(priced.layout.schedule, priced.layout)
    return list(first.values())


def parse_fix(words: list[str]) -> dict[str, Any]:
    """["tp=8", "checkpointing=none"] as {"tp": 8, "checkpointing": "none"}.

    Raises:
        ValueError: not KEY=VALUE, a key that no layout has, or a value of the wrong kind.
    """
    fixed: dict[str, Any] = {}
    kinds = {name: kind for name, kind in Layout.__annotations__.items() if name not in ("global_batch", "seq_len")}
    for given in words:
        key, equals, value = given.partition("=")
        word = shortened(given)
        key = key.strip().replace("-", "_")
        if not equals or key not in kinds:
            raise ValueError(f"--fix {word}: write it as KEY=VALUE with KEY one of {', '.join(kinds)}")
        if key in fixed:
            raise ValueError(f"--fix {word}: {key} is already fixed at {fixed[key]}")
        if key in _WORDS:
            if value not in _WORDS[key]:
                raise ValueError(f"--fix {word}: choose one of {', '.join(_WORDS[key])}")
            fixed[key] = value
        elif key == "mitigation":
            Mitigation.named(value)
            fixed[key] = value
        elif kinds[key] is bool or key == "compile":
            if value.lower() not in _FLAGS:
                raise ValueError(f"--fix {word}: give true or false")
            fixed[key] = _FLAGS[value.lower()]
        else:
            least = 0 if key in ("zero_stage", "embedding_counts_as", "head_counts_as") else 1
            if not value.isdecimal() or len(value) > 18 or int(value) < least:
                raise ValueError(f"--fix {word}: give a whole number of at least {least}")
            fixed[key] = int(value)
    return fixed


def as_document(result: Plan) -> dict[str, Any]:
    """The plan as --json prints it."""
    return {
        "model": result.model.name,
        "num_params": result.model.num_params,
        "cluster": result.cluster.name,
        "device": result.cluster.device.name,
        "num_devices": result.num_devices,
        "software": (result.layouts[0].software if result.layouts else result.software).name,
        "num_candidates": result.num_candidates,
        "num_fitting": result.num_fitting,
        "infeasible": dict(result.infeasible),
        "layouts": [describe(priced) for priced in result.layouts],
        "safe": describe(result.safe) if result.safe else None,
        **({"synchronous": describe(result.synchronous)} if result.synchronous else {}),
        "slowest": describe(result.slowest) if result.slowest else None,
        "nearest": describe(result.nearest) if result.nearest else None,
    }
