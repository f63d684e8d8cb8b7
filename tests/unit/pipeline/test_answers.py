"""Error feedback, basis rotation, Nesterov and local accumulation against their equations; resuming them."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from support import pipeline_models
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.pipeline import DelayedOptimizer, Mitigation, PipelineSchedule
from fourfold.parallel.pipeline import schedule as schedule_module

ADAMW = partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)


def gradients(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64))


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_error_feedback_makes_good_the_step_of_delay_updates_ago(kind, delay):
    """w+ = w - u - f (u - u_old), with u the steps of an optimizer that steps beside, from the same weights."""
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9) if kind == "SGD" else partial(ADAMW, weight_decay=0.0)
    p, beside = matrix(3), matrix(3)
    delayed = DelayedOptimizer(make([p]), delay=delay, mitigation=Mitigation(feedback=0.5))
    other = make([beside])
    steps: list[Tensor] = []
    for gradient in gradients(9, 3):
        before = p.detach().clone()
        p.grad, beside.grad = gradient.clone(), gradient.clone()
        delayed.step()
        start = beside.detach().clone()
        other.step()
        steps.append(start - beside.detach())
        old = steps[-1 - delay] if len(steps) > delay else steps[-1]
        expected = before - steps[-1] - 0.5 * (steps[-1] - old)
        assert torch.allclose(p, expected, rtol=0, atol=1e-14)


def test_nesterovs_look_ahead_is_compensation_for_one_update_whatever_the_delay():
    """m u_hat + (1 - m) g in place of Adam's u_hat; and more than one update of delay does not change it."""
    p, w = matrix(4), matrix(4).detach()
    delayed = DelayedOptimizer(ADAMW([p], weight_decay=0.0), delay=7, mitigation=Mitigation.named("nesterov"))
    u, q = torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(gradients(6, 4), 1):
        p.grad = gradient.clone()
        delayed.step()
        u, q = 0.9 * u + 0.1 * gradient, 0.99 * q + 0.01 * gradient**2
        mean = 0.9 * u / (1 - 0.9**t) + 0.1 * gradient
        w = w - 0.1 * mean / ((q / (1 - 0.99**t)).sqrt() + 1e-8)
        assert torch.allclose(p, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (3, 3), (5,)])
def test_basis_rotation_is_adam_in_the_eigenbasis(shape):
    """Written out with the bases found anew at every update; vectors are left to Adam."""
    p, w = matrix(*shape), matrix(*shape).detach()
    # The first gradient is diagonal in its own bases; eps keeps what rounding leaves beside the diagonal from counting.
    delayed = DelayedOptimizer(ADAMW([p], eps=1e-3), delay=2, mitigation=Mitigation(rotate_every=1))
    if len(shape) == 1:
        reference = matrix(*shape)
        plain = ADAMW([reference], eps=1e-3)
        for gradient in gradients(5, *shape):
            p.grad, reference.grad = gradient.clone(), gradient.clone()
            delayed.step()
            plain.step()
        assert torch.equal(p, reference)
        return
    rows, columns = torch.zeros(shape[0], shape[0]).double(), torch.zeros(shape[1], shape[1]).double()
    left = right = None
    u, q = torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(gradients(6, *shape), 1):
        p.grad = gradient.clone()
        delayed.step()
        rows, columns = 0.99 * rows + 0.01 * gradient @ gradient.T, 0.99 * columns + 0.01 * gradient.T @ gradient
        whole = u if left is None else left @ u @ right.T
        left = torch.linalg.eigh(rows)[1] if left is None else torch.linalg.qr(rows @ left)[0]
        right = torch.linalg.eigh(columns)[1] if right is None else torch.linalg.qr(columns @ right)[0]
        turned = left.T @ gradient @ right
        u, q = 0.9 * (left.T @ whole @ right) + 0.1 * turned, 0.99 * q + 0.01 * turned**2
        step = (u / (1 - 0.9**t)) / ((q / (1 - 0.99**t)).sqrt() + 1e-3)
        w = w * (1 - 0.1 * 0.01) - 0.1 * left @ step @ right.T
        assert torch.allclose(p, w, rtol=0, atol=1e-9)
    assert not torch.allclose(left.abs(), torch.eye(shape[0]).double(), atol=0.1)


