"""What would train something else without a word is refused, on every rank and in words that name the mend.

Each fault is tried on the layouts where it once went unnoticed, and on those where it did not: all say the same.
"""

import pytest
import torch
from support.one_loss import GLOBAL_BATCH, adamw, batches, tiny_model
from torch.distributed.tensor import DTensor

from fourfold.parallel import init_mesh, parallelize

TWO = [
    ({"dp": 2}, {}), ({"dp": 2}, {"zero_stage": 3}), ({"tp": 2}, {}), ({"tp": 2}, {"zero_stage": 3}), ({"cp": 2}, {}),
    ({"pp": 2}, {}), ({"pp": 2}, {"zero_stage": 3, "checkpointing": "stream"}), ({"pp": 2}, {"vp": 2}),
]  # fmt: skip


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def refusal(action) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "accepted"


def spoilt(ids, labels, change: str):
    """The same rows with one thing wrong."""
    ids, labels = ids.clone(), labels.clone()
    if change == "list":
        return ids.tolist(), labels
    if change == "floats":
        return ids.float(), labels
    if change == "shape":
        return ids, labels[:, 1:]
    if change == "rows":
        return ids.flip(0), labels.flip(0)
    if change == "length":
        return ids[:, :-4], labels[:, :-4]
    target, value = {
        "id": (ids, 64), "negative id": (ids, -2), "label": (labels, -1), "large label": (labels, 64),
        "other label": (labels, 7),
    }[change]  # fmt: skip
    target[0, 20] = value
    return ids, labels


def fed(mesh_shape: dict, options: dict, changes: list[str]) -> tuple[dict[str, tuple[str, str]], float]:
    """What training and evaluation say to batches that are wrong on the last rank; then the loss of a right one."""
    model = parallelize(tiny_model(), init_mesh(**mesh_shape, device_type="cpu"), **options)
    rows = model.batch_rows(GLOBAL_BATCH)
    ids, labels = (x[rows] for x in batches(True)[0])
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    said = {}
    for change in changes:
        given = spoilt(ids, labels, change) if is_last else (ids, labels)
        said[change] = (
            refusal(lambda: model.forward_backward(*given)),  # noqa: B023
            refusal(lambda: model.evaluate(*given)),  # noqa: B023
        )
    return said, model.forward_backward(ids, labels).item()


NO_BATCH = {
    "id": "token id 64 in a vocabulary of 64",
    "negative id": "token id -2 in a vocabulary of 64",
    "label": "label -1 in a vocabulary of 64: give -100 where there is no target",
    "large label": "label 64 in a vocabulary of 64",
    "list": "input_ids are a list: give a torch tensor",
    "floats": "input_ids are torch.float32: give whole numbers",
    "shape": "both are [batch, sequence]",
}


@pytest.mark.parametrize(("mesh_shape", "options"), [({}, {}), *TWO], ids=str)
def test_a_batch_that_is_none_is_refused_alike(ranks, mesh_shape, options):
    world = 2 if mesh_shape else 1
    truth = ranks(1)(fed, {}, {}, [])[0][1]
    for said, loss in ranks(world)(fed, mesh_shape, options, list(NO_BATCH)):
        for change, (training, evaluation) in said.items():
            assert NO_BATCH[change] in training
            assert training == evaluation
            assert training.startswith(f"rank {world - 1}: ") == (world > 1)
        assert loss == pytest.approx(truth, rel=1e-5)  # and the ranks are together again


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [layout for layout in TWO if "dp" not in layout[0]]
    + [({"dp": 2, "tp": 2}, {}), ({"dp": 2, "cp": 2}, {"zero_stage": 3}), ({"dp": 2, "pp": 2}, {})],
    ids=str,
)
def test_peers_with_other_rows_are_refused(ranks, mesh_shape, options):
    world = 4 if "dp" in mesh_shape else 2
    truth = ranks(1)(fed, {}, {}, [])[0][1]
    first, second = (2, 3) if world == 4 else (0, 1)
    for said, loss in ranks(world)(fed, mesh_shape, options, ["rows", "other label", "length"]):
        for training, evaluation in said.values():
            assert f"ranks {first} and ranks {second} share the sequences of dp rank {world // 2 - 1}" in training
            assert "batch_rows" in training
            assert training == evaluation
        assert loss == pytest.approx(truth, rel=1e-5)


def accepted_dtypes(mesh_shape: dict) -> list[float]:
    model = parallelize(tiny_model(), init_mesh(**mesh_shape, device_type="cpu"))
    ids, labels = batches(True)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    kinds = (torch.int64, torch.int32, torch.int16)
    return [model.evaluate(ids[rows].to(kind), labels[rows].to(kind)).item() for kind in kinds]


@pytest.mark.parametrize("mesh_shape", [{"tp": 2}, {"dp": 2}, {"pp": 2}], ids=str)
def test_narrower_whole_numbers_are_the_same_ids(ranks, mesh_shape):
    for losses in ranks(2)(accepted_dtypes, mesh_shape):
        assert losses[0] == losses[1] == losses[2]


