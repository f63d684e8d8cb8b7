"""The rows of every step and of every held-out loss: a function of seed, step and row, the same under every layout.

Windows fall anywhere in a text. Packed rows hold whole documents; each comes once before any comes again, in an order
of its own for each time through. Where sources are mixed, a row is of one source (see mix.py). No state but the step:
a run that goes on, under whatever layout, takes the rows that it would have taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.data import Text, held_out_starts, num_starts, training_starts, windows
from fourfold.launch.training.mix import source_of_row
from fourfold.launch.training.packing import Batch, Packing, pack, packed_batch
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel.decoder.limits import PACKED, Choice, decoder_facts, refuse
from fourfold.parallel.decoder.stage import has_sliding_window


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What the rows of a training follow from, besides the text.

    Attributes:
        shares: how often each source comes, as mix.shares_of gives them; one source has one.
    """

    seq_len: int
    global_batch: int
    seed: int
    shares: tuple[int, ...] = (1,)


class Rows(Protocol):
    """Rows of a training and of its held-out losses, by their place in the global batch."""

    def training(self, step: int, rows: slice) -> Batch:
        """Rows `rows` of the global batch of `step`."""

    def training_targets(self, step: int) -> Tensor:
        """[global_batch] float64: how many tokens each row of `step` predicts."""

    def held_out(self, num_rows: int, rows: slice) -> Batch:
        """Rows `rows` of `num_rows` that are spread evenly over the held-out text."""

    def held_out_targets(self, num_rows: int) -> Tensor:
        """[num_rows] float64: how many tokens each of those predicts."""


def check_packing(options: TrainOptions, layout: Layout, model: nn.Module) -> None:
    """Refuse mixes and packed rows that are not possible, before a rank waits for another.

    Raises:
        ValueError: as many weights as sources are needed; a layout or a model that takes no documents.
    """
    weights, data = options.data_weights, options.data
    if weights and len(weights) != len(data):
        raise ValueError(f"{len(weights)} data_weights for {len(data)} entries of data: give one for each")
    if not options.packing:
        return
    try:
        refuse(PACKED, decoder_facts(model.config.to_dict()), Choice.of(layout))  # type: ignore[union-attr, operator]
    except ValueError as error:
        raise ValueError(f"packing=true: {error}") from None
    if layout.asynchronous and layout.cp == 1 and has_sliding_window(model):
        raise ValueError(
            f"packing=true with schedule={layout.schedule!r} and a sliding window: its attention takes no documents "
            "there without a ring; use cp of at least 2, schedule='1f1b', or packing=false"
        )


def as_rows(text: "tuple[Tensor, Tensor] | Rows", order: Order, *, held_out: bool) -> Rows:
    """`text` itself, or windows of (train, held out), each one row of tokens."""
    if not isinstance(text, tuple):
        return text
    return WindowRows([Text(text[0])], [Text(text[1])] if held_out else None, order)


def relative_targets(targets: Tensor) -> Tensor:
    """How much each part of a mean counts, from its number of targets: 1 on average, and 1 where all are alike."""
    return targets / targets.mean()


class WindowRows:
    """Windows at random places of each text.

    Args:
        train: a text a source.
        held_out: one or several; None where no held-out loss is taken.
    Raises:
        ValueError: a text that is shorter than a window.
    """

    def __init__(self, train: Sequence[Text], held_out: Sequence[Text] | None, order: Order) -> None:
        self._train, self._order = [text.tokens for text in train], order
        self._held_out = [text.tokens for text in held_out or ()]
        for tokens in (*self._train, *self._held_out):
            num_starts(tokens, order.seq_len)

    def training(self, step: int, rows: slice) -> Batch:
        order = self._order
        if len(self._train) == 1:
            starts = training_starts(
                self._train[0], seq_len=order.seq_len, global_batch=order.global_batch, step=step, seed=order.seed
            )
            return Batch(windows(self._train[0], starts[rows], order.seq_len))
        places = np.random.default_rng((order.seed, step)).random(order.global_batch)
        parts = [torch.empty(0, order.seq_len, dtype=torch.int64)]
        for row in range(order.global_batch)[rows]:
            source, _ = source_of_row(step * order.global_batch + row, order.shares)
            tokens = self._train[source]
            start = np.array([places[row] * num_starts(tokens, order.seq_len)], dtype=np.int64)
            parts.append(windows(tokens, start, order.seq_len))
        return Batch(torch.cat(parts))

    def training_targets(self, step: int) -> Tensor:
        return self._targets(self._order.global_batch)

    def held_out(self, num_rows: int, rows: slice) -> Batch:
        seq_len = self._order.seq_len
        starts = held_out_starts(self._held_out, seq_len=seq_len, num_rows=num_rows)[rows]
        # Over all texts, one behind the other.
        ends = np.cumsum([num_starts(tokens, seq_len) for tokens in self._held_out])
        texts = np.searchsorted(ends, starts, side="right")
        parts = [torch.empty(0, seq_len, dtype=torch.int64)]
        for start, text in zip(starts, texts, strict=True):
            inside = start - (ends[text - 1] if text else 0)
            parts.append(windows(self._held_out[text], np.array([inside]), seq_len))
        return Batch(torch.cat(parts))

    def held_out_targets(self, num_rows: int) -> Tensor:
        return self._targets(num_rows)

    def _targets(self, num_rows: int) -> Tensor:
        return torch.full((num_rows,), self._order.seq_len - 1, dtype=torch.float64)


