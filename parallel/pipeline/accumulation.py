"""From the gradients of micro-batches to the gradient of an update: sum, skip, average over replicas, clip.

torch's DistributedDataParallel averages by parameter wherever a backward ends; here the update is somewhere in an
endless stream, micro-batches may count differently, and a replica may lack a gradient that another has. All of it
happens before the optimizer and the mitigation see a gradient, so that what is clipped or skipped is never compensated.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import gather_rows, place_in
from fourfold.parallel.gradients import average_gradients, local_part
from fourfold.parallel.pipeline.failure import replica_lost
from fourfold.parallel.pipeline.joint_ranks import JointRanks
from fourfold.parallel.pipeline.local_parts import first_unlike, numbers_of
from fourfold.parallel.pipeline.masters import MasterWeights
from fourfold.parallel.pipeline.parts import Parts
from fourfold.parallel.pipeline.settings import PipelineSettings


class GradientSum:
    """The gradients of a stage since its last update.

    Args:
        weights: whose `live` parameters get gradients.
        dp_group: replicas of the stage, or None.
        parts: the ranks that the stage's weights are cut over.
        joint: those that compute each micro-batch together: `parts`, or some of dp_group.

    A micro-batch of weight w counts w times; where all count the same, the sums and quotients are those of plain
    gradient accumulation to the bit, because weights are taken relative to the first one of a run (`unit`).
    """

    def __init__(
        self,
        weights: MasterWeights,
        settings: PipelineSettings,
        stage: int,
        dp_group: dist.ProcessGroup | None,
        parts: Parts,
        joint: JointRanks,
    ) -> None:
        self._weights, self._settings, self._stage = weights, settings, stage
        self._parts, self._joint = parts, joint
        self._group = dp_group if dp_group is not None and dp_group.size() > 1 else None
        self._pending = 0.0  # weight of the micro-batches in the sum, in units
        self._unit = 0.0

    @property
    def under_way(self) -> tuple[float, float]:
        """The weight of the micro-batches in the sum, and its unit, for `begin`."""
        return self._pending, self._unit

    def begin(self, under_way: tuple[float, float] | None = None) -> None:
        """At the start of a run, or where a paused one goes on.

        Raises:
            ValueError: on every replica, where their weights are not the same: set on some of them only, say.
            PipelineError: a replica is gone.
        Cost: with replicas, one small all-gather, and the weights read once; as much for what tp ranks hold alike.
        """
        self._pending, self._unit = under_way or (0.0, 0.0)
        self._parts.check_alike(self._weights)
        if self._group is None or not self._weights.live:
            return
        rows = self._gathered(torch.tensor(numbers_of(self._weights.live), dtype=torch.int64, device="cpu"))
        if (unlike := first_unlike([row.tolist() for row in rows])) is not None:
            rank, weight = unlike
            ranks = dist.get_process_group_ranks(self._group)
            raise ValueError(
                f"stage {self._stage}: weight {self._weights.names[weight]} of rank {ranks[rank]} is not that of rank "
                f"{ranks[0]}, its replica, or one is frozen: they would train on as two models; set weights, freeze "
                "and load states on every replica"
            )

    def relative(self, weight: float) -> float:
        """A micro-batch's weight in units of the first one of this run that had any."""
        if not self._unit and weight:
            self._unit = weight
        return weight / self._unit if weight else 0.0

    @contextmanager
    def adding(self, weight: float) -> Iterator[None]:
        """Around the backward of a micro-batch of relative weight `weight`: add its gradients, or skip them."""
        if not self._settings.skip_nonfinite:
            yield
            self._pending += weight
            return
        # The sum so far goes aside, so that the new gradients can be looked at alone.
        live = self._weights.live
        before = [p.grad for p in live]
        for p in live:
            p.grad = None
        yield
        self._parts.resolve(live)
        new = [local_part(p.grad) for p in live if p.grad is not None]
        finite = not new or bool(torch.stack([gradient.isfinite().all() for gradient in new]).all())
        if live:
            finite = self._joint.all(finite, live[0].device)
        for p, kept in zip(live, before, strict=True):
            if not finite or p.grad is None:
                p.grad = kept
            elif kept is not None:
                p.grad = kept.add_(p.grad)
        self._pending += weight if finite else 0.0

    @torch.no_grad()
    def average(self) -> bool:
        """Turn the sums into the mean over micro-batches and replicas. Returns whether there is anything to step with.

        Raises:
            ValueError: a replica's stream has ended; a sparse gradient.
            PipelineError: a replica is gone.
        Cost: with replicas one small all-gather and one all-reduce of the gradients.
        """
        live, (total, share) = self._weights.live, self._agree()
        for name, p in zip(self._weights.names, live, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(
                    f"stage {self._stage}: {name} has a sparse gradient: make its embedding with sparse=False"
                )
        self._parts.resolve(live)
        gradients = [local_part(p.grad) for p in live if p.grad is not None]
        if gradients and self._group is not None:
            if share != 1:
                torch._foreach_mul_(gradients, share)
            try:
                # In the module's order: in how many optimizers a replica has them changes no sum.
                average_gradients(self._weights.in_order, self._group)
            except RuntimeError as error:
                raise replica_lost(self._stage, self._group, error) from error
        self._pending = 0.0
        if gradients and total not in (0.0, 1.0):
            torch._foreach_div_(gradients, total)
        return bool(gradients) and total > 0

    def end(self) -> None:
        """At the end of a run: refuse replicas whose streams go on."""
        if self._group is not None:
            self._agree(ended=True)

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradients by max_norm / (norm + 1e-6) where that is below 1, as torch's clip_grad_norm_.

        Args:
            norm: a scalar, best where the gradients are; nobody waits for it there.
        """
        gradients = [local_part(p.grad) for p in self._weights.live if p.grad is not None]
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            torch._foreach_mul_(alike, scale.to(alike[0].device, dtype))

    def norm(self) -> Tensor:
        """The 2-norm of the stage's gradients, of all tp ranks together, summed in fp64."""
        found = [(p.grad, p) for p in self._weights.in_order if p.grad is not None]
        return self._parts.norm([local_part(gradient) for gradient, _ in found], [p for _, p in found])

    def _agree(self, *, ended: bool = False) -> tuple[float, float]:
        """Over the replicas: the mean of their weights, and this one's share in the mean; missing gradients are zeros.

        The weight is in the mean unit of the replicas. Every rank tells whether its stream has ended, its unit, its
        weight and which parameters have a gradient.
        """
        if self._group is None:
            return self._pending, 1.0
        live = self._weights.live
        mine = [float(ended), self._unit, self._unit * self._pending, *(float(p.grad is not None) for p in live)]
        table = torch.stack(self._gathered(torch.tensor(mine, dtype=torch.float64, device="cpu")))
        over = table[:, 0] > 0
        if over.any() and not over.all():
            ranks = dist.get_process_group_ranks(self._group)
            shorter = [rank for rank, short in zip(ranks, over.tolist(), strict=True) if short]
            raise ValueError(
                f"stage {self._stage}: the stream of rank {shorter[0]} has ended, those of its replicas go on: give "
                f"every replica as many micro-batches (ranks {ranks})"
            )
        for p, anywhere in zip(live, table[:, 3:].any(0).tolist(), strict=True):
            if anywhere and p.grad is None:
                p.grad = torch.zeros_like(p)
        unit = float(table[:, 1].mean())
        if not unit:
            return 0.0, 1.0
        return float(table[:, 2].sum()) / (len(table) * unit), self._unit / unit

    def _gathered(self, row: Tensor) -> list[Tensor]:
        """`row` of every replica, on the host as it is. Cost: see gather_numbers."""
        assert self._group is not None
        live = self._weights.live
        try:
            return gather_rows(place_in(self._group), row, live[0].device if live else torch.device("cpu"))
        except RuntimeError as error:
            raise replica_lost(self._stage, self._group, error) from error
