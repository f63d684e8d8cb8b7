"""Weights, gradients and constants from outside of a stage are taken, left where they were, or refused."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from support import pipeline_models
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def trainer(stages: list[nn.Module], **options: Any) -> PipelinedBackpropEmulator:
    return PipelinedBackpropEmulator(stages, **{"optimizer": SGD, "loss_fn": F.cross_entropy, **options})


def weights(stages: list[nn.Module]) -> list[Tensor]:
    return [p.detach().clone() for stage in stages for p in stage.parameters()]


class Borrower(nn.Module):
    """Computes with a weight that it does not own."""

    def __init__(self, lender: nn.Module) -> None:
        super().__init__()
        self.lenders = [lender]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.lenders[0].weight)  # type: ignore[arg-type]


class InnerAutocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(hidden).float()  # type: ignore[no-any-return]


def test_a_weight_that_a_stage_or_the_loss_does_not_own_is_refused():
    embedding, tokens = nn.Embedding(8, 6), torch.arange(4)
    head = nn.Linear(6, 8)
    stages = [embedding, nn.Linear(6, 6), Borrower(embedding)]
    with pytest.raises(ValueError, match=r"stage 2 computes with a trained weight of shape \[8, 6\]"):
        trainer(stages).run([(tokens, tokens)])
    owned = [embedding, nn.Linear(6, 6)]
    with pytest.raises(ValueError, match="loss function's own"):
        trainer(owned, loss_fn=lambda out, target: F.cross_entropy(head(out), target)).run([(tokens, tokens)])
    head.requires_grad_(False)
    trainer(owned, loss_fn=lambda out, target: F.cross_entropy(head(out), target)).run([(tokens, tokens)])


def test_running_statistics_of_two_stages_are_refused():
    norm = nn.BatchNorm1d(6, affine=False)
    with pytest.raises(ValueError, match="are one weight"):
        trainer([nn.Sequential(nn.Linear(6, 6), norm), nn.Sequential(norm, nn.Linear(6, 3))])


def test_an_autocast_inside_a_stage_is_seen_where_it_would_void_the_correction():
    data = pipeline_models.batches(4)
    for mitigation in ("spectrain", "pipemare-dc"):
        with pytest.raises(ValueError, match="an autocast inside it"):
            trainer([InnerAutocast(stage) for stage in pipeline_models.stages(3)], mitigation=mitigation).run(data)
    trainer([InnerAutocast(stage) for stage in pipeline_models.stages(3)]).run(data)


def test_gradients_of_the_users_own_backward_are_not_trained_with():
    data = pipeline_models.batches(4)
    stages, clean = pipeline_models.stages(3), pipeline_models.stages(3)
    F.cross_entropy(nn.Sequential(*stages)(data[0][0]), data[0][1]).backward()
    assert trainer(stages).run(data) == trainer(clean).run(data)
    assert all(map(torch.equal, weights(stages), weights(clean)))


def test_after_a_failed_run_the_module_has_its_weights_and_trains_on():
    data = pipeline_models.batches(6)

    class Fails(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            if hidden.isnan().any():
                raise KeyError("data")
            return hidden

    stages = pipeline_models.stages(3)
    stages[0] = nn.Sequential(stages[0], Fails())
    pipeline = trainer(stages)
    bad = [*data[:4], (torch.full_like(data[0][0], torch.nan), data[0][1])]
    with pytest.raises(KeyError):
        pipeline.run(bad)
    for stage in pipeline.stages:
        assert all(map(torch.equal, stage.weights.masters, stage.weights.live))
        assert stage.optimizer is None or stage.optimizer.num_updates == 4
    held = weights(stages)
    state = deepcopy(pipeline.state_dict())
    assert all(map(torch.equal, weights(stages), held))
    again = pipeline_models.stages(3)
    again[0] = nn.Sequential(again[0], Fails())
    other = trainer(again)
    other.load_state_dict(state)
    assert other.run(data) == pipeline.run(data)


@pytest.mark.parametrize("mitigation", ["lwpv+sc", "lwpw", "ef"])
def test_a_weight_that_is_frozen_between_runs_stays_in_forwards_too(mitigation):
    """A moment is left from before; nothing may be predicted from it."""
    data = pipeline_models.batches(8)
    stages = pipeline_models.stages(3)
    pipeline = trainer(stages, mitigation=mitigation)
    pipeline.run(data)
    read: list[Tensor] = []
    frozen = stages[0][0][0].weight
    stages[0].register_forward_hook(lambda *_: read.append(frozen.detach().clone()))
    frozen.requires_grad_(False)
    before = frozen.clone()
    pipeline.run(data)
    assert all(torch.equal(each, before) for each in read)
    assert len(read) == len(data)
    # And a stage of which nothing is left to train.
    stages[0].requires_grad_(False)
    others = weights(stages[1:])
    pipeline.run(data)
    assert not any(map(torch.equal, weights(stages[1:])[:1], others[:1]))


def test_averaged_weights_may_be_put_in_for_an_evaluation_and_taken_out():
    """The masters keep the bits that bf16 has no room for."""
    data = [(x.bfloat16(), target) for x, target in pipeline_models.batches(6)]
    options = {"master_dtype": torch.float32, "loss_fn": lambda out, target: F.cross_entropy(out.float(), target)}
    ends = []
    for swap in (False, True):
        stages = [stage.to(torch.bfloat16) for stage in pipeline_models.stages(3)]
        pipeline = trainer(stages, **options)
        pipeline.run(data)
        if swap:
            kept = [deepcopy(stage.state_dict()) for stage in stages]
            plain = pipeline.evaluate(data)
            for stage in stages:
                stage.load_state_dict({name: 0.5 * value for name, value in stage.state_dict().items()})
            assert pipeline.evaluate(data) != plain
            for stage, state in zip(stages, kept, strict=True):
                stage.load_state_dict(state)
            assert pipeline.evaluate(data) == plain
        pipeline.run(data)
        ends.append([master.detach().clone() for stage in pipeline.stages for master in stage.weights.masters])
    assert all(map(torch.equal, *ends))


def test_weights_set_in_the_optimizer_before_the_first_run_are_taken():
    data = pipeline_models.batches(4)
    stages, plain = pipeline_models.stages(3), pipeline_models.stages(3)
    pipeline = trainer(stages)
    for stage in pipeline.stages:
        for master in stage.weights.masters:
            master.data.mul_(0.5)
    with torch.no_grad():
        for stage in plain:
            for p in stage.parameters():
                p.mul_(0.5)
    assert pipeline.run(data) == trainer(plain).run(data)


def test_two_pipelines_that_share_a_saved_state_do_not_share_moments():
    data = pipeline_models.batches(6)
    first, second = trainer(pipeline_models.stages(3)), trainer(pipeline_models.stages(3))
    first.run(data)
    second.load_state_dict(first.state_dict())
    state = deepcopy(second.state_dict())
    first.run(data)
    third = trainer(pipeline_models.stages(3))
    third.load_state_dict(state)
    assert second.run(data) == third.run(data)


def exchange_storage(stages: list[nn.Module]) -> None:
    for p in stages[-1].parameters():
        p.data = p.data.clone()


def freeze(stages: list[nn.Module]) -> None:
    stages[0][0][0].weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "words"), [(exchange_storage, "was changed while a stream runs"), (freeze, "was frozen while a stream")]
)
def test_what_would_meet_each_stage_at_another_micro_batch_is_refused_in_mid_stream(change, words):
    """Storage that is exchanged is no write; the optimizer would go on with the old one, and nothing would train."""
    stages = pipeline_models.stages(3)
    pipeline = trainer(stages)

    def stream() -> Any:
        for number, batch in enumerate(pipeline_models.batches(6)):
            if number == 3:
                change(stages)
            yield batch

    with pytest.raises(ValueError, match=words):
        pipeline.run(stream())


def test_a_group_that_the_optimizer_got_afterwards_is_refused():
    pipeline = trainer(pipeline_models.stages(3))
    pipeline.run(pipeline_models.batches(3))
    pipeline.stages[0].optimizer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="make all groups in the optimizer factory"):
        pipeline.run(pipeline_models.batches(3))


def test_learning_rates_that_are_tensors_are_each_stages_own():
    """A scheduler writes into them: shared, every stage's scheduler would move the rates of all."""
    data = pipeline_models.batches(6)
    ends = []
    for rate in (torch.tensor(0.01), 0.01):
        stages = pipeline_models.stages(3)
        trainer(
            stages, optimizer=partial(torch.optim.AdamW, lr=rate),
            scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        ).run(data)  # fmt: skip
        ends.append(weights(stages))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # a tensor's step is rounded otherwise


