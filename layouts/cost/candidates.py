"""Many layouts at once, as columns: what the closed forms of memory and time work on.

Every cost is written once, over numpy columns; one layout is a column of length one. So the search prices a million
layouts with the very formulas that explain a single one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.layouts.inputs.layout import CHECKPOINTING, EVERY_SCHEDULE, MITIGATION, PRECISIONS, Layout
from fourfold.parallel.decoder.limits import FP8, drains
from fourfold.parallel.pipeline.mitigation import Mitigation

Column = NDArray[Any]


def kinds_of(*columns: Column) -> tuple[Column, Column]:
    """The first row of every combination of values that occurs in some columns, and of each row the combination's
    place among these: what depends on nothing else is computed once for each.

    Cost: a sort of each column.
    """
    keys = np.zeros(1, dtype=int)
    for column in columns:
        values, places = np.unique(column, return_inverse=True)
        keys = keys * len(values) + places.reshape(-1)
    _, firsts, places = np.unique(keys, return_index=True, return_inverse=True)
    return firsts, places.reshape(-1)


NONE, SELECTIVE, FULL, STREAM = range(len(CHECKPOINTING))
FLUSHED, LOCKSTEP, ONE_F_ONE_B, DOUBLE_BUFFERED, ZERO_BUBBLE = range(len(EVERY_SCHEDULE))

_DEFAULTS: dict[str, Any] = {
    "dp": 1, "pp": 1, "cp": 1, "tp": 1, "micro_batch": 1, "checkpointing": NONE, "zero_stage": 0, "vp": 1, "ep": 1,
    "cp_heads": 1, "sequence_parallel": False, "checkpoint_every": 1, "stream_chunks": 1, "offload": False,
    "embedding_counts_as": 0, "head_counts_as": 0, "schedule": np.int8(FLUSHED), "sharded_accumulation": False,
}  # fmt: skip
_SHARED = ("global_batch", "seq_len", "mitigation", "precision", "compile")
_WORDS = {"checkpointing": CHECKPOINTING, "schedule": EVERY_SCHEDULE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Columns of equal length; `checkpointing` and `schedule` as indices of their words. Batch, length,
    mitigation, precision and whether layers are compiled are one for all."""

    dp: Column
    pp: Column
    cp: Column
    tp: Column
    micro_batch: Column
    checkpointing: Column
    zero_stage: Column
    vp: Column
    ep: Column
    cp_heads: Column
    sequence_parallel: Column
    checkpoint_every: Column
    stream_chunks: Column
    offload: Column
    embedding_counts_as: Column
    head_counts_as: Column
    schedule: Column
    sharded_accumulation: Column
    global_batch: int
    seq_len: int
    mitigation: str = MITIGATION
    precision: str = PRECISIONS[0]
    compile: bool | None = None

    def __len__(self) -> int:
        return len(self.dp)

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> "Candidates":
        """The columns of some layouts; all must have the same of what is one for all."""
        batches = {tuple(getattr(layout, name) for name in _SHARED) for layout in layouts}
        assert len(batches) == 1, f"layouts of several {', '.join(_SHARED)}: {batches}"
        columns: dict[str, Any] = {}
        for name in _DEFAULTS:
            values = [getattr(layout, name) for layout in layouts]
            columns[name] = np.array([_WORDS[name].index(v) for v in values] if name in _WORDS else values)
        return cls(**dict(zip(_SHARED, batches.pop(), strict=True)), **columns)

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, Column],
        *,
        global_batch: int,
        seq_len: int,
        mitigation: str = MITIGATION,
        precision: str = PRECISIONS[0],
        compile: bool | None = None,
    ) -> "Candidates":
        """Columns by name; a name that is left out has its default."""
        length = len(next(iter(columns.values())))
        full: dict[str, Any] = {
            name: columns.get(name, np.full(length, default)) for name, default in _DEFAULTS.items()
        }
        shared: dict[str, Any] = dict(
            zip(_SHARED, (global_batch, seq_len, mitigation, precision, compile), strict=True)
        )
        return cls(**shared, **full)

    def take(self, rows: Column) -> "Candidates":
        """The rows of a mask or of indices."""
        columns = {name: getattr(self, name)[rows] for name in _DEFAULTS}
        return Candidates(**self._shared(), **columns)

    def layout(self, row: int) -> Layout:
        values: dict[str, Any] = {name: getattr(self, name)[row].item() for name in _DEFAULTS}
        values |= {name: words[values[name]] for name, words in _WORDS.items()}
        return Layout(**self._shared(), **values)

    def _shared(self) -> dict[str, Any]:
        """What is one for all."""
        return {name: getattr(self, name) for name in _SHARED}

    @property
    def num_micro_batches(self) -> Column:
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def rotates(self) -> bool:
        """Whether the mitigation of those that never drain turns whole matrices."""
        return Mitigation.named(self.mitigation).rotate_every > 0

    @property
    def fp8(self) -> bool:
        """Whether the layers' matrix products are in fp8."""
        return self.precision in FP8

    @property
    def any_asynchronous(self) -> bool:
        return not self.drains.all()

    @property
    def drains(self) -> Column:
        """Which pipelines drain before every update: their gradients are not late."""
        return drains(self.schedule)  # type: ignore[no-any-return]

    @property
    def zero_bubble(self) -> Column:
        """Which compute weight gradients apart from those of inputs, and later."""
        zero_bubble: Column = self.schedule == ZERO_BUBBLE
        return zero_bubble

    @property
    def recomputed_share(self) -> Column:
        """Of the layers, how many run their whole forward again in backward: full checkpointing and StreamBP."""
        whole = (self.checkpointing == FULL) | (self.checkpointing == STREAM)
        return np.where(whole, 1.0 / self.checkpoint_every, 0.0)

    @property
    def tokens(self) -> Column:
        """Tokens of one micro-batch on one cp rank."""
        return self.micro_batch * (self.seq_len // self.cp)

    @property
    def shards(self) -> Column:
        """Ranks that hold the same weights, over which ZeRO shards: dp x cp."""
        return self.dp * self.cp


assert set(_DEFAULTS) | set(_SHARED) == {entry.name for entry in fields(Layout)}
