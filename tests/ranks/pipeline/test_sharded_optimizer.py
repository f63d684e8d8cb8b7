"""A stage's optimizer sharded over its replicas: the weights are, to the bit, those of replicas that have all of it."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import pipeline_models
from support.digest import digest
from support.pipeline_models import replicas
from torch import nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator
from fourfold.parallel.pipeline import ClipNorm, PipelineError
from fourfold.parallel.pipeline.optimizer import NamedParameters

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: NamedParameters) -> torch.optim.Optimizer:
    """Two groups, so that the optimizer's order is not the module's."""
    decayed = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim < 2]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decayed}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01)


def muon(parameters: NamedParameters) -> list[torch.optim.Optimizer]:
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    made: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=0.02)] if matrices else []
    return [*made, torch.optim.AdamW(rest, lr=0.01)] if rest else made


OPTIONS: dict[str, Any] = {"optimizer": adamw, "loss_fn": F.cross_entropy}
CASES: list[dict[str, Any]] = [
    {"optimizer": SGD},
    {"optimizer": adamw, "schedule": "2bw:4"},
    {"optimizer": muon},
    {"optimizer": muon, "mitigation": "stash+ef", "schedule": "2bw:3"},
    {"optimizer": SGD, "mitigation": "stash+ef"},
    {"optimizer": adamw, "mitigation": "spectrain"},
    {"optimizer": muon, "mitigation": "pipemare-lr+pipemare-dc"},
    {"optimizer": adamw, "mitigation": "rotate+lwpv+sc"},
    {"optimizer": muon, "mitigation": "rotate+lwpw+sc", "schedule": "1f1b-async"},
    {"optimizer": SGD, "mitigation": "none", "clip": 0.1, "schedule": "paci:2"},
    {"optimizer": muon, "clip": ClipNorm(max_norm=0.1, scope="model", lag_updates=1), "schedule": "1f1b-async"},
    {"optimizer": adamw, "mitigation": "none", "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3)},
    {"optimizer": muon, "master_dtype": torch.float64, "observe": True},
]


def sharded_and_whole() -> list[tuple[str, str, bool]]:
    """For each case: this rank's losses and weights with all of the optimizer and with a part, and if parts are."""
    pipeline, peers, replica, stage = replicas()
    found = []
    for case in CASES:
        ends, states = [], []
        for sharded in (False, True):
            modules = pipeline_models.stages(2)
            made = PipelinedBackprop(
                modules, group=pipeline, dp_group=peers, shard_optimizer=sharded, **{**OPTIONS, **case}
            )
            losses = made.run(pipeline_models.batches(7, seed=replica))
            losses += made.run(pipeline_models.batches(4, seed=5 + replica, last=2))
            losses += made.evaluate(pipeline_models.batches(2, seed=9))
            ends.append(digest(losses, modules[stage].state_dict()))
            optimizers = made.stage.optimizer.optimizers if made.stage.optimizer else []
            states.append(sum(len(each.state) for each in optimizers))
        found.append((ends[0], ends[1], 0 < states[1] < states[0]))
    return found


def test_weights_are_those_of_whole_optimizers_to_the_bit(ranks):
    for rank, ends in enumerate(ranks(4)(sharded_and_whole)):
        for case, (whole, sharded, is_part) in zip(CASES, ends, strict=True):
            assert whole == sharded, f"rank {rank}, {case}"
            assert is_part, f"rank {rank}, {case}"


