"""`layout-advisor validate`: how right the model is about runs that happened."""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fourfold.layouts.cost.price import GIB, PricedLayout
from fourfold.layouts.evidence.inference import settle
from fourfold.layouts.evidence.runs import Run, read_runs
from fourfold.layouts.evidence.validation import LEAST_RUNS, Scores, price_runs, score
from fourfold.layouts.inputs.reading import BEYOND

PREDICTED = (
    "step_time_pred_s", "memory_pred_gib", "fit_probability", "fits_pred", "step_time_low_s", "step_time_high_s",
    "memory_low_gib", "memory_high_gib", "software",
)  # fmt: skip


def validate(
    runs: Annotated[Path, typer.Argument(help="A CSV of runs (the schema of runs.csv).")],
    predictions: Annotated[Path | None, typer.Option(help="Write the rows with their predictions to this CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    software: Annotated[
        str, typer.Option(help="What ran them, a name or a file; default: the `software` column, else the likeliest.")
    ] = "",
) -> None:
    """Price every row of RUNS and compare with what was measured: time, order, what fits, and the pick.

    Where neither --software nor a column says what ran a row, the known software is chosen whose predictions come
    nearest, and how surely it is that one is told.
    """
    rows, usable, refused = read_runs(runs)
    usable, told = settle(usable, software or None)
    prices = price_runs(usable)
    if predictions is not None:
        write_predictions(predictions, rows, usable, prices)
    table = scores_by_sweep(usable, prices)
    if as_json:
        document = {name: asdict(scores) for name, scores in table.items()}
        unpriced = [{"line": line, "reason": reason} for line, reason in refused.items()]
        chosen = [{**asdict(inference), "fits": inference.fits} for inference in told]
        typer.echo(json.dumps({"scores": document, "not_priced": unpriced, "software": chosen}, indent=1))
        return
    console = Console(markup=False, emoji=False)
    if usable:
        console.print(score_table(table))
    for inference in told:
        console.print(str(inference), soft_wrap=True, highlight=False)
    for note, count in Counter(run.note for run in usable if run.note).items():
        console.print(f"{count} rows {note}", soft_wrap=True, highlight=False)
    for line, reason in refused.items():
        console.print(f"line {line} not priced: {reason}", soft_wrap=True, highlight=False)
    if predictions is not None:
        console.print(f"Predictions: {predictions}")


def scores_by_sweep(runs: list[Run], prices: list[PricedLayout]) -> dict[str, Scores]:
    """Scores of all rows, then of each sweep with enough finished runs."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        members[run.sweep].append(index)
    table = {"all": score(runs, prices)} if runs else {}
    for sweep, rows in members.items():
        if sum(runs[row].step_s is not None for row in rows) >= LEAST_RUNS:
            table[sweep] = score([runs[row] for row in rows], [prices[row] for row in rows])
    return table


def score_table(table: Mapping[str, Scores]) -> Table:
    """Scores as a table on the terminal."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("sweep")
    for name in ("runs", "MAPE", "Spearman", "OOM acc", "prec", "recall", "top-1", "OOM picks"):
        result.add_column(name, justify="right")

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for name, s in table.items():
        result.add_row(
            name, str(s.num_runs), text(s.mape, ".1%"), text(s.spearman, ".3f"), text(s.oom_accuracy, ".3f"),
            text(s.oom_precision, ".3f"), text(s.oom_recall, ".3f"), text(s.top1, ".3f"),
            f"{s.num_oom_picks} of {s.num_sweeps}",
        )  # fmt: skip
    return result


def write_predictions(path: Path, rows: list[dict[str, str]], runs: list[Run], prices: list[PricedLayout]) -> None:
    """The input's columns plus the predictions; blank where a row cannot be priced."""
    by_line = {run.number: (run, priced) for run, priced in zip(runs, prices, strict=True)}
    with path.open("w", newline="", encoding="utf-8") as file:
        names = list(dict.fromkeys([*(name for name in rows[0] if name != BEYOND), *PREDICTED]))
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        for line, row in enumerate(rows, start=2):
            extra: dict[str, object] = {}
            if line in by_line:
                run, priced = by_line[line]
                extra = {
                    "step_time_pred_s": f"{priced.step_s:.6g}", "memory_pred_gib": f"{priced.peak_bytes / GIB:.6g}",
                    "fit_probability": f"{priced.fit_probability:.6g}", "fits_pred": priced.fits,
                    "step_time_low_s": f"{priced.step_low_s:.6g}", "step_time_high_s": f"{priced.step_high_s:.6g}",
                    "memory_low_gib": f"{priced.peak_low_bytes / GIB:.6g}",
                    "memory_high_gib": f"{priced.peak_high_bytes / GIB:.6g}", "software": run.software.name,
                }  # fmt: skip
            writer.writerow({**row, **extra})
