"""Does pipelined backpropagation learn as well as training without delays, and which mitigation helps?

    PYTHONPATH=src python -m benchmarks.pipelined_backprop.accuracy                # what is missing
    PYTHONPATH=src python -m benchmarks.pipelined_backprop.accuracy --report       # the tables from accuracy.csv

Every seed of a run is one row of accuracy.csv, appended when the run ends; seeds that have their row are not repeated,
so the command can be stopped and started again. One process, one thread, the seeds side by side (models.py); the
delays are the emulator's, which equal the runtime's.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from benchmarks.pipelined_backprop import data, models
from benchmarks.rows import FIELDS, append_row, measurement
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.pipeline import scale_adam_hyperparameters, scale_hyperparameters

TABLE = Path(__file__).with_name("accuracy.csv")
METHODS = {  # the name in the tables: (delays, mitigation); lock-step pipelined backpropagation's grow with depth
    "no delay": ("none", "none"),
    "PB": ("lockstep", "none"),
    "PB+stash": ("lockstep", "stash"),
    "PB+SC": ("lockstep", "sc"),
    "PB+LWPv": ("lockstep", "lwpv"),
    "PB+LWPv+SC": ("lockstep", "lwpv+sc"),
    "PB+LWPw": ("lockstep", "lwpw"),
    "PB+LWPw+SC": ("lockstep", "lwpw+sc"),
    "PB+SpecTrain": ("lockstep", "spectrain"),
    "PB+PipeMare": ("lockstep", "pipemare-lr+pipemare-dc"),
    "PB+Nesterov": ("lockstep", "nesterov+stash"),
    "PB+rotation": ("lockstep", "rotate"),
    "PB+rotation+LWPv+SC": ("lockstep", "rotate+lwpv+sc"),
    "PB+EF": ("lockstep", "ef"),
    # 2bw: one update everywhere, and a backward with its forward's weights, whatever the depth.
    "2bw": ("2bw", "stash"),
    "2bw+EF": ("2bw", "stash+ef"),
    "2bw+SC": ("2bw", "stash+sc"),
    "2bw+LWPv+SC": ("2bw", "stash+lwpv+sc"),
    "2bw+rotation": ("2bw", "stash+rotate"),
}
MAIN = ("no delay", "PB", "PB+stash", "PB+SC", "PB+LWPv", "PB+LWPv+SC")
FEW = ("no delay", "PB", "PB+LWPw", "PB+LWPv+SC")
DEEP = (
    "no delay", "PB", "PB+LWPv+SC", "PB+LWPw+SC", "PB+Nesterov", "PB+EF", "2bw", "2bw+EF", "2bw+SC", "2bw+LWPv+SC",
)  # fmt: skip
ROTATED = ("PB+rotation", "PB+rotation+LWPv+SC", "2bw+rotation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A network with its data, its reference hyper-parameters (at `batch` samples), and its schedule."""

    name: str
    optimizer: str
    lr: float
    momentum: float = 0.9
    batch: int = 128
    size: int  # micro-batch
    steps: int  # updates
    methods: tuple[str, ...] = MAIN

    def words(self, method: str) -> str:
        return (
            f"task={self.name} optimizer={self.optimizer} method={method} lr={self.lr:g}@{self.batch} "
            f"micro_batch={self.size} updates={self.steps}"
        )


def tasks(scale: float, images: str) -> list[Task]:
    """All tasks at `scale` times the full schedule: together some two and a half hours of one core for five seeds."""
    sgd = partial(Task, optimizer="SGDM", size=2)
    text = partial(Task, name="decoder-text", size=2, batch=32, steps=round(2500 * scale))
    return [
        sgd(name=f"mlp14-{images}", lr=0.02, steps=round(40000 * scale)),
        sgd(name=f"resnet20-{images}", lr=0.05, steps=round(12000 * scale)),
        text(optimizer="AdamW", lr=3e-3),
        text(optimizer="NAdamW", lr=3e-3, methods=FEW),
        text(optimizer="Muon", lr=0.02, momentum=0.95, methods=FEW),
        text(optimizer="SGDM", lr=0.3, methods=FEW),
        # 16 stages: the embedding, 14 blocks, the head.
        text(name="decoder16-text", optimizer="AdamW", lr=3e-3, methods=(*DEEP, *ROTATED)),
        text(name="decoder16-text", optimizer="Muon", lr=0.02, momentum=0.95, methods=DEEP),
        text(name="decoder16-text", optimizer="SGDM", lr=0.3, methods=DEEP),
    ]