def early_optimizer(mesh_shape: dict, options: dict, meta: bool) -> tuple[str, bool]:
    """What a step of an optimizer says that was made before, and whether the weights moved."""
    with torch.device("meta" if meta else "cpu"):
        whole = tiny_model()
    optimizer = adamw(whole.parameters())
    model = parallelize(whole, init_mesh(**mesh_shape, device_type="cpu"), **options)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ids, labels = batches(False)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    model.forward_backward(ids[rows], labels[rows])
    said = refusal(optimizer.step)
    same = [torch.equal(local(a), local(b)) for a, b in zip(before, model.parameters(), strict=True)]
    later = adamw(model.parameters())
    later.step()  # which is made as it should be
    return said, not any(same)


@pytest.mark.parametrize(
    ("mesh_shape", "options", "meta"),
    [*((*layout, False) for layout in [({}, {"zero_stage": 3}), *TWO]), ({"dp": 2}, {}, True), ({"pp": 2}, {}, True)],
    ids=str,
)
def test_an_optimizer_made_before_trains_or_is_refused(ranks, mesh_shape, options, meta):
    replaced = meta or "tp" in mesh_shape or options.get("zero_stage") == 3
    for said, moved in ranks(2 if mesh_shape else 1)(early_optimizer, mesh_shape, options, meta):
        if replaced:
            assert "AdamW was made before parallelize" in said
            assert not moved
        else:
            assert (said, moved) == ("accepted", True)


def whole_model(mesh_shape: dict, options: dict, folder: str) -> list[str]:
    whole = tiny_model()
    mesh = init_mesh(**mesh_shape, device_type="cpu")
    parallelize(whole, mesh, **options)
    ids = batches(False)[0][0]
    return [
        refusal(lambda: whole(ids, labels=ids).loss.backward()),
        refusal(lambda: whole.generate(ids[:1], max_new_tokens=2, do_sample=False)),
        refusal(lambda: whole.save_pretrained(folder)),
        refusal(whole.state_dict),
        refusal(lambda: whole.load_state_dict({})),
        refusal(lambda: whole.model(ids)),
        refusal(lambda: parallelize(whole, mesh, **options)),
    ]


@pytest.mark.parametrize(("mesh_shape", "options"), [({}, {}), *TWO], ids=str)
def test_the_model_that_was_taken_over_says_so(ranks, mesh_shape, options, tmp_path):
    for said in ranks(2 if mesh_shape else 1)(whole_model, mesh_shape, options, str(tmp_path / "model")):
        assert all("taken over by parallelize" in words and "save_pretrained(folder)" in words for words in said[:-1])
        assert "was parallelized before" in said[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


def norms(mesh_shape: dict, options: dict) -> tuple[float, float]:
    """The norm before clipping, and after it again."""
    model = parallelize(tiny_model(), init_mesh(**mesh_shape, device_type="cpu"), **options)
    ids, labels = batches(False)[0]
    rows = model.batch_rows(GLOBAL_BATCH)
    model.forward_backward(ids[rows], labels[rows])
    return model.clip_grad_norm_(0.5).item(), model.clip_grad_norm_(0.5).item()


@pytest.mark.parametrize(("mesh_shape", "options"), TWO, ids=str)
def test_the_model_s_own_clipping_is_by_one_norm(ranks, mesh_shape, options):
    before, after = ranks(1)(norms, {}, {})[0]
    assert after == pytest.approx(0.5, rel=1e-4)
    for found in ranks(2)(norms, mesh_shape, options):
        assert found == pytest.approx((before, after), rel=1e-5)


def without_gradients(mesh_shape: dict, options: dict) -> tuple[list[str], list[float]]:
    """What training says inside of no_grad on one rank, and inference_mode; losses of evaluation there, and after."""
    model = parallelize(tiny_model(), init_mesh(**mesh_shape, device_type="cpu"), **options)
    rows = model.batch_rows(GLOBAL_BATCH)
    ids, labels = (x[rows] for x in batches(True)[0])
    with torch.set_grad_enabled(torch.distributed.get_rank() == 0):
        said = [refusal(lambda: model.forward_backward(ids, labels))]
    with torch.inference_mode():
        said.append(refusal(lambda: model.forward_backward(ids, labels)))
        losses = [model.evaluate(ids, labels).item()]
    return said, [*losses, model.forward_backward(ids, labels).item()]


@pytest.mark.parametrize(("mesh_shape", "options"), TWO, ids=str)
def test_no_gradients_are_for_evaluation(ranks, mesh_shape, options):
    truth = ranks(1)(fed, {}, {}, [])[0][1]
    for said, losses in ranks(2)(without_gradients, mesh_shape, options):
        assert all("forward_backward without gradients" in words and "use evaluate" in words for words in said)
        assert losses == pytest.approx([truth] * 2, rel=1e-5)


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_a_norm_that_is_none_is_refused(mesh, max_norm):
    model = parallelize(tiny_model(), mesh)
    ids, labels = batches(True)[0]
    model.forward_backward(ids, labels)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=f"max_norm={max_norm}: give a number of at least 0"):
        model.clip_grad_norm_(max_norm)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, model.parameters(), strict=True))