def counted(case: dict[str, Any]) -> tuple[bool, list[int]]:
    """Replicas with the same stream, against the emulator; and the bytes broadcast for each update."""
    pipeline, peers, _, stage = replicas()
    modules = pipeline_models.stages(2)
    made = PipelinedBackprop(modules, group=pipeline, dp_group=peers, shard_optimizer=True, **{**OPTIONS, **case})
    sent: list[int] = []
    broadcast = dist.broadcast

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if options.get("group") is peers:
            sent.append(tensor.numel() * tensor.element_size())
        return broadcast(tensor, *args, **options)

    dist.broadcast = counting
    try:
        losses = made.run(pipeline_models.batches(6))
    finally:
        dist.broadcast = broadcast
    again = pipeline_models.stages(2)
    emulator = PipelinedBackpropEmulator(again, **{**OPTIONS, **case})
    expected = emulator.run(pipeline_models.batches(6))
    same = digest(losses, modules[stage].state_dict()) == digest(expected, again[stage].state_dict())
    size = sum(p.numel() * p.element_size() for p in modules[stage].parameters())
    return same, [sum(sent) // size, sum(sent) % size, made.stage.num_updates]


@pytest.mark.parametrize(
    ("case", "gathers"),
    [
        # The present weights alone at each update; on stage 0 the predicted ones, too, and these as a run begins.
        ({"mitigation": "stash+ef", "schedule": "2bw:2"}, (3, 3)),
        ({"optimizer": SGD}, (6 + 7, 6)),
        ({"optimizer": adamw, "mitigation": "rotate+lwpv+sc"}, (6 + 7, 6)),
        # Those of backwards besides, on stages after the first.
        ({"optimizer": SGD, "mitigation": "spectrain"}, (6 + 7, 6 + 7 + 7)),
        ({"optimizer": muon, "mitigation": "pipemare-dc"}, (6 + 7, 6)),
    ],
)
def test_emulated_and_each_version_of_the_weights_is_gathered_once(ranks, case, gathers):
    for rank, (same, found) in enumerate(ranks(4)(counted, case)):
        assert same, f"rank {rank}"
        assert found == [gathers[rank % 2], 0, 3 if "schedule" in case else 6], f"rank {rank}"


def set_between_runs(how: str, mitigation: str) -> str:
    """A digest of this stage's weights after they were clamped between two runs in one of several places."""
    pipeline, peers, replica, stage = replicas()
    modules = pipeline_models.stages(2)
    options = {**OPTIONS, "optimizer": SGD, "mitigation": mitigation}
    made = PipelinedBackprop(modules, group=pipeline, dp_group=peers, shard_optimizer=how != "whole", **options)
    made.run(pipeline_models.batches(5, seed=replica))
    if how == "optimizer":
        for optimizer in made.stage.optimizer.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.data.clamp_(-0.1, 0.1)
        made.evaluate(pipeline_models.batches(1))  # which takes them for the moment only
    else:
        for p in modules[stage].parameters():
            p.data.clamp_(-0.1, 0.1)
    made.run(pipeline_models.batches(5, seed=replica))
    return digest([], modules[stage].state_dict())


@pytest.mark.parametrize("mitigation", ["none", "lwpv+sc", "stash"])
def test_weights_set_between_runs_are_taken(ranks, mitigation):
    whole, module, optimizer = (ranks(4)(set_between_runs, how, mitigation) for how in ("whole", "module", "optimizer"))
    assert whole == module == optimizer
    assert whole[0] == whole[2]
    assert whole[1] == whole[3]


def set_unlike(how: str) -> str:
    """The refusal of a run after weights were set on replica 1 only, in the module or in both places."""
    pipeline, peers, replica, stage = replicas()
    modules = pipeline_models.stages(2)
    made = PipelinedBackprop(modules, group=pipeline, dp_group=peers, shard_optimizer=True, **OPTIONS)
    made.run(pipeline_models.batches(3))
    if replica == 1 and how == "owned":
        names = made.stage.weights.own_names
        dict(modules[stage].named_parameters())[names[0]].data.mul_(0.5)
    if replica == 1 and how == "not owned":
        owned = made.stage.weights.own_names
        next(p for name, p in modules[stage].named_parameters() if name not in owned).data.mul_(0.5)
    if how == "both":  # in the optimizer of its owner, otherwise in the module of the other
        for optimizer in made.stage.optimizer.optimizers if replica == 1 else []:
            optimizer.param_groups[0]["params"][0].data.mul_(2.0)
        owned = [name for names in made.stage.weights.shards.told(made.stage.weights.own_names)[1:] for name in names]
        if replica == 0:
            for name, p in modules[stage].named_parameters():
                if name in owned:
                    p.data.mul_(0.5)
    try:
        made.run(pipeline_models.batches(3))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["owned", "not owned", "both"])
