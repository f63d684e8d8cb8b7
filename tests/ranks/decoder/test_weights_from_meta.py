"""A model built without storage gets the same weights under every layout, and trains."""

import pytest
import torch
from support.one_loss import tiny_model

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.testing.compare import assert_ranks, assert_same, full_tensor


def weights(mesh_shape: dict, options: dict, model_options: dict) -> tuple[dict, float]:
    with torch.device("meta"):
        model = tiny_model(**model_options)
    mesh = init_mesh(**mesh_shape, device_type="cpu")
    parallel = parallelize(model, mesh, seed=5, **options)
    ids = torch.arange(48).view(2, 24) % 64
    loss = parallel.evaluate(ids[parallel.batch_rows(2)]).item()
    named = {name: full_tensor(value).detach() for name, value in parallel.named_parameters()}
    return named, loss


@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_draws_the_same(ranks, tied):
    model = {"tie_word_embeddings": tied}
    whole, loss = ranks(1)(weights, {}, {}, model)[0]
    assert len({value.float().sum().item() for value in whole.values()}) > len(whole) // 2  # no two layers alike
    for mesh_shape, options in (({"tp": 2}, {}), ({"dp": 2}, {"zero_stage": 3}), ({"pp": 2}, {})):
        results = ranks(2)(weights, mesh_shape, options, model)
        found = {name: value for named, _ in results for name, value in named.items()}
        where = f"mesh {mesh_shape}, options {options}"
        assert_same(found.items(), whole.items(), where)
        assert_ranks([{"loss": abs(other / loss - 1)} for _, other in results], 1e-5, where)
