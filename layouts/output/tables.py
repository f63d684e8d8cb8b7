"""Ranked layouts as a table on the terminal, as plan.csv, and as JSON."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fourfold.layouts.cost.asynchronous import convergence
from fourfold.layouts.cost.candidates import Candidates
from fourfold.layouts.cost.measured_layers import lacks_compiled_layers
from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.constants import load_constants
from fourfold.layouts.inputs.model import human_count
from fourfold.layouts.inputs.software import load_software
from fourfold.layouts.search.rank import Plan
from fourfold.parallel.decoder.limits import PRECISIONS


def describe(priced: PricedLayout) -> dict[str, Any]:
    """One priced layout as plain values: the row of plan.csv and of --json."""
    row: dict[str, Any] = {"layout": str(priced.layout)}
    row |= priced.layout.as_dict()
    row |= {
        "num_micro_batches": priced.layout.num_micro_batches, "runnable": priced.runnable,
        "step_s": priced.step_s, "mfu": priced.mfu, "tokens_per_s": priced.tokens_per_s,
        "tokens_per_s_per_device": priced.tokens_per_s / priced.layout.world_size,
        "compute_s": priced.compute_s, "exposed_communication_s": priced.exposed_communication_s,
        "bubble_s": priced.bubble_s, "optimizer_s": priced.optimizer_s,
        "peak_gib": priced.peak_bytes / GIB, "reserve_gib": priced.reserve_bytes / GIB,
        "capacity_gib": priced.capacity_bytes / GIB, "margin_gib": priced.margin_bytes / GIB,
        "step_low_s": priced.step_low_s, "step_high_s": priced.step_high_s,
        "peak_low_gib": priced.peak_low_bytes / GIB, "peak_high_gib": priced.peak_high_bytes / GIB,
        "expected_s": priced.expected_s, "fit_probability": priced.fit_probability, "fits": priced.fits,
        "host_gib": priced.host_bytes / GIB, "software": priced.software.name, "launch_bound": priced.launch_bound,
    }  # fmt: skip
    if priced.layout.asynchronous:
        row |= {"updates_per_step": priced.layout.updates_per_step, "convergence": convergence(priced.layout)}
    row |= {f"{name}_part_s": seconds for name, seconds in priced.time_parts_s.items()}
    return row | {f"{name}_gib": size / GIB for name, size in priced.memory_parts_bytes.items()}


def write_csv(path: str | Path, layouts: Sequence[PricedLayout]) -> None:
    """Write plan.csv: one layout a row, fastest first."""
    rows = [describe(priced) for priced in layouts]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def seconds_text(seconds: float) -> str:
    """1.23 s, 45.6 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def gib_text(size: float) -> str:
    return f"{size / GIB:.3g}"


def mark(result: Plan, priced: PricedLayout) -> str:
    """What a row stands out for: the fastest, the safe pick, the fastest without late gradients."""
    fastest = bool(result.layouts) and priced.layout == result.layouts[0].layout
    safe = result.safe is not None and priced.layout == result.safe.layout
    words = "fast+safe" if fastest and safe else "fastest" if fastest else "safe" if safe else ""
    in_time = result.synchronous is not None and priced.layout == result.synchronous.layout
    return (words + " sync").strip() if in_time else words


