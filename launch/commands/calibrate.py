"""`layout-advisor calibrate`: fit the model's constants to measured runs."""

from pathlib import Path
from typing import Annotated

import tomli_w
import typer
from rich.console import Console

from fourfold.launch.commands.validate import score_table
from fourfold.layouts.evidence.calibration import MEMORY_SPREAD, PRIOR_SPREAD, cross_validate
from fourfold.layouts.evidence.calibration import calibrate as fit_to
from fourfold.layouts.evidence.fit import Fit, load_fit, load_prior_fit
from fourfold.layouts.evidence.inference import settle
from fourfold.layouts.evidence.runs import Run, read_runs
from fourfold.layouts.evidence.software_fit import MEMORY, TIME, fit_software
from fourfold.layouts.evidence.validation import price_runs, score
from fourfold.layouts.inputs.software import as_document, software_names


def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="One or more CSVs of measured runs (the schema of runs.csv).")],
    out: Annotated[Path | None, typer.Option(help="Write the fitted constants to this TOML file.")] = None,
    from_prior: Annotated[
        bool, typer.Option("--from-prior", help="Start from the constants before any fit, not from the shipped ones.")
    ] = False,
    software: Annotated[
        str, typer.Option(help="Fit the constants of this software (a name or a file) instead; `infer`: the likeliest.")
    ] = "",
    cross_validation: Annotated[
        bool, typer.Option("--cross-validate", help="Also fit without each sweep in turn and score on it.")
    ] = False,
) -> None:
    """Fit the constants on RUNS; show which moved and how well they carry over.

    With --software, those of the software that ran them: a dozen runs of your own give a file for --software of the
    other commands. It holds no more than what differs from the software that it started from.

    Cross-validation starts from the constants before any fit, so that no held-out sweep has a say.
    """
    console = Console(markup=False, emoji=False)
    usable: list[Run] = []
    for path in runs:
        _, good, refused = read_runs(path)
        usable += good
        if refused:
            console.print(f"{path}: {len(refused)} rows cannot be priced, line {min(refused)}: {refused[min(refused)]}")
    if not usable:
        raise ValueError(f"{', '.join(map(str, runs))}: no row that can be priced")
    if software:
        _calibrate_software(console, usable, software, out, f"{len(usable)} runs of {', '.join(p.name for p in runs)}")
        return
    prior = load_prior_fit() if from_prior else load_fit()
    fitted = fit_to(usable, prior, report=console.print)
    for name in (*PRIOR_SPREAD, *MEMORY_SPREAD):
        before, after = prior.get(name), fitted.get(name)
        if abs(after / before - 1) > 0.01:
            console.print(f"  {name}: {before:.4g} -> {after:.4g}")
    console.print(score_table({"all, as fitted": score(usable, price_runs(usable, fitted))}))
    if cross_validation:
        folds = {fold.name: score(fold.runs, fold.prices) for fold in cross_validate(usable, load_prior_fit())}
        console.print(score_table(folds))
    if out is not None:
        write_fit(out, fitted, f"fitted by `calibrate` on {len(usable)} runs of {', '.join(p.name for p in runs)}")
        console.print(f"Constants: {out}")


def _calibrate_software(console: Console, runs: list[Run], name: str, out: Path | None, evidence: str) -> None:
    """Fit one software to runs of it, show what moved, and write its file."""
    settled, told = settle(runs, None if name == "infer" else name)
    for inference in told:
        console.print(str(inference), soft_wrap=True, highlight=False)
    most = max(told, key=lambda inference: inference.num_rows).software
    own = [run for run in settled if run.software.name == most]
    before, fit = own[0].software, fit_software(own)
    for constant in (*TIME, *MEMORY, "time_spread", "network_spread", "memory_spread"):
        old, new = getattr(before, constant), getattr(fit.software, constant)
        if abs(new - old) > 0.01 * abs(old):
            console.print(f"  {constant}: {old:.4g} -> {new:.4g}")
    fitted = [fit.priced_as(run) for run in own]
    console.print(score_table({"before": score(own, price_runs(own)), "as fitted": score(fitted, price_runs(fitted))}))
    if out is not None:
        like = most if most in software_names() else ""
        document = as_document(fit.software, provenance=f"fitted by `calibrate` on {evidence}", like=like)
        out.write_text(tomli_w.dumps(document), encoding="utf-8")
        console.print(f"Software: {out}")


def write_fit(path: Path, fit: Fit, provenance: str) -> None:
    """Write a fit in the form of data/constants.toml: four digits, and where they come from."""

    def rounded(value: object) -> object:
        return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else float(f"{value:.4g}")

    tables = {name: rounded(dict(value)) for name, value in fit.as_dict().items()}
    path.write_text(tomli_w.dumps({"provenance": provenance, **tables}), encoding="utf-8")