def test_prediction_sees_rotated_steps():
    """One update ahead at the rate of the moment is, for a first step without decay, that step again."""
    p = matrix(4, 3)
    start = p.detach().clone()
    delayed = DelayedOptimizer(
        ADAMW([p], weight_decay=0.0), delay=1, mitigation=Mitigation(predict="velocity", rotate_every=1)
    )
    p.grad = gradients(1, 4, 3)[0]
    delayed.step()
    ahead = delayed.forward_weights()
    assert ahead is not None
    torch.testing.assert_close(ahead[0] - p.detach(), p.detach() - start, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_stages", [2, 4, 7])
@pytest.mark.parametrize("crossed", [1, 2, 3])
def test_local_accumulation_bounds_the_updates_that_a_micro_batch_crosses(num_stages, crossed):
    def most(schedule: PipelineSchedule) -> int:
        program = schedule.program(12 * num_stages)
        return max(own - seen for stage in range(num_stages) for seen, own in program.versions(stage))

    schedule = PipelineSchedule.accumulating(num_stages, crossed_updates=crossed)
    assert most(schedule) <= crossed
    if schedule.update_every > 1:  # and fewer micro-batches would not do
        fewer = PipelineSchedule(name="paci", num_stages=num_stages, update_every=schedule.update_every - 1)
        assert most(fewer) > crossed
    with pytest.raises(ValueError, match="at least 1"):
        PipelineSchedule.accumulating(4, crossed_updates=0)


@pytest.mark.parametrize(
    "mitigation", ["ef", "lwpv+sc+ef", "rotate", "lwpv+sc+rotate", "lwpw+rotate+ef", "nesterov+stash", "spectrain+ef"]
)
def test_answers_compose_and_resume_to_the_bit(mitigation):
    """Stopped, saved and loaded into new objects; and at no delay all of them are the plain optimizer."""

    def trained(**options) -> tuple[PipelinedBackpropEmulator, list[Tensor]]:
        stages = pipeline_models.stages(3)
        made = PipelinedBackpropEmulator(stages, optimizer=ADAMW, loss_fn=F.cross_entropy, **options)
        return made, [p for stage in stages for p in stage.parameters()]

    data = pipeline_models.batches(12)
    first, weights = trained(mitigation=mitigation)
    first.run(data[:5])
    second, resumed = trained(mitigation=mitigation)
    second.load_state_dict(deepcopy(first.state_dict()))
    first.run(data[5:])
    second.run(data[5:])
    assert all(map(torch.equal, weights, resumed))

    plain, without = trained(mitigation="none", delays=[0, 0, 0])
    plain.run(data)
    answered, same = trained(mitigation=mitigation, delays=[0, 0, 0])
    answered.run(data)
    assert all(map(torch.equal, without, same))
    assert not all(map(torch.equal, without, weights))


def test_what_is_remembered_goes_by_name():
    stages = pipeline_models.stages(2)
    made = PipelinedBackpropEmulator(stages, optimizer=ADAMW, loss_fn=F.cross_entropy, mitigation="rotate+ef+lwpw")
    made.run(pipeline_models.batches(6))
    stage = made.stages[0]
    kept = {name: tensor.clone() for name, tensor in stage.remembered().items()}
    blank = stage.remembered(blank=True)
    assert kept.keys() == blank.keys()
    assert all(kept[name].shape == blank[name].shape and not blank[name].any() for name in kept)
    stage.go_on(num_updates=6, num_forwards=6, remembered=blank)
    assert not any(tensor.any() for tensor in stage.remembered().values())


def test_schedules_are_drawn_as_they_run():
    """The tables in the docstring are those of the programs."""
    drawn = schedule_module.__doc__ or ""
    for name in ("lockstep", "1f1b-async"):
        table = PipelineSchedule.named(name, 4).program(6).drawn()
        assert "\n".join(f"    {line}" for line in table.splitlines()) in drawn
