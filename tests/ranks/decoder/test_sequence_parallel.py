"""Sequence parallelism beside tp: one loss and all gradients, on every axis, and hidden states that are cut."""

import pytest
import torch
from support.one_loss import assert_one_loss, batches, tiny_model

from fourfold.parallel import init_mesh, parallelize


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_fp64_nothing_but_rounding_is_left(ranks, family):
    # What remains is transformers' own: its norms and rotary tables are fp32.
    model = {"double": True, "family": family}
    assert_one_loss(ranks(2), {"tp": 2}, masked=True, model=model, tolerance=1e-6, sequence_parallel=True)


@pytest.mark.parametrize(
    ("mesh_shape", "options", "model"),
    [
        ({"tp": 4}, {"micro_batch": 1}, {"num_key_value_heads": 4}),
        ({"dp": 2, "tp": 2}, {"micro_batch": 1, "checkpointing": "full"}, {}),
        ({"dp": 2, "tp": 2}, {"zero_stage": 3, "checkpointing": "selective"}, {}),
        ({"pp": 2, "tp": 2}, {"micro_batch": 1}, {}),
        ({"pp": 2, "tp": 2}, {"micro_batch": 1, "zero_stage": 3, "checkpointing": "full"}, {}),
        ({"cp": 2, "tp": 2}, {}, {}),
        ({"cp": 2, "tp": 2}, {"micro_batch": 1}, {"family": "mistral", "sliding_window": 5}),
    ],
    ids=str,
)
def test_four_ranks(ranks, mesh_shape, options, model):
    assert_one_loss(ranks(4), mesh_shape, masked=True, model=model, sequence_parallel=True, **options)


def test_tied_embeddings(ranks):
    assert_one_loss(ranks(2), {"tp": 2}, model={"tie_word_embeddings": True}, sequence_parallel=True)


def lengths_of_hidden_states(sequence_parallel: bool) -> set[int]:
    """Tokens that this rank's layers take and give."""
    model = parallelize(tiny_model(), init_mesh(tp=2, device_type="cpu"), sequence_parallel=sequence_parallel)
    seen = set()
    for module in model.stage.layers.values():
        module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[1]))
        module.register_forward_hook(lambda _, inputs, output: seen.add(output.shape[1]))
    model.forward_backward(batches(False)[0][0])
    return seen


def test_hidden_states_are_cut(ranks):
    assert ranks(2)(lengths_of_hidden_states, True) == [{12}, {12}]
    assert ranks(2)(lengths_of_hidden_states, False) == [{24}, {24}]


def of_odd_length(mesh_shape: dict, length: int) -> str:
    model = parallelize(tiny_model(), init_mesh(**mesh_shape, device_type="cpu"), sequence_parallel=True)
    try:
        model.forward_backward(torch.zeros(1, length, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("mesh_shape", "length"), [({"tp": 2}, 7), ({"cp": 2, "tp": 2}, 12)], ids=str)
def test_a_sequence_that_cannot_be_cut_evenly_is_refused_on_every_rank(ranks, mesh_shape, length):
    world = 4 if "cp" in mesh_shape else 2
    for said in ranks(world)(of_odd_length, mesh_shape, length):
        assert f"a sequence of {length} tokens cannot be cut evenly" in said
        assert f"give a multiple of {8 if world == 4 else 2}" in said
