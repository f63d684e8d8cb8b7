"""The training loop: one optimizer step after another under any layout, measured as it goes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.launch.training.blame import first_not_finite
from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.optimizers import check_optimizer, make_optimizers, set_rate
from fourfold.launch.training.rows import Order, Rows, as_rows, relative_targets
from fourfold.launch.training.settings import TrainSettings, learning_rate_at
from fourfold.launch.training.undrained import check_in_flight
from fourfold.launch.training.watch import Activity
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel import ParallelModel
from fourfold.parallel.decoder.deepspeed_model import DeepSpeedModel
from fourfold.parallel.pipeline.report import StageReport

COUNTED_STEPS = 2
"""Steps whose memory is counted: the optimizer's states are made in the first and held through the second."""


@dataclass(slots=True)
class StepRecord:
    """One step; loss and norm are global, and the time is that of the rank that took longest."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    step_s: float
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of this rank by phase: data_s, forward_backward_s, clip_s, update_s."""


class _Phases:
    """Times one step's phases, from its creation."""

    def __init__(self) -> None:
        self._start = self._since = time.perf_counter()
        self.phases: dict[str, float] = {}

    def ended(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name], self._since = now - self._since, now

    @property
    def seconds(self) -> float:
        """From the creation to the end of the last phase."""
        return self._since - self._start


