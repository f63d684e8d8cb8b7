"""Spike compensation and weight prediction against theory: Nesterov, equal spectral radii, weights of a gradient."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator, spike_compensation
from fourfold.parallel.pipeline import (
    DelayedOptimizer,
    Mitigation,
    equivalent_horizon,
    scale_adam_hyperparameters,
    scale_hyperparameters,
)
from fourfold.parallel.pipeline.stage import PipelineStage
from fourfold.parallel.testing.delayed_quadratic import half_life, polynomial, spectral_radii

MOMENTA = st.floats(0.0, 0.999)
DELAYS = st.integers(0, 64)


def parameter(values: list[float] | None = None) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values or [1.0, -2.0, 0.5], dtype=torch.float64))


def trajectory(p: torch.nn.Parameter, step, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    path = []
    for _ in range(count):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        step()
        path.append(p.detach().clone())
    return torch.stack(path)


@settings(deadline=None)  # the machine may be busy
@given(DELAYS, MOMENTA)
def test_total_weight_of_a_gradient_is_kept(delay, momentum):
    a, b = spike_compensation(delay, momentum)
    assert b + a / (1 - momentum) == pytest.approx(1 / (1 - momentum))


def test_no_delay_is_plain_momentum_and_no_momentum_needs_nothing():
    assert spike_compensation(0, 0.9) == (1.0, 0.0)
    assert spike_compensation(5, 0.0) == (0.0, 1.0)
    for wrong in ((-1, 0.9), (1, 1.0), (1, -0.1)):
        with pytest.raises(ValueError, match=r"at least 0|must lie in"):
            spike_compensation(*wrong)


def test_compensation_of_one_update_is_nesterov():
    assert spike_compensation(1, 0.9) == (0.9, pytest.approx(1.0))
    one, other = parameter(), parameter()
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    compensated = DelayedOptimizer(torch.optim.SGD([one], **arguments), delay=1, mitigation=Mitigation.named("sc"))
    nesterov = torch.optim.SGD([other], nesterov=True, **arguments)
    # fp64; the wrapper reaches the same sum in another order
    torch.testing.assert_close(trajectory(one, compensated.step), trajectory(other, nesterov.step), rtol=0, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_compensated_sgd_is_the_papers_equation(nesterov, dampening):
    if nesterov and dampening:
        pytest.skip("torch refuses nesterov with dampening")
    delay, lr, m, decay = 4, 0.1, 0.9, 0.01
    p, w, v = parameter(), parameter().detach(), torch.zeros(3, dtype=torch.float64)
    optimizer = torch.optim.SGD([p], lr=lr, momentum=m, weight_decay=decay, dampening=dampening, nesterov=nesterov)
    wrapped = DelayedOptimizer(optimizer, delay=delay, mitigation=Mitigation.named("sc"))
    a, b = spike_compensation(delay + nesterov, m)
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        g = torch.randn(3, generator=generator, dtype=torch.float64)
        p.grad = g.clone()
        wrapped.step()
        g = (1 - dampening) * (g + decay * w)
        v = m * v + g
        w = w - lr * (a * v + b * g)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-13)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], v, rtol=0, atol=1e-13)


def test_compensated_adamw_takes_the_compensated_mean():
    delay, lr, (m, s), eps, decay = 3, 0.1, (0.9, 0.99), 1e-8, 0.01
    p, w = parameter(), parameter().detach()
    u, q = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(m, s), eps=eps, weight_decay=decay)
    wrapped = DelayedOptimizer(optimizer, delay=delay, mitigation=Mitigation.named("sc"))
    a = m**delay
    generator = torch.Generator().manual_seed(3)
    for t in range(1, 7):
        g = torch.randn(3, generator=generator, dtype=torch.float64)
        p.grad = g.clone()
        wrapped.step()
        u, q = m * u + (1 - m) * g, s * q + (1 - s) * g * g
        mean = a * u / (1 - m**t) + (1 - a) * g
        w = w * (1 - lr * decay) - lr * mean / ((q / (1 - s**t)).sqrt() + eps)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], u, rtol=0, atol=1e-13)


def test_adam_compensated_by_one_is_nadam_without_its_momentum_schedule():
    one, other = parameter(), parameter()
    adam = DelayedOptimizer(
        torch.optim.Adam([one], lr=0.1, betas=(0.9, 0.99)), delay=1, mitigation=Mitigation.named("sc")
    )
    nadam = torch.optim.NAdam([other], lr=0.1, betas=(0.9, 0.99), momentum_decay=1e9)
    first, second = trajectory(one, adam.step, 400), trajectory(other, nadam.step, 400)
    # They differ in the bias correction of the first updates only.
    assert torch.allclose(first[-1] - first[200], second[-1] - second[200], atol=5e-3)
    assert not torch.allclose(first[1], second[1], atol=5e-3)


def test_compensated_muon_orthogonalises_the_compensated_mean():
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    p = torch.nn.Parameter(start.clone())
    delay, m, lr = 3, 0.9, 0.1
    wrapped = DelayedOptimizer(
        torch.optim.Muon([p], lr=lr, momentum=m, nesterov=False, weight_decay=0.0),
        delay=delay,
        mitigation=Mitigation.named("sc"),
    )
    w, u, a = start.clone(), torch.zeros(4, 3), m**delay
    for _ in range(4):
        g = torch.randn(4, 3)
        p.grad = g.clone()
        wrapped.step()
        u = m * u + (1 - m) * g
        q = torch.nn.Parameter(w)
        q.grad = a * u + (1 - a) * g
        torch.optim.Muon([q], lr=lr, momentum=0.0, nesterov=False, weight_decay=0.0).step()
        w = q.detach()
        # torch's Newton-Schulz runs in bfloat16, where a last bit of its input moves the step by up to a few 1e-3
        assert torch.allclose(p.detach(), w, atol=5e-3)


@settings(deadline=None)  # the machine may be busy
@given(st.sampled_from([1, 2, 4, 8]), st.floats(0.5, 0.99), st.floats(1e-5, 0.05))
def test_spike_compensation_is_prediction_with_the_equivalent_horizon(delay, momentum, x):
    a, b = spike_compensation(delay, momentum)
    horizon = equivalent_horizon(delay, momentum)
    assert horizon == pytest.approx(momentum * (1 - momentum**delay) / (1 - momentum))
    compensated = polynomial(x, momentum, delay, a=a, b=b, horizon=0.0, form="v")
    predicted = polynomial(x, momentum, delay, a=1.0, b=0.0, horizon=horizon, form="v")
    radii = spectral_radii(np.array([compensated, predicted]))
    assert abs(radii[0] - radii[1]) < 1e-6


def test_the_plain_polynomial_is_the_published_one():
    m, x, delay = 0.9, 0.02, 4
    ours = polynomial(x, m, delay, a=1.0, b=0.0, horizon=0.0, form="v")
    published = np.array([1.0, -(1 + m), m, 0.0, 0.0, x])  # z^(D+1) - (1+m) z^D + m z^(D-1) + x
    assert np.allclose(ours, np.append(published, 0.0))


def test_half_lives_order_the_methods():
    names = ("plain", "SC_D", "SC_2D", "LWPw_D+SC_D")
    plain, compensated, over, combined = (half_life(4, name, momenta=1 - np.logspace(0, -4, 9))[0] for name in names)
    assert combined < over < compensated < plain / 4


@pytest.mark.parametrize(
    ("mitigation", "form", "spike", "horizon"),
    [
        ("none", "v", 0, 0), ("sc", "v", 1, 0), ("lwpv", "v", 0, 1), ("lwpw", "w", 0, 1), ("lwpv+sc", "v", 1, 1),
        ("lwpw+sc", "w", 1, 1), ("sc2d", "v", 2, 0), ("lwpv2d", "v", 0, 2),
    ],
)  # fmt: skip
def test_the_emulator_follows_the_characteristic_polynomial(mitigation, form, spike, horizon):
    """On f(w) = x w^2 / 2 the emulator's weights satisfy the recurrence whose roots the half-lives come from."""
    x, m, delay = 0.01, 0.9, 3
    model = torch.nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    trainer = PipelinedBackpropEmulator(
        [model],
        optimizer=partial(torch.optim.SGD, lr=1.0, momentum=m),
        # the gradient of output * stale weight would mix two versions: take x w^2 / 2 of the forward's weight alone
        loss_fn=lambda output, target: x * output.square().sum() / 2,
        mitigation="stash" if mitigation == "none" else f"stash+{mitigation}",
        delays=[delay],
    )
    path = []
    for_ever = ((torch.ones(1, 1, dtype=torch.float64), None) for _ in range(60))

    def recorded():
        for batch in for_ever:
            path.append(model.weight.item())
            yield batch

    trainer.run(recorded())
    a, b = spike_compensation(spike * delay, m)
    recurrence = polynomial(x, m, delay, a=a, b=b, horizon=horizon * delay, form=form)
    tail = np.array(path[20:])  # past the ramp, where the delay is constant
    residue = np.convolve(tail, recurrence, "valid")
    assert np.abs(residue).max() < 1e-12 * np.abs(tail).max()


