"""A failing comparison names what was run, the parameter and the figure."""

import pytest
import torch

from fourfold.parallel.testing.compare import (
    assert_errors,
    assert_gradients,
    assert_ranks,
    assert_same,
    gradient_errors,
    relative_error,
    state_differences,
)

EXPECTED = {"first.weight": torch.tensor([3.0, 4.0]), "second.bias": torch.tensor([1.0, 0.0])}


def test_a_wrong_gradient_is_named_with_its_relative_error():
    found = {**EXPECTED, "first.weight": torch.tensor([3.0, 4.5])}
    assert gradient_errors(found, EXPECTED) == {"first.weight": pytest.approx(0.1), "second.bias": 0.0}
    assert_gradients(found, EXPECTED, 0.11)
    with pytest.raises(AssertionError, match=r"tp2\n1 of 2 errors are above 0.01\n  gradient of first.weight: 0.1$"):
        assert_gradients(found, EXPECTED, 0.01, "tp2")


def test_parameters_of_one_side_alone_are_named():
    with pytest.raises(AssertionError, match=r"\['second.bias'\] are missing, and \['third'\] were not expected"):
        gradient_errors({"first.weight": EXPECTED["first.weight"], "third": torch.zeros(1)}, EXPECTED)


def test_a_gradient_that_is_rounding_alone_counts_against_the_largest():
    tiny = {**EXPECTED, "second.bias": torch.tensor([1e-7, 0.0])}
    assert gradient_errors({**tiny, "second.bias": torch.zeros(2)}, tiny)["second.bias"] == pytest.approx(2e-8)


def test_not_a_number_is_wrong_and_comes_first():
    with pytest.raises(AssertionError, match=r"^2 of 3 errors are above 1\n  loss: nan\n  gradient: 2$"):
        assert_errors({"gradient": 2.0, "loss": float("nan"), "norm": 1.0}, 1.0)


def test_the_rank_is_named():
    with pytest.raises(AssertionError, match=r"^cp2, rank 1\n1 of 1 errors are above 0.5\n  loss: 0.6"):
        assert_ranks([{"loss": 0.5}, {"loss": 0.6}], 0.5, "cp2")


def test_equality_is_of_every_bit_unless_a_difference_is_allowed():
    other = {**EXPECTED, "second.bias": torch.tensor([1.0, 1e-6])}
    assert_same(EXPECTED.items(), EXPECTED.items())
    assert_same(other.items(), EXPECTED.items(), atol=1e-5)
    with pytest.raises(AssertionError, match=r"^stage 1\n.*\n  largest difference of second.bias: 1e-06$"):
        assert_same(other.items(), EXPECTED.items(), "stage 1")
    with pytest.raises(AssertionError, match=r"second.bias is \(3,\) torch.float32, not \(2,\) torch.float32"):
        assert_same({**EXPECTED, "second.bias": torch.zeros(3)}.items(), EXPECTED.items())
    with pytest.raises(AssertionError, match=r"\['second.bias'\] are on one side alone"):
        assert_same([("first.weight", EXPECTED["first.weight"])], EXPECTED.items())


def test_relative_error_of_zeros():
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_the_place_of_a_difference_in_a_state_is_its_path():
    state = {"weights": [torch.zeros(2), torch.ones(2)], "step": 3, "lr": {"base": 0.1}}
    other = {"weights": [torch.zeros(2), torch.tensor([1.0, 1.5])], "step": 3, "lr": {"base": 0.2}}
    assert state_differences(state, state) == []
    assert state_differences(other, state) == ["state['weights'][1]", "state['lr']['base']"]
    assert state_differences({"weights": []}, state, "stage 1") == ["stage 1"]
    assert state_differences(torch.zeros(2).double(), torch.zeros(2)) == ["state"]