def plan_table(result: Plan, layouts: Sequence[PricedLayout], *, num_tokens: float = 0.0, width: int = 80) -> Table:
    """The ranked table; the safe pick is added below where it is not among `layouts`.

    On a terminal narrower than 100 columns the shares of communication and bubble are left out.
    """
    table = Table(
        title=f"{result.model.name} ({human_count(result.model.num_params)}) on {result.num_devices} x "
        f"{result.cluster.device.name}: {result.num_fitting} of {result.num_candidates} layouts fit",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    # On a narrow terminal a long name goes on in the next line; nothing else is cut.
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("layout", overflow="fold")
    _, _, *columns, _ = _headings(num_tokens, width)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for rank, cells in enumerate(_rows(result, layouts, num_tokens, width), start=1):
        table.add_row(*cells, style="bold" if rank == 1 else None)
    return table


def plan_lines(
    result: Plan, layouts: Sequence[PricedLayout], *, num_tokens: float = 0.0, width: int = 80
) -> Iterator[str]:
    """The rows of `plan_table` as plain lines, for more of them than a drawn table lays out in reasonable time."""
    rows = [_headings(num_tokens, width), *_rows(result, layouts, num_tokens, width)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (1, len(widths) - 1)  # the name and the mark
    for row in rows:
        cells = [
            cell.ljust(size) if place in left else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _headings(num_tokens: float, width: int) -> list[str]:
    columns = ["step", "MFU", "tok/s/dev", *(["comm", "bubble"] if width >= 100 else []), "GiB", "P(fits)"]
    return ["#", "layout", *columns, *["days"] * (num_tokens > 0), ""]


def _rows(result: Plan, layouts: Sequence[PricedLayout], num_tokens: float, width: int) -> Iterator[list[str]]:
    """A row's cells; the safe pick and the fastest in time come last where they are not among `layouts`."""
    shown = list(layouts)
    for extra in (result.safe, result.synchronous):
        if extra is not None and all(priced.layout != extra.layout for priced in shown):
            shown.append(extra)
    for rank, priced in enumerate(shown, start=1):
        cells = [
            str(rank) if rank <= len(layouts) else "", str(priced.layout), seconds_text(priced.step_s),
            f"{priced.mfu:.1%}", f"{priced.tokens_per_s / priced.layout.world_size:.0f}",
        ]  # fmt: skip
        if width >= 100:
            cells += [f"{share / priced.step_s:.1%}" for share in (priced.exposed_communication_s, priced.bubble_s)]
        cells += [gib_text(priced.peak_bytes), f"{priced.fit_probability:.2f}"]
        if num_tokens:
            cells.append(f"{num_tokens / priced.tokens_per_s / 86400:.3g}")
        yield [*cells, mark(result, priced)]


_WORDS = (
    (r"(dp|pp|cp|tp)\d+", "dp, pp, cp, tp: ranks along the axes of data, pipeline, context and tensor"),
    (r"mb\d+", "mbN: N sequences a micro-batch"),
    (r"less\d+\+\d+", "lessA+B: when stages are cut, the embedding counts for A layers and the head for B"),
    (r"vp\d+", "vpN: each pipeline rank holds N chunks of layers (interleaving)"),
    (r"ep\d+", "epN: N ranks share a set of experts"),
    (r"heads\d+", "headsN: N of the cp ranks exchange heads instead of passing keys round the ring"),
    (r"sp", "sp: sequence parallelism in tp"),
    (r"z\d", "zN: ZeRO stage N (1 optimizer states sharded, 2 gradients too, 3 weights too)"),
    (r"shardacc", "shardacc: gradients are reduced and sharded after every micro-batch, not once a step"),
    ("|".join(PRECISIONS), f"{', '.join(PRECISIONS)}: the precision, where it is not the device's own"),
    (
        r"compile|nocompile",
        "compile, nocompile: layers run through torch.compile, or not; without a word as on the device",
    ),
    (r"selective", "selective: what is cheap is recomputed in backward, matrix products and attention are kept"),
    (r"full(/\d+)?", "full/N: every N-th layer (every one without /N) is recomputed in backward"),
    (r"stream(x\d+)?", "streamxN: StreamBP in N chunks of the sequence, or with 1 cut as the runtime chooses"),
    (r"offload", "offload: inputs of checkpointed layers wait in host memory"),
    (r"zero-bubble", "zero-bubble: a rank computes weight gradients, put off until then, while it would idle"),
    (r"(lockstep|1f1b-async|2bw)(/.*)?", "lockstep, 1f1b-async, 2bw: the pipeline never drains, gradients come late"),
)
COLUMNS = (
    "MFU: model FLOPs (6 a parameter and token, embeddings too, and attention's, causal counted whole, windows by "
    "their width) over the peak; P(fits): probability of not running out of memory; layouts are ranked by step over "
    "P(fits), the time with what is lost where they do not fit; fast+safe: the fastest so counted, whose P(fits) is at "
    "least 0.95; sync: the fastest whose gradients come in time"
)


def legend(layouts: Sequence[PricedLayout] | None = None) -> str:
    """What the words of layouts' names and the columns mean; of all words, or of those that some layouts use."""
    used = None if layouts is None else {word for priced in layouts for word in str(priced.layout).split()}
    words = [text for pattern, text in _WORDS if used is None or any(re.fullmatch(pattern, word) for word in used)]
    return "; ".join([*words, COLUMNS]) + "."


def doubt_text(result: Plan) -> str:
    """How sure the first of a plan is, and which two layouts a short measurement would tell apart."""
    best = result.layouts[0]
    seen = "" if best.software.seen_on(result.cluster.device.name) else ", never held against runs on such devices"
    words = (
        f"Priced as {best.software.name}{seen}: {best.layout} takes {seconds_text(best.step_low_s)} to "
        f"{seconds_text(best.step_high_s)} in 8 cases of 10, with {best.peak_low_bytes / GIB:.3g} to "
        f"{best.peak_high_bytes / GIB:.3g} GiB."
    )
    rivals = [priced for priced in result.layouts[1:] if priced.step_low_s < best.step_high_s]
    if not rivals:
        return words
    # Of those that may be faster, the one that differs most in how it is cut tells most.
    rival = max(rivals[:10], key=lambda priced: _cuts_changed(best, priced))
    return words + f" What would settle the order: twelve steps each of {best.layout} and of {rival.layout}."


def launch_text(priced: PricedLayout) -> str:
    """What a layout's device waits for its host to launch operators, and what gives the launches more work."""
    if priced.software.compiled or not priced.software.compiled_as:
        compiling = ""
    elif priced.layout.compile is False:
        compiling = ", or compile=true"
    else:
        compiling = ", or a layout whose layers the runtime compiles (checkpointing none or full)"
    share = priced.time_parts_s["launch"] / priced.step_s
    return (
        f"{priced.layout} is launch-bound: its devices wait {share:.0%} of a step for their hosts to launch operators. "
        f"What gives a launch more work: a larger micro-batch{compiling}."
    )


def uncompiled_text(result: Plan) -> str:
    """That compiled layers are priced by formulas, where the cluster's profile timed others of this model; or ""."""
    if not result.layouts or result.request.fix.get("compile") is False:
        return ""
    software = result.software
    pricing = Pricing(
        layouts=Candidates.of([result.layouts[0].layout]), model=result.model, cluster=result.cluster,
        software=load_software(software.compiled_as) if software.compiled_as else software, constants=load_constants(),
    )  # fmt: skip
    if not lacks_compiled_layers(pricing):
        return ""
    return (
        "Layers run compiled here, and the profile timed none of this model's so: they are priced by formulas. "
        "Measure again with `layout-advisor profile --model`."
    )


def _cuts_changed(first: PricedLayout, second: PricedLayout) -> int:
    names = ("tp", "pp", "cp", "zero_stage", "checkpointing", "schedule")
    return sum(getattr(first.layout, name) != getattr(second.layout, name) for name in names)


def why_not(result: Plan) -> str:
    """What ruled out the other combinations, most frequent first."""
    reasons: Mapping[str, int] = result.infeasible
    told = sorted(((count, reason) for reason, count in reasons.items() if count), reverse=True)
    return "; ".join(f"{reason}: {count}" for count, reason in told)
