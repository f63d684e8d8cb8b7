"""Fused kernels in uncompiled layers: one process's losses and gradients, and no kernel where it would be wrong."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from support.fused_kernels import FusedKernels
from support.one_loss import check_layout

from fourfold.parallel.decoder import fused_layers
from fourfold.parallel.stream.fused import Fused
from fourfold.parallel.testing.compare import assert_ranks

ALL = {"norms": 1, "gates": 1, "rotary": 1}
KERNELS = {"norms": "rms_norm", "gates": "silu_mul", "rotary": "rotary"}


def checked(wrong: bool, *arguments: Any) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    """Errors of a layout that trains with such kernels; how often each was called, and for how many kinds taken."""
    stand_ins = FusedKernels()
    kernels = stand_ins.kernels()
    fused = Fused(replace(kernels, silu_mul=kernels.gelu_mul) if wrong else kernels)
    with mock.patch.object(fused_layers, "liger", return_value=fused):
        errors, _ = check_layout(*arguments)
    return errors, dict(stand_ins.count), fused.taken()


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
        assert {name for name, times in count.items() if times > 5} == {KERNELS[name] for name in taken if taken[name]}


def test_a_kernel_that_gives_others_is_not_taken(ranks):
    errors, count, found = ranks(1)(checked, True, {}, {}, {}, True)[0]
    assert_ranks([errors], 1e-5, "wrong gates")
    assert found == {**ALL, "gates": 0}
    assert count["gelu_mul"] <= 4


def mixed(family: str, zero_stage: int) -> dict[str, int]:
    fused = Fused(FusedKernels().kernels())
    options = {"precision": "bf16-mixed", "zero_stage": zero_stage}
    with mock.patch.object(fused_layers, "liger", return_value=fused):
        check_layout({}, options, {"family": family}, True)
    return fused.taken()


# Under autocast angles and a layer's norms are fp32, queries and what enters a norm of heads bf16. FSDP2 casts all.
@pytest.mark.parametrize(("family", "zero_stage", "norms"), [("llama", 0, 1), ("qwen3", 0, 2), ("qwen3", 1, 1)])
def test_kernels_are_compared_in_the_dtypes_that_come(family, zero_stage, norms, ranks):
    assert ranks(1)(mixed, family, zero_stage)[0] == {**ALL, "norms": norms}
