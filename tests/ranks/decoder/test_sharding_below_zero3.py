"""ZeRO 1 and 2: the losses, gradients and norms of one process, and what of the model a rank holds between steps."""

import pytest
import torch
from support.one_loss import GLOBAL_BATCH, MAX_NORM, adamw, assert_one_loss, batches, tiny_model
from torch.distributed.tensor import DTensor

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.data_parallel import CountCollectives


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("mesh_shape", [{}, {"dp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_two_ranks(ranks, mesh_shape, zero_stage):
    if zero_stage == 2 and "pp" in mesh_shape:  # refused: test_limits_are_the_runtime_s.py
        pytest.skip("a stage's gradients are whole until the end of a step")
    # In fp64 what remains is transformers' own: its norms and rotary tables are fp32.
    model = {"double": True}
    how = {"micro_batch": 1, "zero_stage": zero_stage, "model": model, "tolerance": 1e-6}
    assert_one_loss(ranks(2 if mesh_shape else 1), mesh_shape, masked=True, **how)


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ({"dp": 4}, {"zero_stage": 1, "checkpointing": "stream", "micro_batch": 1}),
        ({"dp": 2, "cp": 2}, {"zero_stage": 2, "checkpointing": "full", "micro_batch": 1}),
        ({"dp": 2, "tp": 2}, {"zero_stage": 1, "sequence_parallel": True}),
        ({"dp": 2, "pp": 2}, {"zero_stage": 1, "micro_batch": 1, "checkpointing": "selective"}),
    ],
    ids=str,
)
def test_four_ranks(ranks, mesh_shape, options):
    assert_one_loss(ranks(4), mesh_shape, masked=True, **options)


def collectives_of_a_step(zero_stage: int) -> tuple[int, ...]:
    """(All-gathers, reduce-scatters) of a step of two micro-batches over 4 layers and the ends."""
    model = parallelize(tiny_model(), init_mesh(dp=2, device_type="cpu"), zero_stage=zero_stage, micro_batch=1)
    ids, labels = batches(False)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    with CountCollectives() as counted:
        model.forward_backward(ids[rows], labels[rows])
    return tuple(
        sum(count for name, count in counted.calls.items() if kind in name)
        for kind in ("allgather_base", "reduce_scatter")
    )


def test_weights_are_gathered_once_a_step_and_gradients_sharded_once_or_at_each_micro_batch(ranks):
    assert ranks(2)(collectives_of_a_step, 1) == [(5, 5)] * 2
    assert ranks(2)(collectives_of_a_step, 2) == [(5, 10)] * 2


def held_between_steps(zero_stage: int) -> tuple[float, float]:
    """Shares of the model's weights and of its optimizer's states that this rank holds after a step."""
    model = parallelize(tiny_model(), init_mesh(dp=2, device_type="cpu"), zero_stage=zero_stage)
    optimizer = adamw(model.parameters())
    ids, labels = batches(False)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    model.forward_backward(ids[rows], labels[rows])
    model.clip_grad_norm_(MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    model.evaluate(ids[rows], labels[rows])  # which gathers, and lets go again

    def local(value: torch.Tensor) -> int:
        return (value.to_local() if isinstance(value, DTensor) else value).numel()

    parameters = list(model.parameters())
    whole = sum(parameter.numel() for parameter in parameters)
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    return sum(map(local, parameters)) / whole, sum(map(local, states)) / (2 * whole)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_rank_holds_its_share_of_the_states(ranks, zero_stage):
    expected = 1.0 if zero_stage == 0 else 0.5
    for held in ranks(2)(held_between_steps, zero_stage):
        assert held == (expected, expected)
