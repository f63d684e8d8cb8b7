"""The test the project lives by: one loss and one set of gradients, whatever the layout.

Every rank also trains the untouched transformers model in its own process, in fp32 on the whole global batch, and
compares with it the loss and every gradient of the first step and the losses of three AdamW steps. The bound of 1e-5 is
two orders over fp32's rounding in sums of this length (about 1e-7) and far under any wrong factor or lost term.
"""

import pytest
import torch
from support.one_loss import GLOBAL_BATCH, assert_one_loss, batches, tiny_model

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks, full_tensor, relative_error
from fourfold.parallel.testing.data_parallel import CountCollectives


@pytest.mark.parametrize("mesh_shape", [{"dp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_in_fp64_nothing_but_rounding_is_left(ranks, mesh_shape, zero_stage):
    """A term of 1e-6 could hide in fp32. What remains is transformers' own: its norms and rotary tables are fp32."""
    model = {"double": True}
    assert_one_loss(ranks(2), mesh_shape, masked=True, model=model, tolerance=1e-6, steps=3, zero_stage=zero_stage)


@pytest.mark.parametrize("mesh_shape", [{"dp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("zero_stage", [0, 3])
def test_bf16_products(ranks, mesh_shape, zero_stage):
    """bf16 keeps 8 bits (4e-3) at each of some thirty roundings between the loss and the first layer's gradients."""
    assert_one_loss(ranks(2), mesh_shape, tolerance=6e-2, zero_stage=zero_stage, dtype=torch.bfloat16, micro_batch=1)


def loss_of_unlike_ranks(mesh_shape: dict, options: dict) -> float:
    rank = torch.distributed.get_rank()
    model = parallelize(tiny_model(seed=1 + rank), init_mesh(**mesh_shape, device_type="cpu"), **options)
    ids, labels = batches(False)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    return model.evaluate(ids[rows], labels[rows]).item()


@pytest.mark.parametrize(
    ("mesh_shape", "zero_stage"), [({"dp": 2}, 0), ({"dp": 2}, 3), ({"tp": 2}, 0), ({"dp": 2, "tp": 2}, 0)], ids=str
)
def test_the_first_rank_s_weights_count(ranks, mesh_shape, zero_stage):
    world = 4 if len(mesh_shape) == 2 else 2
    found = ranks(world)(loss_of_unlike_ranks, mesh_shape, {"zero_stage": zero_stage})
    expected = ranks(1)(loss_of_unlike_ranks, {}, {})[0]
    assert found == pytest.approx([expected] * world, rel=1e-5)


def built_unlike(difference: str, zero_stage: int) -> str:
    """What a rank says whose replica was asked for another seed, or another size."""
    rank = torch.distributed.get_rank()
    with torch.device("meta"):
        model = tiny_model(intermediate_size=48 + 16 * rank * (difference == "size"))
    seed = rank * (difference == "seed")
    try:
        parallelize(model, init_mesh(dp=2, device_type="cpu"), zero_stage=zero_stage, seed=seed)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_replicas_of_different_models_are_refused(ranks, zero_stage):
    for difference, message in (("seed", "from 0 to 1 over the replicas"), ("size", "models differ in names, shapes")):
        for rank, said in enumerate(ranks(2)(built_unlike, difference, zero_stage)):
            assert message in said, f"rank {rank}, another {difference}"


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


@pytest.mark.parametrize("less", [(0, 1), (2, 0)], ids=str)
def test_an_uneven_pipeline(ranks, less):
    cut = {"embedding_counts_as": less[0], "head_counts_as": less[1]}
    assert_one_loss(ranks(2), {"pp": 2}, masked=True, micro_batch=1, checkpointing="full", **cut)


@pytest.mark.parametrize("mesh_shape", [{}, {"dp": 2}, {"cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "stream"])
def test_gradients_sharded_at_every_micro_batch(ranks, mesh_shape, checkpointing):
    if checkpointing == "stream" and "tp" in mesh_shape:
        pytest.skip("chunks of cut matrices are refused")
    how = {"zero_stage": 3, "micro_batch": 1, "checkpointing": checkpointing, "sharded_accumulation": True}
    assert_one_loss(ranks(2 if mesh_shape else 1), mesh_shape, masked=True, **how)


def reductions(sharded: bool) -> int:
    """Reduce-scatters of a step of two micro-batches over 4 layers and the ends."""
    model = parallelize(
        tiny_model(), init_mesh(dp=2, device_type="cpu"), zero_stage=3, micro_batch=1, sharded_accumulation=sharded
    )
    ids, labels = batches(False)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    with CountCollectives() as collectives:
        model.forward_backward(ids[rows], labels[rows])
    return sum(count for name, count in collectives.calls.items() if "reduce_scatter" in name)


def test_gradients_are_reduced_once_a_step_or_once_a_micro_batch(ranks):
    assert ranks(2)(reductions, False) == [5, 5]
    assert ranks(2)(reductions, True) == [10, 10]


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


def accumulate_twice(mesh_shape: dict, options: dict) -> dict[str, float]:
    """Each gradient's error when the batch goes through in two calls, each of which is a mean of its own."""
    ids, labels = batches(True)[0]
    plain = tiny_model("qwen3")
    for half in (slice(0, 2), slice(2, 4)):
        plain(ids[half], labels=labels[half]).loss.backward()
    model = parallelize(tiny_model("qwen3"), init_mesh(**mesh_shape, device_type="cpu"), **options)
    rows = model.batch_rows(2)
    for half in (slice(0, 2), slice(2, 4)):
        model.forward_backward(ids[half][rows], labels[half][rows])
    truth = {name: parameter.grad for name, parameter in plain.named_parameters()}
    return {
        f"gradient of {name}": relative_error(full_tensor(value.grad), truth[name])
        for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("mesh_shape", [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_gradients_add_over_calls(ranks, mesh_shape, zero_stage):
    world = 4 if len(mesh_shape) == 2 else 2
    answers = ranks(world)(accumulate_twice, mesh_shape, {"zero_stage": zero_stage})
    assert_ranks(answers, 1e-5, f"mesh {mesh_shape}, zero_stage {zero_stage}")
