"""Tied embeddings in a pipeline: two stages hold one weight, and take one process's steps with it.

In fp64, where what remains is transformers' own: its norms and rotary tables are fp32.
"""

import pytest
import torch
from support.one_loss import GLOBAL_BATCH, MAX_NORM, adamw, assert_one_loss, batches, tiny_model
from torch import Tensor

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error

TIED = {"tie_word_embeddings": True, "double": True}
NAME = "model.embed_tokens.weight"
PP_DP, PP_CP, PP_TP = {"dp": 2, "pp": 2}, {"pp": 2, "cp": 2}, {"pp": 2, "tp": 2}


@pytest.mark.parametrize(
    ("mesh_shape", "options", "family"),
    [
        ({"pp": 2}, {}, "llama"),
        ({"pp": 2}, {"checkpointing": "full", "compile": "aot_eager"}, "qwen3"),
        ({"pp": 2}, {"checkpointing": "stream", "micro_batch": 2}, "qwen3"),
        ({"pp": 2}, {"vp": 2, "schedule": "zero-bubble"}, "llama"),
        ({"pp": 4}, {}, "llama"),
        (PP_DP, {}, "qwen3"),
        (PP_DP, {"zero_stage": 1}, "llama"),
        (PP_DP, {"zero_stage": 3, "checkpointing": "stream"}, "qwen3"),
        (PP_DP, {"vp": 2}, "llama"),
        (PP_DP, {"vp": 2, "schedule": "zero-bubble", "zero_stage": 1}, "qwen3"),
        (PP_CP, {}, "llama"),
        (PP_CP, {"zero_stage": 3, "checkpointing": "selective"}, "qwen3"),
        (PP_TP, {}, "qwen3"),
        (PP_TP, {"sequence_parallel": True, "zero_stage": 3, "checkpointing": "full"}, "llama"),
        (PP_TP, {"sequence_parallel": True, "vp": 2}, "llama"),
    ],
    ids=str,
)
def test_every_gradient_is_one_process_s(ranks, mesh_shape, options, family):
    world = torch.tensor(list(mesh_shape.values())).prod().item()
    model = {**TIED, "family": family}
    # 1e-6: fp64, but for the norms and rotary tables that transformers computes in fp32
    assert_one_loss(ranks(world), mesh_shape, masked=True, model=model, tolerance=1e-6, **options)


def three_steps(mesh_shape: dict, options: dict, calls: int) -> tuple[dict[str, float], Tensor | None]:
    """Errors of all weights after three clipped AdamW steps of `calls` backwards each, and this rank's embedding."""
    truth = tiny_model(**TIED)
    plain = adamw(truth.parameters())
    model = parallelize(tiny_model(**TIED), init_mesh(**mesh_shape, device_type="cpu"), **options)
    optimizer = adamw(model.parameters())
    part = GLOBAL_BATCH // calls
    rows = model.batch_rows(part)
    for ids, labels in batches(True):
        for some_ids, some_labels in zip(ids.split(part), labels.split(part), strict=True):
            truth(some_ids, labels=some_labels).loss.backward()
            model.forward_backward(some_ids[rows], some_labels[rows])
        torch.nn.utils.clip_grad_norm_(truth.parameters(), MAX_NORM)
        model.clip_grad_norm_(MAX_NORM)
        for each in (plain, optimizer):
            each.step()
            each.zero_grad()
    weights = {name: full_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}
    expected = dict(truth.named_parameters())
    assert set(model.state_dict()) <= set(truth.state_dict())
    return {name: relative_error(value, expected[name]) for name, value in weights.items()}, weights.get(NAME)


