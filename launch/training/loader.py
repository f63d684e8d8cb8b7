"""Batches of tokens in an order that is the same under every layout and goes on where it was left.

    batches = TokenBatches(tokens, seq_len=1024, global_batch=16, rows=model.batch_rows(16))
    for ids in batches:
        ...
    torch.save(batches.state_dict(), path)

A batch depends on the seed, the step and the row alone, so the state is one number, whatever the layout. The names are
those that torchdata's StatefulDataLoader looks for; workers have nothing to do here, because a row is a slice of
memory-mapped tokens. `PackedBatches` has rows of whole documents, for `forward_backward(ids, labels, document_ids)`.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from fourfold.launch.training.data import Text, training_rows
from fourfold.launch.training.packing import Batch
from fourfold.launch.training.rows import Order, PackedRows

Drawn = TypeVar("Drawn", Tensor, Batch)


class _Batches(IterableDataset[Drawn]):
    """Batches one after the other, with the step as their state."""

    def __init__(
        self, tokens: Tensor, *, seq_len: int, global_batch: int, rows: slice | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}: give one row of whole numbers")
        if seq_len < 2 or global_batch < 1:
            raise ValueError(f"seq_len={seq_len}, global_batch={global_batch}: at least 2 tokens and one row")
        self._tokens, self._seq_len, self._global_batch = tokens, seq_len, global_batch
        self._rows = slice(0, global_batch) if rows is None else rows
        self._seed = seed
        self.step = 0
        """Of the batch that comes next."""

    def _draw(self, step: int) -> Drawn:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Drawn]:
        while True:
            step, self.step = self.step, self.step + 1
            yield self._draw(step)

    def state_dict(self) -> dict[str, int]:
        """Where the order stands, and what makes it."""
        return {
            "step": self.step, "seed": self._seed, "seq_len": self._seq_len, "global_batch": self._global_batch,
            "num_tokens": len(self._tokens),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there, under any layout. Raises ValueError where the order would be another."""
        mine: dict[str, int] = self.state_dict()
        for name in [*mine, *(name for name in state if name not in mine)]:
            has, wants = state.get(name), mine.get(name)
            if name != "step" and has != wants:
                raise ValueError(f"the batches were of {name}={has}, these are of {wants}: give the same")
        self.step = state["step"]


class TokenBatches(_Batches[Tensor]):
    """Endless batches: [rows, seq_len] int64 each.

    Args:
        tokens: one-dimensional, of any integer dtype; memory-mapped ones are read row by row.
        seq_len: tokens a row.
        global_batch: rows a step over all dp ranks.
        rows: those of this dp rank, as ParallelModel.batch_rows gives them; None for all.
    Raises:
        ValueError: fewer tokens than a row, no row, or a row of one token, which has nothing to predict.
    """

    def __init__(
        self, tokens: Tensor, *, seq_len: int, global_batch: int, rows: slice | None = None, seed: int = 0
    ) -> None:
        super().__init__(tokens, seq_len=seq_len, global_batch=global_batch, rows=rows, seed=seed)
        if len(tokens) < seq_len:
            raise ValueError(f"seq_len={seq_len}, but there are {len(tokens)} tokens: use a shorter one")

    def _draw(self, step: int) -> Tensor:
        return training_rows(
            self._tokens, seq_len=self._seq_len, global_batch=self._global_batch, step=step, seed=self._seed,
            rows=self._rows,
        )  # fmt: skip


class PackedBatches(_Batches[Batch]):
    """Endless batches of packed documents: a `Batch` each, with ids, labels and document_ids, [rows, seq_len] int64.

    Args:
        tokens, seq_len, global_batch, rows, seed: as of TokenBatches.
        documents: [num_documents], the place of each document's first token in `tokens`, ascending from 0.
    Raises:
        ValueError: as TokenBatches; places that are none, or no document of two tokens.
    Cost: see packing.pack.
    """

    def __init__(
        self,
        tokens: Tensor,
        documents: NDArray[np.int64],
        *,
        seq_len: int,
        global_batch: int,
        rows: slice | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tokens, seq_len=seq_len, global_batch=global_batch, rows=rows, seed=seed)
        places = np.asarray(documents, dtype=np.int64)
        rising = places.ndim == 1 and len(places) > 0 and places[0] == 0 and bool((np.diff(places) > 0).all())
        if not rising or places[-1] >= len(tokens):
            raise ValueError(
                f"documents: give the place of each one's first token, rising from 0 and below {len(tokens)}"
            )
        self._num_documents = len(places)
        order = Order(seq_len=seq_len, global_batch=global_batch, seed=seed)
        self._packed = PackedRows([Text(tokens, places)], None, order)

    def _draw(self, step: int) -> Batch:
        return self._packed.training(step, self._rows)

    def state_dict(self) -> dict[str, int]:
        """Where the order stands, and what makes it."""
        return super().state_dict() | {"num_documents": self._num_documents}
