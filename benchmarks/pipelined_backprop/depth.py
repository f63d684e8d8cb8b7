"""Sixteen stages: what one update of delay costs, what delays that grow with depth cost, and which answer helps.

    PYTHONPATH=src python -m benchmarks.pipelined_backprop.depth              # what is missing, most important first
    PYTHONPATH=src python -m benchmarks.pipelined_backprop.depth --report     # the tables from depth.csv

A byte decoder of an embedding, 14 blocks and a head, one a stage, under two settings with the same hyper-parameters:

    2bw        an update of 8 windows of 32 bytes, delay 1 on every stage (16 micro-batches an update)
    lockstep   an update of 2 windows, delays 30, 28, ... 0, hyper-parameters scaled from 8 windows to 2

Learning rates are tuned on two seeds that the tables do not use and on a shorter schedule, in steps of two from the
optimizer's reference rate on for as long as the mean loss falls. Under lockstep every method is tuned by itself; under
2bw all methods take the rate of no delay, as error feedback's paper does. Every seed of a run is
one row of depth.csv, appended when the run ends; what has its rows is not repeated, so the command resumes.

The reference at equal time is training without delay in the time that the delayed schedule takes: 1F1B needs
(M + S - 1) / M of it, so that it makes M / (M + S - 1) of the updates, its schedule of rates shortened to them.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from benchmarks.pipelined_backprop import data, models
from benchmarks.pipelined_backprop.accuracy import decay, evaluate
from benchmarks.rows import FIELDS, append_row, measurement
from torch import Tensor
from torch.optim import SGD, AdamW, Muon, Optimizer

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.pipeline import scale_adam_hyperparameters, scale_hyperparameters
from fourfold.parallel.pipeline.optimizer import NamedParameters, OptimizerFactory

TABLE = Path(__file__).with_name("depth.csv")
NUM_STAGES, WIDTH, LENGTH = 16, 16, 32
REFERENCE_BATCH = 8  # windows of LENGTH bytes
REFERENCE_RATES = {"SGDM": 0.3, "AdamW": 8e-3, "Muon": 0.04}
RATES = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SEEDS, TUNING_SEEDS = range(5), range(100, 102)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One schedule with its size of an update.

    Attributes:
        windows: of one update.
        updates: of the full schedule.
        tuning_updates: of the shorter schedule for tuning.
        shares_rate: whether all methods take the rate of no delay.
        equal_time: updates that 1F1B makes in the time of the full schedule.
        methods: name in the tables -> mitigation.
    """

    name: str
    windows: int
    updates: int
    tuning_updates: int
    shares_rate: bool = False
    equal_time: int
    methods: dict[str, str]


def settings(scale: float) -> dict[str, Setting]:
    """Both settings at `scale` times the full schedules. 2bw has 16 micro-batches an update, lockstep one."""
    double, step = round(1000 * scale), round(800 * scale)
    return {
        "2bw": Setting(
            name="2bw",
            windows=8,
            updates=double,
            tuning_updates=round(600 * scale),
            shares_rate=True,
            equal_time=round(double * 16 / (16 + NUM_STAGES - 1)),
            methods={
                "no delay": "none", "equal time": "none", "2bw": "stash", "2bw+EF": "stash+ef",
                "2bw+SC": "stash+sc", "2bw+LWPv+SC": "stash+lwpv+sc",
            },
        ),
        "lockstep": Setting(
            name="lockstep",
            windows=2,
            updates=step,
            tuning_updates=round(240 * scale),
            equal_time=max(1, round(step / NUM_STAGES)),
            methods={
                "no delay": "none", "equal time": "none", "PB": "none", "PB+stash": "stash", "PB+LWPv+SC": "lwpv+sc",
                "PB+LWPv": "lwpv", "PB+LWPw+SC": "lwpw+sc", "PB+EF": "ef", "PB+Nesterov": "nesterov+stash",
                "PB+LWPv+SC+stash": "lwpv+sc+stash", "PB+rotation": "rotate",
                "PB+rotation+LWPv+SC": "rotate+lwpv+sc", "PACI:4": "none", "PACI:8": "none",
            },
        ),
    }  # fmt: skip


