"""The runtime reaches, bit for bit, the weights of the emulator; streams, replicas, resuming, evaluation."""

from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import pipeline_models
from support.digest import digest
from support.rank_pool import RankFailure
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator
from fourfold.parallel.pipeline import PipelineSchedule, Program
from fourfold.parallel.pipeline.schedule import NAMES
from fourfold.parallel.testing.compare import assert_ranks, state_differences

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
NADAMW = partial(torch.optim.NAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
MUON = partial(torch.optim.Muon, lr=0.02)
MITIGATIONS = (
    "none", "stash", "sc", "sc2d", "lwpv", "lwpv2d", "lwpw", "lwpw2d", "lwpv+sc", "lwpw+sc", "lwpv2d+sc2d",
    "lwpw2d+sc2d", "spectrain", "pipemare-lr+pipemare-dc", "shrink", "stash+lwpv+sc",
)  # fmt: skip


def subgroup(size: int) -> dist.ProcessGroup | None:
    """The first `size` ranks; None on the others, which must call as well."""
    group = dist.new_group(list(range(size)))
    return group if dist.get_rank() < size else None


def digests(num_stages: int, cases: list[dict[str, Any]], count: int) -> tuple[list[str], dict[int, list[str]]]:
    """Of this rank's stage after each case; and of all stages in the emulator, for this rank's share of the cases."""
    group = subgroup(num_stages)
    rank = dist.get_rank()
    mine: list[str] = []
    emulated: dict[int, list[str]] = {}
    for number, case in enumerate(cases):
        settings = {"optimizer": SGD, "loss_fn": F.cross_entropy, **case}
        model = settings.pop("model", {})
        data = pipeline_models.batches(count, last=2)
        if group is not None:
            runtime = PipelinedBackprop(pipeline_models.stages(num_stages, **model), group=group, **settings)
            losses = runtime.run(data)
            assert len(losses) == count
            mine.append(digest(losses, runtime.state_dict()))
        if number % dist.get_world_size() == rank:
            emulator = PipelinedBackpropEmulator(pipeline_models.stages(num_stages, **model), **settings)
            losses = emulator.run(data)
            emulated[number] = [digest(losses, state) for state in emulator.state_dict()]
    return mine, emulated


def assert_runtime_equals_emulator(pool: Any, num_stages: int, cases: list[dict[str, Any]], count: int = 9) -> None:
    results = pool(digests, num_stages, cases, count)
    emulated = {number: stages for _, share in results for number, stages in share.items()}
    assert len(emulated) == len(cases)
    different = [
        (case, stage)
        for number, case in enumerate(cases)
        for stage in range(num_stages)
        if results[stage][0][number] != emulated[number][stage]
    ]
    assert different == []
    if count > 2 * num_stages:  # the digests do see the weights: mitigations at different delays differ
        assert len({stages[0] for stages in emulated.values()}) > min(len(cases), 4) // 2


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_runtime_equals_emulator_for_every_schedule_and_mitigation(ranks, num_stages):
    cases = [
        {"schedule": schedule, "mitigation": mitigation}
        for schedule in NAMES
        # where nothing is delayed, all mitigations are the same plain optimizer: a few will do
        for mitigation in (
            MITIGATIONS if any(PipelineSchedule.named(schedule, num_stages).delays()) else MITIGATIONS[::5]
        )
    ]
    assert_runtime_equals_emulator(ranks(4), num_stages, cases)


def test_runtime_equals_emulator_with_dropout_schedulers_and_other_optimizers(ranks):
    cases: list[dict[str, Any]] = [
        {"optimizer": optimizer, "mitigation": mitigation}
        for optimizer in (ADAMW, NADAMW)
        for mitigation in ("none", "lwpv+sc", "lwpw", "spectrain")
    ]
    cases += [
        {"optimizer": MUON, "mitigation": mitigation, "model": {"matrices_only": True}}
        for mitigation in ("none", "lwpv+sc", "lwpw+sc")
    ]
    cases += [
        {"seed": 3, "model": {"dropout": 0.3}, "schedule": schedule} for schedule in ("lockstep", "paci:3", "zb-h1:2")
    ]
    cases += [{"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3), "mitigation": "lwpw+sc"}]
    assert_runtime_equals_emulator(ranks(4), 4, cases)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_micro_batches_than_stages(ranks, count):
    cases = [{"schedule": schedule} for schedule in NAMES]
    assert_runtime_equals_emulator(ranks(4), 4, cases, count)


def test_a_program_written_by_hand_runs(ranks):
    program = Program.parse("stage 0 | F0 F1 B0* F2 B1* B2*\nstage 1 | F0 B0 F1 B1* F2 B2*")
    assert program.delays() == [1, 0]
    assert_runtime_equals_emulator(ranks(2), 2, [{"schedule": program, "mitigation": "lwpv+sc"}], 3)


def resume(schedule: str, mitigation: str) -> list[str]:
    """Stop after 5 of 12 micro-batches, save, go on in a new object: where it differs from the emulator doing so."""
    group = subgroup(2)
    if group is None:
        return []
    settings = {"optimizer": SGD, "loss_fn": F.cross_entropy, "schedule": schedule, "mitigation": mitigation, "seed": 1}
    stream = iter(pipeline_models.batches(12))
    used: list[int] = []
    counted = ((used.append(1), batch)[1] for batch in stream)
    first = PipelinedBackprop(pipeline_models.stages(2, dropout=0.2), group=group, **settings)
    losses = first.run(islice(counted, 5))
    assert len(used) == 5  # nothing was taken from the stream beyond what was trained on
    before = first.evaluate(pipeline_models.batches(3, seed=9, last=1))
    assert before == first.evaluate(pipeline_models.batches(3, seed=9, last=1))
    second = PipelinedBackprop(pipeline_models.stages(2, dropout=0.2), group=group, **settings)
    second.load_state_dict(first.state_dict())
    losses += second.run(counted)
    emulator = PipelinedBackpropEmulator(pipeline_models.stages(2, dropout=0.2), **settings)
    data = pipeline_models.batches(12)
    expected = emulator.run(data[:5])
    assert before == emulator.evaluate(pipeline_models.batches(3, seed=9, last=1))
    states = emulator.state_dict()
    emulator = PipelinedBackpropEmulator(pipeline_models.stages(2, dropout=0.2), **settings)
    emulator.load_state_dict(states)
    expected += emulator.run(data[5:])
    return state_differences(
        {"losses": losses, "state": second.state_dict()},
        {"losses": expected, "state": emulator.state_dict()[dist.get_rank(group)]},
    )


@pytest.mark.parametrize(
    ("schedule", "mitigation"), [("lockstep", "lwpw+sc"), ("2bw", "none"), ("paci:3", "pipemare-dc")]
)
def test_training_resumes_where_it_was_saved(ranks, schedule, mitigation):
    assert ranks(2)(resume, schedule, mitigation) == [[], []]


def replicas(same_data: bool) -> tuple[list[str], list[torch.Tensor]]:
    """2 replicas (ranks 0, 1 and 2, 3) of 2 stages: where this stage differs from the emulator's, and its weights."""
    pipelines = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    peers = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    replica, stage = divmod(dist.get_rank(), 2)
    torch.manual_seed(0)
    modules = pipeline_models.stages(2)
    if replica:  # replicas may start from different weights: the first one's count
        for p in modules[stage].parameters():
            p.data.add_(1.0)
    settings = {"optimizer": SGD, "loss_fn": F.cross_entropy}
    runtime = PipelinedBackprop(modules, group=pipelines[replica], dp_group=peers[stage], **settings)
    data = pipeline_models.batches(8, seed=5 if same_data else 5 + replica)
    runtime.run(data)
    emulator = PipelinedBackpropEmulator(pipeline_models.stages(2), **settings)
    emulator.run(data)
    differences = state_differences(runtime.state_dict(), emulator.state_dict()[stage])
    return differences, [p.detach().clone() for p in modules[stage].parameters()]


def test_replicas_average_their_gradients(ranks):
    # (g + g) / 2 is g, to the bit: with the same data in both replicas nothing changes.
    assert [differences for differences, _ in ranks(4)(replicas, True)] == [[]] * 4
    results = ranks(4)(replicas, False)
    assert [] not in [differences for differences, _ in results]
    for stage in range(2):
        assert state_differences(results[stage][1], results[2 + stage][1], f"stage {stage}") == []


def averaged_replicas_match_large_batches() -> dict[str, float]:
    """Two replicas of n samples each train as one pipeline on micro-batches of 2 n (in fp64, to rounding)."""
    pipelines = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    peers = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    replica, stage = divmod(dist.get_rank(), 2)
    whole = [(x.double(), y) for x, y in pipeline_models.batches(9, size=4)]
    half = [(x[2 * replica : 2 * replica + 2], y[2 * replica : 2 * replica + 2]) for x, y in whole]
    settings = {"optimizer": SGD, "loss_fn": F.cross_entropy, "mitigation": "lwpv+sc"}
    modules = [module.double() for module in pipeline_models.stages(2)]
    PipelinedBackprop(modules, group=pipelines[replica], dp_group=peers[stage], **settings).run(half)
    reference = [module.double() for module in pipeline_models.stages(2)]
    PipelinedBackpropEmulator(reference, **settings).run(whole)
    truth = dict(reference[stage].named_parameters())
    return {name: float((p - truth[name]).abs().max()) for name, p in modules[stage].named_parameters()}


def test_two_replicas_train_as_one_pipeline_with_twice_the_batch(ranks):
    # fp64 and nine updates: the order of a sum of four changes the last bits only
    assert_ranks(ranks(4)(averaged_replicas_match_large_batches), 1e-12)


def meta_inputs() -> tuple[list[float], list[float]]:
    """Losses of runtime and emulator: ranks that do not read an input may pass its shape only."""
    data = pipeline_models.batches(6, last=1)
    if dist.get_rank() != 0:
        data = [(torch.empty(x.shape, device="meta"), y) for x, y in data]
    settings = {"optimizer": SGD, "loss_fn": F.cross_entropy}
    runtime = PipelinedBackprop(pipeline_models.stages(2), group=None, **settings)
    emulator = PipelinedBackpropEmulator(pipeline_models.stages(2), **settings)
    return runtime.run(data), emulator.run(pipeline_models.batches(6, last=1))


def test_later_stages_need_only_the_shapes(ranks):
    for rank, (losses, emulated) in enumerate(ranks(2)(meta_inputs)):
        assert losses == emulated, f"rank {rank}"


def empty_and_wrong() -> list[str]:
    runtime = PipelinedBackprop(pipeline_models.stages(2), group=None, optimizer=SGD, loss_fn=F.cross_entropy)
    assert runtime.run([]) == []
    messages = []
    for wrong in (
        {"stages": pipeline_models.stages(3)},
        {"stages": [None, None]},
        {"schedule": "fastest"},
        {"schedule": PipelineSchedule(name="1f1b", num_stages=3)},
        {"mitigation": "hope"},
        {"optimizer": lambda parameters: torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)},
        {"optimizer": torch.optim.Adagrad},
    ):
        settings: dict[str, Any] = {"optimizer": SGD, "loss_fn": F.cross_entropy, "stages": pipeline_models.stages(2)}
        settings.update(wrong)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            PipelinedBackprop(settings.pop("stages"), group=None, **settings)
        messages.append(str(error.value))
    return messages


def test_what_is_not_supported_is_refused_with_the_values(ranks):
    for rank, messages in enumerate(ranks(2)(empty_and_wrong)):
        expected = (
            "3 stages on a group of 2", "is None", "'fastest' is not known", "is for 3 stages", "'hope' is not among",
            "over the parameters it is called with", "Adagrad",
        )  # fmt: skip
        for words, message in zip(expected, messages, strict=True):
            assert words in message, f"rank {rank}"


def failing_loss() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("deliberate")

    PipelinedBackprop(pipeline_models.stages(2), group=None, optimizer=SGD, loss_fn=loss).run(
        pipeline_models.batches(4)
    )


def test_an_error_on_one_stage_is_that_rank_s_own(ranks):
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2.*ArithmeticError: deliberate"):
        ranks(2)(failing_loss)