def make_optimizer(task: Task) -> Callable[[list[nn.Parameter]], Optimizer]:
    """The task's optimizer with its hyper-parameters scaled from the reference batch to the micro-batch."""
    if task.optimizer in ("SGDM", "Muon"):
        lr, momentum = scale_hyperparameters(lr=task.lr, momentum=task.momentum, batch=task.batch, new_batch=task.size)
        if task.optimizer == "SGDM":
            return partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=1e-4)
        # Muon's step has a fixed size whatever the gradient's: like Adam's, it takes the square-root rule.
        return partial(
            torch.optim.Muon, lr=task.lr * (task.size / task.batch) ** 0.5, momentum=momentum, weight_decay=0.0
        )
    scaled = scale_adam_hyperparameters(
        lr=task.lr, betas=(task.momentum, 0.99), batch=task.batch, new_batch=task.size, weight_decay=0.01
    )
    kind: Any = (
        torch.optim.AdamW if task.optimizer == "AdamW" else partial(torch.optim.NAdam, decoupled_weight_decay=True)
    )
    return partial(kind, **scaled._asdict())


def decay(steps: int) -> Callable[[Optimizer], LambdaLR]:
    """Warm up over a twentieth of the updates; a tenth of the rate from a half on, a hundredth from three quarters."""

    def factor(step: int) -> float:
        ramp = min(1.0, (step + 1) / (steps / 20))
        return ramp * 0.1 ** ((step >= steps / 2) + (step >= 3 * steps / 4))

    return lambda optimizer: LambdaLR(optimizer, factor)


def image_run(task: Task, method: str, seeds: Sequence[int], images: data.Images) -> list[float]:
    """Test accuracy in percent after the whole schedule, for each seed."""
    x, y, test_x, test_y = images
    draws = models.Draws(seeds)
    if task.name.startswith("mlp"):
        x, test_x = x.flatten(1), test_x.flatten(1)
        stages = models.mlp(draws, x.shape[1])
    else:
        stages = models.resnet20(draws)
    trainer = train(task, method, stages, data.shuffled(x, y, size=task.size, steps=task.steps, seeds=seeds))
    pairs = zip(test_x.split(256), test_y.split(256), strict=True)
    every = ((x.expand(len(seeds), *x.shape), y.expand(len(seeds), *y.shape)) for x, y in pairs)
    wrong = evaluate(trainer, lambda logits, target: (logits.argmax(-1) != target).double().mean(1), every)
    return [100 * (1 - one) for one in wrong]


def text_run(task: Task, method: str, seeds: Sequence[int], text: Tensor) -> list[float]:
    """Loss in nats a byte on the last tenth of the text, which is not trained on, for each seed."""
    cut = len(text) * 9 // 10
    # Muon and basis rotation treat a weight as a matrix: there every seed's is one of its own.
    draws = models.Draws(seeds, separate=task.optimizer == "Muon" or task.name == "decoder16-text")
    deep = {"layers": 14, "width": 32, "heads": 2} if task.name == "decoder16-text" else {}
    stages = models.decoder(draws, **deep)
    stream = data.windows(text[:cut], length=64, size=task.size, steps=task.steps, seeds=seeds)
    trainer = train(task, method, stages, stream)
    held_out = data.windows(text[cut:], length=64, size=64, steps=12, seeds=[1234] * len(seeds))
    return evaluate(trainer, models.loss_per_seed, held_out)


def train(
    task: Task, method: str, stages: list[nn.Module], stream: Iterator[tuple[Tensor, Tensor]]
) -> PipelinedBackpropEmulator:
    delays, mitigation = METHODS[method]
    given = {"none": [0] * len(stages), "2bw": [1] * len(stages)}
    trainer = PipelinedBackpropEmulator(
        stages,
        optimizer=make_optimizer(task),
        loss_fn=lambda logits, target: models.loss_per_seed(logits, target).sum(),
        mitigation=mitigation,
        delays=given.get(delays),
        scheduler=decay(task.steps),
    )
    trainer.run(stream)
    return trainer


