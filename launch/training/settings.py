"""How long and how fast a training learns, and what follows from that: its learning rates and parameter groups."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fourfold.layouts.inputs.layout import Layout

BETAS = (0.9, 0.95)
"""AdamW's, at the global batch."""


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


_NOT_THE_MODELS = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")
_COMPARED = ("steps", "learning_rate", "warmup_steps", "weight_decay", "max_norm", "seed")


def comparable_settings(config: Mapping[str, Any], layout: Layout, settings: TrainSettings) -> dict[str, Any]:
    """What a resumed run must have like the run that it resumes, whatever its layout: flat, and as JSON keeps it.

    Args:
        config: the model's, with transformers' defaults filled in.
    """
    model = {f"model.{name}": value for name, value in config.items() if name not in _NOT_THE_MODELS}
    batch = {"global_batch": layout.global_batch, "seq_len": layout.seq_len}
    flat = {**model, **batch, **{name: getattr(settings, name) for name in _COMPARED}}
    kept: dict[str, Any] = json.loads(json.dumps(flat, default=str))
    return kept


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it; a function of the step, so a resumed run agrees."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, norms and biases (vectors) do not."""
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
