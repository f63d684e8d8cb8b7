"""Tensor parallelism of a decoder stage, as a plan for torch's DTensor.

The cut is Megatron's (Shoeybi et al. 2019): attention heads and the MLP's inner width by columns then rows, embedding
and head by vocabulary. torch's `parallelize_module` applies it. Two things it leaves to the caller are here: the inputs
of an attention block and an MLP enter as one DTensor, so that the backward pass sums one gradient instead of one a
projection; and norms become replicated DTensors, so that an optimizer sees parameters of one kind.

With sequence parallelism (Korthikanti et al. 2022) the hidden states between these blocks are cut along the sequence,
so that norms and residual sums are done once and not on every tp rank. They are gathered before a block's first
matrices, and what the last ones give is summed and scattered again: as many bytes as the all-reduce has.

    plain       x -- norm -- [ q k v, attention, o ] -- all-reduce ------ + x       all of x on every tp rank
    sequence    x -- norm -- all-gather -- [ ... ] -- reduce-scatter ---- + x       a tp-th of x's tokens on each
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.sequence.tensors import IGNORED_LABEL


def cut_layer(layer: nn.Module, tp_mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
    """Replace a decoder layer's parameters by DTensors on `tp_mesh`, in place.

    Args:
        layer: its q, k, v, gate and up projections are cut by columns, o and down by rows.
        tp_mesh: one-dimensional; every rank of it must call with the same weights.
        sequence_parallel: the layer's input and output are [B, S_local / tp, hidden]; else [B, S_local, hidden].
    Cost: no communication now; in a step two all-reduces of [B, S_local, hidden] each way, or as many all-gathers and
        reduce-scatters.
    Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3; Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.
    """
    between = _between(sequence_parallel)
    norm = _AsDTensor(between)
    plan: dict[str, ParallelStyle] = {
        "input_layernorm": norm,
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": between},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        "post_attention_layernorm": norm,
        "mlp": PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=between),
    }
    if hasattr(layer.self_attn, "q_norm"):  # over each head's features; this rank has some of the heads
        plan["self_attn.q_norm"] = plan["self_attn.k_norm"] = _AsDTensor(Shard(2))
    parallelize_module(layer, tp_mesh, plan)


def cut_ends(stage: DecoderStage, tp_mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
    """The same for the embedding and the head, by vocabulary, and for the last norm, where the stage has them.

    Logits leave the stage as this rank's part of the vocabulary.

    Cost: in a step one all-reduce of [B, S_local, hidden] for the embedding and one for the head's input gradient.
    """
    between = _between(sequence_parallel)
    if stage.is_first:
        embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        parallelize_module(stage.model, tp_mesh, {"embed_tokens": embedding})
        # After DTensor's own hook, which begins the sum and does not wait for it.
        cast(nn.Module, stage.model.embed_tokens).register_forward_hook(_wait)
    if stage.is_last:
        head = ColwiseParallel(input_layouts=between)
        parallelize_module(stage, tp_mesh, {"model.norm": _AsDTensor(between), "lm_head": head})
        if stage.config.tie_word_embeddings:  # both are Shard(0), and one weight again
            embedding = cast(Any, stage.model).embed_tokens
            if stage.is_first:
                stage.lm_head.weight = embedding.weight
            else:  # which is not run here, so was not cut
                embedding.weight = stage.lm_head.weight


def cut_cross_entropy(logits: Tensor, targets: Tensor, tp_mesh: DeviceMesh) -> Tensor:
    """The sum of the targets' cross-entropies, from each rank's part of the vocabulary; the same on every rank.

    torch's loss_parallel must be on in the backward as well as in the forward. Here the gradient is made in the
    forward, so that a backward may come at any time, from anywhere.

    Args:
        logits: [B, S, vocab / tp], fp32 or fp64.
        targets: [B, S] int64, negative for none.
        tp_mesh: one-dimensional; every rank of it must call with the same targets.
    Cost: three all-reduces of [B S]; the gradient, as large as the logits, is kept for the backward.
    """
    return cast(Tensor, _CutCrossEntropy.apply(logits, targets, tp_mesh))  # type: ignore[no-untyped-call]


class _CutCrossEntropy(torch.autograd.Function):
    """`cut_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tp_mesh: DeviceMesh) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted), loss_parallel():
            leaf = logits.detach().requires_grad_(wanted)
            cut = DTensor.from_local(leaf, tp_mesh, [Shard(2)], run_check=False)
            total = cross_entropy_sum(cut, targets)
            if wanted:
                ctx.save_for_backward(*torch.autograd.grad(total, leaf))
        return total.detach()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * weight, None, None


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the targets' cross-entropies as a plain tensor.

    Args:
        logits: [B, S, vocab], or a DTensor of that cut by the vocabulary, under loss_parallel.
        targets: [B, S] int64, negative for none.
    """
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total.to_local() if isinstance(total, DTensor) else total


def _between(sequence_parallel: bool) -> Placement:
    """How hidden states [B, S_local, hidden] lie on the tp ranks between the layers' matrices."""
    return Shard(1) if sequence_parallel else Replicate()


class _Waited(torch.autograd.Function):
    """A collective's result, waited for.

    A tensor that is still on its way is of a class of its own. A compiled layer that is given one gives back a gradient
    that DTensor's backward does not know (torch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.wait() if isinstance(x, AsyncCollectiveTensor) else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def _wait(_: nn.Module, given: Any, output: Tensor) -> Tensor:
    return cast(Tensor, _Waited.apply(output))  # type: ignore[no-untyped-call]


class _AsDTensor(ParallelStyle):
    """Run a module with replicated parameters on an input of the given placement; the output has it too."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Tensor, ...]:
            return (DTensor.from_local(inputs[0], mesh, [self.placement], run_check=False), *inputs[1:])

        def leave(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, None, enter, leave)  # type: ignore[arg-type]