@pytest.mark.parametrize(
    ("mesh_shape", "options", "calls"),
    [
        ({"pp": 2}, {}, 2),
        (PP_DP, {}, 2),
        (PP_DP, {"zero_stage": 1}, 2),
        (PP_DP, {"zero_stage": 3}, 1),
        (PP_CP, {"vp": 2, "schedule": "zero-bubble"}, 2),
        (PP_TP, {"sequence_parallel": True}, 2),
    ],
    ids=str,
)
def test_weights_after_three_steps(ranks, mesh_shape, options, calls):
    """Of several calls a step, too: what an earlier one has summed counts once. Both copies are alike to the bit."""
    world = torch.tensor(list(mesh_shape.values())).prod().item()
    answers = ranks(world)(three_steps, mesh_shape, options, calls)
    assert_ranks([errors for errors, _ in answers], 1e-6, f"mesh {mesh_shape}, options {options}, {calls} calls")
    copies = [embedding for _, embedding in answers if embedding is not None]
    assert len(copies) == world  # with pp=2 each rank has an end
    assert all(torch.equal(copy, copies[0]) for copy in copies)


def first_weights(mesh_shape: dict, options: dict) -> Tensor:
    """This rank's embedding, where every rank has built another model."""
    rank = torch.distributed.get_rank()
    whole_model = tiny_model(seed=1 + rank, **TIED)
    model = parallelize(whole_model, init_mesh(**mesh_shape, device_type="cpu"), **options)
    named, state = dict(model.named_parameters()), model.state_dict()
    assert "lm_head.weight" not in named
    assert torch.equal(full_tensor(state.get("lm_head.weight", state[NAME])), full_tensor(named[NAME]))
    return full_tensor(named[NAME]).detach().clone()


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [({"pp": 2}, {}), ({"pp": 2}, {"vp": 2}), (PP_DP, {"zero_stage": 3}), (PP_TP, {})],
    ids=str,
)
def test_the_first_stage_s_embedding_counts(ranks, mesh_shape, options):
    world = torch.tensor(list(mesh_shape.values())).prod().item()
    expected = dict(tiny_model(seed=1, **TIED).named_parameters())[NAME]
    for found in ranks(world)(first_weights, mesh_shape, options):
        assert torch.equal(found, expected)


def trained_apart(frozen_on: list[int], masked: bool) -> tuple[str, list[float] | None]:
    """What a rank says whose embedding is frozen where `frozen_on` has it; else its gradient's and weight's norms."""
    rank = torch.distributed.get_rank()
    model = parallelize(tiny_model(**TIED), init_mesh(pp=2, device_type="cpu"))
    embedding = dict(model.named_parameters())[NAME]
    embedding.requires_grad_(rank not in frozen_on)
    ids = batches(False)[0][0]
    labels = torch.full_like(ids, -100) if masked else ids
    try:
        model.forward_backward(ids, labels)
    except ValueError as error:
        return str(error), None
    norm = model.clip_grad_norm_(1.0).item()
    return "", None if embedding.grad is None else [embedding.grad.norm().item(), norm]


def test_a_frozen_embedding_gets_no_gradient_and_half_a_frozen_one_is_refused_everywhere(ranks):
    assert ranks(2)(trained_apart, [0, 1], False) == [("", None)] * 2
    for frozen_on in ([0], [1]):
        for said, _ in ranks(2)(trained_apart, frozen_on, False):
            assert "the tied embedding is frozen on 1 of the 2 ranks that hold it" in said


def test_without_targets_gradients_are_zero(ranks):
    assert ranks(2)(trained_apart, [], True) == [("", [0.0, 0.0])] * 2


def built_apart(changes: dict) -> str:
    changes = changes if torch.distributed.get_rank() else {}
    try:
        parallelize(tiny_model(**(TIED | changes)), init_mesh(pp=2, device_type="cpu"))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_stages_of_unlike_embeddings_are_refused(ranks):
    for said in ranks(2)(built_apart, {"vocab_size": 80}):
        assert "the rows of the tied embedding: [64, 80] in rank order" in said
    for said in ranks(2)(built_apart, {"tie_word_embeddings": False}):
        assert "whether the head is the embedding (tie_word_embeddings): [1, 0] in rank order" in said
