"""Weight gradients put off to where ranks would idle: the loss and gradients of one process all the same."""

import pytest
import torch
from support.one_loss import assert_one_loss, batches, tiny_model
from torch.distributed.pipelining import (
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks, relative_error

SPLIT = {"vp": 2, "schedule": "zero-bubble"}


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ({"pp": 2}, {}),
        ({"dp": 2, "pp": 2}, {}),
        ({"dp": 2, "pp": 2}, {"zero_stage": 1}),
        ({"pp": 2, "cp": 2}, {"zero_stage": 1}),
        ({"pp": 2, "tp": 2}, {"sequence_parallel": True}),
        ({"pp": 4}, {}),
    ],
    ids=str,
)
def test_in_fp64_nothing_but_rounding_is_left(ranks, mesh_shape, options):
    """But what transformers itself computes in fp32: norms and rotary tables."""
    layers = 8 if mesh_shape == {"pp": 4} else 4
    model = {"double": True, "family": "qwen3", "num_hidden_layers": layers}
    size = 4 if mesh_shape != {"pp": 2} else 2
    assert_one_loss(ranks(size), mesh_shape, masked=True, model=model, tolerance=1e-6, **{**SPLIT, **options})


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"vp": 3}, {"num_hidden_layers": 7}),  # runs of one layer and of two
        ({"micro_batch": 2}, {"family": "mistral", "sliding_window": 5}),
    ],
    ids=str,
)
def test_two_ranks(ranks, options, model):
    assert_one_loss(ranks(2), {"pp": 2}, masked=True, model=model, **{**SPLIT, **options})


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_bf16_products(ranks, zero_stage):
    """bf16 keeps 8 bits (4e-3) at each of some thirty roundings between the loss and the first layer's gradients."""
    options = {**SPLIT, "zero_stage": zero_stage, "precision": "bf16-mixed"}
    assert_one_loss(ranks(4), {"dp": 2, "pp": 2}, tolerance=6e-2, **options)


def in_numbers(counts: list[int]) -> tuple[list[dict[str, float]], list[type]]:
    """Errors of gradients for so many micro-batches each, and the schedules that trained."""
    model, errors = parallelize(tiny_model(), init_mesh(pp=2, device_type="cpu"), **SPLIT), []
    pattern = torch.cat([ids for ids, _ in batches(False)])
    for count in counts:
        plain, ids = tiny_model(), pattern[:count]
        plain(ids, labels=ids).loss.backward()
        model.forward_backward(ids)
        truth = dict(plain.named_parameters())
        errors.append({name: relative_error(p.grad, truth[name].grad) for name, p in model.named_parameters()})
        for parameter in model.parameters():
            parameter.grad = None
    return errors, [type(made) for made, _ in model._pipeline._schedules.values()]


def test_whole_rounds_are_split_and_other_numbers_run_without(ranks):
    counts = [2, 4, 3, 5]
    kinds = [ScheduleInterleavedZeroBubble] * 2 + [ScheduleInterleaved1F1B, ScheduleLoopedBFS]
    answers = ranks(2)(in_numbers, counts)
    for place, count in enumerate(counts):
        assert_ranks([errors[place] for errors, _ in answers], 1e-5, f"{count} micro-batches")
    assert all(found == kinds for _, found in answers)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("zb", "schedule='zb': choose one of 1f1b, .*, zero-bubble"),
        ("2bw", "schedule='2bw': .*choose '1f1b' or 'zero-bubble', or use pipeline_decoder"),
        ("zero-bubble", "vp=1 with schedule='zero-bubble'"),
    ],
)
def test_what_is_no_schedule_of_parallelize_is_refused(mesh, schedule, message):
    with pytest.raises(ValueError, match=message):
        parallelize(tiny_model(), mesh, schedule=schedule)
