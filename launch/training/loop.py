"""The training loop: one optimizer step after another under any layout, measured as it goes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fourfold.launch.training.checkpoints import load_checkpoint, refuse_overwriting, save_checkpoint
from fourfold.launch.training.data import held_out_rows, training_rows
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel import ParallelModel

BETAS = (0.9, 0.95)
"""AdamW's, at the global batch."""
COUNTED_STEPS = 2
"""Steps whose memory is counted: the optimizer's states are made in the first and held through the second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How long and how fast to learn; sizes are the layout's.

    Attributes:
        steps: optimizer steps in all, those of a resumed run included.
        learning_rate: its peak, after `warmup_steps` (linear), before a cosine down to a tenth at the end.
        max_norm: gradients are clipped to this 2-norm over the whole model.
        checkpoint_every: steps between checkpoints; 0 writes none, and a positive number also writes one at the end.
        held_out_batches: global batches of held-out text for the loss at the end; 0 leaves it out.
    """

    steps: int
    learning_rate: float = 3e-3
    warmup_steps: int = 10
    weight_decay: float = 0.1
    max_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 0
    held_out_batches: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: train for at least one step")
        for name in ("learning_rate", "max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above zero")
        for name in ("warmup_steps", "weight_decay", "checkpoint_every", "held_out_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")


@dataclass(slots=True)
class StepRecord:
    """One step as this rank saw it; the loss and the norm are global."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    step_s: float


@dataclass(slots=True)
class TrainResult:
    records: list[StepRecord] = field(default_factory=list)
    held_out_loss: float | None = None
    peak_bytes: int = 0
    """Most bytes that tensors held on this rank in building the model and the first steps."""


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it; a function of the step, so a resumed run agrees."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_optimizer(model: ParallelModel, settings: TrainSettings) -> Optimizer:
    """AdamW over `decay_groups`."""
    groups = decay_groups(list(model.parameters()), settings.weight_decay)
    return AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=True)


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, norms and biases (vectors) do not."""
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def train(
    model: ParallelModel,
    layout: Layout,
    text: tuple[Tensor, Tensor],
    settings: TrainSettings,
    *,
    gauge: MemoryGauge,
    checkpoints: Path | None = None,
    resume: bool = False,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> TrainResult:
    """Train `model` on `text` and return what was measured; every rank calls.

    Args:
        text: (train, held_out), one-dimensional uint8.
        gauge: made before the model was; it is stopped after the second step, which has seen the optimizer's states.
        checkpoints: folder for checkpoints; needed when `settings.checkpoint_every` or `resume`.
        resume: start from the newest checkpoint there instead of from scratch.
        on_step: called on every rank after every step.
    Raises:
        ValueError: nothing to resume from, a checkpoint of another model, or one that would be overwritten.
        FloatingPointError: loss or gradient is no longer a finite number; weights and checkpoints are as before.
    """
    optimizer = make_optimizer(model, settings)
    first = 0
    if resume:
        first = load_checkpoint(needed(checkpoints), model, optimizer)
        if first >= settings.steps:
            raise ValueError(f"the checkpoint is of step {first}, and --steps {settings.steps} asks for no more")
    elif settings.checkpoint_every:
        refuse_overwriting(needed(checkpoints))
    rows = model.batch_rows(layout.global_batch)
    result = TrainResult()
    for step in range(first, settings.steps):
        start = time.perf_counter()
        ids = training_rows(
            text[0], seq_len=layout.seq_len, global_batch=layout.global_batch, step=step, seed=settings.seed, rows=rows
        )
        rate = learning_rate_at(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model.forward_backward(ids).item()
        norm = model.clip_grad_norm_(settings.max_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} at step {step}: "
                f"lower the learning rate {settings.learning_rate:.2g}"
            )
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        record = StepRecord(step, loss, norm, rate, time.perf_counter() - start)
        result.records.append(record)
        on_step(record)
        if step == first + COUNTED_STEPS - 1:
            gauge.stop()
        if settings.checkpoint_every and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps):
            save_checkpoint(needed(checkpoints), model, optimizer, step=step + 1)
    if settings.held_out_batches:
        result.held_out_loss = held_out_loss(model, layout, text[1], settings.held_out_batches)
    gauge.stop()
    result.peak_bytes = gauge.peak_bytes
    return result


def held_out_loss(model: ParallelModel, layout: Layout, text: Tensor, num_batches: int) -> float:
    """Mean loss over `num_batches` global batches spread evenly over `text`; every rank calls."""
    model.eval()
    rows = model.batch_rows(layout.global_batch)
    total = 0.0
    for batch in range(num_batches):
        shift = batch * layout.global_batch
        ids = held_out_rows(
            text,
            seq_len=layout.seq_len,
            num_rows=num_batches * layout.global_batch,
            rows=slice(shift + rows.start, shift + rows.stop),
        )
        total += model.evaluate(ids).item()
    model.train()
    return total / num_batches


def slowest_and_largest(result: TrainResult, device: torch.device) -> TrainResult:
    """The same result with every step's time, and the memory, of the rank that had most; every rank calls."""
    times = torch.tensor([record.step_s for record in result.records], dtype=torch.float64, device=device)
    peak = torch.tensor(result.peak_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    for record, step_s in zip(result.records, times.tolist(), strict=True):
        record.step_s = step_s
    result.peak_bytes = int(peak)
    return result


def needed(checkpoints: Path | None) -> Path:
    """The folder of checkpoints; ValueError where there is none."""
    if checkpoints is None:
        raise ValueError("checkpoints need a folder: give --out DIR")
    return checkpoints
