"""Train under a layout: `torchrun --nproc-per-node N -m fourfold.launch.train --layout layout.toml --steps 100`.

Every rank runs this file, started by torchrun or by mpiexec; the number of ranks must be the layout's. Rank 0,
or the last stage's first rank where the pipeline never drains, shows progress, and with --out writes `metrics.csv` (a
row a step) and `result.json`. `layout-advisor launch` starts the same through torch's elastic agent.
"""

import logging
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from torch.distributed.elastic.multiprocessing.errors import record

from fourfold.launch.refusal import refuse
from fourfold.launch.training.async_loop import AsynchronousModel, train_asynchronously
from fourfold.launch.training.build import build
from fourfold.launch.training.data import byte_frequency_loss, read_standard_library
from fourfold.launch.training.loop import StepRecord, TrainingRun, slowest_and_largest, train
from fourfold.launch.training.mpi import adopt_mpi_ranks, started_by_mpi
from fourfold.launch.training.progress import Display
from fourfold.launch.training.records import Metrics, write_result
from fourfold.launch.training.settings import TrainSettings
from fourfold.layouts.inputs.layout import read_layout_file


@record
def main(
    layout_file: Annotated[Path, typer.Option("--layout", help="layout.toml, as `layout-advisor plan` writes it")],
    steps: Annotated[int, typer.Option(help="optimizer steps in all")] = 100,
    out: Annotated[Path | None, typer.Option(help="folder for metrics.csv, result.json and checkpoints")] = None,
    learning_rate: Annotated[float, typer.Option(help="at its peak")] = 3e-3,
    warmup_steps: Annotated[int, typer.Option(help="linear warm-up")] = 10,
    seed: Annotated[int, typer.Option(help="of weights and batches")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints; 0: none")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --out")] = False,
    held_out_batches: Annotated[int, typer.Option(help="batches of held-out text at the end; 0: none")] = 4,
    peak_flops_per_s: Annotated[float, typer.Option(help="of all devices together, for MFU; 0: not shown")] = 0.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
) -> None:
    """Train a decoder on the standard library's sources under a layout; run it on every rank, with torchrun."""
    # A rank that waits for a dead one is ended by the elastic agent; its own complaint would hide the cause.
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        if started_by_mpi(os.environ):
            adopt_mpi_ranks()
        # What is asked for, refused before any rank waits for another.
        layout, model = read_layout_file(layout_file)
        settings = TrainSettings(
            steps=steps,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            seed=seed,
            checkpoint_every=checkpoint_every,
            held_out_batches=held_out_batches,
        )
        if model.vocab_size < 256:
            raise ValueError(f"vocab_size={model.vocab_size}: the text is bytes, so the model needs at least 256")
        if out is None and (checkpoint_every or resume):
            raise ValueError("checkpoints need a folder: give --out DIR")
        if out is not None:
            _make_folder(out)
        text = read_standard_library()
        parallel_model, gauge = build(layout, model, settings)
        # Of a pipeline that never drains, only the last stage knows how a step went while it runs.
        reports = dist.get_rank() == (layout.pp - 1 if layout.asynchronous else 0)
        display = Display(layout, model, settings, peak_flops_per_s) if reports and not quiet else None
        metrics = Metrics(out / "metrics.csv", resume=resume) if reports and out is not None else None

        def on_step(step: StepRecord) -> None:
            if metrics is not None:
                metrics.add(step)
            if display is not None:
                display.show(step, gauge.in_use_bytes())

        run = TrainingRun(
            gauge=gauge, checkpoints=out / "checkpoints" if out else None, resume=resume, on_step=on_step
        )  # fmt: skip
        with display or nullcontext(), gauge:
            if isinstance(parallel_model, AsynchronousModel):
                result = train_asynchronously(parallel_model, text, run)
            else:
                result = train(parallel_model, layout, text, settings, run)
    except ValueError as error:
        refuse(error)
    result = slowest_and_largest(result, parallel_model.device)
    if dist.get_rank() == 0:
        frequencies = byte_frequency_loss(*text) if held_out_batches else None
        if not quiet and result.held_out_loss is not None:
            print(f"held-out loss {result.held_out_loss:.3f} nats a byte; byte frequencies alone {frequencies:.3f}")
        if out is not None:
            write_result(
                out, layout, result, byte_frequency_loss=frequencies, device=parallel_model.device.type
            )  # fmt: skip
    dist.destroy_process_group()


def _make_folder(out: Path) -> None:
    """Now, and not after hours of training. Raises ValueError where results could not be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}: give a folder that can be written") from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
