"""Packed rows under every layout, against the untouched model of one process with a block-diagonal mask.

In fp64: what remains is transformers' own, its norms and rotary tables are fp32. The rows hold documents of one token,
of most of a row and of a whole row, and others on every dp rank.
"""

from functools import cache

import pytest
import torch
from support.large_logits import with_large_logits
from support.one_loss import GLOBAL_BATCH, SEQ_LEN, batches, tiny_model
from torch import Tensor

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error

LENGTHS = ((9, 1, 14), (24,), (3, 4, 5, 12), (1, 1, 20, 2))
TOLERANCE = 1e-6
WINDOW = {"family": "mistral", "sliding_window": 5}


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels that name documents' first tokens too, and the number of each token's document: [B, S] each."""
    ids, labels = batches(True)[0]
    numbers = [[7 + index for index, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    return ids, labels, torch.tensor(numbers)


def reference_loss(model: torch.nn.Module, window: int) -> Tensor:
    """One process: a mask with a block for each document, its own positions, its first token no target."""
    ids, labels, _ = packed()
    labels = labels.clone()
    mask = torch.zeros(GLOBAL_BATCH, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    positions = torch.zeros_like(ids)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            inside = slice(start, start + length)
            mask[row, 0, inside, inside] = torch.ones(length, length).tril().triu(1 - window).bool()
            positions[row, inside] = torch.arange(length)
            labels[row, start] = -100
            start += length
    return model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss


@cache  # in each rank's process, for all layouts of one model
def single_process(**model_options: object) -> tuple[float, float, dict[str, Tensor]]:
    """The loss with documents, the loss without, and the gradients with."""
    model = tiny_model(double=True, **model_options)
    ids, labels, _ = packed()
    without = model(ids, labels=labels).loss
    without.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = reference_loss(model, model_options.get("sliding_window", SEQ_LEN))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    alike = [name for name, gradient in gradients.items() if relative_error(gradient, plain[name]) < 0.01]
    assert not alike, f"the documents make no difference to {alike}"
    return loss.item(), without.item(), gradients


def check_documents(mesh_shape: dict, options: dict, model_options: dict) -> dict[str, float]:
    """This rank's errors: evaluation, a step, its gradients, and an evaluation of the same rows unpacked."""
    with_documents, without, truth = single_process(**model_options)
    mesh = init_mesh(**mesh_shape, device_type="cpu")
    model = parallelize(tiny_model(double=True, **model_options), mesh, **options)
    rows = model.batch_rows(GLOBAL_BATCH)
    ids, labels, documents = (x[rows] for x in packed())
    errors = {
        "evaluation": abs(model.evaluate(ids, labels, documents).item() / with_documents - 1),
        "loss": abs(model.forward_backward(ids, labels, document_ids=documents).item() / with_documents - 1),
        "evaluation without documents": abs(model.evaluate(ids, labels).item() / without - 1),
    }
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = full_tensor(gradient)
        errors[f"gradient of {name}"] = relative_error(gradient, truth[name])
    return errors


STREAM = {"checkpointing": "stream"}


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ({}, {}),
        ({}, STREAM),
        ({"dp": 2}, {}),
        ({"dp": 2}, {"micro_batch": 1, "zero_stage": 3, "checkpointing": "full"}),
        ({"dp": 2}, {"checkpointing": "selective"}),
        ({"dp": 2}, STREAM | {"zero_stage": 3}),
        ({"cp": 2}, {}),
        ({"cp": 2}, {"micro_batch": 1, "checkpointing": "full"}),
        ({"cp": 2}, {"micro_batch": 2, "zero_stage": 3}),
        ({"cp": 2}, STREAM | {"micro_batch": 2}),
        ({"tp": 2}, {}),
        ({"tp": 2}, {"zero_stage": 3, "checkpointing": "full", "micro_batch": 2}),
        ({"tp": 2}, {"sequence_parallel": True}),
        ({"pp": 2}, {}),
        ({"pp": 2}, {"micro_batch": 2, "zero_stage": 3, "checkpointing": "full"}),
        ({"pp": 2}, STREAM | {"micro_batch": 2}),
        ({"pp": 2}, {"vp": 2}),
        ({"pp": 2}, {"vp": 2, "schedule": "zero-bubble"}),
        ({"cp": 2, "tp": 2}, {"micro_batch": 2}),
        ({"dp": 2, "pp": 2}, {"micro_batch": 1}),
        ({"dp": 2, "cp": 2}, STREAM | {"zero_stage": 3}),
    ],
    ids=str,
)
def test_documents_as_on_one_process(ranks, mesh_shape, options):
    assert_documents(ranks, mesh_shape, options, {})


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        ({"dp": 2}, {}),
        ({"dp": 2}, STREAM),
        ({"cp": 2}, {"micro_batch": 2}),
        ({"tp": 2}, {"micro_batch": 2, "sequence_parallel": True}),
        ({"pp": 2}, {"micro_batch": 2}),
    ],
    ids=str,
)
def test_documents_and_windows(ranks, mesh_shape, options):
    assert_documents(ranks, mesh_shape, options, WINDOW)


