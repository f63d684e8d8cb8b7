"""What is given wrongly is refused with its name and the mend, before anything is trained or loaded."""

from functools import partial
from typing import Any

import pytest
import torch
from support import pipeline_models
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.pipeline import DelayedOptimizer, Mitigation

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def trainer(stages: Any = None, **options: Any) -> PipelinedBackpropEmulator:
    made = pipeline_models.stages(2) if stages is None else stages
    return PipelinedBackpropEmulator(made, **{"optimizer": SGD, "loss_fn": F.cross_entropy, **options})


def exponential(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def made_already(parameters: Any = None) -> torch.optim.Optimizer:
    return SGD(nn.Linear(2, 2).parameters() if parameters is None else parameters)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": made_already()}, "optimizer is a SGD: give what makes one"),
        ({"optimizer": None}, "optimizer is a NoneType"),
        ({"scheduler": exponential(made_already())}, "scheduler is a ExponentialLR: give what makes one"),
        ({"loss_fn": None}, "no loss_fn"),
        ({"loss_fn": 3.0}, "loss_fn=3.0: give a function"),
        ({"on_gradients": 3}, "on_gradients=3: give a function"),
        ({"schedule": None}, "schedule=None is a NoneType: give str or PipelineSchedule or Program"),
        ({"mitigation": ["lwpv", "sc"]}, r"mitigation=\['lwpv', 'sc'\] is a list: give str or Mitigation"),
        ({"seed": "a"}, "seed='a' is a str: give int or None"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is a str"),
        ({"master_dtype": torch.int64}, "trained in a floating dtype"),
        ({"skip_nonfinite": "yes"}, "skip_nonfinite='yes' is a str: give bool"),
        ({"delays": [1.5, 0]}, "one number of updates, at least 0"),
        ({"stages": nn.Linear(2, 2)}, "stages is a Linear: give a list of modules"),
        ({"stages": [torch.tanh, nn.Linear(2, 2)]}, "stage 0 is a builtin_function_or_method"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_another_kind_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        trainer(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_weight": lambda target: None}, "loss_weight returned NoneType: give one number"),
        ({"loss_weight": lambda target: torch.ones(2)}, r"loss_weight returned \[2\]: give one number"),
        ({"on_gradients": lambda found: {}}, "on_gradients returned another dict: change its own in place"),
    ],
)
def test_what_functions_return_is_looked_at(options, words):
    with pytest.raises(ValueError, match=words):
        trainer(**options).run(pipeline_models.batches(2))


def test_a_stream_that_is_none_is_refused():
    with pytest.raises(ValueError, match="the stream is a NoneType"):
        trainer().run(None)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("when", ["made", "run"])
def test_hooks_that_no_backward_would_reach_are_refused(kind, when):
    """The optimizer's parameters get their gradients handed over: a hook there would be void."""

    def halve(found: Tensor) -> None:
        (found if found.grad is None else found.grad).mul_(0.5)

    def hooked(parameters: Any) -> torch.optim.Optimizer:
        if when == "made":
            getattr(parameters[0], kind)(halve)
        return SGD(parameters)

    def use() -> None:
        made = trainer(optimizer=hooked)
        assert made.stages[0].optimizer is not None
        getattr(made.stages[0].optimizer.optimizer.param_groups[0]["params"][0], kind)(halve)
        made.run(pipeline_models.batches(2))

    with pytest.raises(ValueError, match=r"a hook on the gradient of .* register it on the module's"):
        use()


class HandsOn(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(6, 3), kind

    def forward(self, x: Tensor) -> Any:
        hidden = self.linear(x)
        if self.kind == "nested":
            return torch.nested.as_nested_tensor([hidden[:1], hidden[1:]], layout=torch.jagged)
        return hidden, torch.eye(3).to_sparse()


@pytest.mark.parametrize(("kind", "words"), [("sparse", "that is torch.sparse_coo"), ("nested", "that is nested")])
def test_tensors_that_are_not_plain_memory_are_not_handed_on(kind, words):
    with pytest.raises(ValueError, match=words):
        trainer([HandsOn(kind), nn.Linear(3, 3)]).run(pipeline_models.batches(2))


def test_two_parameters_in_one_memory_are_refused():
    stages = [nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 3)]
    pair = stages[0]
    assert isinstance(pair, nn.Sequential)
    pair[1].weight = nn.Parameter(pair[0].weight.data)
    with pytest.raises(ValueError, match=r"0.weight and 1.weight are two parameters in one memory"):
        trainer(stages)
    # Two parts of one memory are two weights.
    flat = torch.randn(72)
    pair[0].weight, pair[1].weight = nn.Parameter(flat[:36].view(6, 6)), nn.Parameter(flat[36:].view(6, 6))
    trainer(stages)


def other_module() -> list[nn.Module]:
    return [nn.Linear(6, 4), nn.Linear(4, 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": ADAMW}, r"of the optimizers \['SGD'\], this stage has \['AdamW'\]"),
        ({"optimizer": lambda given: [SGD(given[:1]), SGD(given[1:])]}, r"this stage has \['SGD', 'SGD'\]"),
        ({"scheduler": exponential}, "saved without a learning-rate scheduler"),
        ({"stages": other_module()}, "the state is of another module: .* absent here"),
    ],
)
def test_a_state_of_another_pipeline_is_refused_before_it_is_loaded(options, words):
    saved = trainer(mitigation="none")
    saved.run(pipeline_models.batches(5))
    made = trainer(mitigation="none", **options)
    before = [p.detach().clone() for stage in made.stages for p in stage.module.parameters()]
    with pytest.raises(ValueError, match=words):
        made.load_state_dict(saved.state_dict())
    assert all(map(torch.equal, before, (p for stage in made.stages for p in stage.module.parameters())))


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda states: states[:1], "1 states for 2 stages"), (lambda states: [{}, {}], "this is no state of a stage")],
)
def test_what_is_no_state_is_refused(change, words):
    made = trainer()
    with pytest.raises(ValueError, match=words):
        made.load_state_dict(change(made.state_dict()))


@pytest.mark.parametrize("mitigation", ["lwpv+sc", "rotate+lwpv+sc", "lwpw+ef"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_weights_are_two_real_ones_to_an_adam(mitigation, amsgrad):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 4, dtype=torch.complex128, generator=generator)
    whole, parts = nn.Parameter(first.clone()), nn.Parameter(torch.view_as_real(first).clone())
    both = [
        DelayedOptimizer(ADAMW([p], amsgrad=amsgrad), delay=2, mitigation=Mitigation.named(mitigation))
        for p in (whole, parts)
    ]
    for _ in range(5):
        gradient = torch.randn(3, 4, dtype=torch.complex128, generator=generator)
        whole.grad, parts.grad = gradient, torch.view_as_real(gradient).clone()
        for each in both:
            each.step()
        ahead = [(each.forward_weights() or [])[0] for each in both]
        torch.testing.assert_close(torch.view_as_real(whole.detach()), parts.detach(), rtol=0, atol=1e-14)
        torch.testing.assert_close(torch.view_as_real(ahead[0]), ahead[1], rtol=0, atol=1e-14)


def test_a_default_device_of_the_users_is_not_for_numbers_on_the_host():
    """As on CUDA, where torch.set_default_device would put a message's header on the device."""
    stages, data = pipeline_models.stages(3), pipeline_models.batches(6)
    plain = trainer(pipeline_models.stages(3), mitigation="ef+lwpv", clip=1.0).run(data)
    torch.set_default_device("meta")
    try:
        assert trainer(stages, mitigation="ef+lwpv", clip=1.0).run(data) == plain
    finally:
        torch.set_default_device(None)
