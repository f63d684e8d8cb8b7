"""Clipping, skipping and hooks belong to an update before the delay is compensated; what moments count."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator, spike_compensation
from fourfold.parallel.pipeline import ClipNorm, DelayedOptimizer, Mitigation

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def scalar(value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value], dtype=torch.float64))


def clip_to_one(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)


@pytest.mark.parametrize("late", [False, True], ids=["hook before the wrapper", "hook after it"])
def test_a_hook_that_clips_comes_before_compensation(late):
    p = scalar()
    optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.9)
    if not late:
        optimizer.register_step_pre_hook(clip_to_one)
    delayed = DelayedOptimizer(optimizer, delay=2, mitigation=Mitigation.named("sc"))
    if late:
        optimizer.register_step_pre_hook(clip_to_one)
    p.grad = torch.full_like(p, 1000.0)
    delayed.step()
    a, b = spike_compensation(2, 0.9)
    assert p.item() == pytest.approx(-(a + b), rel=1e-6)  # -2.71
    assert optimizer.state[p]["momentum_buffer"].item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("mitigation", ["sc", "sc2d", "lwpv+sc", "nesterov"])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "NAdam"])
def test_what_a_hook_does_to_gradients_equals_having_done_it_before(kind, mitigation):
    arguments = {"momentum": 0.9} if kind == "SGD" else {}
    ends = []
    for inside in (True, False):
        p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        optimizer = getattr(torch.optim, kind)([p], lr=0.1, **arguments)
        delayed = DelayedOptimizer(optimizer, delay=3, mitigation=Mitigation.named(mitigation))
        if inside:
            optimizer.register_step_pre_hook(clip_to_one)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            p.grad = 10 * torch.randn(3, generator=generator, dtype=torch.float64)
            if not inside:
                nn.utils.clip_grad_norm_([p], 1.0)
            delayed.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_a_step_of_its_own_is_refused_where_it_would_be_void():
    class Clipping(torch.optim.SGD):
        def step(self, closure=None):
            clip_to_one(self, (), {})
            return super().step(closure)

    p = scalar()
    with pytest.raises(ValueError, match=r"Clipping has a step of its own.*use SGD with clip="):
        DelayedOptimizer(Clipping([p], lr=1.0, momentum=0.9), delay=2, mitigation=Mitigation.named("sc"))
    # The weight form reads weights only: there the subclass does as it likes.
    delayed = DelayedOptimizer(Clipping([p], lr=1.0, momentum=0.9), delay=2, mitigation=Mitigation.named("lwpw"))
    p.grad = torch.full_like(p, 1000.0)
    delayed.step()
    assert p.item() == pytest.approx(-1.0, rel=1e-6)


class Doubles(nn.Module):
    """Two stages of one matrix each, in fp64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Linear(inputs, outputs, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(x)


def two_stages() -> list[nn.Module]:
    torch.manual_seed(2)
    return [Doubles(4, 5), Doubles(5, 3)]


def batches(count: int, *, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            scale * torch.randn(6, 4, generator=generator, dtype=torch.float64),
            torch.randn(6, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def simulated(data, *, delay: int, clip: ClipNorm) -> list[Tensor]:
    """Consistent delay, SGD with momentum and sc on two matrices, written out from the equations."""
    first, second = (stage.matrix.weight.detach().clone() for stage in two_stages())
    moments = [torch.zeros_like(first), torch.zeros_like(second)]
    a, b = spike_compensation(delay, 0.9)
    past = [(first, second)]
    norms = []
    weights = [first, second]
    for update, (x, y) in enumerate(data):
        late = [w.clone().requires_grad_() for w in past[max(0, update - delay)]]
        F.mse_loss(x @ late[0].T @ late[1].T, y).backward()
        gradients = [w.grad for w in late]
        own = [g.norm().item() for g in gradients]
        norms.append((own[0] ** 2 + own[1] ** 2) ** 0.5)
        for at in range(2):
            first = norms[update] if clip.first_wait else own[at]
            whole = norms[update - clip.lag_updates] if update >= clip.lag_updates else first
            norm = max(whole if clip.scope == "model" else own[at], own[at])
            clipped = gradients[at] * min(1.0, clip.max_norm / (norm + 1e-6))
            moments[at] = 0.9 * moments[at] + clipped
            weights[at] = weights[at] - 0.05 * (a * moments[at] + b * clipped)
        past.append((weights[0], weights[1]))
    return weights


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"scope": "model"},
        {"scope": "model", "lag_updates": 1},
        {"scope": "model", "lag_updates": 3},
        {"scope": "model", "lag_updates": 4, "first_wait": False},
    ],
    ids=str,
)
def test_clipping_is_that_of_the_equations(rule):
    data = batches(9, scale=3.0)
    stages, clip = two_stages(), ClipNorm(max_norm=0.5, **rule)
    trainer = PipelinedBackpropEmulator(
        stages, optimizer=SGD, loss_fn=F.mse_loss, mitigation="stash+sc", delays=[2, 2], clip=clip
    )  # fmt: skip
    trainer.run(data)
    expected = simulated(data, delay=2, clip=clip)
    for stage, weight in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.matrix.weight.detach(), weight, rtol=0, atol=1e-13)
    unclipped = two_stages()
    PipelinedBackpropEmulator(
        unclipped, optimizer=SGD, loss_fn=F.mse_loss, mitigation="stash+sc", delays=[2, 2]
    ).run(data)  # fmt: skip
    assert not torch.allclose(unclipped[0].matrix.weight, stages[0].matrix.weight, atol=1e-3)