class PackedRows:
    """Rows of packed documents, each source's in a new order every time through.

    Args:
        train: a text with documents a source.
        held_out: the same; None where no held-out loss is taken.
    Raises:
        ValueError: a text without documents of two tokens.
    Cost: see packing.pack.
    """

    def __init__(self, train: Sequence[Text], held_out: Sequence[Text] | None, order: Order) -> None:
        self._order = order
        self._train, self._held_out = list(train), list(held_out or ())
        self._packings = [_packing(text, order.seq_len) for text in self._train]
        self._held_out_packings = [_packing(text, order.seq_len) for text in self._held_out]
        # A permutation is as long as the corpus: the last one of each source is kept, and the one before, for a batch
        # that lies across two times through.
        self._permutation = lru_cache(maxsize=2 * len(self._train))(self._draw_permutation)

    def training(self, step: int, rows: slice) -> Batch:
        return self._drawn(self._train, self._packings, self._rows_of(step)[rows])

    def training_targets(self, step: int) -> Tensor:
        counts = [self._packings[source].num_targets(row) for source, row in self._rows_of(step)]
        return torch.tensor(counts, dtype=torch.float64)

    def held_out(self, num_rows: int, rows: slice) -> Batch:
        return self._drawn(self._held_out, self._held_out_packings, self._held_out_rows(num_rows)[rows])

    def held_out_targets(self, num_rows: int) -> Tensor:
        counts = [self._held_out_packings[text].num_targets(row) for text, row in self._held_out_rows(num_rows)]
        return torch.tensor(counts, dtype=torch.float64)

    def _drawn(self, texts: Sequence[Text], packings: Sequence[Packing], rows: Sequence[tuple[int, int]]) -> Batch:
        """One batch of (text, row of its packing)."""
        return _together(
            [packed_batch(texts[at].tokens, packings[at], np.array([row]), self._order.seq_len) for at, row in rows]
        )

    def _rows_of(self, step: int) -> list[tuple[int, int]]:
        """(source, row of its packing) of each row of a step."""
        found = []
        first = step * self._order.global_batch
        for number in range(first, first + self._order.global_batch):
            source, turn = source_of_row(number, self._order.shares)
            time_through, place = divmod(turn, len(self._packings[source]))
            found.append((source, int(self._permutation(source, time_through)[place])))
        return found

    def _draw_permutation(self, source: int, time_through: int) -> NDArray[np.int64]:
        generator = np.random.default_rng((self._order.seed, source, time_through))
        return generator.permutation(len(self._packings[source]))

    def _held_out_rows(self, num_rows: int) -> list[tuple[int, int]]:
        ends = np.cumsum([len(packing) for packing in self._held_out_packings])
        places = np.linspace(0, ends[-1] - 1, num_rows).astype(np.int64)
        texts = np.searchsorted(ends, places, side="right")
        return [
            (int(text), int(place - (ends[text - 1] if text else 0))) for text, place in zip(texts, places, strict=True)
        ]


def _packing(text: Text, seq_len: int) -> Packing:
    assert text.documents is not None
    return pack(text.documents, len(text.tokens), seq_len)


def _together(parts: Sequence[Batch]) -> Batch:
    """Rows one below the other."""
    ids, labels, document_ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels", "document_ids")
    )
    return Batch(ids, labels, document_ids)
