"""Streams that pause with micro-batches in flight: evaluated, saved and resumed as if nothing had happened."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import pipeline_models
from support.digest import digest
from torch import Tensor
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackprop, PipelinedBackpropEmulator
from fourfold.parallel.pipeline import ClipNorm, PipelineError

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
SHORT = (1, 2, 3, 7, 4)
LATE_NORM = partial(ClipNorm, max_norm=0.3, scope="model", first_wait=False)


def pieces(data: list[Any]) -> list[list[Any]]:
    """A stream in streams, some shorter than the pipeline."""
    found, start = [], 0
    for length in SHORT:
        found.append(data[start : start + length])
        start += length
    return [*found, data[start:]]


def made(case: dict[str, Any], num_stages: int, group: Any) -> PipelinedBackprop:
    options = {"optimizer": SGD, "loss_fn": F.cross_entropy, **case}
    torch.manual_seed(3)
    return PipelinedBackprop(pipeline_models.stages(num_stages, **options.pop("model", {})), group=group, **options)


def counted(target: Tensor) -> float:
    return float(target.sum()) % 3


def paused(num_stages: int) -> list[list[str]]:
    """For each case: this stage undisturbed; evaluated at every pause; saved and loaded at every pause; emulated."""
    group = dist.group.WORLD
    data, other = pipeline_models.batches(21, last=2), pipeline_models.batches(4, seed=9)
    found = []
    for case in CASES:
        whole = made(case, num_stages, group)
        ends = [digest(whole.run(data), whole.state_dict())]
        for saves in (False, True):
            pipeline = made(case, num_stages, group)
            losses = []
            for part in pieces(data)[:-1]:
                losses += pipeline.run(part, drain=False)
                if saves:
                    state = deepcopy(pipeline.state_dict())
                    random = torch.get_rng_state()
                    pipeline = made(case, num_stages, group)
                    pipeline.load_state_dict(state)
                    torch.set_rng_state(random)
                else:
                    assert pipeline.evaluate(other) == pipeline.evaluate(other)
            losses += pipeline.run(pieces(data)[-1])
            ends.append(digest(losses, pipeline.state_dict()))
        if not case.get("model"):
            emulator = PipelinedBackpropEmulator(
                pipeline_models.stages(num_stages), **{"optimizer": SGD, "loss_fn": F.cross_entropy, **case}
            )
            losses = [loss for part in pieces(data)[:-1] for loss in emulator.run(part, drain=False)]
            losses += emulator.run(pieces(data)[-1])
            ends.append(digest(losses, emulator.state_dict()[dist.get_rank(group)]))
        found.append(ends)
    return found


CASES: list[dict[str, Any]] = [
    {},
    {"mitigation": "none", "schedule": "1f1b-async", "clip": 0.3},
    {"mitigation": "stash", "schedule": "paci:3"},
    {"schedule": "2bw:5", "optimizer": ADAMW},
    {"mitigation": "lwpw+sc+ef", "schedule": "1f1b-async"},
    {"mitigation": "spectrain", "loss_weight": counted, "schedule": "paci:4"},
    {"seed": 5, "model": {"dropout": 0.4}, "mitigation": "stash+lwpv+sc"},
    {"model": {"dropout": 0.4}, "mitigation": "sc"},
    {"clip": LATE_NORM(lag_updates=6)},
    {"clip": LATE_NORM(lag_updates=1), "schedule": "2bw:5", "optimizer": ADAMW, "loss_weight": counted},
    {"clip": LATE_NORM(lag_updates=5), "schedule": "1f1b-async", "mitigation": "stash+sc"},
    {"clip": LATE_NORM(lag_updates=2), "schedule": "paci:2", "mitigation": "none"},
]


def test_a_stream_that_pauses_ends_as_one_that_does_not(ranks):
    for stage, ends in enumerate(ranks(4)(paused, 4)):
        for case, digests in zip(CASES, ends, strict=True):
            assert len(set(digests)) == 1, f"stage {stage}, {case}"


def refusals() -> list[str]:
    pipeline = made({}, 2, None)
    data = pipeline_models.batches(6)
    pipeline.run(data, drain=False)
    state = deepcopy(pipeline.state_dict())
    emulator = PipelinedBackpropEmulator(pipeline_models.stages(2), optimizer=SGD, loss_fn=F.cross_entropy)
    emulator.run(data, drain=False)
    messages = []
    for refused in (
        lambda: emulator.evaluate(data),
        emulator.state_dict,
        lambda: emulator.load_state_dict([state, state]),
        lambda: made({"schedule": "1f1b:2"}, 2, None).run(data, drain=False),
        lambda: made({"clip": ClipNorm(max_norm=1.0, scope="model")}, 2, None).run(data, drain=False),
        lambda: made({"clip": LATE_NORM(lag_updates=1)}, 2, None).run(data, drain=False),
        lambda: made({"clip": LATE_NORM(lag_updates=2, first_wait=True)}, 2, None).run(data, drain=False),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            refused()
        messages.append(str(error.value))
    # What is in flight goes on only where it was.
    for options in ({"schedule": "2bw"}, {"schedule": "paci:2"}):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            made(options, 2, None).load_state_dict(state)
        messages.append(str(error.value))
    # What comes out otherwise than it did is noticed.
    if dist.get_rank() == 0:
        recipe = next(iter(state["in_flight"]["recipes"].values()))
        recipe["tensors"][0].add_(1.0)
    again = made({}, 2, None)
    again.load_state_dict(state)
    try:
        again.run(data)
    except (ValueError, PipelineError) as error:
        messages.append(str(error))
    return messages


def test_what_cannot_pause_is_refused(ranks):
    pool = ranks(2)
    try:
        results = pool(refusals)
    finally:
        pool.close()
    expected = (
        "evaluate after a run with drain=False", "state_dict after a run", "only PipelinedBackprop can hold",
        "drain=False with '1f1b'", *["choose lag_updates=2 with first_wait=False, scope='stage', or drain=True"] * 3,
        *["has micro-batches in flight of stage"] * 2, "comes out otherwise now",
    )  # fmt: skip
    for rank, messages in enumerate(results):
        assert len(messages) == len(expected), f"rank {rank}"
        for words, message in zip(expected, messages, strict=True):
            assert words in message, f"rank {rank}: {message}"
