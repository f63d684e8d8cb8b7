"""Precision is said, never taken from what a config or a folder stores: weights and Adam's states are fp32 masters."""

import pytest
import torch
from support.meshes import shared_mesh
from support.one_loss import GLOBAL_BATCH, MAX_NORM, adamw, batches, tiny_model

from fourfold.parallel import init_mesh, parallelize

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def stored_in(dtype: torch.dtype, meta: bool) -> torch.nn.Module:
    """A model as from_pretrained or from_config gives it where config and weights are of this dtype."""
    with torch.device("meta" if meta else "cpu"):
        model = tiny_model().to(dtype)
    model.config.dtype = dtype
    return model


def trained(mesh_shape: dict, options: dict, stored: str, meta: bool) -> tuple[list[float], set, set]:
    """Losses of three steps, and the dtypes of this rank's weights and optimizer states."""
    mesh = shared_mesh(**mesh_shape)
    model = parallelize(stored_in(STORED.get(stored, torch.float32), meta), mesh, **options)
    optimizer = adamw(model.parameters())
    rows = model.batch_rows(GLOBAL_BATCH)
    losses = []
    for ids, labels in batches(True):
        losses.append(model.forward_backward(ids[rows], labels[rows]).item())
        model.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    states = {str(v.dtype) for s in optimizer.state.values() for k, v in s.items() if k != "step"}
    return losses, {str(parameter.dtype) for parameter in model.parameters()}, states


LAYOUTS = [
    ({}, {}), ({}, {"zero_stage": 3}), ({"dp": 2}, {}), ({"dp": 2}, {"zero_stage": 3}), ({"tp": 2}, {}),
    ({"pp": 2}, {}), ({"cp": 2}, {"zero_stage": 3}),
]  # fmt: skip


@pytest.mark.parametrize("meta", [False, True], ids=["folder", "meta"])
@pytest.mark.parametrize(("mesh_shape", "options"), LAYOUTS, ids=str)
def test_weights_and_states_are_fp32_whatever_is_stored(ranks, mesh_shape, options, meta):
    world = 2 if mesh_shape else 1
    truth = ranks(1)(trained, {}, {}, "fp32", meta)[0][0]
    for stored in STORED:
        for losses, weights, states in ranks(world)(trained, mesh_shape, options, stored, meta):
            assert (weights, states) == ({"torch.float32"}, {"torch.float32"}), stored
            # To the digits that a bf16 folder keeps, what fp32 weights give; drawn from meta, they are the same ones.
            assert losses == pytest.approx(truth, rel=1e-5 if meta else 2e-2), stored


@pytest.mark.parametrize(("mesh_shape", "options"), LAYOUTS, ids=str)
def test_each_word_means_the_same_under_every_layout(ranks, mesh_shape, options):
    world = 2 if mesh_shape else 1
    expected = {
        "fp32": "torch.float32",
        "bf16-mixed": "torch.float32",
        "bf16": "torch.bfloat16",
        "fp64": "torch.float64",
    }
    # fp64's own rounding is far below, but transformers' norms are fp32; bf16's products differ by the order of sums.
    bounds = {"fp32": 1e-5, "bf16-mixed": 2e-2, "bf16": 2e-2, "fp64": 1e-6}
    for precision, dtype in expected.items():
        chosen = {**options, "precision": precision}
        truth = ranks(1)(trained, {}, {"precision": precision}, "fp32", True)[0][0]
        for losses, weights, states in ranks(world)(trained, mesh_shape, chosen, "fp32", True):
            assert (weights, states) == ({dtype}, {dtype}), precision
            assert losses == pytest.approx(truth, rel=bounds[precision]), precision


def losses_of_a_cast(meta: bool) -> list[tuple[float, float]]:
    """Of a model that `model.to(dtype)` cast, and of one in fp32 whose weights were rounded to that dtype alone."""
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        plain = stored_in(torch.float32, meta)
        for parameter in plain.parameters():
            parameter.data = parameter.data.to(dtype).float()
        made = (parallelize(model, init_mesh(device_type="cpu")) for model in (stored_in(dtype, meta), plain))
        ids = batches(False)[0][0]
        one, other = (model.evaluate(ids).item() for model in made)
        found.append((one, other))
    return found


@pytest.mark.parametrize("meta", [False, True], ids=["folder", "meta"])
def test_a_cast_by_hand_rounds_no_frequencies(ranks, meta):
    for one, other in ranks(1)(losses_of_a_cast, meta)[0]:
        assert one == other


def small_updates(options: dict) -> float:
    """The share of weights that 5 AdamW steps at a rate of 1e-5 have moved, of a model that is stored in bf16."""
    model = parallelize(stored_in(torch.bfloat16, meta=False), init_mesh(device_type="cpu"), **options)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    ids, labels = batches(False)[0]
    for _ in range(5):
        model.forward_backward(ids, labels)
        optimizer.step()
        optimizer.zero_grad()
    moved = [(parameter != before[name]).sum().item() for name, parameter in model.named_parameters()]
    return sum(moved) / sum(parameter.numel() for parameter in model.parameters())


def test_small_updates_move_every_weight_of_a_master_and_few_of_a_bf16_weight(ranks):
    assert ranks(1)(small_updates, {"precision": "bf16-mixed"})[0] > 0.9
    assert ranks(1)(small_updates, {})[0] > 0.9
    assert ranks(1)(small_updates, {"precision": "bf16"})[0] < 0.5


def said(options: dict, made: str) -> str:
    """The precision that is chosen, or the refusal."""
    model = tiny_model()
    model = model.bfloat16() if made == "bfloat16" else model
    try:
        return parallelize(model, init_mesh(device_type="cpu"), **options).precision
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("options", "made", "answer"),
    [
        ({}, "plain", "fp32"),
        ({"dtype": torch.bfloat16}, "plain", "bf16-mixed"),
        ({"dtype": torch.float32}, "bfloat16", "fp32"),
        ({"dtype": torch.bfloat16, "precision": "bf16-mixed"}, "plain", "bf16-mixed"),
        ({"precision": "bf16"}, "plain", "bf16"),
        ({"dtype": torch.bfloat16, "precision": "fp32"}, "plain", "which means 'bf16-mixed': give one of them"),
        ({"dtype": torch.float16}, "plain", "float16 needs loss scaling"),
        ({"precision": "auto"}, "plain", "fp32"),
        ({"precision": "auto", "dtype": torch.bfloat16}, "plain", "bf16-mixed"),
        ({"precision": "int8"}, "plain", "precision='int8': choose one of auto, fp32, bf16-mixed, bf16, fp64, fp8"),
    ],
    ids=str,
)
def test_what_is_said_is_what_is_chosen(ranks, options, made, answer):
    assert answer in ranks(1)(said, options, made)[0]


def made_by_hand() -> list[str]:
    double, stored = tiny_model(double=True), tiny_model(double=True)
    stored.config.dtype = torch.float64
    mesh = init_mesh(device_type="cpu")
    return [parallelize(model, mesh).precision for model in (double, stored)]


def test_fp64_by_hand_stays_and_fp64_of_a_config_does_not(ranks):
    assert ranks(1)(made_by_hand)[0] == ["fp64", "fp32"]
