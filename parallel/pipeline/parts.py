"""Weights that lie in parts on several ranks (tensor parallelism), in a stage that updates in the middle of a stream.

Each of these ranks is in a pipeline of its own, and all of them do the same actions in the same order. Most of an
update is element by element, so that every rank does its part alone, and what they hold alike stays alike. The rest is
here: a norm over all parts, one decision about a gradient that is no number, and the refusal of what would make the
ranks differ (streams, weights, optimizers whose step needs whole matrices).
"""

from collections.abc import Callable, Iterable, Sequence
from inspect import unwrap
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from fourfold.parallel.gradients import resolve_partial_gradients
from fourfold.parallel.pipeline.failure import PipelineError, member_lost
from fourfold.parallel.pipeline.masters import MasterWeights, fingerprint, local_part
from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.values import take_apart

_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    SGD, NAdam, AdamW, Adam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop, ASGD,
)  # fmt: skip
"""Those of torch whose step of a weight reads nothing but that weight's gradient and state; subclasses come first."""

_GOES_ON, _ENDED, _RAISED = range(3)


class Parts:
    """The ranks that hold the parts of one stage's weights.

    Args:
        group: every rank of it runs this stage; None, or a group of one, where the stage is whole: then nothing is sent
            and nothing is refused.
        stage: its number, for errors.
    """

    def __init__(self, group: dist.ProcessGroup | None, stage: int) -> None:
        self.group = group if group is not None and group.size() > 1 else None
        self._stage = stage

    @classmethod
    def of(cls, module: nn.Module, stage: int) -> "Parts":
        """Those of a module, as its DTensors tell.

        Raises:
            ValueError: DTensors on several meshes, or on one of several axes.
        """
        meshes = list({p.device_mesh: name for name, p in module.named_parameters() if isinstance(p, DTensor)}.items())
        if len(meshes) > 1 or any(mesh.ndim > 1 for mesh, _ in meshes):
            raise ValueError(
                f"stage {stage}: {meshes[-1][1]} lies on {meshes[-1][0]}"
                + (f", {meshes[0][1]} on {meshes[0][0]}" if len(meshes) > 1 else "")
                + ": cut all weights of a stage over one mesh of one axis, and give replicas as dp_group"
            )
        return cls(meshes[0][0].get_group() if meshes else None, stage)

    def norm(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> float:
        """The 2-norm of all parts together, summed in fp64; those that every rank holds whole count once.

        Args:
            tensors: this rank's parts.
            parameters: whose they are, in the same order.
        Cost: one all-reduce of 8 bytes.
        """
        parts = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        if self.group is None:
            return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        total = torch.zeros((), dtype=torch.float64, device=parameters[0].device if parameters else "cpu")
        for norm, parameter in zip(norms, parameters, strict=True):
            total += norm.square() / (1 if _is_cut(parameter) else self.group.size())
        self._collective(lambda: dist.all_reduce(total, group=self.group))
        return float(total.sqrt())

    def all(self, holds: bool, device: torch.device) -> bool:
        """Whether something holds on every rank. Cost: one all-reduce of 8 bytes."""
        if self.group is None:
            return holds
        number = torch.tensor(float(holds), dtype=torch.float64, device=device)
        self._collective(lambda: dist.all_reduce(number, dist.ReduceOp.MIN, group=self.group))
        return bool(number)

    def next_of(self, pull: Callable[[], Any], device: torch.device) -> Any:
        """What `pull` gives, or None at the stream's end: on every rank the same, or an error on every rank.

        Raises:
            ValueError: the ranks' streams are of different lengths, or what this stage reads of them is not the same.
            PipelineError: another rank's stream has raised, or a rank is gone.
        Cost: one all-gather of 24 bytes, and what is read is read once more.
        """
        if self.group is None:
            return pull()
        try:
            pulled = pull()
        except Exception:
            self._gathered([_RAISED, 0, 0], device)
            raise
        mine = [_ENDED, 0, 0] if pulled is None else [_GOES_ON, *_digest(pulled)]
        rows = self._gathered(mine, device)
        ranks = dist.get_process_group_ranks(self.group)
        if failed := [rank for rank, row in zip(ranks, rows, strict=True) if row[0] == _RAISED]:
            raise PipelineError(f"stage {self._stage} stops because the stream of rank {failed[0]} has raised an error")
        for rank, row in zip(ranks, rows, strict=True):
            if row == rows[0]:
                continue
            what = "has another length" if row[0] != rows[0][0] else "has another micro-batch"
            raise ValueError(
                f"stage {self._stage}: the stream of rank {rank} {what} than that of rank {ranks[0]}, which holds "
                f"other parts of the same weights: give ranks {ranks} the same micro-batches"
            )
        return pulled

    def resolve(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients that each rank knows a part of only (gradients.resolve_partial_gradients)."""
        if self.group is not None:
            self._collective(lambda: resolve_partial_gradients(parameters))

    def check_alike(self, weights: MasterWeights) -> None:
        """Refuse weights that the ranks hold whole and not alike, and such as some ranks train and others do not.

        Raises:
            ValueError: on every rank, naming the weight.
        Cost: one small all-gather, and those weights read once.
        """
        if self.group is None or not weights.live:
            return
        prints = [(0, 0) if _is_cut(p) else fingerprint(local_part(p)) for p in weights.live]
        mine = [number for p, own in zip(weights.live, prints, strict=True) for number in (*own, int(p.requires_grad))]
        rows = self._gathered(mine, weights.live[0].device)
        for rank, row in zip(dist.get_process_group_ranks(self.group), rows, strict=True):
            if row != rows[0]:
                place = next(at for at, (one, other) in enumerate(zip(row, rows[0], strict=True)) if one != other)
                raise ValueError(
                    f"stage {self._stage}: weight {weights.names[place // 3]} of rank {rank} is not that of the first "
                    "tp rank, or one is frozen, and both hold it whole: set and freeze weights on every rank"
                )

    def check_optimizers(self, optimizers: Iterable[Optimizer], mitigation: Mitigation) -> None:
        """Refuse steps that need whole matrices, or may.

        Raises:
            ValueError: basis rotation, or an optimizer that is not known to work element by element.
        """
        if self.group is None:
            return
        if mitigation.rotate_every:
            raise ValueError(
                f"rotate (rotate_every={mitigation.rotate_every}) with tp={self.group.size()}: basis rotation needs "
                "whole matrices, and tp cuts them; choose tp=1, or leave out rotate"
            )
        for optimizer in optimizers:
            known = next((kind for kind in _ELEMENTWISE if isinstance(optimizer, kind)), None)
            step = unwrap(optimizer.step)
            if known is None or getattr(step, "__func__", step) is not unwrap(known.step):
                raise ValueError(
                    f"{type(optimizer).__name__} with tp={self.group.size()}: its step is not known to work element by "
                    "element, and each rank holds a part of a matrix; choose one of torch's "
                    f"{', '.join(kind.__name__ for kind in _ELEMENTWISE)}, or tp=1"
                )

    def lost(self, error: BaseException) -> PipelineError | None:
        """What to raise for an error of a collective inside the module; None for an error of another kind."""
        text = str(error)
        ours = isinstance(error, dist.DistError) or "gloo" in text or "Connection closed" in text
        if self.group is None or isinstance(error, PipelineError) or not isinstance(error, RuntimeError) or not ours:
            return None
        where = f"stage {self._stage} stops at its tensor parallelism"
        return member_lost(where, f"a rank of stage {self._stage}", self.group, error)

    def _gathered(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """The whole numbers of every rank, in order."""
        assert self.group is not None
        row = torch.tensor(numbers, dtype=torch.int64, device=device)
        rows = [torch.empty_like(row) for _ in range(self.group.size())]
        self._collective(lambda: dist.all_gather(rows, row, group=self.group))
        return [each.tolist() for each in rows]

    def _collective(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except RuntimeError as error:
            raise self.lost(error) or error from error


def _is_cut(parameter: Tensor) -> bool:
    """Whether each rank holds another part of it."""
    return isinstance(parameter, DTensor) and any(placement.is_shard() for placement in parameter.placements)


def _digest(value: Any) -> tuple[int, int]:
    """Two numbers that differ between micro-batches, but for a coincidence."""
    tensors, structure = take_apart(value)
    first = second = crc32(repr((structure, [(each.shape, each.dtype) for each in tensors])).encode())
    for number, each in enumerate(tensors, 1):
        one, other = fingerprint(each)
        first, second = first + number * one, second + number * other
    return first % 2**62, second % 2**62
