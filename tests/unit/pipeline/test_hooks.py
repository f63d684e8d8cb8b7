"""Hooks of optimizers and gradients mean the same in a pipeline as in plain training, whatever answers the delay."""

from functools import partial
from typing import Any

import pytest
import torch
from support import pipeline_models
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.pipeline import DelayedOptimizer, Mitigation
from fourfold.parallel.pipeline.stage import PipelineStage

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def trainer(stages: list[nn.Module], **options: Any) -> PipelinedBackpropEmulator:
    return PipelinedBackpropEmulator(stages, **{"optimizer": SGD, "loss_fn": F.cross_entropy, **options})


@pytest.mark.parametrize("mitigation", ["rotate", "ef", "rotate+ef", "sc+ef"])
def test_a_post_hook_that_clamps_has_the_last_word(mitigation):
    """Rotation steps from zeros and error feedback changes the step: the hook sees neither half done."""
    p = nn.Parameter(torch.linspace(-0.1, 0.1, 12, dtype=torch.float64).view(3, 4))
    optimizer = torch.optim.AdamW([p], lr=0.05)
    seen: list[Tensor] = []

    def clamp(*_: object) -> None:
        seen.append(p.detach().clone())
        p.data.clamp_(-0.12, 0.12)

    optimizer.register_step_post_hook(clamp)
    delayed = DelayedOptimizer(optimizer, delay=2, mitigation=Mitigation.named(mitigation))
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        before = p.detach().clone()
        p.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        delayed.step()
        assert p.abs().max() <= 0.12
        assert torch.equal(p.detach(), seen[-1].clamp(-0.12, 0.12))
        assert (seen[-1] - before).abs().max() > 0.01
        assert before.abs().max() > 0.09  # a step, seen as weights, would be near zero
    assert max(float(each.abs().max()) for each in seen) > 0.12


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16 with fp32 masters"])
def test_a_pre_hook_may_clip_through_the_module(narrow):
    """The module's parameters are not those of the optimizer, but what a hook does to their gradients counts."""

    def weights(how: str) -> list[Tensor]:
        stages = pipeline_models.stages(3)
        options: dict[str, Any] = {}
        if narrow:
            stages = [stage.to(torch.bfloat16) for stage in stages]
            options = {
                "master_dtype": torch.float32,
                "loss_fn": lambda out, target: F.cross_entropy(out.float(), target),
            }
        of_optimizer = iter(stages)

        def factory(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            optimizer, module = SGD(parameters), next(of_optimizer)

            def shrink(*_: object) -> None:
                for p in module.parameters() if how != "optimizer" else parameters:
                    if how == "replaced":
                        p.grad = p.grad * 0.125
                    else:
                        p.grad.mul_(0.125)

            optimizer.register_step_pre_hook(shrink)
            return optimizer

        data = [(x.bfloat16() if narrow else x, target) for x, target in pipeline_models.batches(6)]
        trainer(stages, optimizer=factory, **options).run(data)
        return [p.detach().clone() for stage in stages for p in stage.parameters()]

    first = weights("optimizer")
    for how in ("in place", "replaced"):
        assert all(map(torch.equal, first, weights(how)))


def test_a_step_that_was_replaced_on_the_object_is_refused_and_a_schedulers_is_not():
    p = nn.Parameter(torch.zeros(2))
    optimizer = SGD([p])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    DelayedOptimizer(optimizer, delay=1, mitigation=Mitigation.named("sc"))
    other = SGD([p])
    other.step = lambda: None  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match="SGD has a step of its own"):
        DelayedOptimizer(other, delay=1, mitigation=Mitigation.named("sc"))


def clamp(value: Tensor) -> Tensor:
    return value.clamp(-0.01, 0.01)


def in_place(p: Tensor) -> None:
    p.grad.clamp_(-0.01, 0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize("hook", ["gradient", "accumulated", "module"])
def test_halves_of_a_backward_run_the_hooks_of_a_whole_one(hook):
    found = []
    for halves in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        if hook == "gradient":
            module[0].weight.register_hook(clamp)
        elif hook == "accumulated":
            module[0].weight.register_post_accumulate_grad_hook(in_place)
        else:
            module[0].register_full_backward_hook(lambda _, gradients, __: tuple(map(clamp, gradients)))
        stage = PipelineStage(module, index=1, delay=0, optimizer=SGD, loss_fn=F.cross_entropy, mitigation="none")
        stage.begin()
        for _ in range(2):
            inputs = torch.randn(6, 4).requires_grad_()
            flight = stage.forward(inputs, torch.randint(3, (6,)), None, 0)
            if halves:
                back = stage.backward_input(flight, None, 1.0)
                stage.backward_weight(flight)
            else:
                back = stage.backward(flight, None, 1.0)
        found.append([*back, *(p.grad for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    changed = found[0][0] if hook == "module" else found[0][1]
    assert changed.abs().max() <= (0.01 if hook != "gradient" else 0.02)


def test_error_feedback_counts_the_steps_of_each_parameter():
    """A parameter with a gradient at every other update is corrected by its own steps, not by none."""
    alone, sparse, other = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3))
    mitigation = Mitigation.named("ef")
    reference = DelayedOptimizer(SGD([alone]), delay=3, mitigation=mitigation)
    both = DelayedOptimizer(SGD([sparse, other]), delay=3, mitigation=mitigation)
    for update in range(16):
        gradient = torch.full((1,), 1.0 + update % 3, dtype=torch.float64)
        other.grad, sparse.grad = gradient, None
        if update % 2:
            sparse.grad, alone.grad = gradient.clone(), gradient.clone()
            reference.step()
        both.step()
        assert torch.equal(alone, sparse)
