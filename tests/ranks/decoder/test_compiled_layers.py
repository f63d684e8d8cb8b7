"""Layers under torch.compile: the same numbers on every axis that it is allowed on, and one compilation for all layers.

The backend is torch's aot_eager: what the compiler captures and differentiates is as with inductor, and costs no C++
compiler. What inductor makes of it on a GPU is for tests/gpu.
"""

import pytest
import torch
from support.one_loss import check_layout, tiny_model

from fourfold.parallel import parallelize
from fourfold.parallel.decoder.compiled import chosen_backend
from fourfold.parallel.decoder.limits import FULL, SELECTIVE, STREAM, Choice
from fourfold.parallel.testing.compare import assert_ranks


def check_compiled(mesh_shape: dict, options: dict, model: dict) -> tuple[dict, int]:
    """Errors against one process, and how many graphs were compiled."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # layers of other tests count against its limit of recompilations
    counters.clear()
    errors, _ = check_layout(mesh_shape, {**options, "compile": "aot_eager"}, model, True)
    return errors, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("mesh_shape", "options", "model", "graphs"),
    [
        ({"dp": 2}, {"micro_batch": 1}, {}, 2),  # with gradients, and without
        ({"dp": 2}, {"micro_batch": 1, "zero_stage": 3, "checkpointing": "full"}, {}, 2),
        ({"dp": 2}, {"zero_stage": 1, "micro_batch": 2}, {"family": "qwen3"}, 2),
        ({"pp": 2}, {"micro_batch": 1}, {}, None),
        ({"cp": 2}, {}, {}, None),  # the ring is left out, which cuts a layer in pieces
        ({"cp": 2}, {"checkpointing": "full"}, {"family": "mistral", "sliding_window": 5}, None),
        ({"tp": 2}, {"sequence_parallel": True, "micro_batch": 1}, {}, 2),
    ],
    ids=str,
)
def test_two_ranks(ranks, mesh_shape, options, model, graphs):
    answers = ranks(2)(check_compiled, mesh_shape, options, model)
    assert_ranks([errors for errors, _ in answers], 1e-5, f"{mesh_shape} {options} {model}")
    for _, found in answers:
        assert found == graphs or (graphs is None and 1 <= found <= 8)


@pytest.mark.parametrize(
    ("mesh_shape", "options", "model"),
    [
        ({"tp": 2}, {}, {"family": "qwen3"}),  # norms over heads
        ({"dp": 2, "tp": 2}, {"zero_stage": 3, "checkpointing": "full"}, {}),
        ({"cp": 2, "tp": 2}, {}, {}),
    ],
    ids=str,
)
def test_cut_layers(ranks, mesh_shape, options, model):
    """In fp64; what is left is transformers' own: its norms and rotary tables are fp32."""
    model = {"double": True, "num_hidden_layers": 2} | model
    answers = ranks(4 if len(mesh_shape) == 2 else 2)(check_compiled, mesh_shape, options, model)
    assert_ranks([errors for errors, _ in answers], 1e-6, f"{mesh_shape} {options}")


def test_without_a_compiler_nothing_is_compiled(mesh):
    model = parallelize(tiny_model(), mesh)
    assert all(layer._compiled_call_impl is None for layer in model.stage.layers.values())
    assert not model.compiled
    assert parallelize(tiny_model(), mesh, compile="eager").compiled


@pytest.mark.parametrize(
    ("device", "layout", "expected"),
    [
        ("cpu", {}, None),
        ("cuda", {}, "inductor"),
        ("cuda", {"checkpointing": FULL, "dp": 8}, "inductor"),
        ("cuda", {"checkpointing": SELECTIVE}, None),
        ("cuda", {"checkpointing": STREAM}, None),
        ("cuda", {"tp": 2}, "inductor"),
    ],
    ids=str,
)
def test_the_default_is_by_device_and_by_what_is_allowed(device, layout, expected, monkeypatch):
    monkeypatch.setattr("fourfold.parallel.decoder.compiled._has_triton", lambda: True)
    assert chosen_backend(None, device, Choice(**layout)) == expected
    monkeypatch.setattr("fourfold.parallel.decoder.compiled._has_triton", lambda: False)
    assert chosen_backend(None, device, Choice(**layout)) is None
    assert chosen_backend(True, device, Choice()) == "inductor"
    assert chosen_backend(False, device, Choice()) is None


def test_what_is_no_compiler_is_refused(mesh):
    with pytest.raises(ValueError, match=r"compile='llvm': choose true, false, or one of torch's backends: .*inductor"):
        parallelize(tiny_model(), mesh, compile="llvm")


def test_a_model_that_was_compiled_before_is_refused(mesh):
    whole, inside = tiny_model(), tiny_model()
    inside.model.layers[1].compile(backend="eager")
    for model, where in ((torch.compile(whole, backend="eager"), "this model"), (inside, "module 'model.layers.1'")):
        with pytest.raises(ValueError, match=f"{where} went through torch.compile.* give parallelize the model as it"):
            parallelize(model, mesh)
    parallelize(whole, mesh)