def test_documents_and_tied_embeddings(ranks):
    assert_documents(ranks, {"pp": 2}, {"micro_batch": 2}, {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("mesh_shape", "window"), [({"dp": 2}, {}), ({"dp": 2}, WINDOW), ({"cp": 2}, {}), ({"pp": 2}, {})], ids=str
)
def test_documents_whose_logits_are_never_whole(ranks, mesh_shape, window):
    model, options = {"hidden_size": 16, **window}, {"micro_batch": 2}
    answers = ranks(2)(with_large_logits, check_documents, mesh_shape, options, model)
    assert_ranks([errors for errors, _ in answers], TOLERANCE, f"mesh {mesh_shape}, model {model}")
    assert answers[-1][1] > 0


def assert_documents(ranks, mesh_shape: dict, options: dict, model_options: dict) -> None:
    world = 1
    for size in mesh_shape.values():
        world *= size
    answers = ranks(world)(check_documents, mesh_shape, options, model_options)
    assert_ranks(answers, TOLERANCE, f"mesh {mesh_shape}, options {options}, model {model_options}")


def refusals(mesh_shape: dict, options: dict, changes: list[str]) -> list[str]:
    """What a step says to documents that are wrong on the last rank, or everywhere where the layout cannot have any."""
    model = parallelize(tiny_model(), init_mesh(**mesh_shape, device_type="cpu"), **options)
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    rows = model.batch_rows(GLOBAL_BATCH)
    ids, labels, documents = (x[rows] for x in packed())
    said = []
    for change in changes:
        wrong = documents.clone()
        if change == "pieces":
            wrong[-1, -1] = wrong[-1, 2]
        elif change == "numbers":
            wrong += 1
        given = {"floats": wrong.float(), "shape": wrong[:, 1:], "none": None}.get(change, wrong)
        try:
            model.forward_backward(ids, labels, given if is_last or change == "layout" else documents)
            said.append("accepted")
        except ValueError as error:
            said.append(str(error))
    return said


FAULTS = {
    "pieces": "comes back to document 9 after another one",
    "floats": "document_ids are torch.float32: give whole numbers",
    "shape": "give one number a token",
}
UNLIKE = dict.fromkeys(("numbers", "none"), "different input_ids, labels or document_ids")


@pytest.mark.parametrize("mesh_shape", [{"dp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_wrong_documents_are_refused_on_every_rank(ranks, mesh_shape):
    expected = FAULTS if "dp" in mesh_shape else FAULTS | UNLIKE
    for said in ranks(2)(refusals, mesh_shape, {}, list(expected)):
        for found, (change, message) in zip(said, expected.items(), strict=True):
            assert message in found, change


@pytest.mark.parametrize(
    ("mesh_shape", "options", "message"),
    [
        ({"cp": 2, "pp": 2}, {}, "cp=2 and pp=2"),
        ({"cp": 2, "tp": 2}, {"sequence_parallel": True}, "cp=2 and sequence_parallel=True"),
    ],
    ids=str,
)
def test_layouts_whose_shares_must_be_of_one_length_take_no_documents(ranks, mesh_shape, options, message):
    for (said,) in ranks(4)(refusals, mesh_shape, options, ["layout"]):
        assert message in said
        assert "choose cp=1" in said


def few_tokens() -> str:
    model = parallelize(tiny_model(), init_mesh(cp=2, device_type="cpu"), micro_batch=1)
    try:
        model.forward_backward(torch.zeros(2, 1, dtype=torch.int64), None, torch.zeros(2, 1, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_ring_rank_without_a_token_is_refused(ranks):
    for said in ranks(2)(few_tokens):
        assert "each needs one: give longer rows" in said
