"""How long and how fast a training learns, and what follows from that: its learning rates and parameter groups."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fourfold.launch.train_options import ENGINES, OPTIMIZERS, SCHEDULES
from fourfold.layouts.inputs.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How long and how fast to learn; sizes are the layout's.

    Attributes:
        steps: optimizer steps in all, those of a resumed run included.
        learning_rate: its peak, after `warmup_steps` (linear), before it falls to a tenth at the end by `schedule`:
            "cosine", "linear", or "constant" for not at all.
        beta1, beta2: AdamW's, at the global batch.
        optimizer: "adamw", or "muon" for the layers' matrices with AdamW for the rest.
        engine: "native", or "deepspeed" for its ZeRO.
        max_norm: gradients are clipped to this 2-norm over the whole model.
        precision: a word of parallel.decoder.limits.PRECISIONS; None for the device's.
        evaluate_every: steps between held-out losses while training; 0 takes none before the end.
        checkpoint_every: steps between checkpoints; 0 writes none, and a positive number also writes one at the end.
        checkpoints_in_flight: whether a pipeline that never drains does not drain at checkpoints either, but saves what
            is in flight. It then trains as without checkpoints, to the bit; only its own layout can go on from one.
        held_out_batches: global batches of held-out text for the loss at the end; 0 leaves it out.
        observe: whether the stages of a pipeline that never drains report on themselves.
    """

    steps: int
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_norm: float = 1.0
    optimizer: str = "adamw"
    engine: str = "native"
    seed: int = 0
    precision: str | None = None
    evaluate_every: int = 0
    checkpoint_every: int = 0
    checkpoints_in_flight: bool = False
    held_out_batches: int = 4
    observe: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: train for at least one step")
        for name in ("learning_rate", "max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above zero")
        for name in ("warmup_steps", "weight_decay", "evaluate_every", "checkpoint_every", "held_out_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: from 0 on, and below 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}: choose one of {', '.join(ENGINES)}")
        if self.evaluate_every and not self.held_out_batches:
            raise ValueError(f"evaluate_every={self.evaluate_every} with held_out_batches=0: give held-out batches")


_NOT_THE_MODELS = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")
_COMPARED = (
    "steps", "learning_rate", "schedule", "warmup_steps", "weight_decay", "beta1", "beta2", "max_norm",
    "optimizer", "seed",
)  # fmt: skip


def comparable_settings(config: Mapping[str, Any], layout: Layout, settings: TrainSettings) -> dict[str, Any]:
    """What a resumed run must have like the run that it resumes, whatever its layout: flat, and as JSON keeps it.

    Args:
        config: the model's, with transformers' defaults filled in.
    """
    model = {f"model.{name}": value for name, value in config.items() if name not in _NOT_THE_MODELS}
    batch = {"global_batch": layout.global_batch, "seq_len": layout.seq_len}
    flat = {**model, **batch, **{name: getattr(settings, name) for name in _COMPARED}}
    flat["precision"] = precision_of(layout, settings)
    kept: dict[str, Any] = json.loads(json.dumps(flat, default=str))
    return kept


def precision_of(layout: Layout, settings: TrainSettings) -> str | None:
    """What parallelize takes: the training's word or the layout's; None where both leave it to the device.

    Raises:
        ValueError: two different words.
    """
    said = None if layout.precision == "auto" else layout.precision
    if said and settings.precision not in (None, said):
        raise ValueError(f"precision={settings.precision}, but the layout says precision={said}: give one of them")
    return settings.precision or said


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then from the peak to a tenth of it; a function of the step, so a resumed run agrees."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    left = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.learning_rate * (0.1 + 0.9 * left)


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, norms and biases (vectors) do not."""
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