def test_both_forms_of_prediction_agree_for_plain_momentum_and_differ_with_compensation():
    def weights(name: str) -> torch.Tensor:
        p = parameter()
        optimizer = DelayedOptimizer(
            torch.optim.SGD([p], lr=0.1, momentum=0.9), delay=3, mitigation=Mitigation.named(name)
        )
        trajectory(p, optimizer.step)
        ahead = optimizer.forward_weights()
        assert ahead is not None
        return ahead[0]

    torch.testing.assert_close(weights("lwpv"), weights("lwpw"), rtol=0, atol=1e-13)
    assert not torch.allclose(weights("lwpv+sc"), weights("lwpw+sc"), atol=1e-3)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "NAdam", "Muon"])
def test_velocity_prediction_is_the_step_without_a_new_gradient(kind):
    """With the decay of the moments taken out, horizon 1 is what the optimizer itself does when the gradient is the
    moment: checked on a first step, where the moment is (a multiple of) the gradient."""
    arguments = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.0}, "Muon": {"weight_decay": 0.0}}.get(kind, {})
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.randn(4, 3))
    before = p.detach().clone()
    optimizer = getattr(torch.optim, kind)([p], lr=0.1, **arguments)
    wrapped = DelayedOptimizer(optimizer, delay=1, mitigation=Mitigation.named("lwpv"))
    p.grad = torch.randn(4, 3)
    wrapped.step()
    ahead = wrapped.forward_weights()
    assert ahead is not None
    moved, predicted = p.detach() - before, ahead[0] - p.detach()
    if kind == "NAdam":  # its first step is shortened by its momentum schedule: compare directions
        assert F.cosine_similarity(moved.flatten(), predicted.flatten(), dim=0) > 0.999
    else:
        # steps of about 0.1 in fp32; Muon's Newton-Schulz runs in bfloat16
        torch.testing.assert_close(moved, predicted, rtol=0, atol=5e-3 if kind == "Muon" else 1e-6)


