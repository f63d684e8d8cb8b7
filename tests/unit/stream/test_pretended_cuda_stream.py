"""StreamBP in a user's own loop on a CUDA device that is only pretended: the CPU's gradients, in order on every stream.

Rank 0 of a pool of its own runs it: autograd counts the devices once a process (support.pretended_cuda).
"""

from typing import Any
from unittest import mock

import pytest
import torch
from support.fused_kernels import FusedKernels
from support.pretended_cuda import pretended
from support.pretended_library import only_pretended, own_pool

from fourfold.parallel import stream_backprop
from fourfold.parallel.stream import streaming, token_logprobs
from fourfold.parallel.stream.fused import Fused
from fourfold.parallel.testing.compare import relative_error
from fourfold.parallel.testing.tiny_models import batch, tiny

pytestmark = only_pretended
rank = own_pool(1)
IDS = batch(2, 45)
POSITIONS = torch.cat([torch.arange(length) for length in (9, 1, 35)]).expand(2, -1)
SIZES = {"chunk_size": 16, "mlp_chunk": 24, "offload": "host"}
ROUNDING = 1e-5  # of fp32, sums in another order


def gradients(device: str, family: str, by_tokens: bool, settings: dict[str, Any]) -> list[torch.Tensor]:
    """Of two micro-batches summed, on the CPU."""
    model, ids = tiny(family).to(device), IDS.to(device)
    stream_backprop(model, **SIZES, **settings)
    arguments = {"position_ids": POSITIONS.to(device), "use_cache": False}
    for row in ids.split(1):
        given = {name: value[:1] if name == "position_ids" else value for name, value in arguments.items()}
        if by_tokens:
            loss = -token_logprobs(model, row, row, **given).mean()
        else:
            loss = model(input_ids=row, labels=row, **given).loss
        loss.backward()
    return [parameter.grad.cpu() for parameter in model.parameters()]


def on_both(*case: Any) -> tuple[float, list[str], dict[str, int]]:
    fused = Fused(FusedKernels().kernels("cuda"))
    with pretended() as seen, mock.patch.object(streaming, "liger", return_value=fused):
        there = gradients("cuda", *case)
    here = gradients("cpu", *case)
    error = max(relative_error(one, other) for one, other in zip(there, here, strict=True))
    return error, seen.faults, fused.taken()


@pytest.mark.parametrize(
    ("family", "by_tokens", "settings"),
    [
        ("mistral, window", False, {"head_groups": 2, "keep_attention": True}),
        ("llama", True, {"head_groups": 0, "keep_attention": 1}),
    ],
    ids=["a model's loss, heads", "token_logprobs, queries"],
)
def test_gradients_are_the_cpu_s(rank, family, by_tokens, settings):
    error, faults, taken = rank(on_both, family, by_tokens, settings)[0]
    assert error <= ROUNDING
    assert faults == []
    assert taken == {"norms": 1, "gates": 1, "rotary": 1}