def test_gradients_below_the_limit_are_left_to_the_bit():
    ends = []
    for clip in (None, 1e9):
        stages = two_stages()
        PipelinedBackpropEmulator(stages, optimizer=SGD, loss_fn=F.mse_loss, clip=clip).run(batches(7))
        ends.append(stages[0].matrix.weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("schedule", ["lockstep", "paci:3"])
def test_a_micro_batch_that_is_not_finite_is_as_if_it_had_not_been(schedule):
    """Under accumulation the others of its group still count, and no moment, weight or prediction ever sees it."""
    data = batches(7)
    broken = [(x.clone(), y) for x, y in data]
    broken[3][0][0, 0] = float("nan")
    stages = two_stages()
    trainer = PipelinedBackpropEmulator(
        stages, optimizer=SGD, loss_fn=F.mse_loss, schedule=schedule, skip_nonfinite=True
    )
    losses = trainer.run(broken)
    assert losses[3] != losses[3]
    assert all(torch.isfinite(p).all() for stage in stages for p in stage.parameters())
    assert trainer.stages[0].optimizer.num_updates == (6 if schedule == "lockstep" else 3)
    if schedule == "paci:3":  # micro-batches 3, 4, 5 are a group: it is the mean of the two others
        stages_again, kept = two_stages(), []
        PipelinedBackpropEmulator(
            stages_again, optimizer=SGD, loss_fn=F.mse_loss, delays=[0, 0], schedule=schedule, skip_nonfinite=True,
            on_gradients=lambda gradients: kept.append({name: g.clone() for name, g in gradients.items()}),
        ).run(broken[3:6])  # fmt: skip
        reference = nn.Sequential(*two_stages())
        (sum(F.mse_loss(reference(x), y) for x, y in data[4:6]) / 2).backward()
        for got, stage in zip(kept, reversed(range(2)), strict=True):
            torch.testing.assert_close(got["matrix.weight"], reference[1 - stage].matrix.weight.grad)


def test_a_hook_on_gradients_sees_names_and_changes_the_update():
    seen = []

    def halve(gradients: dict[str, Tensor]) -> None:
        seen.append(list(gradients))
        for gradient in gradients.values():
            gradient.mul_(0.5)

    ends = []
    for hook, lr in ((halve, 0.1), (None, 0.05)):
        stages = two_stages()
        PipelinedBackpropEmulator(
            stages, optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9), loss_fn=F.mse_loss, mitigation="sc",
            on_gradients=hook,
        ).run(batches(5))  # fmt: skip
        ends.append(stages[0].matrix.weight.detach())
    assert seen[0] == ["matrix.weight"]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-14)


def test_gradients_may_be_replaced_or_taken_out():
    def replace(gradients: dict[str, Tensor]) -> None:
        gradients["matrix.weight"] = gradients["matrix.weight"] * 0.5

    def halve(gradients: dict[str, Tensor]) -> None:
        gradients["matrix.weight"].mul_(0.5)

    ends = []
    for hook in (replace, halve, lambda gradients: gradients.clear()):
        stages = two_stages()
        PipelinedBackpropEmulator(stages, optimizer=SGD, loss_fn=F.mse_loss, on_gradients=hook).run(batches(5))
        ends.append(stages[0].matrix.weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], two_stages()[0].matrix.weight)
    for wrong, words in (
        (lambda gradients: gradients.update(other=torch.ones(1)), "on_gradients set 'other', which had no gradient"),
        (lambda gradients: gradients.update({"matrix.weight": torch.ones(1)}), "on_gradients made"),
    ):
        with pytest.raises(ValueError, match=words):
            PipelinedBackpropEmulator(two_stages(), optimizer=SGD, loss_fn=F.mse_loss, on_gradients=wrong).run(
                batches(2)
            )


