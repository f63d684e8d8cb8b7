"""Attention sinks around the ring: one more term of each softmax, against fp64 on one process, and in models."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ring_models import EXPERTS, complaint, ring_errors, summed, tiny_batch
from torch import Tensor

from fourfold.parallel import ring_attention, shard_sequence, unshard_sequence
from fourfold.parallel.testing.compare import assert_ranks, relative_error
from fourfold.parallel.testing.reference import attention_mask

TOLERANCE = 2e-6  # fp32 rounding
SEQ_LEN = 53


def reference(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


def errors(options: dict[str, Any]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(2)
    q, k, v, grad = (torch.randn(1, heads, SEQ_LEN, 16, generator=generator) for heads in (4, 2, 2, 4))
    sinks = torch.randn(4, generator=generator)
    sharded = {key: options[key] for key in ("sharding", "cu_seqlens") if key in options}
    local = [shard_sequence(x, None, dim=2, **sharded).clone().requires_grad_() for x in (q, k, v)]
    here = sinks.clone().requires_grad_()
    out = ring_attention(*local, None, sinks=here, **options)
    out.backward(shard_sequence(grad, None, dim=2, **sharded))
    found = [unshard_sequence(x, None, dim=2, **sharded) for x in (out.detach(), *(x.grad for x in local))]
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    masks = {key: options[key] for key in ("causal", "window", "cu_seqlens") if key in options}
    truth = reference(*leaves, attention_mask(SEQ_LEN, **masks))
    truth.backward(grad.double())
    expected = [truth.detach(), *(x.grad for x in leaves)]
    names = ("o", "dq", "dk", "dv", "dsinks")
    return {
        name: relative_error(mine, right)
        for name, mine, right in zip(names, [*found, summed(here.grad)], expected, strict=True)
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False, "sharding": "striped"},
    {"window": (7, 0)},
    {"cu_seqlens": (0, 9, 10, 41)},  # and padding, which sees nothing
    {"heads_degree": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_sinks_equal_one_process(ranks, options):
    assert_ranks(ranks(2)(errors, options), TOLERANCE, str(options))


def model_errors(family: str, options: dict[str, Any], extra: dict[str, Any]) -> dict[str, float]:
    batch = tiny_batch()
    return ring_errors((family, options), batch, batch, extra=extra)


WINDOWED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = [("GptOss", {**EXPERTS, **WINDOWED}, {"output_router_logits": True}), ("GraniteSWA", WINDOWED, {})]


@pytest.mark.parametrize(("family", "options", "extra"), MODELS)
def test_models_with_sinks(ranks, family, options, extra):
    assert_ranks(ranks(2)(model_errors, family, options, extra), TOLERANCE, family)


def refusal() -> str:
    x = torch.randn(1, 4, 8 // dist.get_world_size(), 16)
    return complaint(ring_attention, x, x, x, None, sinks=torch.zeros(3))


def test_sinks_are_one_a_head(ranks):
    assert all("sinks (3,) on cpu: one for each of 4 heads" in answer for answer in ranks(2)(refusal))