def test_weights_set_unlike_are_refused_on_every_replica(ranks, how):
    pool = ranks(4)
    try:
        messages = pool(set_unlike, how)
    finally:
        pool.close()
    pipeline_models.assert_unlike_replica_is_named(messages)


def resumed(case: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Undisturbed, and saved and loaded at every pause, in flight where there is such; then the refusals."""
    pipeline, peers, replica, _ = replicas()
    data = pipeline_models.batches(12, seed=replica)

    def make(**options: Any) -> PipelinedBackprop:
        torch.manual_seed(1)
        given = {**OPTIONS, "shard_optimizer": True, **case, **options}
        return PipelinedBackprop(pipeline_models.stages(2), group=pipeline, dp_group=peers, **given)

    whole = make()
    ends = [digest(whole.run(data), whole.state_dict())]
    paused = make()
    losses = paused.run(data[:5], drain=False)
    state = deepcopy(paused.state_dict())
    again = make()
    again.load_state_dict(state)
    losses += again.run(data[5:8], drain=False)
    assert again.evaluate(data[:2]) == again.evaluate(data[:2])
    losses += again.run(data[8:])
    ends.append(digest(losses, again.state_dict()))
    messages = []
    theirs = again.stage.weights.shards.told(state)[1 - replica]
    for other, given in ((make(shard_optimizer=False), state), (make(), make(shard_optimizer=False).state_dict()),
                         (make(), theirs)):  # fmt: skip
        with pytest.raises(ValueError, match="load on every replica what it saved itself") as error:
            other.load_state_dict(given)
        messages.append(str(error.value))
    return ends, messages


@pytest.mark.parametrize(
    "case",
    [
        {"optimizer": muon},
        {"optimizer": adamw, "mitigation": "stash+ef", "schedule": "2bw:3"},
        {"optimizer": SGD, "mitigation": "spectrain"},
        {"optimizer": SGD, "mitigation": "sc"},
        {"optimizer": adamw, "mitigation": "none", "master_dtype": torch.float64},
    ],
)
def test_saved_and_resumed_with_micro_batches_in_flight(ranks, case):
    for rank, (ends, messages) in enumerate(ranks(4)(resumed, case)):
        assert ends[0] == ends[1], f"rank {rank}"
        replica = rank // 2
        assert f"replica {replica} of 2, which owns" in messages[0]
        assert "not of a whole optimizer" in messages[0]
        assert "the state of a whole optimizer, not of" in messages[1]
        assert f"replica {1 - replica} of 2" in messages[2]


def few_parameters(mitigation: str) -> tuple[int, str, str]:
    """Four replicas of a stage with two parameters: how many this one owns, and digests against a whole optimizer."""
    alone = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    ends, owned = [], 0
    for sharded in (False, True):
        torch.manual_seed(2)
        module = nn.Linear(6, 3)
        made = PipelinedBackprop(
            [module], group=alone, dp_group=dist.group.WORLD, shard_optimizer=sharded,
            scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2),
            **{**OPTIONS, "optimizer": muon, "mitigation": mitigation, "clip": 0.5},
        )  # fmt: skip
        losses = made.run(pipeline_models.batches(4, seed=dist.get_rank()))
        made.load_state_dict(made.state_dict())
        losses += made.run(pipeline_models.batches(4, seed=dist.get_rank()))
        ends.append(digest(losses, module.state_dict()))
        owned = len(made.stage.optimizer.slots)
    return owned, ends[0], ends[1]


@pytest.mark.parametrize("mitigation", ["none", "lwpv+sc"])
def test_replicas_that_own_nothing(ranks, mitigation):
    results = ranks(4)(few_parameters, mitigation)
    assert [owned for owned, _, _ in results] == [1, 1, 0, 0]
    assert all(whole == sharded for _, whole, sharded in results)


def hooks_and_skips() -> list[tuple[str, int]]:
    """Digests without and with sharding, where hooks change gradients and weights and some micro-batches are void."""
    pipeline, peers, replica, stage = replicas()
    found = []
    for sharded in (False, True):
        seen: list[str] = []

        def halve(gradients: dict[str, torch.Tensor], seen: list[str] = seen) -> None:
            seen.extend(gradients)
            for gradient in gradients.values():
                gradient.mul_(0.5)

        def hooked(parameters: NamedParameters) -> torch.optim.Optimizer:
            optimizer = adamw(parameters)

            def before(*_: Any) -> None:
                for p in (p for group in optimizer.param_groups for p in group["params"] if p.ndim < 2):
                    p.grad.clamp_(-0.01, 0.01)

            def after(*_: Any) -> None:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.clamp_(-0.3, 0.3)

            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)
            return optimizer

        modules = pipeline_models.stages(2)
        made = PipelinedBackprop(
            modules, group=pipeline, dp_group=peers, shard_optimizer=sharded,
            **{**OPTIONS, "optimizer": hooked}, on_gradients=halve, skip_nonfinite=True,
        )  # fmt: skip
        data = pipeline_models.batches(6, seed=replica)
        data[2 + replica] = (data[2 + replica][0] * float("nan"), data[2 + replica][1])
        data[4] = (data[4][0] * float("inf"), data[4][1])  # of both: no update
        made.run(data)
        found.append((digest([], modules[stage].state_dict()), len(set(seen))))
    return found


def test_hooks_and_void_micro_batches(ranks):
    for rank, (whole, sharded) in enumerate(ranks(4)(hooks_and_skips)):
        assert whole == sharded, f"rank {rank}"
        assert whole[1] > 1, f"rank {rank}"


def failing_as_a_run_begins() -> str:
    """What a rank raises where a weight was set in two ways on replica 1 of stage 0, which alone can see it."""
    pipeline, peers, replica, stage = replicas()
    modules = pipeline_models.stages(2)
    made = PipelinedBackprop(modules, group=pipeline, dp_group=peers, shard_optimizer=True, **OPTIONS)
    made.run(pipeline_models.batches(3))
    if (replica, stage) == (1, 0):
        dict(modules[0].named_parameters())[made.stage.weights.own_names[0]].data.mul_(0.5)
        made.stage.weights.masters[0].data.mul_(2.0)
    try:
        made.run(pipeline_models.batches(3))
    except (ValueError, PipelineError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_replica_that_cannot_begin_ends_all(ranks):
    pool = ranks(4)
    try:
        results = pool(failing_as_a_run_begins, timeout_s=60.0)  # the group's own timeout is 120 s
    finally:
        pool.close()
    assert "otherwise, in the optimizer: set it in one of them" in results[2]
    assert "ValueError: stage 0: its replica on rank 2 has failed: ValueError: stage 0: weight" in results[0]
    for rank in (1, 3):
        assert results[rank].startswith("PipelineError"), f"rank {rank}: {results[rank]}"


def faulty(case: str) -> tuple[str, str]:
    """What a rank raises where replica 1 of stage 1 cannot make its optimizer, in one way or another."""
    pipeline, peers, replica, stage = replicas()

    def factory(parameters: NamedParameters) -> torch.optim.Optimizer:
        if (replica, stage) != (1, 1):
            return SGD(parameters)
        if case == "factory":
            raise RuntimeError("no such optimizer")
        if case == "list":
            return SGD(list(parameters)[1:])
        raise AssertionError(case)

    try:
        PipelinedBackprop(
            pipeline_models.stages(2), group=pipeline, dp_group=peers, shard_optimizer=True,
            **{**OPTIONS, "optimizer": factory},
        )  # fmt: skip
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(("case", "words"), [("factory", "no such optimizer"), ("list", "missing: ")])
def test_a_factory_that_fails_on_one_replica_fails_on_all_of_its_stage(ranks, case, words):
    results = ranks(4)(faulty, case)
    assert [kind for kind, _ in results] == [
        "",
        "ValueError",
        "",
        "RuntimeError" if case == "factory" else "ValueError",
    ]
    assert "stage 1: its replica on rank 3 has failed: " in results[1][1]
    assert words in results[1][1]
    assert words in results[3][1]
