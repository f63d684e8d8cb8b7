"""The precision of a training is said by its settings or by its layout, and two words that differ are refused."""

import pytest

from fourfold.launch.training.settings import TrainSettings, precision_of
from fourfold.layouts.inputs.layout import Layout


@pytest.mark.parametrize(
    ("layout", "settings", "expected"),
    [("auto", None, None), ("bf16", None, "bf16"), ("auto", "fp32", "fp32"), ("fp32", "fp32", "fp32")],
)
def test_one_word_is_enough(layout, settings, expected):
    asked = Layout(precision=layout, global_batch=1, seq_len=8), TrainSettings(steps=1, precision=settings)
    assert precision_of(*asked) == expected


def test_two_words_that_differ_are_refused():
    with pytest.raises(ValueError, match="precision=fp32, but the layout says precision=bf16: give one of them"):
        precision_of(Layout(precision="bf16", global_batch=1, seq_len=8), TrainSettings(steps=1, precision="fp32"))
