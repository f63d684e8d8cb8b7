"""Train under a layout: `torchrun --nproc-per-node N -m fourfold.launch.train --layout layout.toml --steps 100`.

Every rank runs this file, started by torchrun or by mpiexec; the number of ranks must be the layout's. Rank 0,
or the last stage's first rank where the pipeline never drains, shows progress, and with --out writes `metrics.csv` (a
row a step) and `result.json`. `layout-advisor launch` starts the same through torch's elastic agent.
"""

import csv
import gc
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.launch.refusal import refuse
from fourfold.launch.training.async_loop import AsynchronousModel, train_asynchronously
from fourfold.launch.training.data import byte_frequency_loss, read_standard_library
from fourfold.launch.training.loop import (
    StepRecord,
    TrainResult,
    TrainSettings,
    make_optimizer,
    slowest_and_largest,
    train,
)
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.mpi import adopt_mpi_ranks, started_by_mpi
from fourfold.layouts.inputs.layout import Layout, read_layout_file
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.parallel import ParallelModel, init_mesh, parallelize
from fourfold.parallel.stream import StreamSettings


def build(
    layout: Layout, model: ModelConfig, settings: TrainSettings
) -> tuple[ParallelModel | AsynchronousModel, MemoryGauge]:
    """Join the mesh and build the layout's model with random weights, the same under every layout.

    Raises:
        ValueError: the world is not the layout's, or the layout is not one this runtime launches.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != layout.world_size:
        raise ValueError(
            f"the layout {layout} needs {layout.world_size} ranks, but {world_size} were started: "
            f"use torchrun --nproc-per-node {layout.world_size}, or another layout"
        )
    if not layout.runnable:
        raise ValueError(
            f"the layout {layout} uses {layout.unrunnable_reason()}, which this runtime does not have: "
            "plan again with --space runtime"
        )
    if torch.cuda.is_available():
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_world_size > torch.cuda.device_count():
            raise ValueError(f"{local_world_size} ranks on this host, but {torch.cuda.device_count()} CUDA devices")
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    mesh = init_mesh(dp=layout.dp, pp=layout.pp, cp=layout.cp, tp=layout.tp)
    _warm_up(layout, model, mesh)
    gauge = MemoryGauge(torch.device(mesh.device_type))
    return _parallel_model(layout, model.config, mesh, settings), gauge


def _parallel_model(
    layout: Layout, config: Mapping[str, Any], mesh: DeviceMesh, settings: TrainSettings
) -> ParallelModel | AsynchronousModel:
    words = dict(config)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(words.pop("model_type"), **words))
    dtype = torch.bfloat16 if mesh.device_type == "cuda" else None
    if layout.asynchronous:
        return AsynchronousModel(whole, layout, mesh, settings, dtype=dtype)
    return parallelize(
        whole,
        mesh,
        micro_batch=layout.micro_batch,
        checkpointing=layout.checkpointing,
        stream=_chunks(layout),
        zero_stage=layout.zero_stage,
        dtype=dtype,
        seed=settings.seed,
        embedding_counts_as=layout.embedding_counts_as,
        head_counts_as=layout.head_counts_as,
    )


def _chunks(layout: Layout) -> StreamSettings | None:
    """A layout that streams names its chunks of a rank's sequence; with one, they are chosen by their closed form."""
    if layout.stream_chunks == 1:
        return None
    return StreamSettings(chunk_size=-(-layout.seq_len // (layout.cp * layout.stream_chunks)))


def _warm_up(layout: Layout, model: ModelConfig, mesh: DeviceMesh) -> None:
    """One step of a model of the same kind and the smallest size that the layout can cut.

    Libraries load and connections open now, so that the first step's time and the memory are the model's own.
    """
    width = 16 * layout.tp
    small = {
        "hidden_size": width, "intermediate_size": width, "num_attention_heads": layout.tp,
        "num_key_value_heads": layout.tp, "head_dim": 16, "vocab_size": width, "num_hidden_layers": layout.pp,
        "layer_types": None, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    settings, layout = TrainSettings(steps=1), replace(layout, embedding_counts_as=0, head_counts_as=0)
    if layout.asynchronous:
        layout = replace(layout, seq_len=4)
        late = _parallel_model(layout, {**model.config, **small}, mesh, settings)
        assert isinstance(late, AsynchronousModel)
        late.pipeline.run(late.micro_batches(lambda: torch.zeros(layout.global_batch // layout.dp, 4).long()))
        del late
    else:
        parallel = _parallel_model(layout, {**model.config, **small}, mesh, settings)
        assert isinstance(parallel, ParallelModel)
        optimizer = make_optimizer(parallel, settings)
        parallel.forward_backward(torch.zeros(layout.micro_batch, 4 * layout.cp, dtype=torch.int64))
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        del parallel, optimizer
    gc.collect()  # a pipeline refers to itself; what it holds must be gone before memory is counted


class Display:
    """Progress on the rank that reports: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, layout: Layout, model: ModelConfig, settings: TrainSettings, peak_flops_per_s: float) -> None:
        self._tokens = layout.global_batch * layout.seq_len
        self._flops = model.flops_per_token(layout.seq_len) * self._tokens
        self._peak_flops_per_s = peak_flops_per_s
        self._console = Console()
        self._last_line_s = 0.0
        self._num_steps = settings.steps
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._task = self._progress.add_task("", total=settings.steps)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def show(self, step: StepRecord, memory_bytes: int) -> None:
        words = f"loss {step.loss:.3f}  {self._tokens / step.step_s:,.0f} tokens/s"
        if self._peak_flops_per_s:
            words += f"  MFU {self._flops / step.step_s / self._peak_flops_per_s:.1%}"
        words += f"  {memory_bytes / 2**30:.2f} GiB"
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step.step + 1, description=words)
        elif time.monotonic() - self._last_line_s > 5 or step.step + 1 == self._num_steps:
            self._last_line_s = time.monotonic()
            print(f"step {step.step + 1}/{self._num_steps}  {words}", flush=True)


class Metrics:
    """metrics.csv, a row as each step ends; a resumed run goes on below the rows of the steps before it."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._earlier: list[dict[str, str]] = []
        if resume and path.exists():
            with path.open(newline="") as file:
                self._earlier = list(csv.DictReader(file))
        self._file: TextIO | None = None

    def add(self, step: StepRecord) -> None:
        names = list(StepRecord.__dataclass_fields__)
        if self._file is None:
            self._file = self._path.open("w", newline="")
            writer = csv.DictWriter(self._file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in self._earlier if int(row["step"]) < step.step)
        csv.DictWriter(self._file, names, lineterminator="\n").writerow(asdict(step))
        self._file.flush()


def write_result(
    out: Path, layout: Layout, result: TrainResult, *, byte_frequency_loss: float | None, device: str
) -> None:
    """result.json, whole or not at all."""
    summary: dict[str, Any] = {
        "layout": layout.as_dict(),
        "device": device,
        "torch": torch.__version__,
        "steps_s": [step.step_s for step in result.records],
        "losses": [step.loss for step in result.records],
        "heldout_loss": result.held_out_loss,
        "byte_frequency_loss": byte_frequency_loss,
        "peak_bytes": result.peak_bytes,
    }
    partial = out / "result.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.rename(out / "result.json")


@record
def main(
    layout: Annotated[Path, typer.Option(help="layout.toml, as `layout-advisor plan` writes it")],
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
        is_first = int(os.environ.get("RANK", "0")) == 0
        plan, model = read_layout_file(layout)
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
        parallel, gauge = build(plan, model, settings)
        # Of a pipeline that never drains, only the last stage knows how a step went while it runs.
        reports = dist.get_rank() == (plan.pp - 1 if plan.asynchronous else 0)
        display = Display(plan, model, settings, peak_flops_per_s) if reports and not quiet else None
        metrics = Metrics(out / "metrics.csv", resume=resume) if reports and out is not None else None

        def on_step(step: StepRecord) -> None:
            if metrics is not None:
                metrics.add(step)
            if display is not None:
                display.show(step, gauge.in_use_bytes())

        with display or nullcontext(), gauge:
            saved: dict[str, Any] = {
                "checkpoints": out / "checkpoints" if out else None,
                "resume": resume,
                "on_step": on_step,
            }
            if isinstance(parallel, AsynchronousModel):
                result = train_asynchronously(parallel, text, gauge=gauge, **saved)
            else:
                result = train(parallel, plan, text, settings, gauge=gauge, **saved)
    except ValueError as error:
        refuse(error)
    result = slowest_and_largest(result, parallel.device)
    if is_first:
        frequencies = byte_frequency_loss(*text) if held_out_batches else None
        if not quiet and result.held_out_loss is not None:
            print(f"held-out loss {result.held_out_loss:.3f} nats a byte; byte frequencies alone {frequencies:.3f}")
        if out is not None:
            write_result(out, plan, result, byte_frequency_loss=frequencies, device=parallel.device.type)
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
