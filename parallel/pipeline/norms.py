"""The norm of the whole model's gradient, of which each stage knows a part and at another time."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.pipeline.links import PipeLinks
from fourfold.parallel.pipeline.settings import ClipNorm


class ModelNorms:
    """Norms by update: asked for when a stage has its part, there when all stages have theirs.

    Args:
        clipping: of scope "model", or nothing is done.
        known: norm by number of update, changed in place; the newest `lag_updates` are kept, for the next run.
    """

    def __init__(self, clipping: ClipNorm | None, known: dict[int, float]) -> None:
        self._clipping = clipping if clipping is not None and clipping.scope == "model" else None
        self.known = known
        self._asked: dict[int, tuple[Any, list[Tensor]]] = {}
        self._links: PipeLinks | None = None

    def of(self, update: int, norm: float, links: PipeLinks) -> float | None:
        """The norm to clip `update` by, where this stage's part is `norm`; None where stages clip by themselves."""
        if self._clipping is None:
            return None
        self._links = links
        row = torch.tensor([norm], dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(links.num_stages)]
        if links.num_stages == 1:
            self.known[update] = norm
        else:
            gather = links.guard(
                lambda: dist.all_gather(rows, row, group=links.control_group, async_op=True), "the norm of an update"
            )
            self._asked[update] = gather, rows
        late = update - self._clipping.lag_updates
        return self._wait(late if late in self.known or late in self._asked else update)

    def finish(self) -> None:
        """At the end of a run: wait for all that was asked."""
        for update in sorted(self._asked):
            self._wait(update)
        if self._clipping is not None:
            forget(self.known, self._clipping.lag_updates)

    def _wait(self, update: int) -> float:
        if update not in self.known:
            assert self._links is not None
            work, rows = self._asked.pop(update)
            self._links.guard(work.wait, "the norm of an update")
            self.known[update] = joined(float(row) for row in rows)
        return self.known[update]


def joined(parts: Any) -> float:
    """The 2-norm of a vector whose parts, in order of the stages, have these norms."""
    return float(torch.tensor(list(parts), dtype=torch.float64).square().sum().sqrt())


def forget(norms: dict[int, float], lag_updates: int) -> None:
    """Keep the newest norms that a later update may ask for."""
    for update in sorted(norms)[: max(0, len(norms) - lag_updates)]:
        del norms[update]
