"""The test the project lives by: one loss and one set of gradients, whatever the layout.

Every rank also trains the untouched transformers model in its own process, in fp32 on the whole global batch, and
compares with it the loss and every gradient of the first step and the losses of three AdamW steps. The bound of 1e-5 is
two orders over fp32's rounding in sums of this length (about 1e-7) and far under any wrong factor or lost term.
"""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from fourfold.parallel import init_mesh, parallelize

GLOBAL_BATCH, SEQ_LEN, STEPS, MAX_NORM = 4, 24, 3, 0.5


def tiny_model(family: str = "llama", **changes: object) -> torch.nn.Module:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "initializer_range": 0.1,
    } | changes  # fmt: skip
    torch.manual_seed(1)
    config = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}[family](**sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def batches(masked: bool) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (STEPS, GLOBAL_BATCH, SEQ_LEN), generator=generator)
    labels = ids.clone()
    if masked:  # uneven, so that a mean of means would show
        labels[:, 0, : SEQ_LEN // 2] = -100
        labels[:, 1, SEQ_LEN - 5 :] = -100
    return list(zip(ids, labels, strict=True))


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


@cache  # in each rank's process, for all layouts of one model
def single_process(masked: bool, **model_options: object):
    """Losses, the first step's gradients, and the gradient norms of the plain transformers model."""
    model, data = tiny_model(**model_options), batches(masked)
    optimizer = adamw(model.parameters())
    losses, norms, gradients = [], [], {}
    for step, (ids, labels) in enumerate(data):
        loss = model(ids, labels=labels).loss
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, gradients


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def check_layout(mesh_shape: dict, options: dict, model_options: dict, masked: bool) -> dict[str, float]:
    """Largest errors against the single process on this rank."""
    data = batches(masked)
    truth_losses, truth_norms, truth = single_process(masked, **model_options)
    mesh = init_mesh(**mesh_shape, device_type="cpu")
    model = parallelize(tiny_model(**model_options), mesh, **options)
    optimizer = adamw(model.parameters())
    rows = model.batch_rows(GLOBAL_BATCH)
    errors = {"gradient": 0.0, "loss": 0.0, "norm": 0.0, "evaluate": 0.0}
    for step, (ids, labels) in enumerate(data):
        before = model.evaluate(ids[rows], labels[rows])
        loss = model.forward_backward(ids[rows], labels[rows])
        if step == 0:
            for name, parameter in model.named_parameters():
                gradient = parameter.grad
                gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                errors["gradient"] = max(errors["gradient"], relative_error(gradient, truth[name]))
        norm = model.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        errors["loss"] = max(errors["loss"], abs(loss.item() / truth_losses[step] - 1))
        errors["evaluate"] = max(errors["evaluate"], abs(before.item() / loss.item() - 1))
        errors["norm"] = max(errors["norm"], abs(norm.item() / truth_norms[step] - 1))
    return errors


def assert_one_loss(pool, mesh_shape, *, masked=False, model=None, **options):
    for errors in pool(check_layout, mesh_shape, options, model or {}, masked):
        assert max(errors.values()) < 1e-5, errors


TWO = [{"dp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2}]
CHOICES = [
    {},
    {"micro_batch": 1},
    {"checkpointing": "full", "micro_batch": 1},
    {"zero_stage": 3},
    {"zero_stage": 3, "checkpointing": "full", "micro_batch": 1},
]


@pytest.mark.parametrize("mesh_shape", TWO, ids=str)
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_two_ranks(ranks, mesh_shape, options):
    assert_one_loss(ranks(2), mesh_shape, masked=True, **options)


FOUR = [
    {"dp": 4}, {"pp": 4}, {"cp": 4}, {"dp": 2, "pp": 2}, {"dp": 2, "cp": 2}, {"dp": 2, "tp": 2},
    {"pp": 2, "cp": 2}, {"pp": 2, "tp": 2}, {"cp": 2, "tp": 2},
]  # fmt: skip


@pytest.mark.parametrize("mesh_shape", FOUR, ids=str)
@pytest.mark.parametrize("options", [{"micro_batch": 1, "checkpointing": "full"}, {"zero_stage": 3}], ids=str)
def test_four_ranks(ranks, mesh_shape, options):
    assert_one_loss(ranks(4), mesh_shape, masked=True, **options)


@pytest.mark.parametrize("mesh_shape", [{}, {"tp": 4}], ids=str)
def test_one_rank_and_all_heads_apart(ranks, mesh_shape):
    world = 4 if mesh_shape else 1
    assert_one_loss(ranks(world), mesh_shape, model={"num_key_value_heads": 4}, micro_batch=2)


@pytest.mark.parametrize("mesh_shape", [{"tp": 2}, {"cp": 2}, {"dp": 2}], ids=str)
def test_tied_embeddings(ranks, mesh_shape):
    assert_one_loss(ranks(2), mesh_shape, model={"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("mesh_shape", "zero_stage"), [({"tp": 2}, 0), ({"dp": 2, "tp": 2}, 3), ({"dp": 2, "tp": 2}, 0)]
)
def test_norms_over_heads(ranks, mesh_shape, zero_stage):
    world = 4 if "dp" in mesh_shape else 2
    assert_one_loss(ranks(world), mesh_shape, model={"family": "qwen3"}, micro_batch=1, zero_stage=zero_stage)


@pytest.mark.parametrize("mesh_shape", [{"dp": 2}, {"cp": 2}, {"pp": 2}], ids=str)
def test_sliding_window(ranks, mesh_shape):
    assert_one_loss(ranks(2), mesh_shape, model={"family": "mistral", "sliding_window": 5}, micro_batch=1)


def accumulate_twice(mesh_shape: dict, options: dict) -> float:
    """Largest gradient error when the batch goes through in two calls, each of which is a mean of its own."""
    ids, labels = batches(True)[0]
    plain = tiny_model("qwen3")
    for half in (slice(0, 2), slice(2, 4)):
        plain(ids[half], labels=labels[half]).loss.backward()
    model = parallelize(tiny_model("qwen3"), init_mesh(**mesh_shape, device_type="cpu"), **options)
    rows = model.batch_rows(2)
    for half in (slice(0, 2), slice(2, 4)):
        model.forward_backward(ids[half][rows], labels[half][rows])
    truth = {name: parameter.grad for name, parameter in plain.named_parameters()}
    full = lambda grad: grad.full_tensor() if isinstance(grad, DTensor) else grad  # noqa: E731
    return max(relative_error(full(value.grad), truth[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("mesh_shape", [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_gradients_add_over_calls(ranks, mesh_shape, zero_stage):
    world = 4 if len(mesh_shape) == 2 else 2
    assert max(ranks(world)(accumulate_twice, mesh_shape, {"zero_stage": zero_stage})) < 1e-5
