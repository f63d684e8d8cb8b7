"""Pipelines on CUDA devices that are only pretended: the CPU's numbers, and in mid-stream nobody waits for the device.

Two ranks of a pool of their own: autograd counts the devices once a process (support.pretended_cuda).
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support.one_loss import adamw, tiny_model
from support.pretended_cuda import Seen, pretended
from support.pretended_library import only_pretended, own_pool

from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.decoder import pipeline_decoder
from fourfold.parallel.pipeline import links
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error

pytestmark = only_pretended
two = own_pool(2)
IDS = torch.randint(64, (8, 2, 13), generator=torch.Generator().manual_seed(5))
ROUNDING = 1e-12  # of fp64, through a few updates


def draining(device: str, seen: Seen | None, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Interleaved stages that put off weight gradients, saved and read again; what the second step waited for."""
    model = parallelize(
        tiny_model(), init_mesh(pp=2, device_type=device), precision="fp64", compile=False, micro_batch=1, vp=2,
        schedule="zero-bubble",
    )  # fmt: skip
    optimizer, found, waits = adamw(model.parameters()), {}, []
    for step, ids in enumerate(IDS[:2]):
        before = len(seen.waits) if seen else 0
        loss, norm = model.forward_backward(ids), model.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        waits = seen.waits[before:] if seen else []
        found |= {f"loss of step {step}": loss.item(), f"norm of step {step}": norm.item()}
    found["evaluation"] = model.evaluate(IDS[2]).item()
    checkpoints = Checkpoints(folder=folder / device)
    checkpoints.save(model, [optimizer], step=2)
    for parameter in model.parameters():
        parameter.data.zero_()
    checkpoints.load(model, [optimizer], Resume(choice="yes"))
    assert model.evaluate(IDS[2]).item() == found["evaluation"]
    return found | _weights(model.named_parameters()), waits


def undrained(device: str, seen: Seen | None, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """A stream that pauses, evaluation, and from its state on; what was waited for as that stream went by."""
    pipeline = pipeline_decoder(
        tiny_model(), init_mesh(pp=2, device_type=device), seq_len=12, precision="fp64", compile=False, clip=0.5,
        optimizer=partial(torch.optim.AdamW, lr=0.01, fused=True), observe=True,
    )  # fmt: skip
    data = [(ids[:, :-1], ids[:, 1:].index_fill(1, torch.arange(number), -100)) for number, ids in enumerate(IDS)]
    marks = [0]

    def stream() -> Iterator[Any]:
        for batch in data[2:6]:
            marks.append(len(seen.waits) if seen else 0)
            yield batch

    found = {"drained": pipeline.run(data[:2]), "paused": pipeline.run(stream(), drain=False)}
    waits = seen.waits[marks[2] : marks[-1]] if seen else []  # what a run looks at as it begins is past
    found["evaluation"] = pipeline.evaluate(data[:2])
    state = deepcopy(pipeline.state_dict())
    found["gone on"] = pipeline.run(data[6:])
    found |= _weights(pipeline.stage.module.named_parameters())
    pipeline.load_state_dict(state)
    assert pipeline.run(data[6:]) == found["gone on"]
    return found, waits


def _weights(named: Any) -> dict[str, Any]:
    return {name: full_tensor(parameter.detach()).tolist() for name, parameter in named}


def on_both(body: Any, folder: Path) -> tuple[dict[str, float], list[Any], list[str]]:
    with pretended() as seen, patch.object(links, "has_nccl", lambda group: True):  # a group each way, as NCCL needs
        there, waits = body("cuda", seen, folder)
    here, _ = body("cpu", None, folder)
    values = [{name: torch.tensor(value) for name, value in found.items()} for found in (there, here)]
    return {name: relative_error(values[0][name], value) for name, value in values[1].items()}, waits, seen.faults


def first_collectives() -> list[tuple[str, list[int]]]:
    """Of init_mesh: the device and the ranks of each."""
    found: list[tuple[str, list[int]]] = []

    def all_reduce(number: torch.Tensor, group: dist.ProcessGroup) -> None:
        found.append((number.device.type, dist.get_process_group_ranks(group)))

    with pretended(), patch.object(dist, "all_reduce", all_reduce):
        init_mesh(pp=2, device_type="cuda")
    return found


def test_a_mesh_s_groups_are_connected_before_two_of_their_ranks_talk(two):
    assert two(first_collectives) == [[("cuda", [0, 1])]] * 2


@pytest.mark.parametrize("body", [draining, undrained])
def test_a_pipeline_s_numbers_are_the_cpu_s_and_nobody_waits(two, body, tmp_path):
    found = two(on_both, body, tmp_path)
    assert_ranks([errors for errors, _, _ in found], ROUNDING, body.__name__)
    for rank, (_, waits, faults) in enumerate(found):
        assert waits == [], f"rank {rank}"
        assert faults == [], f"rank {rank}"
