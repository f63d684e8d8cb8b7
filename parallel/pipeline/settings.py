"""What an asynchronous pipeline is told, the same for the runtime and the emulator, and what is refused at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.optimizer import OptimizerFactory
from fourfold.parallel.pipeline.program import Program
from fourfold.parallel.pipeline.schedule import PipelineSchedule

LossFunction = Callable[[Any, Any], Tensor]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipNorm:
    """Scale an update's gradients so that their 2-norm is at most `max_norm`, before the optimizer and the mitigation.

    Attributes:
        max_norm: more than 0.
        scope: "stage" for the norm of each stage's own gradients; "model" for that of all stages' together.
        lag_updates: of scope "model". 0: the exact norm, for which every stage waits at every update until stage 0 has
            its gradient (with lockstep a drained pipeline; with 2bw of as many micro-batches as stages most of its
            gain over a drained one). L > 0: update k is scaled by the larger of the norm of update k - L, which is
            known without waiting if L is at least the stages' distance in updates
            (PipelineSchedule.distance_in_updates), and the stage's own norm, which alone bounds a sudden spike.
        first_wait: whether the first L updates, before which there is no norm, wait for the exact one. False: they are
            scaled by the stages' own norms, so that no update waits for another stage, and a stream may pause.
    """

    max_norm: float
    scope: str = "stage"
    lag_updates: int = 0
    first_wait: bool = True

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"max_norm={self.max_norm}: more than 0")
        if self.scope not in ("stage", "model"):
            raise ValueError(f"scope={self.scope!r}: choose 'stage' or 'model'")
        if self.lag_updates < 0 or (self.lag_updates and self.scope == "stage"):
            raise ValueError(f"lag_updates={self.lag_updates}: at least 0, and for scope 'model' only")
        if not (self.first_wait or self.lag_updates):
            raise ValueError("first_wait=False with lag_updates=0, where every update waits: give lag_updates")


class PipelineOptions(TypedDict, total=False):
    """The keywords of PipelineSettings, for PipelinedBackprop and PipelinedBackpropEmulator."""

    optimizer: Required[OptimizerFactory]
    loss_fn: Required[LossFunction]
    schedule: str | PipelineSchedule | Program
    mitigation: str | Mitigation
    scheduler: SchedulerFactory | None
    seed: int | None
    dtype: torch.dtype | None
    master_dtype: torch.dtype | None
    loss_weight: Callable[[Any], Tensor | float] | None
    clip: ClipNorm | float | None
    skip_nonfinite: bool
    on_gradients: Callable[[dict[str, Tensor]], None] | None
    observe: bool
    shard_optimizer: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSettings:
    """How a sequence of stages is trained.

    Attributes:
        optimizer: NamedParameters -> torch.optim.Optimizer, or several (Muon for matrices, AdamW for the rest), over
            the parameters it is called with; called once a stage that has parameters.
        loss_fn: (output, target) -> scalar mean over the micro-batch; used on the last stage.
        schedule: a name ("lockstep", "1f1b-async", "2bw:8", ...), a PipelineSchedule, or a Program.
        mitigation: names joined by "+" (see Mitigation.named), or a Mitigation.
        scheduler: optimizer -> learning-rate scheduler, stepped after each update of its stage.
        seed: if given, dropout draws from (seed, stage, micro-batch, replica); else from torch's global generator.
        dtype: what matrix products of the forward run in (torch.bfloat16, by autocast); None: the weights' own, or
            what a torch.autocast around `run` says.
        master_dtype: of the optimizers' parameters, where those of the stages are narrower (torch.float32 for bf16).
        loss_weight: target -> how much its micro-batch counts in an update (its number of targets, say, for the mean
            over targets); None: every micro-batch counts the same.
        clip: ClipNorm, or its max_norm for every stage by itself.
        skip_nonfinite: leave a micro-batch whose gradient of a stage is inf or NaN out of that stage's update; an
            update with nothing left changes neither weights nor moments.
        on_gradients: called with {parameter's name: gradient} of an update, averaged, before clipping; may change them
            in place, put others in the dict, or take some out (no gradient).
        observe: measure realised delay, prediction error, gradient norm and idle time of each stage (see report.py).
        shard_optimizer: each replica of a stage has the optimizer of a part of its parameters, whole ones (see
            partition.owners), and sends the others what they are after an update (ZeRO 1). The factory is called with
            the replica's own, and not where it owns none. Without replicas it changes nothing.
    Raises:
        ValueError: float16, whose gradients need a GradScaler.
    """

    optimizer: OptimizerFactory
    loss_fn: LossFunction | None = None
    schedule: str | PipelineSchedule | Program = "lockstep"
    mitigation: str | Mitigation = "lwpv+sc"
    scheduler: SchedulerFactory | None = None
    seed: int | None = None
    dtype: torch.dtype | None = None
    master_dtype: torch.dtype | None = None
    loss_weight: Callable[[Any], Tensor | float] | None = None
    clip: ClipNorm | float | None = None
    skip_nonfinite: bool = False
    on_gradients: Callable[[dict[str, Tensor]], None] | None = None
    observe: bool = False
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.dtype == torch.float16:
            raise ValueError(
                "dtype=float16 needs a GradScaler, whose scale would change between a forward and its backward: use "
                "bfloat16"
            )
        self._check_types()
        if isinstance(self.clip, bool | str):
            raise ValueError(f"clip={self.clip!r}: give the largest norm as a number, or a ClipNorm; None for none")
        if _has_grad_scaler(self.loss_fn):
            raise ValueError(
                "loss_fn uses a GradScaler, and no stage would unscale its gradients: use bfloat16 without"
            )

    def _check_types(self) -> None:
        if isinstance(self.optimizer, torch.optim.Optimizer) or not callable(self.optimizer):
            raise ValueError(
                f"optimizer is a {type(self.optimizer).__name__}: give what makes one of a stage's parameters, "
                "functools.partial(torch.optim.AdamW, lr=1e-3), say"
            )
        if isinstance(self.scheduler, LRScheduler):
            raise ValueError(
                f"scheduler is a {type(self.scheduler).__name__}: give what makes one of a stage's optimizer, "
                "lambda optimizer: LambdaLR(optimizer, factor), say"
            )
        for name in ("loss_fn", "scheduler", "loss_weight", "on_gradients"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a function, or None")
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds):
                words = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise ValueError(f"{name}={value!r} is a {type(value).__name__}: give {words}")
        if self.master_dtype is not None and not self.master_dtype.is_floating_point:
            raise ValueError(f"master_dtype={self.master_dtype}: weights are trained in a floating dtype")

    @property
    def chosen(self) -> Mitigation:
        """The mitigation as data. Raises ValueError for an unknown name."""
        return Mitigation.named(self.mitigation) if isinstance(self.mitigation, str) else self.mitigation

    @property
    def clipping(self) -> ClipNorm | None:
        return self.clip if isinstance(self.clip, ClipNorm | None) else ClipNorm(max_norm=float(self.clip))

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """The scheduler of an optimizer.

        Raises:
            ValueError: one that wants a metric, which a stage in mid-stream does not have.
        """
        if self.scheduler is None:
            return None
        made = self.scheduler(optimizer)
        if made is None:
            return None
        if not callable(getattr(made, "step", None)):
            raise ValueError(
                f"the scheduler factory returned {type(made).__name__}: return one torch.optim.lr_scheduler; several "
                "go into a ChainedScheduler or SequentialLR"
            )
        if getattr(made, "optimizer", optimizer) is not optimizer:
            raise ValueError(
                "the scheduler factory made a scheduler of another optimizer than the one that it is called with: its "
                "learning rate would never change"
            )
        if isinstance(made, ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau wants a metric at every update, which only the last stage has, and later: use a "
                "scheduler over updates (LambdaLR, CosineAnnealingLR, ...)"
            )
        return made


_KINDS: dict[str, tuple[type, ...]] = {
    "schedule": (str, PipelineSchedule, Program),
    "mitigation": (str, Mitigation),
    "seed": (int, type(None)),
    "dtype": (torch.dtype, type(None)),
    "master_dtype": (torch.dtype, type(None)),
    "skip_nonfinite": (bool,),
    "observe": (bool,),
}


def _has_grad_scaler(function: Any) -> bool:
    """Whether a GradScaler is among what a function was given: its closure, its object, its arguments."""
    scaler = torch.amp.GradScaler
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _filled(cell)]
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    used = [names.get(name) for name in code.co_names] if code is not None else []
    own = list(vars(function).values()) if hasattr(function, "__dict__") else []
    partial = [*getattr(function, "args", ()), *(getattr(function, "keywords", None) or {}).values()]
    return any(
        isinstance(each, scaler) for each in (*cells, *used, *own, *partial, getattr(function, "__self__", None))
    )


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not assigned yet
        return False
