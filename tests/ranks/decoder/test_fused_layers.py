"""Fused kernels in uncompiled layers: one process's losses and gradients, and no kernel where it would be wrong.

The kernels are plain torch, on a CPU. Like Liger-Kernel's they write where autograd does not look: the rotary one over
queries and keys, the gated one's backward over its inputs.
"""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.one_loss import check_layout
from torch import Tensor

from fourfold.parallel.decoder import fused_layers
from fourfold.parallel.stream.fused import Fused, Kernels
from fourfold.parallel.testing.compare import assert_ranks

COUNT: dict[str, int] = {}


def write(x: Tensor, values: Tensor) -> Tensor:
    """Over the memory of x, which autograd is not told."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
    return memory.copy_(values)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat([-x[..., half:], x[..., :half]], -1) * sin.unsqueeze(1)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        COUNT["rotary"] = COUNT.get("rotary", 0) + 1
        ctx.save_for_backward(cos, sin)
        for x in (q, k):
            write(x, rotated(x, cos, sin))
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(grad_q, cos, -sin), rotated(grad_k, cos, -sin), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    COUNT["norms"] = COUNT.get("norms", 0) + 1
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((weight + offset) * wide.to(x.dtype)).to(x.dtype)


class SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        COUNT["gates"] = COUNT.get("gates", 0) + 1
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        slope = a.sigmoid() * (1 + a * (1 - a.sigmoid()))
        of_a, of_b = grad * b * slope, grad * F.silu(a)
        return write(a, of_a), write(b, of_b)


def wrong_mul(a: Tensor, b: Tensor) -> Tensor:
    COUNT["wrong"] = COUNT.get("wrong", 0) + 1
    return a * b


def checked(wrong: bool, *arguments: Any) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    """Errors of a layout that trains with such kernels; how often each was called, and for how many classes taken."""
    COUNT.clear()
    gate = wrong_mul if wrong else SiluMul.apply
    fused = Fused(Kernels("cpu", rms_norm, gate, wrong_mul, Rotary.apply))
    with mock.patch.object(fused_layers, "liger", return_value=fused):
        errors, _ = check_layout(*arguments)
    return errors, dict(COUNT), fused.taken()


ALL = {"norms": 1, "gates": 1, "rotary": 1}


@pytest.mark.parametrize(
    ("mesh_shape", "options", "model", "taken"),
    [
        ({}, {}, {}, ALL),
        ({}, {"checkpointing": "full", "zero_stage": 3}, {"family": "qwen3"}, ALL),
        # Its kernel overwrites what selective checkpointing keeps.
        ({}, {"checkpointing": "selective", "micro_batch": 2}, {}, {**ALL, "rotary": 0}),
        ({"pp": 2}, {"micro_batch": 1}, {}, ALL),
        ({"cp": 2}, {"zero_stage": 1}, {}, ALL),
        ({"tp": 2}, {}, {}, dict.fromkeys(ALL, 0)),
        ({}, {"compile": "eager"}, {}, dict.fromkeys(ALL, 0)),
        ({"pp": 2}, {"micro_batch": 1, "vp": 2, "schedule": "zero-bubble"}, {}, dict.fromkeys(ALL, 0)),
    ],
    ids=str,
)
def test_one_loss(ranks, mesh_shape, options, model, taken):
    answers = ranks(2 if mesh_shape else 1)(checked, False, mesh_shape, options, model, True)
    assert_ranks([errors for errors, _, _ in answers], 1e-5, f"mesh {mesh_shape}, options {options}")
    for _, count, found in answers:
        assert found == taken
        assert {name for name, times in count.items() if times > 5} == {name for name in taken if taken[name]}


def test_a_kernel_that_gives_others_is_not_taken(ranks):
    errors, count, found = ranks(1)(checked, True, {}, {}, {}, True)[0]
    assert_ranks([errors], 1e-5, "wrong gates")
    assert found == {**ALL, "gates": 0}
    assert count["wrong"] <= 4


def mixed(family: str, zero_stage: int) -> dict[str, int]:
    fused = Fused(Kernels("cpu", rms_norm, SiluMul.apply, wrong_mul, Rotary.apply))
    options = {"precision": "bf16-mixed", "zero_stage": zero_stage}
    with mock.patch.object(fused_layers, "liger", return_value=fused):
        check_layout({}, options, {"family": family}, True)
    return fused.taken()


# Under autocast angles and a layer's norms are fp32, queries and what enters a norm of heads bf16. FSDP2 casts all.
@pytest.mark.parametrize(("family", "zero_stage", "norms"), [("llama", 0, 1), ("qwen3", 0, 2), ("qwen3", 1, 1)])
def test_kernels_are_compared_in_the_dtypes_that_come(family, zero_stage, norms, ranks):
    assert ranks(1)(mixed, family, zero_stage)[0] == {**ALL, "norms": norms}
