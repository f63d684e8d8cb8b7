"""Documents packed into rows of one length, whole where they fit: best fit first, the longest before the shorter.

Windows cut through a text wherever they fall, and most documents are seen in parts, behind the end of another. Here a
document that is no longer than a row stays whole, and a row's tokens see their own document only (the model is told
which that is). A longer one is cut into pieces of a row. What no piece fits into is padding, which is no target.

    documents   a a a a a | b b | c c c | d d d d d d d d d        rows of 5   d d d d d
                                                                               a a a a a
                                                                               d d d d .
                                                                               c c c b b

Source: Ding et al. 2024 (arXiv 2404.10830), best-fit packing; the order of rows is not theirs but a permutation.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourfold.parallel.sequence.tensors import IGNORED_LABEL

LEAST_TOKENS = 2
"""Of a piece: one token alone has nothing to predict, and is left out."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step, as ParallelModel.forward_backward takes them.

    Attributes:
        ids: [rows, seq_len] int64.
        labels, document_ids: [rows, seq_len] int64 where documents are packed; None where a row is one text.
    """

    ids: Tensor
    labels: Tensor | None = None
    document_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """Which pieces of a text are in which row.

    Attributes:
        starts, lengths: [num_pieces] of the pieces, in tokens of the text; row after row.
        first_pieces: [num_rows + 1], where each row's pieces begin among them.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    first_pieces: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first_pieces) - 1

    def num_targets(self, row: int) -> int:
        """Tokens of a row that are predicted: all but the first of each document."""
        inside = slice(self.first_pieces[row], self.first_pieces[row + 1])
        return int((self.lengths[inside] - 1).sum())


def pack(documents: NDArray[np.int64], num_tokens: int, seq_len: int) -> Packing:
    """Pack documents into rows of `seq_len` tokens; the same on every rank and under every layout.

    Args:
        documents: [num_documents], the place of each one's first token, ascending from 0.
        num_tokens: of the whole text.
    Raises:
        ValueError: no document has two tokens.
    Cost: some microseconds a document; 24 bytes a piece.
    """
    # Pieces: a document that is longer than a row gives several, and of those all but the last are whole rows.
    lengths = np.diff(documents, append=num_tokens)
    num_pieces = -(-lengths // seq_len)
    first_of_document = np.cumsum(num_pieces) - num_pieces
    index_in_document = np.arange(num_pieces.sum()) - np.repeat(first_of_document, num_pieces)
    starts = np.repeat(documents, num_pieces) + index_in_document * seq_len
    lengths = np.minimum(np.repeat(documents + lengths, num_pieces) - starts, seq_len)
    kept = lengths >= LEAST_TOKENS
    starts, lengths = starts[kept], lengths[kept]
    if not len(starts):
        raise ValueError("packing=true, but no document has two tokens: give longer ones, or leave packing out")
    # Rows: each piece, the longest first, goes where least is left that it fits into.
    row_of_piece = np.empty(len(starts), dtype=np.int64)
    num_rows = 0
    rows_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # that some row has left, ascending
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[place]
        else:
            space, row, num_rows = seq_len, num_rows, num_rows + 1
        row_of_piece[piece] = row
        left = space - length
        if left >= LEAST_TOKENS:
            if left not in rows_by_space:
                rows_by_space[left] = []
                insort(spaces, left)
            rows_by_space[left].append(row)
    by_row = np.argsort(row_of_piece, kind="stable")
    counts = np.bincount(row_of_piece, minlength=num_rows)
    first_pieces = np.concatenate([[0], np.cumsum(counts)])
    return Packing(starts[by_row], lengths[by_row], first_pieces)


def packed_batch(tokens: Tensor, packing: Packing, rows: NDArray[np.int64], seq_len: int) -> Batch:
    """The rows `rows` of a packing: ids, labels and the number of each token's document."""
    ids = torch.zeros(len(rows), seq_len, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED_LABEL)
    document_ids = torch.zeros_like(ids)
    for place, row in enumerate(rows.tolist()):
        pieces = range(packing.first_pieces[row], packing.first_pieces[row + 1])
        end = 0
        for number, piece in enumerate(pieces):
            start, length = int(packing.starts[piece]), int(packing.lengths[piece])
            inside = slice(end, end + length)
            ids[place, inside] = labels[place, inside] = tokens[start : start + length].long()
            document_ids[place, inside] = number
            end += length
        document_ids[place, end:] = len(pieces)  # padding is a document of its own, without a target
    return Batch(ids, labels, document_ids)
