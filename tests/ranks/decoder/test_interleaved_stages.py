"""Several runs of layers a pipeline rank: the loss and gradients of one process, with all that goes with them."""

import pytest
import torch
from support.one_loss import assert_one_loss, batches, tiny_model
from torch.distributed.pipelining import ScheduleInterleaved1F1B, ScheduleLoopedBFS
from torch.distributed.tensor import DTensor

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks, relative_error

MESH = {"pp": 2}


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ({"pp": 2}, {}),
        ({"dp": 2, "pp": 2}, {"zero_stage": 1}),
        ({"pp": 2, "cp": 2}, {"checkpointing": "selective", "zero_stage": 1}),
        ({"pp": 2, "tp": 2}, {"sequence_parallel": True}),
        ({"dp": 2, "pp": 2}, {"checkpointing": "stream", "zero_stage": 1}),
    ],
    ids=str,
)
def test_in_fp64_nothing_but_rounding_is_left(ranks, mesh_shape, options):
    """But what transformers itself computes in fp32: norms and rotary tables."""
    how = {"masked": True, "model": {"double": True, "family": "qwen3"}, "tolerance": 1e-6, "vp": 2}
    assert_one_loss(ranks(4 if len(mesh_shape) == 2 else 2), mesh_shape, **how, **options)


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"vp": 3, "checkpointing": "full"}, {"num_hidden_layers": 7}),  # runs of one layer and of two
        ({"vp": 2, "checkpointing": "stream"}, {}),
        ({"vp": 2}, {"family": "mistral", "sliding_window": 5}),
        ({"vp": 2, "micro_batch": 2, "compile": "aot_eager"}, {}),
    ],
    ids=str,
)
def test_two_ranks(ranks, options, model):
    assert_one_loss(ranks(2), MESH, masked=True, model=model, **options)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_bf16_products(ranks, zero_stage):
    """bf16 keeps 8 bits (4e-3) at each of some thirty roundings between the loss and the first layer's gradients."""
    mesh_shape = {"dp": 2, "pp": 2}
    assert_one_loss(ranks(4), mesh_shape, tolerance=6e-2, vp=2, zero_stage=zero_stage, precision="bf16-mixed")


def in_numbers(counts: list[int]) -> tuple[list[dict[str, float]], list[type]]:
    """Errors of loss, evaluation and gradients for so many micro-batches each, and the schedules that ran."""
    model, errors = parallelize(tiny_model(), init_mesh(**MESH, device_type="cpu"), vp=2), []
    pattern = torch.cat([ids for ids, _ in batches(False)])
    for count in counts:
        plain, ids = tiny_model(), pattern[:count]
        truth = plain(ids, labels=ids).loss
        truth.backward()
        found = {"loss": model.forward_backward(ids) / truth - 1, "evaluation": model.evaluate(ids) / truth - 1}
        gradients = dict(plain.named_parameters())
        of_each = {name: relative_error(p.grad, gradients[name].grad) for name, p in model.named_parameters()}
        errors.append({name: abs(float(value)) for name, value in found.items()} | of_each)
        for parameter in model.parameters():
            parameter.grad = None
    return errors, [type(made) for made, _ in model._pipeline._schedules.values()]


def test_any_number_of_micro_batches_is_exact(ranks):
    """One, three and four go into rounds; five do not."""
    for counts, schedule in (([1, 3], ScheduleInterleaved1F1B), ([4, 5], ScheduleLoopedBFS)):
        answers = ranks(2)(in_numbers, counts)
        for place in range(2):
            assert_ranks([errors[place] for errors, _ in answers], 1e-5, f"{counts[place]} micro-batches")
        assert all(kinds[-2] is schedule for _, kinds in answers)


def held() -> tuple[list[str], list[list[int]], bool]:
    """This rank's layers by name, the runs that it computes in, and whether its gradients are cut after ZeRO 1."""
    model = parallelize(tiny_model(), init_mesh(dp=2, pp=2, device_type="cpu"), vp=2, zero_stage=1)
    ids = batches(False)[0][0][:2]
    model.forward_backward(ids)
    layers = sorted({name.split(".")[2] for name in model.state_dict() if "layers" in name})
    runs = [[int(index) for index in run.layers] for run in model._runs]
    return layers, runs, all(isinstance(parameter.grad, DTensor) for parameter in model.parameters())


def test_layers_are_dealt_in_rounds(ranks):
    for rank, (layers, runs, sharded) in enumerate(ranks(4)(held)):
        first = rank // 1 % 2
        assert (layers, runs) == ([str(first), str(first + 2)], [[first], [first + 2]])
        assert sharded


@pytest.mark.parametrize(
    ("vp", "options", "message"),
    [
        (0, {}, "vp=0: a whole number of runs"),
        (True, {}, "vp=True: a whole number of runs"),
        (2, {}, "vp=2 with pp=1: .*choose pp of at least 2, or vp=1"),
    ],
)
def test_what_is_no_interleaving_is_refused(mesh, vp, options, message):
    with pytest.raises(ValueError, match=message):
        parallelize(tiny_model(), mesh, vp=vp, **options)
