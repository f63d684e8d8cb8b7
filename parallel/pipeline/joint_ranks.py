"""Ranks that compute each micro-batch of a stage together: each has a part of its weights (tp), or of the rows (cp).

Each is in a pipeline of its own, and all do the same actions in the same order: inside of a layer one waits for the
others. A rank with another micro-batch, or with none left, would give the others numbers of other rows, or leave them
waiting; so they compare what they read before they compute, and decide together whether a gradient is finite.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.communication import digest, gather_numbers, place_in
from fourfold.parallel.pipeline.failure import PipelineError, member_lost
from fourfold.parallel.pipeline.values import resolved, take_apart

_GOES_ON, _ENDED, _RAISED = range(3)
Told = TypeVar("Told")


class JointRanks:
    """The ranks that compute each micro-batch of one stage together.

    Args:
        group: every rank of it runs this stage; None, or a group of one, where a rank does so alone: then nothing is
            sent and nothing is refused.
        stage: its number, for errors.
    """

    _work = "its tensor parallelism"
    _bond = "which holds other parts of the same weights"

    def __init__(self, group: dist.ProcessGroup | None, stage: int) -> None:
        self.group = group if group is not None and group.size() > 1 else None
        self._stage = stage

    def all(self, holds: bool, device: torch.device) -> bool:
        """Whether something holds on every rank. Cost: one all-gather of 8 bytes; see gather_numbers."""
        return holds if self.group is None else all(row[0] for row in self._gathered([holds], device))

    def told(self, mine: Told) -> list[Told]:
        """What each rank tells, in rank order. Cost: an all-gather of objects, which waits for the device."""
        everyone = [mine]
        if self.group is not None:
            everyone *= self.group.size()
            self._collective(lambda: dist.all_gather_object(everyone, mine, group=self.group))
        return everyone

    def next_of(self, pull: Callable[[], Any], device: torch.device) -> Any:
        """What `pull` gives, or None at the stream's end: on every rank the same, or an error on every rank.

        Raises:
            ValueError: the ranks' streams are of different lengths, or what this stage reads of them is not the same.
            PipelineError: another rank's stream has raised, or a rank is gone.
        Cost: one all-gather of 16 bytes, and what is read is read once more, on the host.
        """
        if self.group is None:
            return pull()
        try:
            pulled = pull()
            mine = [_ENDED, 0] if pulled is None else [_GOES_ON, _digest(pulled)]
        except Exception:
            self._gathered([_RAISED, 0], device)
            raise
        rows = self._gathered(mine, device)
        ranks = dist.get_process_group_ranks(self.group)
        if failed := [rank for rank, row in zip(ranks, rows, strict=True) if row[0] == _RAISED]:
            raise PipelineError(f"stage {self._stage} stops because the stream of rank {failed[0]} has raised an error")
        for rank, row in zip(ranks, rows, strict=True):
            if row == rows[0]:
                continue
            what = "has another length" if row[0] != rows[0][0] else "has another micro-batch"
            raise ValueError(
                f"stage {self._stage}: the stream of rank {rank} {what} than that of rank {ranks[0]}, {self._bond}: "
                f"give ranks {ranks} the same micro-batches"
            )
        return pulled

    def lost(self, error: BaseException) -> PipelineError | None:
        """What to raise for an error of a collective inside the module; None for an error of another kind."""
        text = str(error)
        ours = isinstance(error, dist.DistError) or "gloo" in text or "Connection closed" in text
        if self.group is None or isinstance(error, PipelineError) or not isinstance(error, RuntimeError) or not ours:
            return None
        where = f"stage {self._stage} stops at {self._work}"
        return member_lost(where, f"a rank of stage {self._stage}", self.group, error)

    def _gathered(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """The whole numbers of every rank, in order."""
        found: list[list[int]] = []
        self._collective(lambda: found.extend(gather_numbers(place_in(self.group), numbers, device)))
        return found

    def _collective(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except RuntimeError as error:
            raise self.lost(error) or error from error


class RingRanks(JointRanks):
    """Those that share every sequence around a ring.

    They are replicas: the mean of their losses, which each makes of its own tokens, is the loss of the whole
    micro-batch, and so is the mean of their gradients.
    """

    _work = "its ring"
    _bond = "which shares every sequence with it (cp)"


def _digest(value: Any) -> int:
    """A number that differs between micro-batches, but for a coincidence."""
    tensors, structure = take_apart(value)
    seen = [(str(each.dtype), tuple(each.shape), _checksum(each)) for each in tensors]
    return digest((structure, seen))


def _checksum(tensor: Tensor) -> int:
    """Of its bits, in order."""
    return crc32(resolved(tensor.detach().cpu()).view(-1).view(torch.uint8).numpy().tobytes())
