"""`layout-advisor launch`: train under a layout.toml on this machine."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fourfold.launch.processes import start_ranks
from fourfold.launch.runs import read_result
from fourfold.launch.train_options import MOST_SEED, RESUME_VALUE, as_arguments, checked
from fourfold.launch.verdict import checked_prediction, read_phases, verdict
from fourfold.layouts.inputs.layout import (
    Layout,
    check_runnable,
    read_layout_file,
    read_prediction,
    write_layout_file,
)
from fourfold.layouts.inputs.model import ModelConfig

WRITTEN = {"metrics.csv", "log.jsonl", "result.json", "checkpoints", "tokens", "tensorboard", "wandb", ".lock"}
"""What a training leaves in its folder."""


class ResumingCommand(TyperCommand):
    """`--resume` alone means the newest checkpoint; a value may follow."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = []
        for word, following in zip(args, [*args[1:], ""], strict=True):
            words.append(word)
            if word == "--resume" and not RESUME_VALUE.fullmatch(following):
                words.append("yes")
        return super().parse_args(ctx, words)


def launch(
    layout: Annotated[Path, typer.Argument(help="layout.toml, as `layout-advisor plan --out DIR` writes it.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for metrics.csv, result.json and checkpoints.")] = Path("run"),
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of weights and batches.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 0,
    resume: Annotated[
        str,
        typer.Option(
            metavar="[auto|STEP]",
            help="Go on from the newest checkpoint in --out; auto: if there is one; or from that of a step.",
        ),
    ] = "no",
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="Also where the checkpoint's run had other settings.")
    ] = False,
    engine: Annotated[str, typer.Option(help="native, or deepspeed: its ZeRO over dp.")] = "native",
    timeout_minutes: Annotated[
        float, typer.Option(help="Without progress, before a hang is told and the ranks are ended.")
    ] = 10.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a decoder on Python's own sources under LAYOUT: starts one rank a device (or core) of this machine.

    On several hosts run `torchrun ... -m fourfold.launch.train --layout LAYOUT` on each instead.
    """
    plan, model = read_layout_file(layout)
    said = checked_prediction(read_prediction(layout), str(layout))
    run_layout(
        plan, model, steps=steps, out=out, learning_rate=learning_rate, seed=seed,
        checkpoint_every=checkpoint_every, resume=resume, resume_anyway=resume_anyway,
        timeout_minutes=timeout_minutes, quiet=quiet, engine=engine,
    )  # fmt: skip
    if not quiet:
        for line in verdict(said, read_result(out), read_phases(out)):
            typer.echo(line)


def run_layout(layout: Layout, model: ModelConfig, *, out: Path, **options: Any) -> None:
    """Train under `layout` with one rank a device of this machine; results land in `out`.

    Args:
        options: the keys of TrainOptions.
    Raises:
        ValueError: what this runtime cannot run, more ranks than this machine has GPUs for (or eight a core).
        RankFailure: a rank failed; the others have been ended.
    """
    values = {name: checked(name, value, f"--{name.replace('_', '-')}") for name, value in options.items()}
    start_training(layout, model, as_arguments({"out": str(out), **values}))


def start_training(layout: Layout, model: ModelConfig, arguments: Sequence[str]) -> None:
    """Start fourfold.launch.train with `arguments` under `layout`. Raises as `run_layout`."""
    check_runnable(layout, model)
    import torch

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda" and layout.world_size > torch.cuda.device_count():
        raise ValueError(
            f"the layout {layout} needs {layout.world_size} GPUs, but this machine has {torch.cuda.device_count()}: "
            "plan for fewer, or use torchrun on several hosts"
        )
    if layout.world_size > 8 * (os.cpu_count() or 1):
        raise ValueError(
            f"the layout {layout} needs {layout.world_size} ranks, and this machine has {os.cpu_count()} cores: "
            "plan for fewer, or use torchrun on several hosts"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layout.toml"
        write_layout_file(file, layout, model)
        words = [*arguments, "--layout", str(file)]
        start_ranks("fourfold.launch.train", words, num_ranks=layout.world_size, device_type=device_type)


def fresh_folder(folder: Path) -> Path:
    """`folder`, empty. Raises ValueError where it holds anything but an earlier run's results."""
    if folder.exists():
        strange = sorted({path.name for path in folder.iterdir()} - WRITTEN)
        if strange:
            raise ValueError(f"{folder} holds {strange[0]}, which no run has written: give another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder
