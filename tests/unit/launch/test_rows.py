"""Rows of a training: one order under every cut over ranks, known from the step alone; mixes in exact proportion."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.one_loss import tiny_model

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.data import Text, held_out_rows, standard_library, training_rows
from fourfold.launch.training.mix import shares_of, source_of_row
from fourfold.launch.training.rows import Order, PackedRows, Rows, WindowRows, check_packing
from fourfold.layouts.inputs.layout import Layout

GLOBAL_BATCH = 4


def text(first: int, *lengths: int) -> Text:
    """Tokens that count from `first`, in documents of `lengths`."""
    tokens = torch.arange(first, first + sum(lengths), dtype=torch.int32)
    return Text(tokens, np.cumsum([0, *lengths])[:-1])


def order(*weights: float) -> Order:
    return Order(seq_len=6, global_batch=GLOBAL_BATCH, seed=5, shares=shares_of(weights or (1.0,)))


ONE = [text(0, 6, 4, 2, 9, 5, 3, 3, 6, 12)]
TWO = [*ONE, text(1000, 7, 5, 30)]
MADE: dict[str, Rows] = {
    "windows": WindowRows(ONE, ONE, order()),
    "windows of a mix": WindowRows(TWO, TWO, order(3, 1)),
    "packed": PackedRows(ONE, ONE, order()),
    "packed mix": PackedRows(TWO, TWO, order(3, 1)),
}


@pytest.mark.parametrize("rows", MADE.values(), ids=MADE)
def test_any_cut_over_ranks_and_any_order_of_asking_is_the_same(rows):
    whole = [rows.training(step, slice(0, GLOBAL_BATCH)) for step in range(6)]
    for step in (5, 2, 0, 3):  # as a run that goes on at that step would
        for start in range(GLOBAL_BATCH):
            one = rows.training(step, slice(start, start + 1))
            assert torch.equal(one.ids[0], whole[step].ids[start])
            if one.document_ids is not None:
                assert torch.equal(one.document_ids[0], whole[step].document_ids[start])
                assert torch.equal(one.labels[0], whole[step].labels[start])
    assert len({tuple(batch.ids.flatten().tolist()) for batch in whole}) == 6


@pytest.mark.parametrize("rows", MADE.values(), ids=MADE)
def test_targets_are_counted_as_the_rows_have_them(rows):
    for batch, told in (
        (rows.training(3, slice(0, GLOBAL_BATCH)), rows.training_targets(3)),
        (rows.held_out(5, slice(0, 5)), rows.held_out_targets(5)),
    ):
        counted = torch.full((len(batch.ids),), 5.0, dtype=torch.float64)
        if batch.labels is not None:
            inside = (batch.labels[:, 1:] != -100) & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
            counted = inside.sum(1).double()
        assert torch.equal(counted, told)


def test_windows_of_one_source_are_those_of_before():
    tokens = ONE[0].tokens
    rows = MADE["windows"]
    kept = slice(1, 3)
    truth = training_rows(tokens, seq_len=6, global_batch=GLOBAL_BATCH, step=2, seed=5, rows=kept)
    assert torch.equal(rows.training(2, kept).ids, truth)
    assert torch.equal(rows.held_out(8, kept).ids, held_out_rows(tokens, seq_len=6, num_rows=8, rows=kept))


def test_packed_documents_come_once_each_time_through():
    rows = PackedRows(ONE, None, order())
    num_rows = len(rows._packings[0])
    seen: list[list[int]] = []
    for step in range(2 * num_rows // GLOBAL_BATCH + 1):
        seen += rows.training(step, slice(0, GLOBAL_BATCH)).ids.tolist()
    first, second = seen[:num_rows], seen[num_rows : 2 * num_rows]
    assert sorted(first) == sorted(second)
    assert first != second
    assert set(range(50)) == {token for row in first for token in row}


def test_a_mix_is_in_proportion_and_a_row_is_of_one_source():
    for rows in (MADE["windows of a mix"], MADE["packed mix"]):
        taken = [rows.training(step, slice(0, GLOBAL_BATCH)).ids for step in range(10)]
        first = sum(int((ids[:, 0] < 1000).sum()) for ids in taken)
        assert first == 30
        assert all((ids < 1000).all() or ids[0] >= 1000 for batch in taken for ids in batch)
        held_out = rows.held_out(9, slice(0, 9)).ids
        assert held_out[0, 0] < 1000 <= held_out[-1, 0]


def test_the_sources_of_the_module_s_picture():
    shares = shares_of((0.5, 0.25, 0.25))
    assert [source_of_row(row, shares)[0] for row in range(8)] == [2, 0, 1, 0, 2, 0, 1, 0]


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=5), st.integers(0, 3000))
def test_every_source_comes_as_often_as_its_weight_says(weights, num_rows):
    shares, turns = shares_of(weights), Counter[int]()
    for row in range(num_rows):
        source, turn = source_of_row(row, shares)
        assert turn == turns[source]
        turns[source] += 1
    for source, weight in enumerate(weights):
        exact = num_rows * Fraction(weight) / sum(map(Fraction, weights))
        assert abs(turns[source] - exact) < len(weights)


@pytest.mark.parametrize(
    ("text_", "said"), [(text(0, 5), "seq_len=6 is longer than the text of 5"), (text(0, 1, 1), "two tokens")]
)
def test_a_text_without_a_row_is_refused_before_it_is_asked_for(text_, said):
    kind = WindowRows if len(text_.tokens) == 5 else PackedRows
    for train, held_out in (([text_], ONE), (ONE, [text_])):
        with pytest.raises(ValueError, match=said):
            kind(train, held_out, order())


@pytest.mark.parametrize(
    ("keys", "fields", "said"),
    [
        ({"data_weights": (0.5,), "data": ("a", "b")}, {}, "1 data_weights for 2 entries of data: give one for each"),
        ({"data_weights": (0.5,)}, {}, "1 data_weights for 0 entries of data"),
        ({"packing": True}, {"cp": 2, "pp": 2}, "packing=true: packed rows with cp=2 and pp=2"),
        ({"packing": True}, {"cp": 2, "tp": 2, "sequence_parallel": True}, "choose cp=1 or sequence_parallel=false"),
        ({"packing": True}, {"pp": 2, "schedule": "lockstep"}, "and a sliding window: .* use cp of at least 2"),
        (
            {"packing": True},
            {"pp": 2, "schedule": "lockstep", "checkpointing": "stream"},
            "checkpointing='stream' and schedule='lockstep'",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(keys, fields, said):
    model = tiny_model("mistral", sliding_window=5)
    layout = Layout(global_batch=4, seq_len=16, **fields)
    with pytest.raises(ValueError, match=said) as error:
        check_packing(TrainOptions(**keys), layout, model)
    assert "\n" not in str(error.value)
    for taken in ({}, {"pp": 2, "schedule": "lockstep"}, {"pp": 2, "schedule": "2bw", "checkpointing": "stream"}):
        layout = Layout(global_batch=4, seq_len=16, cp=2, **taken)
        check_packing(TrainOptions(packing="packing" not in keys), layout, model)


def test_the_standard_library_has_a_document_a_file():
    train, held_out = standard_library()
    for part in (train, held_out):
        assert part.documents is not None
        assert part.documents[0] == 0
        assert (np.diff(part.documents) > 0).all()
        assert len(part.documents) > 20
        assert part.documents[-1] < len(part.tokens)
