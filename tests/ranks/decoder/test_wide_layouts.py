"""Layouts far wider than this machine, on torch's fake process group: collectives return at once and move nothing.

What is checked is what a rank holds and that a step runs; the numbers of a step mean nothing here.
"""

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist
from support.fork_server import fork_server
from support.one_loss import tiny_model
from torch.testing._internal.distributed.fake_pg import FakeStore

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.grid import Grid


def on_one_rank(shape: dict[str, int], rank: int, options: dict) -> tuple[dict[str, int], list[str], bool]:
    """Elements this rank holds of each parameter, its layers, and whether a step ran (pp: a step needs its peers)."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=Grid(**shape).world_size)
    mesh = init_mesh(**shape, device_type="cpu")
    with torch.device("meta"):
        whole = tiny_model(num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=8, intermediate_size=64)
    model = parallelize(whole, mesh, **options)
    held = {name: value.numel() for name, value in model.state_dict().items()}
    local = {
        name: (value.to_local() if hasattr(value, "to_local") else value).numel()
        for name, value in model.named_parameters()
    }
    assert held.keys() == local.keys()
    ran = False
    if shape.get("pp", 1) == 1:
        model.forward_backward(torch.zeros(1, 32 * shape.get("cp", 1), dtype=torch.int64))
        ran = True
    return local, sorted(model.stage.layers), ran


@pytest.mark.parametrize(
    ("shape", "rank", "options"),
    [
        ({"dp": 64, "pp": 8, "tp": 8}, 4095, {}),
        ({"dp": 64, "pp": 4, "cp": 2, "tp": 8}, 1234, {"zero_stage": 3}),
        ({"dp": 512, "tp": 8}, 77, {}),
        ({"dp": 256, "cp": 2, "tp": 8}, 4000, {}),
    ],
    ids=str,
)
def test_4096_ranks(shape, rank, options):
    with ProcessPoolExecutor(1, mp_context=fork_server()) as fresh:
        held, layers, ran = fresh.submit(on_one_rank, shape, rank, options).result(timeout=120)
    tp, pp = shape["tp"], shape.get("pp", 1)
    shards = shape["dp"] * shape.get("cp", 1) if options else 1
    assert ran == (pp == 1)
    assert len(layers) == 8 // pp
    first = f"model.layers.{layers[0]}"
    if shards == 1:
        assert held[f"{first}.mlp.gate_proj.weight"] == 64 * 32 // tp
        assert held[f"{first}.input_layernorm.weight"] == 32
    else:  # 8 rows of this tp rank over 128 shards: at most one each
        assert held[f"{first}.mlp.gate_proj.weight"] in (0, 32)