@torch.no_grad()
def evaluate(
    trainer: PipelinedBackpropEmulator,
    metric: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> list[float]:
    """The mean over all samples of a metric [E], with the trained weights."""
    network = nn.Sequential(*(stage.module for stage in trainer.stages)).eval()
    total, count = torch.zeros(()), 0
    for inputs, targets in batches:
        total = total + metric(network(inputs), targets) * inputs.shape[1]
        count += inputs.shape[1]
    return (total / count).tolist()  # type: ignore[no-any-return]


def done(table: Path) -> set[tuple[str, str]]:
    if not table.exists():
        return set()
    with table.open(newline="") as file:
        return {(row["case"], row["seed"]) for row in csv.DictReader(file)}


def report(table: Path) -> None:
    """Every task and optimizer: mean, spread and each seed, with the distance to training without delays.

    The distance is the mean over seeds of the paired differences, +- its standard error (their sd over the root of
    their number); within two of these it is not told from none.
    """
    groups: dict[str, dict[str, dict[str, float]]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            before, rest = row["case"].split(" method=")
            method, after = rest.split(" lr=")
            title = f"{before} lr={after} [{row['metric']}, {row['unit']}]"
            groups.setdefault(title, {}).setdefault(method, {})[row["seed"]] = float(row["median"])
    for title, methods in groups.items():
        print(f"\n{title}\n\n| method | mean | sd | minus no delay | seeds |\n|---|---|---|---|---|")
        reference = methods.get("no delay", {})
        for method in METHODS:
            seeds = methods.get(method, {})
            if not seeds:
                continue
            values = list(seeds.values())
            paired = [value - reference[seed] for seed, value in seeds.items() if seed in reference]
            spread = f"{stdev(values):.3f}" if len(values) > 1 else "-"
            gap = f"{mean(paired):+.3f}" if paired else "-"
            if len(paired) > 1 and method != "no delay":
                gap += f" +- {stdev(paired) / len(paired) ** 0.5:.3f}"
            print(f"| {method} | {mean(values):.3f} | {spread} | {gap} | {' '.join(f'{v:.2f}' for v in values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of updates")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--only", default="", help="tasks whose name and optimizer contain this")
    parser.add_argument("--methods", default="", help="comma-separated, in place of each task's own")
    parser.add_argument("--lr", type=float, help="in place of each task's own reference rate")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        report(given.table)
        return
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * given.minutes
    text = data.library_bytes()
    finished = done(given.table)
    for task in tasks(given.scale, "fashion" if given.fashion_mnist else "digits"):
        if given.lr:
            task = replace(task, lr=given.lr)
        if given.only not in f"{task.name} {task.optimizer}":
            continue
        for method in given.methods.split(",") if given.methods else task.methods:
            case = task.words(method)
            seeds = [seed for seed in range(given.seeds) if (case, str(seed)) not in finished]
            if not seeds or time.monotonic() > end:
                continue
            start = time.process_time()
            textual = task.name.startswith("decoder")
            if textual:
                values = text_run(task, method, seeds, text)
            else:  # read only where needed: the digits come with scikit-learn
                folder = given.fashion_mnist
                values = image_run(task, method, seeds, data.fashion_mnist(folder) if folder else data.digits())
            for seed, value in zip(seeds, values, strict=True):
                row = measurement(
                    benchmark="pipelined_backprop/accuracy", provider="fourfold", case=case,
                    metric="test_loss" if textual else "test_accuracy", unit="nats/byte" if textual else "%",
                    samples=[value], kind="cpu", seed=seed,
                )  # fmt: skip
                append_row(given.table, row, FIELDS)
            shown = " ".join(f"{value:.3f}" for value in values)
            print(f"{case}: {shown} ({time.process_time() - start:.0f} s of CPU)", flush=True)


if __name__ == "__main__":
    main()
