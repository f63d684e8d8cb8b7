"""`layout-advisor calibrate`: fit the model's constants to measured runs."""

import tomllib
from pathlib import Path
from typing import Annotated

import tomli_w
import typer
from rich.console import Console

from fourfold.launch.commands.validate import score_table
from fourfold.layouts.evidence.calibration import MEMORY_SPREAD, PRIOR_SPREAD, cross_validate, get_constant
from fourfold.layouts.evidence.calibration import calibrate as fit
from fourfold.layouts.evidence.runs import Run, read_runs
from fourfold.layouts.evidence.validation import price_runs, score
from fourfold.layouts.inputs.constants import Constants, constants_from, constants_to, load_constants, load_prior


def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="One or more CSVs of measured runs (the schema of runs.csv).")],
    out: Annotated[Path | None, typer.Option(help="Write the fitted constants to this TOML file.")] = None,
    from_prior: Annotated[
        bool, typer.Option("--from-prior", help="Start from the constants before any fit, not from the shipped ones.")
    ] = False,
    cross_validation: Annotated[
        bool, typer.Option("--cross-validate", help="Also fit without each sweep in turn and score on it.")
    ] = False,
) -> None:
    """Fit the constants on RUNS; show which moved and how well they carry over.

    Cross-validation starts from the constants before any fit, so that no held-out sweep has a say.
    """
    console = Console()
    usable: list[Run] = []
    for path in runs:
        _, good, refused = read_runs(path)
        usable += good
        if refused:
            console.print(f"{path}: {len(refused)} rows cannot be priced, line {min(refused)}: {refused[min(refused)]}")
    if not usable:
        raise ValueError(f"{', '.join(map(str, runs))}: no row that can be priced")
    prior = load_prior() if from_prior else load_constants()
    fitted = fit(usable, prior, report=console.print)
    for name in (*PRIOR_SPREAD, *MEMORY_SPREAD):
        before, after = get_constant(prior, name), get_constant(fitted, name)
        if abs(after / before - 1) > 0.01:
            console.print(f"  {name}: {before:.4g} -> {after:.4g}")
    console.print(score_table({"all, as fitted": score(usable, price_runs(usable, fitted))}))
    if cross_validation:
        folds = {fold.name: score(fold.runs, fold.prices) for fold in cross_validate(usable, load_prior())}
        console.print(score_table(folds))
    if out is not None:
        write_constants(
            out, fitted, f"fitted by `calibrate` on {len(usable)} runs of {', '.join(p.name for p in runs)}"
        )
        console.print(f"Constants: {out}")


def write_constants(path: Path, constants: Constants, provenance: str) -> None:
    """Write constants in the form of data/constants.toml: four digits, and where they come from."""

    def rounded(value: object) -> object:
        return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else float(f"{value:.4g}")

    table = {name: rounded(value) for name, value in constants_to(constants).items()}
    path.write_text(tomli_w.dumps({"provenance": provenance, "constants": table}), encoding="utf-8")


def read_constants(path: Path | None) -> Constants:
    """Constants from a file of `calibrate`, or the shipped ones.

    Raises:
        ValueError: the file is missing, broken, or lacks a constant.
    """
    if path is None:
        return load_constants()
    try:
        return constants_from(tomllib.loads(path.read_text(encoding="utf-8"))["constants"])
    except (OSError, tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file of constants ({error}): write it with `calibrate --out`") from None
