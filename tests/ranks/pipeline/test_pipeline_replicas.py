"""Replicas of a pipeline that are not alike: in gradients, weights, masks, buffers and the lengths of their streams."""

from functools import partial
from typing import Any

import pytest
import torch
from support import pipeline_models
from support.pipeline_models import replicas
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator
from fourfold.parallel.pipeline import PipelineError

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Experts(nn.Module):
    """One of two experts a micro-batch: the other has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x[0, 0] > 0 else self.second(x)


def unlike_replicas() -> tuple[list[Tensor], bool]:
    """Replica 0 uses the first expert only, replica 1 the second; against the mean of their gradients."""
    pipeline, peers, replica, stage = replicas()

    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [Experts(), nn.Linear(6, 3)]

    both = []
    for sign in (1.0, -1.0):
        both.append([(torch.cat([sign * x[:1].abs(), x[1:]]), y) for x, y in pipeline_models.batches(5)])
    modules = stages()
    made = PipelinedBackprop(
        modules, group=pipeline, dp_group=peers, optimizer=SGD, loss_fn=F.cross_entropy, schedule="1f1b:1"
    )
    made.run(both[replica])
    reference = nn.Sequential(*stages())
    optimizer = SGD(reference.parameters())
    for pair in zip(*both, strict=True):
        optimizer.zero_grad()
        (sum(F.cross_entropy(reference(x), y) for x, y in pair) / 2).backward()
        optimizer.step()
    mine = [p.detach() for p in modules[stage].parameters()]
    expected = [p.detach() for p in reference[stage].parameters()]
    return mine, all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, expected, strict=True))


def test_a_gradient_that_one_replica_lacks_counts_as_zero(ranks):
    results = ranks(4)(unlike_replicas)
    assert all(equal for _, equal in results)
    for stage in range(2):
        assert all(map(torch.equal, results[stage][0], results[2 + stage][0]))


def replicas_set_unlike(how: str) -> str:
    """Weights set, or frozen, on one replica only, as by a file that one rank has loaded."""
    pipeline, peers, replica, stage = replicas()
    modules = pipeline_models.stages(2)
    made = PipelinedBackprop(modules, group=pipeline, dp_group=peers, optimizer=SGD, loss_fn=F.cross_entropy)
    made.run(pipeline_models.batches(3))
    if replica == 1:
        last = list(modules[stage].parameters())[-1]
        if how == "frozen":
            last.requires_grad_(False)
        else:
            last.data.mul_(0.5)
    try:
        made.run(pipeline_models.batches(3))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["set", "frozen"])
def test_replicas_whose_weights_were_set_unlike_are_refused(ranks, how):
    pool = ranks(4)
    try:
        messages = pool(replicas_set_unlike, how)
    finally:
        pool.close()
    pipeline_models.assert_unlike_replica_is_named(messages)


class Remembers(nn.Module):
    """Dropout on ones, kept to be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.masks = nn.Linear(6, 6), nn.Dropout(0.5), []

    def forward(self, x: Tensor) -> Tensor:
        mask = self.dropout(torch.ones(64))
        self.masks.append(mask.detach())
        return self.linear(x) * mask.mean()


def dropout_and_norms() -> tuple[Tensor, list[Tensor], bool]:
    """This rank's masks, its buffers after a run, and whether replica 0's masks are the emulator's."""
    pipeline, peers, replica, stage = replicas()
    torch.manual_seed(0)
    modules = [nn.Sequential(Remembers(), nn.BatchNorm1d(6)), nn.Sequential(nn.BatchNorm1d(6), Remembers())]
    options: dict[str, Any] = {"optimizer": SGD, "loss_fn": F.cross_entropy, "seed": 5}
    data = pipeline_models.batches(4, seed=replica)
    PipelinedBackprop(modules, group=pipeline, dp_group=peers, **options).run(data)
    masks = torch.stack(modules[stage][stage].masks)
    again = [nn.Sequential(Remembers(), nn.BatchNorm1d(6)), nn.Sequential(nn.BatchNorm1d(6), Remembers())]
    PipelinedBackpropEmulator(again, **options).run(data)
    emulated = torch.stack(again[stage][stage].masks)
    return masks, [buffer.clone() for buffer in modules[stage].buffers()], torch.equal(masks, emulated)


def test_replicas_draw_masks_of_their_own_and_end_with_the_same_buffers(ranks):
    results = ranks(4)(dropout_and_norms)
    assert [equal for _, _, equal in results] == [True, True, False, False]
    for stage in range(2):
        assert not torch.equal(results[stage][0], results[2 + stage][0])
        assert all(map(torch.equal, results[stage][1], results[2 + stage][1]))


def replicas_of_unlike_lengths() -> tuple[str, str]:
    pipeline, peers, replica, _ = replicas()
    made = PipelinedBackprop(
        pipeline_models.stages(2), group=pipeline, dp_group=peers, optimizer=SGD, loss_fn=F.cross_entropy
    )
    try:
        made.run(pipeline_models.batches(5 - replica))
    except (ValueError, PipelineError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_replicas_of_different_lengths_end_at_once(ranks):
    pool = ranks(4)
    try:
        messages = pool(replicas_of_unlike_lengths, timeout_s=60.0)
    finally:
        pool.close()
    assert all(kind for kind, _ in messages), messages
    assert any("the stream of rank 3 has ended, those of its replicas go on" in text for _, text in messages), messages
