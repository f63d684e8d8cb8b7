"""A stage's optimizer spread over its replicas (ZeRO 1): who owns which weights, and how they come to the others.

torch's ZeroRedundancyOptimizer wraps one optimizer and sends weights after each of its steps. Here an update has
several optimizers, answers to delay around them, and predicted weights that only who has the moments can make. So a
replica owns whole parameters, on which everything works as it would on all of them, Muon and basis rotation too, since
no matrix is cut; what is computed there, weights or predictions of them, is gathered by all.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold.parallel.pipeline.failure import replica_lost
from fourfold.parallel.pipeline.partition import owners

Made = TypeVar("Made")


class Shards:
    """Which of a stage's parameters each of its replicas owns.

    Args:
        named: the stage's trained parameters, (name, parameter), in the module's order.
        stage: its number, for errors.
        group: the replicas.
    Raises:
        ValueError: a parameter that is cut already (a DTensor).

    Attributes:
        names: of the parameters by their owners, those of the first replica first.
        own: where in `names` this replica's stand.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], stage: int, group: dist.ProcessGroup) -> None:
        if cut := [name for name, p in named if isinstance(p, DTensor)]:
            raise ValueError(
                f"stage {stage}: shard_optimizer=True spreads whole parameters over the replicas, and {cut[0]} is a "
                "DTensor, cut over other ranks already: leave shard_optimizer out"
            )
        self._stage, self._group = stage, group
        owner = owners([p.numel() for _, p in named], group.size())
        self._set([[name for (name, _), who in zip(named, owner, strict=True) if who == rank]
                   for rank in range(group.size())])  # fmt: skip

    @property
    def num_replicas(self) -> int:
        return self._group.size()

    @property
    def replica(self) -> int:
        """This one's number."""
        return self._group.rank()

    def do_together(self, work: Callable[[], Made]) -> list[Made]:
        """Do something on every replica; returns what each has of it, small objects.

        Raises:
            ValueError: it failed on another replica; here, what it raised.
        """
        done, failure = None, None
        try:
            done = work()
        except Exception as error:
            failure = error
        outcomes = self.told(("" if failure is None else f"{type(failure).__name__}: {failure}", done))
        if failure is not None:
            raise failure
        for number, (words, _) in enumerate(outcomes):
            if words:
                rank = dist.get_process_group_ranks(self._group)[number]
                raise ValueError(f"stage {self._stage}: its replica on rank {rank} has failed: {words}")
        return [each for _, each in outcomes]  # type: ignore[misc]

    def follow(self, names: list[list[str]]) -> None:
        """Take the order of each replica's parameters from it: that of its optimizers."""
        self._set(names)

    def told(self, own: Made) -> list[Made]:
        """What every replica tells, a small object each. Raises PipelineError: a replica is gone."""
        answers: list[Made | None] = [None] * self.num_replicas
        try:
            dist.all_gather_object(answers, own, group=self._group)
        except RuntimeError as error:
            raise replica_lost(self._stage, self._group, error) from error
        return answers  # type: ignore[return-value]

    @torch.no_grad()
    def gathered(self, own: Sequence[Tensor], shapes: Sequence[Tensor]) -> list[Tensor]:
        """New tensors with every replica's, in the order of `names`; every replica calls.

        Args:
            own: this replica's.
            shapes: tensors with the shapes, dtypes and devices of all; what is wider is rounded before it is sent.
        Raises:
            PipelineError: a replica is gone.
        Cost: a broadcast of each replica's share, all at once: (n-1)/n of all bytes are received by each of n.
        """
        found: list[Tensor] = []
        works = []
        try:
            for number, names in enumerate(self._of):
                part = shapes[len(found) : len(found) + len(names)]
                flats = {dtype: _flat(part, dtype) for dtype in {each.dtype: None for each in part}}
                views = _views(part, flats)
                if number == self.replica:
                    for view, tensor in zip(views, own, strict=True):
                        view.copy_(tensor)
                for flat in (flat for flat in flats.values() if flat.numel()):
                    sent = flat.view(torch.uint8)
                    works.append(dist.broadcast(sent, group=self._group, group_src=number, async_op=True))
                found += views
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise replica_lost(self._stage, self._group, error) from error
        return found

    def _set(self, of: list[list[str]]) -> None:
        self._of = of
        self.names = [name for names in of for name in names]
        start = sum(map(len, of[: self.replica]))
        self.own = slice(start, start + len(of[self.replica]))


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Room for those of one dtype, one after another."""
    some = [tensor for tensor in tensors if tensor.dtype == dtype]
    return torch.empty(sum(tensor.numel() for tensor in some), dtype=dtype, device=some[0].device)


def _views(tensors: Sequence[Tensor], flats: dict[torch.dtype, Tensor]) -> list[Tensor]:
    """The place of each tensor in the room of its dtype."""
    used = dict.fromkeys(flats, 0)
    views = []
    for tensor in tensors:
        start = used[tensor.dtype]
        used[tensor.dtype] += tensor.numel()
        views.append(flats[tensor.dtype][start : used[tensor.dtype]].view(tensor.shape))
    return views