@dataclass(slots=True)
class TrainResult:
    records: list[StepRecord] = field(default_factory=list)
    held_out_loss: float | None = None
    peak_bytes: int = 0
    """Most bytes that tensors held on this rank in building the model and the first steps."""
    reserved_bytes: int = 0
    """Most bytes that CUDA's allocator took from the device for them; 0 on a CPU."""
    device: str = "cpu"
    precision: str = "fp32"
    compiled: bool = False
    """Whether the layers ran through torch.compile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """What surrounds a training: where it is kept, what measures it, who is told.

    Attributes:
        gauge: made before the model was; it is stopped once the optimizer's states have been seen.
        checkpoints: where checkpoints are kept; needed when they are written or read.
        resume: the checkpoint to start from, if any.
        activity: told what this rank is doing.
        on_start: called as a step begins.
        on_step: called after every step, on every rank that knows its loss.
        on_evaluation: called with the number of steps taken and the held-out loss, on every rank.
        on_reports: called with the number of steps taken and what the stages of a pipeline that never drains have seen
            of themselves since the last time, on every rank.
    """

    gauge: MemoryGauge
    checkpoints: Checkpoints | None = None
    resume: Resume = field(default_factory=Resume)
    activity: Activity = field(default_factory=Activity)
    on_start: Callable[[int], None] = lambda step: None
    on_step: Callable[[StepRecord], None] = lambda record: None
    on_evaluation: Callable[[int, float], None] = lambda step, loss: None
    on_reports: Callable[[int, Sequence[StageReport]], None] = lambda step, reports: None

    def kept_checkpoints(self) -> Checkpoints:
        """Where checkpoints are kept; ValueError where none are."""
        if self.checkpoints is None:
            raise ValueError("checkpoints need a folder: give --out DIR")
        return self.checkpoints

    def checkpoint_failed(self) -> bool:
        """Whether this rank knows that a checkpoint in the background has failed."""
        return self.checkpoints is not None and self.checkpoints.failed

    def finish_checkpoint(self) -> None:
        """Wait for the one that is being written, if any; every rank calls. Raises CheckpointError where it fails."""
        if self.checkpoints is not None and self.checkpoints.background is not None:
            self.activity.now("finishing the checkpoint")
            self.checkpoints.wait()


def train(
    model: ParallelModel,
    layout: Layout,
    text: tuple[Tensor, Tensor] | Rows,
    settings: TrainSettings,
    run: TrainingRun,
) -> TrainResult:
    """Train `model` on `text` and return what was measured; every rank calls.

    Args:
        text: (train, held_out), one-dimensional, of any integer dtype; or the rows of every step.
    Raises:
        ValueError: nothing to resume from, a checkpoint of another model, or one that would be overwritten; a setting
            of pipelines that never drain.
        FloatingPointError: loss or gradient is no longer a finite number; weights and checkpoints are as before.
    """
    # Where to start: at a checkpoint, or at step 0 in a folder that holds none.
    check_optimizer(layout, settings)
    check_in_flight(layout, settings)
    order = Order(seq_len=layout.seq_len, global_batch=layout.global_batch, seed=settings.seed)
    batches = as_rows(text, order, held_out=settings.held_out_batches > 0)
    # DeepSpeed has the optimizer, and updates when it clips.
    if isinstance(model, DeepSpeedModel):
        optimizers, rated = [], [model.optimizer]
    else:
        optimizers = rated = make_optimizers(model, settings)
    first = 0
    if run.resume:
        run.activity.now("reading a checkpoint")
        first = run.kept_checkpoints().load(model, optimizers, run.resume)
        refuse_no_more_steps(first, settings, run.resume)
    elif settings.checkpoint_every:
        run.kept_checkpoints().refuse_overwriting()
    rows = model.batch_rows(layout.global_batch)
    result = TrainResult(device=model.device.type, precision=model.precision, compiled=model.compiled)
    for step in range(first, settings.steps):
        run.on_start(step)
        clock = _Phases()
        # This rank's rows of the step's batch, and the step's learning rate.
        batch = batches.training(step, rows)
        rate = learning_rate_at(step, settings)
        clock.ended("data_s")
        set_rate(rated, rate)
        # Gradients, refused before they reach the weights where they are no numbers; then the update.
        run.activity.now(f"step {step}: forward and backward")
        loss = model.forward_backward(batch.ids, batch.labels, batch.document_ids).item()
        clock.ended("forward_backward_s")
        norm = model.clip_grad_norm_(settings.max_norm).item()
        clock.ended("clip_s")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            run.finish_checkpoint()
            where = first_not_finite(model, batch.ids, batch.labels, batch.document_ids)
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} at step {step}{', ' if where else ''}{where}: "
                f"lower the learning rate {settings.learning_rate:.2g}"
            )
        run.activity.now(f"step {step}: update")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        # What is told and kept of the step.
        clock.ended("update_s")
        told = torch.tensor([clock.seconds, run.checkpoint_failed()], dtype=torch.float64, device=model.device)
        step_s, failed = _largest(told).tolist()
        if failed:  # on some rank; now on all of them at the same step
            run.finish_checkpoint()
        record = StepRecord(step, loss, norm, rate, step_s, clock.phases)
        result.records.append(record)
        run.on_step(record)
        if step == first + COUNTED_STEPS - 1:
            run.gauge.stop()
        if settings.evaluate_every and (step + 1) % settings.evaluate_every == 0 and step + 1 < settings.steps:
            run.activity.now(f"held-out evaluation after step {step}")
            run.on_evaluation(step + 1, held_out_loss(model, layout, batches, settings.held_out_batches))
        if settings.checkpoint_every and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps):
            run.activity.now(f"writing the checkpoint of step {step + 1}")
            run.kept_checkpoints().save(model, optimizers, step=step + 1)
    if settings.held_out_batches:
        run.activity.now("held-out evaluation")
        result.held_out_loss = held_out_loss(model, layout, batches, settings.held_out_batches)
    run.finish_checkpoint()
    run.gauge.stop()
    result.peak_bytes, result.reserved_bytes = run.gauge.peak_bytes, run.gauge.reserved_bytes
    return result


def held_out_loss(model: ParallelModel, layout: Layout, text: Tensor | Rows, num_batches: int) -> float:
    """Mean loss over the targets of `num_batches` global batches spread evenly over `text`; every rank calls."""
    order = Order(seq_len=layout.seq_len, global_batch=layout.global_batch, seed=0)
    batches = as_rows((text, text), order, held_out=True) if isinstance(text, Tensor) else text
    model.eval()
    rows = model.batch_rows(layout.global_batch)
    num_rows = num_batches * layout.global_batch
    counts = relative_targets(batches.held_out_targets(num_rows).view(num_batches, -1).sum(1)).tolist()
    total = 0.0
    for number, count in enumerate(counts):
        shift = number * layout.global_batch
        batch = batches.held_out(num_rows, slice(shift + rows.start, shift + rows.stop))
        total += model.evaluate(batch.ids, batch.labels, batch.document_ids).item() * count
    model.train()
    return total / num_batches


def refuse_no_more_steps(first: int, settings: TrainSettings, resume: Resume) -> None:
    """Raises ValueError where the checkpoint is of the last step, unless the same command is simply given again."""
    if first >= settings.steps and resume.choice != "auto":
        raise ValueError(f"the checkpoint is of step {first}, and --steps {settings.steps} asks for no more")


def largest_memory(result: TrainResult, device: torch.device) -> TrainResult:
    """The same result with the memory of the rank that had most; every rank calls."""
    most = torch.tensor([result.peak_bytes, result.reserved_bytes], dtype=torch.int64, device=device)
    result.peak_bytes, result.reserved_bytes = (int(value) for value in _largest(most).tolist())
    return result


def _largest(value: Tensor) -> Tensor:
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value
