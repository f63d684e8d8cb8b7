"""The norm of the whole model's gradient, of which each stage knows a part and at another time."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.pipeline.links import PipeLinks
from fourfold.parallel.pipeline.settings import ClipNorm

_NOT_MADE = -1.0
"""In place of a stage's part, where it pauses before the update; a norm is never negative."""


class ModelNorms:
    """Norms by update: asked for when a stage has its part, there when all stages have theirs.

    Stages ask in order of the updates. Where a stream pauses with updates that some stages have made and others have
    not, these answer for them that they have none, so that nobody waits; once the stream goes on, all ask again.

    Args:
        clipping: of scope "model", or nothing is done.
        known: norm by number of update, changed in place; the newest `lag_updates` are kept, for the next run.

    Attributes:
        parts: of this stage, by update, of those updates that others had not made when the stream paused.
    """

    def __init__(self, clipping: ClipNorm | None, known: dict[int, float]) -> None:
        self._clipping = clipping if clipping is not None and clipping.scope == "model" else None
        self.known = known
        self.parts: dict[int, float] = {}
        self._asked: dict[int, tuple[Any, list[Tensor]]] = {}

    def of(self, update: int, norm: Tensor, links: PipeLinks) -> float | None:
        """The norm to clip `update` by, where this stage's part is `norm`; None where stages clip by their own.

        Cost: of scope "model", the host waits for `norm`, which other stages are told.
        """
        clipping = self._clipping
        if clipping is None:
            return None
        self._ask(update, float(norm), links)
        late = update - clipping.lag_updates
        if late in self.known or late in self._asked:
            found = self._wait(late, links)
            # An endless stream asks for none of the older ones again.
            for older in [each for each in self.known if each < late]:
                del self.known[older]
            return found
        return self._wait(update, links) if clipping.first_wait else None

    def take_up(self, links: PipeLinks) -> None:
        """Before a stream goes on: ask again for what was left open when it paused."""
        parts, self.parts = self.parts, {}
        for update, norm in sorted(parts.items()):
            self._ask(update, norm, links)

    def pause(self, updates: range, links: PipeLinks) -> None:
        """Where a stream pauses: answer for `updates`, which other stages have made and this one has not."""
        if self._clipping is None:
            return
        for update in updates:
            self._ask(update, _NOT_MADE, links)
        for update in sorted(self._asked):
            rows = self._rows(update, links)
            if _NOT_MADE not in rows:
                self.known[update] = joined(rows)
            elif rows[links.stage] != _NOT_MADE:
                self.parts[update] = rows[links.stage]
        forget(self.known, self._clipping.lag_updates)

    def finish(self, links: PipeLinks) -> None:
        """At the end of a run: wait for all that was asked."""
        for update in sorted(self._asked):
            self._wait(update, links)
        if self._clipping is not None:
            forget(self.known, self._clipping.lag_updates)

    def _ask(self, update: int, norm: float, links: PipeLinks) -> None:
        row = torch.tensor([norm], dtype=torch.float64, device="cpu")
        rows = [torch.empty_like(row) for _ in range(links.num_stages)]
        if links.num_stages == 1:
            self.known[update] = norm
        else:
            gather = links.guard(
                lambda: dist.all_gather(rows, row, group=links.control_group, async_op=True), "the norm of an update"
            )
            self._asked[update] = gather, rows

    def _rows(self, update: int, links: PipeLinks) -> list[float]:
        work, rows = self._asked.pop(update)
        links.guard(work.wait, "the norm of an update")
        return [float(row) for row in rows]

    def _wait(self, update: int, links: PipeLinks) -> float:
        if update not in self.known:
            self.known[update] = joined(self._rows(update, links))
        return self.known[update]


def joined(parts: Any) -> float:
    """The 2-norm of a vector whose parts, in order of the stages, have these norms."""
    return float(torch.tensor(list(parts), dtype=torch.float64, device="cpu").square().sum().sqrt())


def forget(norms: dict[int, float], lag_updates: int) -> None:
    """Keep the newest norms that a later update may ask for."""
    for update in sorted(norms)[: max(0, len(norms) - lag_updates)]:
        del norms[update]
