"""Weights that lie in parts on several ranks (tensor parallelism), in a stage that updates in the middle of a stream.

Each of these ranks is in a pipeline of its own, and all of them do the same actions in the same order. Most of an
update is element by element, so that every rank does its part alone, and what they hold alike stays alike. The rest is
here: a norm over all parts, and the refusal of what would make the ranks differ (weights, optimizers whose step needs
whole matrices). What they read and what they leave out they agree on in joint_ranks.py.
"""

from collections.abc import Iterable, Sequence
from inspect import unwrap

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
from fourfold.parallel.pipeline.joint_ranks import JointRanks, RingRanks
from fourfold.parallel.pipeline.local_parts import first_unlike, numbers_of
from fourfold.parallel.pipeline.masters import MasterWeights
from fourfold.parallel.pipeline.mitigation import Mitigation

_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    SGD, NAdam, AdamW, Adam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop, ASGD,
)  # fmt: skip
"""Those of torch whose step of a weight reads nothing but that weight's gradient and state; subclasses come first."""


class Parts(JointRanks):
    """The ranks that hold the parts of one stage's weights; a group of None where the stage is whole."""

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

    def or_ring(self, module: nn.Module) -> JointRanks:
        """These, or of a module that shares sequences the ranks of its `cp_group`.

        Raises:
            ValueError: it does both.
        """
        ring = RingRanks(getattr(module, "cp_group", None), self._stage)
        if ring.group is not None and self.group is not None:
            raise ValueError(
                f"stage {self._stage} is cut over tp={self.group.size()} and shares sequences over "
                f"cp={ring.group.size()}, which no pipeline that never drains does at once: choose tp=1 or cp=1"
            )
        return self if ring.group is None else ring

    def norm(self, tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all parts together, a scalar summed in fp64; those that every rank holds whole count once.

        Args:
            tensors: this rank's parts.
            parameters: whose they are, in the same order.
        Cost: one all-reduce of 8 bytes.
        """
        parts = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        if self.group is None:
            return torch.linalg.vector_norm(torch.stack(norms)) if norms else no_norm()
        total = torch.zeros((), dtype=torch.float64, device=parameters[0].device if parameters else "cpu")
        for norm, parameter in zip(norms, parameters, strict=True):
            total += norm.square() / (1 if _is_cut(parameter) else self.group.size())
        self._collective(lambda: dist.all_reduce(total, group=self.group))
        return total.sqrt()

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
        rows = self._gathered(numbers_of(weights.live, _is_cut), weights.live[0].device)
        if (unlike := first_unlike(rows)) is not None:
            rank, weight = unlike
            raise ValueError(
                f"stage {self._stage}: weight {weights.names[weight]} of rank "
                f"{dist.get_process_group_ranks(self.group)[rank]} is not that of the first tp rank, or one is frozen, "
                "and both hold it whole: set and freeze weights on every rank"
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


def no_norm() -> Tensor:
    """The norm of nothing."""
    return torch.zeros((), dtype=torch.float64, device="cpu")


def _is_cut(parameter: Tensor) -> bool:
    """Whether each rank holds another part of it."""
    return isinstance(parameter, DTensor) and any(placement.is_shard() for placement in parameter.placements)
