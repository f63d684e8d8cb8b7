"""Packed rows: every document whole where it fits, nothing twice, nothing lost but single tokens."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourfold.launch.training.packing import pack, packed_batch


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])[:-1]


def rows_of(lengths: list[int], seq_len: int) -> list[list[tuple[int, int]]]:
    """(start, length) of the pieces of each row."""
    packing = pack(starts_of(lengths), sum(lengths), seq_len)
    pieces = list(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    ends = packing.first_pieces.tolist()
    return [pieces[start:end] for start, end in itertools.pairwise(ends)]


def test_the_rows_of_the_module_s_picture():
    assert rows_of([5, 2, 3, 9], 5) == [[(0, 5)], [(10, 5)], [(15, 4)], [(5, 2), (7, 3)]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 16))
def test_every_token_is_in_one_row(lengths, seq_len):
    if max(lengths) == 1:
        with pytest.raises(ValueError, match="no document has two tokens"):
            pack(starts_of(lengths), sum(lengths), seq_len)
        return
    rows = rows_of(lengths, seq_len)
    for row in rows:
        assert sum(length for _, length in row) <= seq_len
        assert min(length for _, length in row) >= 2
    taken = sorted(token for row in rows for start, length in row for token in range(start, start + length))
    alone = set()  # the rest of a document that is one token, which has nothing to predict
    for start, length in zip(starts_of(lengths).tolist(), lengths, strict=True):
        if length % seq_len == 1:
            alone.add(start + length - 1)
        if length <= seq_len and length > 1:  # whole
            assert [(start, length)] == [piece for row in rows for piece in row if piece[0] == start]
    assert taken == sorted(set(range(sum(lengths))) - alone)
    # No two rows whose pieces one would hold: best fit leaves at most one row half empty.
    assert sum(2 * sum(length for _, length in row) <= seq_len for row in rows) <= 1


def test_a_row_tells_its_documents_and_padding_is_no_target():
    tokens = torch.arange(100, 119, dtype=torch.int32)
    packing = pack(starts_of([5, 2, 3, 9]), 19, 5)
    batch = packed_batch(tokens, packing, np.array([3, 2]), 5)
    assert batch.ids.tolist() == [[105, 106, 107, 108, 109], [115, 116, 117, 118, 0]]
    assert batch.labels is not None
    assert batch.document_ids is not None
    assert batch.labels.tolist() == [[105, 106, 107, 108, 109], [115, 116, 117, 118, -100]]
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert [packing.num_targets(row) for row in range(4)] == [4, 4, 3, 3]
