"""Evaluating, reading a state dict and saving leave training as it would have been, wherever in the loop they stand.

Each rank trains twice, without and with these calls, and compares to the bit: they read, so no rounding may differ.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from support.meshes import shared_mesh
from support.one_loss import GLOBAL_BATCH, MAX_NORM, adamw, batches, tiny_model
from torch.distributed.tensor import DTensor

from fourfold.parallel import ParallelModel, parallelize

PLACES = ("before the step", "between backward and clipping", "between clipping and the update", "after the step")


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def trained(mesh, options: dict, reads) -> tuple[dict, dict]:
    """Losses and norms before clipping, and this rank's weights after three steps; `reads(model, place)` in between."""
    model = parallelize(tiny_model(num_hidden_layers=4 if mesh["pp"].size() > 1 else 2), mesh, **options)
    optimizer = adamw(model.parameters())
    rows = model.batch_rows(GLOBAL_BATCH)
    first = {name: local(value).clone() for name, value in model.named_parameters()}
    figures: dict = {"losses": [], "norms": []}
    for ids, labels in batches(True):
        reads(model, PLACES[0])
        figures["losses"].append(model.forward_backward(ids[rows], labels[rows]).item())
        reads(model, PLACES[1])
        figures["norms"].append(model.clip_grad_norm_(MAX_NORM).item())
        reads(model, PLACES[2])
        optimizer.step()
        optimizer.zero_grad()
        reads(model, PLACES[3])
    weights = {name: local(value).clone() for name, value in model.named_parameters()}
    assert not [name for name, value in weights.items() if value.numel() and torch.equal(value, first[name])]
    return figures, weights


def differences(mesh, options: dict, plain: tuple[dict, dict], reads) -> list[str]:
    figures, weights = trained(mesh, options, reads)
    wrong = [
        f"{what} are {values}, not {plain[0][what]}" for what, values in figures.items() if values != plain[0][what]
    ]
    return wrong + [f"{name} differs" for name, value in plain[1].items() if not torch.equal(weights[name], value)]


def evaluate(model: ParallelModel) -> None:
    ids, labels = batches(False)[1]
    rows = model.batch_rows(GLOBAL_BATCH)
    model.eval()
    model.evaluate(ids[rows], labels[rows])
    model.train()


def state_dict(model: ParallelModel) -> None:
    assert model.state_dict()


def refused_batch(model: ParallelModel) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        model.evaluate(torch.full((2, 24), 99))


def save(model: ParallelModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")


CALLS = (state_dict, refused_batch, save, evaluate)  # evaluating last: a state dict would heal what it left


def compared(mesh_shape: dict, options: dict) -> list[str]:
    """What differs with all calls everywhere; then which call, and where, makes the difference."""
    mesh = shared_mesh(**mesh_shape)
    plain = trained(mesh, options, lambda model, place: None)

    def everything(model: ParallelModel, place: str) -> None:
        for call in CALLS:
            call(model)

    anything = torch.tensor(len(differences(mesh, options, plain, everything)))
    torch.distributed.all_reduce(anything)  # so that all ranks look on, or none
    wrong = []
    if anything:
        for call in CALLS:
            for asked in PLACES:
                found = differences(mesh, options, plain, lambda model, at: at == asked and call(model))  # noqa: B023
                wrong += [f"{call.__name__} {asked}: {what}" for what in found]
    return wrong


STREAM = {"checkpointing": "stream", "zero_stage": 3}


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ({}, {"zero_stage": 3}),
        ({"dp": 2}, {"zero_stage": 0}),
        ({"dp": 2}, {"zero_stage": 3, "micro_batch": 1}),
        ({"dp": 2}, {"zero_stage": 3, "checkpointing": "full"}),
        ({"cp": 2}, {"zero_stage": 3}),
        ({"tp": 2}, {"zero_stage": 0}),
        ({"tp": 2}, {"zero_stage": 3}),
        ({"pp": 2}, {"zero_stage": 0, "micro_batch": 1}),
        ({"pp": 2}, {"zero_stage": 3, "micro_batch": 1}),
        ({"pp": 2}, {"vp": 2, "micro_batch": 1}),
        ({"dp": 2, "pp": 2}, {"vp": 2, "zero_stage": 1, "micro_batch": 1}),
        ({"dp": 2}, {"zero_stage": 1, "micro_batch": 1}),
        ({"dp": 2}, {"zero_stage": 2, "micro_batch": 1}),
        ({"tp": 2}, {"zero_stage": 1, "sequence_parallel": True}),
        ({"dp": 2}, STREAM),
        ({"cp": 2}, STREAM),
        ({"pp": 2}, STREAM),
        ({"dp": 2, "tp": 2}, {"zero_stage": 3}),
        ({"dp": 2, "pp": 2}, {"zero_stage": 3, "micro_batch": 1}),
    ],
    ids=str,
)
def test_reading_changes_nothing(ranks, mesh_shape, options):
    world = 1
    for size in mesh_shape.values():
        world *= size
    for rank, wrong in enumerate(ranks(world)(compared, mesh_shape, options)):
        assert not wrong, f"mesh {mesh_shape}, options {options}, rank {rank}: {wrong[:8]}"
