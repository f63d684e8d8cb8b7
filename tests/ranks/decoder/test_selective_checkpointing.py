"""Selective checkpointing: the same numbers, and between "full" and "none" in what a layer keeps and computes again."""

import pytest
import torch
from support.one_loss import assert_one_loss, batches, tiny_model
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel import parallelize


@pytest.mark.parametrize("mesh_shape", [{}, {"dp": 2}, {"cp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_one_loss(ranks, mesh_shape):
    world = 2 if mesh_shape else 1
    assert_one_loss(ranks(world), mesh_shape, masked=True, micro_batch=1, checkpointing="selective")


def test_with_the_ring_in_fp64(ranks):
    # What remains is transformers' own: its norms and rotary tables are fp32.
    model = {"double": True, "family": "mistral", "sliding_window": 5}
    assert_one_loss(ranks(2), {"cp": 2}, model=model, tolerance=1e-6, checkpointing="selective")


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often operators ran, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] = self.calls.get(func.overloadpacket.__name__, 0) + 1
        return func(*args, **(kwargs or {}))


def step(checkpointing: str, mesh: DeviceMesh) -> tuple[int, dict[str, int]]:
    """Bytes that live after a forward for its backward, parameters left out, and the operators of a whole step."""
    model = parallelize(tiny_model(), mesh, checkpointing=checkpointing)
    ids = batches(False)[0][0]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.stage.position_ids = torch.arange(ids.shape[1])[None]
        model.stage(ids)
    with Counted() as counted:
        model.forward_backward(ids)
    return sum(kept.values()), counted.calls


def test_matrix_products_run_once_and_what_is_cheap_runs_twice(mesh):
    none, selective, full = (step(kind, mesh)[1] for kind in ("none", "selective", "full"))
    products = [sum(calls.get(name, 0) for name in ("mm", "addmm", "bmm")) for calls in (none, selective, full)]
    assert products[0] == products[1] < products[2]
    attention = [
        sum(n for name, n in c.items() if "attention" in name and "backward" not in name)
        for c in (none, selective, full)
    ]
    assert attention == [4, 4, 8]
    assert none["silu"] == 4
    assert selective["silu"] == full["silu"] == 8