def test_scaling_rule():
    lr, momentum = scale_hyperparameters(lr=0.1, momentum=0.9, batch=128, new_batch=1)
    assert momentum == pytest.approx(0.9 ** (1 / 128))
    # one sample's total effect: lr / ((1 - m) N)
    assert lr / ((1 - momentum) * 1) == pytest.approx(0.1 / (0.1 * 128))
    assert scale_hyperparameters(lr=0.1, momentum=0.9, batch=32, new_batch=32) == (pytest.approx(0.1), 0.9)
    with pytest.raises(ValueError, match="new_batch=0"):
        scale_hyperparameters(lr=0.1, momentum=0.9, batch=32, new_batch=0)


def test_scaling_rule_for_adam():
    scaled = scale_adam_hyperparameters(lr=1e-3, betas=(0.9, 0.999), batch=64, new_batch=4, weight_decay=0.1)
    assert scaled.lr == pytest.approx(1e-3 / 4)
    assert scaled.betas == (pytest.approx(0.9 ** (1 / 16)), pytest.approx(0.999 ** (1 / 16)))
    assert scaled.eps == pytest.approx(4e-8)
    # decoupled decay a sample: lr * weight_decay / N
    assert scaled.lr * scaled.weight_decay / 4 == pytest.approx(1e-3 * 0.1 / 64)


@pytest.mark.parametrize("name", ["sc+sc", "lwpv+lwpw", "stash+spectrain", "spectrain+lwpv", "magic"])
def test_mitigations_that_contradict_are_refused(name):
    with pytest.raises(ValueError, match=r"says twice|take one|leave out|is not among"):
        Mitigation.named(name)


def test_shrinking_rescheduling_and_correction():
    p = parameter([1.0])
    chosen = Mitigation(shrink=0.5, reschedule_updates=4)
    optimizer = DelayedOptimizer(torch.optim.SGD([p], lr=1.0), delay=2, mitigation=chosen)
    steps = []
    for _ in range(5):
        before = p.item()
        p.grad = torch.ones_like(p)
        optimizer.step()
        steps.append(before - p.item())
    assert steps == pytest.approx([0.25 * 2 ** -(1 - min(k / 4, 1)) for k in range(5)])

    p = parameter([0.0])
    optimizer = DelayedOptimizer(torch.optim.SGD([p], lr=1.0), delay=2, mitigation=Mitigation(correction=0.25))
    for _ in range(30):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    # weights that grow by 1 an update were 2 less two updates ago
    corrected = optimizer.backward_weights()
    assert corrected is not None
    assert corrected[0].item() == pytest.approx(p.item() - 2, abs=1e-6)


def test_weight_copies():
    assert Mitigation.named("none").weight_copies(6) == 0
    assert Mitigation.named("sc").weight_copies(6) == 0
    assert Mitigation.named("lwpv+sc").weight_copies(6) == 2
    assert Mitigation.named("lwpw").weight_copies(6) == 3
    assert Mitigation.named("stash").weight_copies(6) == 8
    assert Mitigation.named("lwpv+sc").weight_copies(0) == 0


def test_a_stage_that_finds_half_of_what_another_cut_remembered_starts_afresh():
    def stage(inner: torch.nn.Module) -> PipelineStage:
        made = partial(torch.optim.SGD, lr=0.1)
        return PipelineStage(inner, index=0, optimizer=made, delay=1, mitigation=Mitigation.named("lwpw"))

    old = {"before.weight": torch.ones(2, 2), "before.bias": torch.ones(2)}
    for remembered, expected in ((old, {"before"}), ({"before.weight": old["before.weight"]}, set())):
        resumed = stage(torch.nn.Linear(2, 2))
        resumed.go_on(num_updates=3, num_forwards=3, remembered=remembered)
        assert {name.split(".")[0] for name in resumed.remembered()} == expected
        assert resumed.snapshot() is not None