def test_modules_that_average_by_themselves_or_have_no_weights_yet_are_refused(monkeypatch):
    stages = pipeline_models.stages(3)
    monkeypatch.setattr("fourfold.parallel.pipeline.checks.DistributedDataParallel", nn.LayerNorm)
    with pytest.raises(ValueError, match=r"stage \d: .*norm is wrapped in LayerNorm, which averages"):
        trainer(stages)
    with pytest.raises(ValueError, match="stage 1: the module makes its weights at its first forward"):
        trainer([nn.Linear(6, 5), nn.LazyLinear(3)])


def test_what_cannot_be_run_is_said_at_once():
    data = pipeline_models.batches(2)
    for off in (torch.no_grad, torch.inference_mode):
        pipeline = trainer(pipeline_models.stages(3))
        with off(), pytest.raises(ValueError, match="gradients are off"):
            pipeline.run(data)
    with pytest.raises(ValueError, match=r"the stream gave a Tensor: give pairs"):
        trainer(pipeline_models.stages(3)).run([torch.zeros(2, 3)])  # type: ignore[list-item]
    for weight in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="finite and at least 0"):
            trainer(pipeline_models.stages(3), loss_weight=lambda _, weight=weight: weight).run(data)
    with pytest.raises(ValueError, match="differentiable=True"):
        trainer(pipeline_models.stages(3), optimizer=partial(torch.optim.Adam, differentiable=True))


@pytest.mark.parametrize("what", ["state_dict", "load_state_dict", "run", "evaluate"])
def test_what_needs_a_drained_pipeline_is_refused_in_mid_stream(what):
    """A state taken there would lack the micro-batches in flight."""
    data = pipeline_models.batches(4)
    pipeline = trainer(pipeline_models.stages(3))
    state = deepcopy(pipeline.state_dict())
    arguments = {"state_dict": (), "load_state_dict": (state,), "run": (data,), "evaluate": (data,)}[what]

    def asking() -> Any:
        for at, pair in enumerate(data):
            if at == 2:
                getattr(pipeline, what)(*arguments)
            yield pair

    with pytest.raises(ValueError, match=f"{what} while a stream runs"):
        pipeline.run(asking())
    pipeline.load_state_dict(state)
    assert pipeline.run(data) == trainer(pipeline_models.stages(3)).run(data)