def test_a_momentum_that_is_set_to_zero_leaves_no_velocity_behind():
    """From there on the velocity is the gradient, as if there had never been a momentum."""
    ahead = []
    for momentum in (0.9, 0.0):
        p = scalar(1.0)
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=momentum)
        delayed = DelayedOptimizer(optimizer, delay=2, mitigation=Mitigation.named("lwpv"))
        p.grad = torch.full_like(p, 3.0)
        delayed.step()
        optimizer.param_groups[0]["momentum"] = 0.0
        p.grad = torch.full_like(p, -1.0)
        delayed.step()
        ahead.append(delayed.forward_weights()[0])
    assert torch.equal(*ahead)
    assert float(ahead[0]) == pytest.approx(1 - 0.3 + 0.1 + 0.2)


def test_complex_gradients_are_clipped_by_their_size():
    p = nn.Linear(3, 3, dtype=torch.complex64)
    found: list[Tensor] = []
    optimizer = torch.optim.SGD
    PipelinedBackpropEmulator(
        [p], optimizer=lambda given: _kept(optimizer(given, lr=0.1), found), mitigation="none", clip=0.5, observe=True,
        loss_fn=lambda output, target: (output - target).abs().square().sum(),
    ).run([(torch.ones(2, 3, dtype=torch.complex64), torch.full((2, 3), 5.0))])  # fmt: skip
    assert float(torch.stack([torch.linalg.vector_norm(g) for g in found]).norm()) == pytest.approx(0.5, rel=1e-4)


def _kept(optimizer: torch.optim.Optimizer, found: list[Tensor]) -> torch.optim.Optimizer:
    groups = optimizer.param_groups
    optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in groups[0]["params"]))
    return optimizer


def test_without_momentum_the_velocity_is_the_gradient():
    def ahead(name: str) -> Tensor:
        p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        delayed = DelayedOptimizer(
            torch.optim.SGD([p], lr=0.1, weight_decay=0.01), delay=3, mitigation=Mitigation.named(name)
        )
        for value in (1.0, -3.0):
            p.grad = torch.full_like(p, value)
            delayed.step()
        found = delayed.forward_weights()
        assert found is not None
        assert not torch.equal(found[0], p)
        return found[0]

    # lr T v = T (w_before - w) where nothing but the newest gradient moves the weights
    torch.testing.assert_close(ahead("lwpv"), ahead("lwpw"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mitigation", ["lwpv", "lwpv+sc", "sc"])
def test_moments_are_counted_by_parameter(mitigation):
    """A parameter without a gradient at some updates is treated as one whose optimizer made fewer."""
    rare, alone, often = scalar(1.0), scalar(1.0), scalar(1.0)
    chosen = Mitigation.named(mitigation)
    both = DelayedOptimizer(torch.optim.AdamW([rare, often], lr=0.1), delay=2, mitigation=chosen)
    single = DelayedOptimizer(torch.optim.AdamW([alone], lr=0.1), delay=2, mitigation=chosen)
    for update in range(6):
        often.grad = torch.full_like(often, 1.0)
        rare.grad = None
        if update >= 4:
            rare.grad, alone.grad = torch.full_like(rare, 2.0 - update), torch.full_like(alone, 2.0 - update)
            single.step()
        both.step()
    assert torch.equal(rare, alone)
    if chosen.predicts:
        assert torch.equal(both.forward_weights()[0], single.forward_weights()[0])


def test_limits_that_make_no_sense_are_refused():
    for arguments, words in (
        ({"max_norm": 0.0}, "more than 0"), ({"max_norm": 1.0, "scope": "world"}, "'stage' or 'model'"),
        ({"max_norm": 1.0, "lag_updates": 1}, "for scope 'model' only"),
        ({"max_norm": 1.0, "scope": "model", "first_wait": False}, "give lag_updates"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ClipNorm(**arguments)