ORDER = (  # (setting, optimizer, methods), most important first
    ("lockstep", "AdamW", "no delay,PB,PB+LWPv+SC,PACI:4,PACI:8"),
    ("2bw", "Muon", "no delay,2bw,2bw+EF,2bw+LWPv+SC,2bw+SC"),
    ("lockstep", "AdamW", "PB+rotation+LWPv+SC,equal time"),
    ("2bw", "AdamW", "no delay,2bw,2bw+EF,2bw+LWPv+SC,equal time"),
    ("2bw", "Muon", "equal time"),
    ("lockstep", "SGDM", "no delay,PB,PB+LWPv+SC,PACI:4,equal time"),
    ("2bw", "SGDM", "no delay,2bw,2bw+EF,2bw+LWPv+SC,equal time"),
    ("lockstep", "Muon", "no delay,PB,PB+LWPv+SC,PACI:4,equal time"),
    ("lockstep", "AdamW", "PB+LWPv+SC+stash,PB+rotation,PB+EF,PB+LWPw+SC,PB+Nesterov,PB+stash,PB+LWPv"),
    ("2bw", "AdamW", "2bw+SC"),
    ("lockstep", "Muon", "PB+LWPw+SC,PB+EF"),
    ("lockstep", "SGDM", "PB+LWPw+SC,PB+EF"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One method at one rate."""

    setting: Setting
    optimizer: str
    method: str
    factor: float
    updates: int
    tuning: bool = False

    @property
    def case(self) -> str:
        return (
            f"task=decoder16-text setting={self.setting.name} optimizer={self.optimizer} method={self.method} "
            f"lr={self.factor * REFERENCE_RATES[self.optimizer]:g}@{REFERENCE_BATCH} windows={self.setting.windows} "
            f"schedule={'tuning' if self.tuning else self.setting.updates} updates={self.updates}"
        )

    @property
    def accumulates(self) -> int:
        """Micro-batches of one update, where the method is to accumulate some."""
        return int(self.method.partition(":")[2] or 1)


def make_optimizers(run: Run, parameters: NamedParameters) -> Optimizer | Sequence[Optimizer]:
    """The run's optimizer; beside Muon an AdamW for the embedding, the positions and the head, as Muon is used."""
    rate, size = run.factor * REFERENCE_RATES[run.optimizer], run.setting.windows * run.accumulates
    if run.optimizer == "SGDM":
        lr, momentum = scale_hyperparameters(lr=rate, momentum=0.9, batch=REFERENCE_BATCH, new_batch=size)
        return SGD(parameters, lr=lr, momentum=momentum)
    ends = [p for name, p in parameters.named() if name.split(".")[0] in ("bytes", "positions", "linear")]
    adam_rate = rate if run.optimizer == "AdamW" else run.factor * REFERENCE_RATES["AdamW"]
    scaled = scale_adam_hyperparameters(
        lr=adam_rate, betas=(0.9, 0.99), batch=REFERENCE_BATCH, new_batch=size, weight_decay=0.01
    )
    if run.optimizer == "AdamW" or ends:
        return AdamW(parameters, **scaled._asdict())
    # A step of Muon has one size whatever the gradient's: like Adam's it takes the square-root rule.
    _, momentum = scale_hyperparameters(lr=rate, momentum=0.95, batch=REFERENCE_BATCH, new_batch=size)
    return Muon(parameters, lr=rate * (size / REFERENCE_BATCH) ** 0.5, momentum=momentum, weight_decay=0.0)


def losses(run: Run, seeds: Sequence[int], text: Tensor) -> list[float]:
    """Loss in nats a byte on the last tenth of the text, which is not trained on, for each seed."""
    setting, mitigation = run.setting, run.setting.methods[run.method]
    # Muon and basis rotation treat a weight as a matrix: there every seed's is a parameter of its own.
    draws = models.Draws(seeds, separate=run.optimizer == "Muon" or "rotate" in mitigation)
    stages = models.decoder(draws, layers=NUM_STAGES - 2, width=WIDTH, heads=2, length=LENGTH)
    factory: OptimizerFactory = partial(make_optimizers, run)
    delays: list[int] | None = None
    if run.method in ("no delay", "equal time"):
        delays = [0] * NUM_STAGES
    elif setting.name == "2bw":
        delays = [1] * NUM_STAGES
    every = run.accumulates
    trainer = PipelinedBackpropEmulator(
        stages,
        optimizer=factory,
        loss_fn=lambda logits, target: models.loss_per_seed(logits, target).sum(),
        schedule="lockstep" if every == 1 else f"paci:{every}",
        mitigation=mitigation,
        delays=delays,
        scheduler=decay(run.updates // every),
    )
    cut = len(text) * 9 // 10
    trainer.run(data.windows(text[:cut], length=LENGTH, size=setting.windows, steps=run.updates, seeds=seeds))
    held_out = data.windows(text[cut:], length=LENGTH, size=64, steps=16, seeds=[1234] * len(seeds))
    return evaluate(trainer, models.loss_per_seed, held_out)


def read(table: Path) -> dict[str, dict[int, float]]:
    """Case -> seed -> loss."""
    found: dict[str, dict[int, float]] = {}
    if table.exists():
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["case"], {})[int(row["seed"])] = float(row["median"])
    return found


def measured(run: Run, seeds: Sequence[int], text: Tensor, table: Path) -> list[float]:
    """The losses of a run, from the table, or made and appended to it."""
    known = read(table).get(run.case, {})
    missing = [seed for seed in seeds if seed not in known]
    if missing:
        start = time.process_time()
        values = losses(run, missing, text)
        for seed, value in zip(missing, values, strict=True):
            row = measurement(
                benchmark="pipelined_backprop/depth", provider="fourfold", case=run.case, metric="test_loss",
                unit="nats/byte", samples=[value], kind="cpu", seed=seed,
            )  # fmt: skip
            append_row(table, row, FIELDS)
            known[seed] = value
        shown = " ".join(f"{value:.3f}" for value in values)
        print(f"{run.case}: {shown} ({time.process_time() - start:.0f} s of CPU)", flush=True)
    return [known[seed] for seed in seeds]


def tuned(run: Run, text: Tensor, table: Path) -> Run:
    """`run` at its best rate: from the reference rate on, a step up or down as long as that helps.

    Where training diverges at the reference rate the search begins at the next lower rate at which it does not.
    """

    setting = run.setting
    method = "no delay" if setting.shares_rate and run.method != "equal time" else run.method

    def loss(at: int) -> float:
        updates = min(run.updates, setting.tuning_updates)
        trial = replace(run, method=method, factor=RATES[at], updates=updates, tuning=True)
        found = mean(measured(trial, TUNING_SEEDS, text, table))
        return found if found == found else float("inf")

    best = RATES.index(1.0)
    while best > 0 and loss(best) == float("inf"):
        best -= 1
    for step in (-1, 1):
        while 0 <= best + step < len(RATES) and loss(best + step) < loss(best):
            best += step
    return replace(run, factor=RATES[best])


def report(table: Path) -> None:
    """For each setting and optimizer: mean, spread, tuned rate, distance to no delay, each seed.

    The distance is the mean over seeds of the paired differences, +- its standard error.
    """
    groups: dict[str, dict[str, tuple[str, dict[int, float]]]] = {}
    for case, by_seed in read(table).items():
        if min(by_seed) in TUNING_SEEDS:
            continue
        joined = case.replace("no delay", "no_delay").replace("equal time", "equal_time")
        words = dict(word.split("=", 1) for word in joined.split())
        size = f"{words['windows']} windows an update, {words['schedule']} of them"
        title = f"{words['setting']}, {words['optimizer']}, {size}"
        groups.setdefault(title, {})[words["method"].replace("_", " ")] = (words["lr"], by_seed)
    for title, methods in sorted(groups.items()):
        print(f"\n{title}\n")
        print("| method | rate | mean | sd | minus no delay | minus equal time | seeds |")
        print("|---|---|---|---|---|---|---|")
        for method, (rate, by_seed) in methods.items():
            values = list(by_seed.values())
            spread = f"{stdev(values):.3f}" if len(values) > 1 else "-"
            gaps = [_gap(by_seed, methods[name][1]) if name in methods else "-" for name in ("no delay", "equal time")]
            shown = " ".join(f"{value:.3f}" for value in values)
            print(f"| {method} | {rate} | {mean(values):.4f} | {spread} | {gaps[0]} | {gaps[1]} | {shown} |")


def _gap(values: dict[int, float], reference: dict[int, float]) -> str:
    paired = [value - reference[seed] for seed, value in values.items() if seed in reference]
    if len(paired) < 2:
        return "-"
    return f"{mean(paired):+.4f} +- {stdev(paired) / len(paired) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of updates")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--only", default="", help="settings and optimizers that contain this, as '2bw Muon'")
    parser.add_argument("--methods", default="", help="comma-separated, in place of the list's")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        report(given.table)
        return
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * given.minutes
    text = data.library_bytes()
    for name, optimizer, methods in ORDER:
        if given.only not in f"{name} {optimizer}":
            continue
        setting = settings(given.scale)[name]
        for method in (given.methods or methods).split(","):
            if time.monotonic() > end:
                return
            # A short schedule wants a rate of its own, which its own tuning finds.
            updates = setting.equal_time if method == "equal time" else setting.updates
            run = Run(setting=setting, optimizer=optimizer, method=method, factor=1.0, updates=updates)
            measured(tuned(run, text, given.table), SEEDS, text, given.table)


if __name__ == "__main__":
    main()
