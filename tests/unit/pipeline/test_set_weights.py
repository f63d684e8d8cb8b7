"""A weight of two stages is refused; weights set between runs are taken, or the change is noticed and refused."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from support import pipeline_models
from torch import nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def trainer(stages: list[nn.Module], **options: Any) -> PipelinedBackpropEmulator:
    return PipelinedBackpropEmulator(stages, **{"optimizer": SGD, "loss_fn": F.cross_entropy, **options})


def test_a_weight_of_two_stages_is_refused():
    first, last = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
    last.weight = first.weight
    for tied in ([first, nn.Linear(6, 6), last], [last, last]):
        with pytest.raises(ValueError, match=r"are one weight.*untie them"):
            trainer(tied)
    # Also where only the memory is shared.
    view = nn.Linear(6, 8, bias=False)
    view.weight.data = first.weight.data
    with pytest.raises(ValueError, match=r"stage 0's weight and stage 1's weight are one weight"):
        trainer([first, view])
    # Twice in one stage is no matter, nor is a frozen one.
    trainer([nn.Sequential(first, nn.Linear(6, 6), last)])
    first.weight.requires_grad_(False)
    trainer([first, last])


@pytest.mark.parametrize("mitigation", ["none", "lwpv+sc", "stash"])
@pytest.mark.parametrize("how", ["load", "clamp", "data", "optimizer"])
def test_weights_set_between_runs_are_taken(how, mitigation):
    """The same as a new pipeline that starts from these weights and the same moments."""
    data = pipeline_models.batches(12)
    stages = pipeline_models.stages(3)
    changed = trainer(stages, mitigation=mitigation)
    changed.run(data[:6])
    state = deepcopy(changed.state_dict())
    goal = [{name: p.detach().clamp(-0.1, 0.1) for name, p in stage.named_parameters()} for stage in stages]
    for stage, part, target in zip(stages, changed.stages, goal, strict=True):
        if how == "load":
            stage.load_state_dict({**stage.state_dict(), **target})
        for name, p in stage.named_parameters():
            if how == "clamp":
                with torch.no_grad():
                    p.clamp_(-0.1, 0.1)
            if how == "data":
                p.data = target[name].clone()
        if how == "optimizer" and part.optimizer is not None:
            for p in part.optimizer.optimizer.param_groups[0]["params"]:
                p.data.clamp_(-0.1, 0.1)
    losses = changed.run(data[6:])

    reference = trainer(pipeline_models.stages(3), mitigation=mitigation)
    for own, target in zip(state, goal, strict=True):
        own["module"].update(target)
    reference.load_state_dict(state)
    assert reference.run(data[6:]) == losses


def test_changes_that_cannot_be_taken_are_refused():
    def made() -> tuple[list[nn.Module], PipelinedBackpropEmulator]:
        stages = pipeline_models.stages(2)
        return stages, trainer(stages)

    data = pipeline_models.batches(3)
    stages, pipeline = made()
    stages[1][1].weight = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"stage 1: parameter 1.weight is not the object"):
        pipeline.run(data)
    stages, pipeline = made()
    stages[0].double()
    with pytest.raises(ValueError, match=r"stage 0: parameter .* went to torch.float64"):
        pipeline.run(data)
    frozen = pipeline_models.stages(2)
    frozen[0][0][0].weight.requires_grad_(False)
    pipeline = trainer(frozen)
    frozen[0][0][0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"stage 0: parameter .* was not trainable when the pipeline was made"):
        pipeline.run(data)
    stages, pipeline = made()
    pipeline.run(data)
    with torch.no_grad():
        stages[0][0][0].weight.add_(1.0)
        pipeline.stages[0].weights.masters[0].sub_(1.0)
    with pytest.raises(ValueError, match=r"stage 0: weight 0.0.weight was set in the module and, otherwise"):
        pipeline.run(data)
    stages, pipeline = made()

    def meddling():
        for pair in data:
            yield pair
            with torch.no_grad():
                stages[0][0][0].weight.clamp_(-0.1, 0.1)

    with pytest.raises(ValueError, match=r"weight 0.0.weight was changed while a stream runs"):
        pipeline.run(meddling())


def test_evaluation_leaves_every_module_in_its_mode():
    stages = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), nn.Linear(8, 3)]
    stages[0][1].eval()
    modes = [module.training for stage in stages for module in stage.modules()]
    pipeline = trainer(stages)
    pipeline.evaluate(pipeline_models.batches(2))
    assert [module.training for stage in stages for module in stage.modules()] == modes
    with pytest.raises(RuntimeError):
        pipeline.evaluate([(torch.zeros(2, 5), torch.zeros(2))])
    assert [module.training for stage in stages for module in stage.modules()] == modes
