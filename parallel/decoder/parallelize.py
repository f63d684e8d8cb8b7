"""A Hugging Face decoder on a (dp, pp, cp, tp) mesh, with the gradients of one process.

torch has each axis: DTensor, pipelining, FSDP2 and DDP, and here ring attention. What it leaves open is their sum. Each
averages its gradients over other things (replicas, micro-batches, nothing at all), so the same model under two layouts
takes two different steps. Here there is one rule: **weight gradients are those of the mean loss over all target tokens
of the global batch**. Every micro-batch's loss is a sum over its own tokens divided by the global count, and every axis
sums.

    mesh = init_mesh(dp=2, tp=2)
    model = parallelize(model, mesh)
    for input_ids in loader:                       # this dp rank's sequences, whole
        loss = model.forward_backward(input_ids)   # labels default to input_ids, as in transformers
        optimizer.step(); optimizer.zero_grad()
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fourfold.parallel.decoder.adapters import without_wrapper
from fourfold.parallel.decoder.compiled import chosen_backend, compile_layer
from fourfold.parallel.decoder.float8 import refuse_without_fp8, use_fp8
from fourfold.parallel.decoder.fused_layers import use_fused
from fourfold.parallel.decoder.limits import FP8, Choice, as_number, drains, may_stream_head
from fourfold.parallel.decoder.parallel_model import ParallelModel, StepOptions, device_of
from fourfold.parallel.decoder.precision import Precision, chosen_precision
from fourfold.parallel.decoder.stage import DecoderStage, check_decoder, has_sliding_window
from fourfold.parallel.decoder.taken_over import mark_replaced, refuse_taken_over, take_over
from fourfold.parallel.decoder.tensor_parallel import cut_ends, cut_layer
from fourfold.parallel.decoder.tied_ends import check_ends_alike, copy_to_last_stage
from fourfold.parallel.decoder.weights import materialise
from fourfold.parallel.gradients import copy_weights
from fourfold.parallel.grid import AXES, interleaved_ranges, layer_ranges
from fourfold.parallel.mesh import replica_mesh
from fourfold.parallel.ring.transformers import use_ring_attention
from fourfold.parallel.stream.settings import StreamSettings


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    micro_batch: int | None = None,
    checkpointing: str = "none",
    stream: StreamSettings | None = None,
    zero_stage: int = 0,
    precision: str | None = None,
    dtype: torch.dtype | None = None,
    sharded_accumulation: bool = False,
    sequence_parallel: bool = False,
    compile: bool | str | None = None,
    vp: int = 1,
    schedule: str = "1f1b",
    seed: int = 0,
    embedding_counts_as: int = 0,
    head_counts_as: int = 0,
) -> ParallelModel:
    """Put a decoder on a mesh; every rank calls, and where their weights differ, the first dp x cp rank's count.

    A model that fits no rank is built under `with torch.device("meta")`: each rank then makes the weights it keeps, a
    layer at a time, the same under every layout.

    Args:
        model: a transformers causal language model of the Llama family (decoder.limits.FAMILIES), or a PeftModel with
            LoRA of its layers' matrices around one, of which the adapters alone are trained and saved. Its modules are
            taken over and changed in place: from now on `model` itself refuses to run or be saved. Make the optimizer
            afterwards, from ParallelModel.parameters(): tp and zero_stage above 0 replace parameters.
        mesh: from `init_mesh`. tp cuts matrices (DTensor), cp the sequence (ring attention), pp the layers
            (torch.distributed.pipelining, 1F1B), dp the batch.
        micro_batch: sequences a forward pass; None means one with pp > 1, the whole local batch without.
        checkpointing: "none", "selective" (keep each layer's input and the outputs of its matrix products and of
            attention, recompute the rest), "full" (keep each layer's input, recompute the layer) or "stream" (the same
            in chunks of the sequence, head and loss too: see stream_backprop). "stream" needs tp=1.
        stream: the chunks' sizes; None is stream_backprop's defaults.
        zero_stage: what the dp x cp ranks, which hold the same weights, shard among them. 0: nothing (DDP). 1: the
            optimizer's states, and between steps the weights; in a step weights and gradients are whole. 2: gradients
            too, which are reduced at every micro-batch; needs pp=1. 3: weights too, each layer gathered when it runs.
            1 to 3 are FSDP2's.
        precision: "fp32"; "bf16-mixed", fp32 weights, gradients and optimizer states with products in bf16; "bf16", all
            of them in bf16; "fp64"; "fp8", bf16-mixed with the products of layers' matrices in fp8 by torchao (see
            decoder.float8), which needs a device that has them, and "fp8-emulated", the same roundings on any. None or
            "auto" takes fp32 on a CPU and bf16-mixed on CUDA, whatever dtype the model's config or weights have, but
            fp64 for a model made so by hand (`model.double()`).
        dtype: the older way to say it: torch.bfloat16 means bf16-mixed.
        sharded_accumulation: with zero_stage=3 and several micro-batches, reduce and shard each one's gradients. Else
            whole gradients are kept until the last: less traffic, and the model's size in memory. Needs pp=1.
        sequence_parallel: with tp, cut hidden states along the sequence between the layers' matrices. Sequences must
            be multiples of cp x tp, with cp > 1 of twice that.
        compile: run each layer through torch.compile: True for inductor, or the name of another backend of torch. None
            does so on CUDA with Triton, not on a CPU. Needs checkpointing "none" or "full".
        vp: runs of layers that a pipeline rank holds (interleaved 1F1B, which idles a vp-th of what 1F1B does and sends
            vp times as often). Needs pp of at least 2, and zero_stage 0 or 1.
        schedule: "1f1b", or "zero-bubble" with vp of at least 2: a rank that would idle at a step's end computes weight
            gradients, which it has put off until then. Needs checkpointing "none" and no compiler. A step whose
            micro-batches are no multiple of pp runs as without it.
        seed: of the weights of a model on the meta device; the weights of any other are kept.
        embedding_counts_as, head_counts_as: in layers, see layer_ranges.
    Returns:
        A ParallelModel that holds this rank's part.
    Raises:
        ValueError: what cannot be exact (decoder.limits): another model family, heads that tp does not divide, fewer
            layers than stages, streaming with tp > 1; a precision or a compiler that is none; stages of unlike tied
            embeddings; a model that was parallelized or compiled before; adapters with tp, or of another kind.
    Cost: weights that were not drawn here travel once, from the first dp x cp rank to the others; a tied embedding once
        from the first pipeline stage to the last.
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"the mesh has axes {mesh.mesh_dim_names}, not {AXES}: make it with init_mesh")
    if zero_stage not in range(4):
        raise ValueError(f"zero_stage={zero_stage!r}: choose 0 (DDP), 1, 2 or 3 (FSDP2)")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch}: at least one sequence")
    if isinstance(vp, bool) or not isinstance(vp, int) or vp < 1:
        raise ValueError(f"vp={vp!r}: a whole number of runs of layers a pipeline rank, at least 1")
    scheduled = as_number("schedule", schedule)
    if not drains(scheduled):
        raise ValueError(
            f"schedule={schedule!r}: parallelize drains at every step; choose '1f1b' or 'zero-bubble', or use "
            "pipeline_decoder for a pipeline that never drains"
        )
    layout = Choice(
        **{axis: mesh[axis].size() for axis in AXES},
        checkpointing=as_number("checkpointing", checkpointing),
        zero_stage=zero_stage,
        sharded_accumulation=sharded_accumulation,
        sequence_parallel=sequence_parallel,
        compile=bool(compile),
        fp8=precision in FP8,
        vp=vp,
        schedule=scheduled,
        embedding_counts_as=embedding_counts_as,
        head_counts_as=head_counts_as,
    )
    given = model
    refuse_taken_over(given)
    model, adapted = without_wrapper(given)
    check_decoder(model, layout, adapters=adapted)
    if stream is not None and checkpointing != "stream":
        raise ValueError(f"stream={stream} with checkpointing={checkpointing!r}: they go with checkpointing='stream'")
    stored = chosen_precision(precision, dtype, model, mesh.device_type)
    refuse_without_fp8(stored, mesh.device_type)
    backend = chosen_backend(compile, mesh.device_type, layout)
    # Without a mask torch's kernel sees the whole sequence; the ring's blocks know windows, also on one rank.
    windows = has_sliding_window(model) and checkpointing != "stream"  # whose chunks know windows themselves
    ring = mesh.get_group("cp") if layout.cp > 1 or windows else None
    if ring is not None:
        use_ring_attention(model, ring)
    else:
        cast(Any, model).set_attn_implementation("sdpa")

    # The layers of this rank.
    def stage_of(layers: Sequence[int]) -> DecoderStage:
        made = DecoderStage(
            model,
            layers,
            checkpointing=checkpointing,
            stream=stream,
            autocast_dtype=stored.products if zero_stage == 0 else None,
        )
        made.sequence_shards = layout.tp if sequence_parallel else 1
        made.streams_head = may_stream_head(layout.tp, layout.schedule)
        return made

    held = _layers_of_rank(model, mesh, layout)
    runs = [stage_of(run) for run in held]
    stage = runs[0] if vp == 1 else stage_of([layer for run in held for layer in run])
    # Their weights, and what becomes of the model around them.
    before = list(stage.parameters())
    replicas = replica_mesh(mesh)
    placement = _Placement(
        replicas=replicas,
        zero_stage=zero_stage,
        precision=stored,
        seed=seed,
        sequence_parallel=sequence_parallel,
        backend=backend,
    )
    _place(stage, runs, model, mesh, placement)
    if backend is None:
        use_fused(stage.layers.values(), layout)
    kept = {id(parameter) for parameter in stage.parameters()}
    mark_replaced(parameter for parameter in before if id(parameter) not in kept)
    take_over(model, *([given, cast(Any, given).base_model] if adapted else []))
    options = StepOptions(
        micro_batch=micro_batch,
        zero_stage=zero_stage,
        sharded_accumulation=sharded_accumulation,
        sequence_parallel=sequence_parallel,
        compiled=backend is not None,
        precision=stored,
        ring=ring,
        schedule=schedule,
    )
    return ParallelModel(stage, mesh, replicas, options, given, runs)


def _layers_of_rank(model: nn.Module, mesh: DeviceMesh, layout: Choice) -> list[range]:
    """The runs of layers of this rank's pipeline stages."""
    num_layers, rank = cast(Any, model).config.num_hidden_layers, mesh.get_local_rank("pp")
    if layout.vp > 1:
        return interleaved_ranges(num_layers, layout.pp, layout.vp)[rank]
    return [layer_ranges(num_layers, layout.pp, layout.embedding_counts_as, layout.head_counts_as)[rank]]


def _check_alike(stage: DecoderStage, seed: int, device: torch.device, group: dist.ProcessGroup) -> None:
    """Refuse replicas of different models, or of one that is to be drawn from different seeds; every rank calls.

    Cost: one all-reduce of 32 bytes.
    """
    parts = [(n, tuple(p.shape), str(p.dtype), p.requires_grad, p.is_meta) for n, p in stage.named_parameters()]
    digest = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])
    values = torch.tensor([seed, -seed, digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    most, least, high, low = values.tolist()
    if most != -least:
        raise ValueError(f"seed={seed} here, from {-least} to {most} over the replicas: give all ranks one seed")
    if high != -low:
        raise ValueError("the replicas' models differ in names, shapes, dtypes or what is trained: build the same one")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placement:
    """How a stage's weights lie on its ranks, and what runs them.

    Attributes:
        replicas: the ranks that hold the same weights, whole or sharded.
        backend: torch.compile's, for each layer; None for none.
    """

    replicas: DeviceMesh
    zero_stage: int
    precision: Precision
    seed: int
    sequence_parallel: bool
    backend: str | None


def _place(
    stage: DecoderStage, runs: Sequence[DecoderStage], model: nn.Module, mesh: DeviceMesh, how: _Placement
) -> None:
    """Give the stage its weights on this rank, cut over tp and sharded over the replicas, a layer at a time.

    What is left besides layers is sharded with the run that computes with it.
    """
    device, tp_mesh, replicas = device_of(mesh), mesh["tp"], how.replicas
    # Unless they were drawn alike. DDP would copy them all at once, through a second copy of the model.
    drawn_alike = all(parameter.is_meta for parameter in stage.parameters())
    copies_weights = replicas.size() > 1 and not drawn_alike
    if replicas.size() > 1:
        _check_alike(stage, how.seed, device, replicas.get_group())
    if mesh["pp"].size() > 1:
        check_ends_alike(model, mesh, dtype=how.precision.weights, device=device)
    products = how.precision.products
    policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32 if products is not None else None)

    def made(part: nn.Module, name: str) -> None:
        materialise(part, name, model, seed=how.seed, device=device, dtype=how.precision.weights)

    def sharded(part: nn.Module) -> None:
        if how.zero_stage == 3:
            fully_shard(part, mesh=replicas, mp_policy=policy)
        elif how.zero_stage > 0:  # gathered by the first forward of a step, and whole until its last backward
            fully_shard(part, mesh=replicas, mp_policy=policy, reshard_after_forward=False)

    for index, layer in stage.layers.items():
        made(layer, f"model.layers.{index}")
        if how.precision.fp8:
            use_fp8(layer, how.precision)
        if tp_mesh.size() > 1:
            cut_layer(layer, tp_mesh, sequence_parallel=how.sequence_parallel)
        if copies_weights:
            copy_weights(layer.parameters(), replicas.get_group())
        if how.backend is not None:
            compile_layer(layer, how.backend, rounds=how.precision.fp8)
        sharded(layer)
    tied = cast(Any, model).config.tie_word_embeddings
    for name, part in stage.ends():
        if tied and name == "lm_head":  # the embedding's weight was made before, under its own name
            stage.lm_head.weight = cast(Any, stage.model).embed_tokens.weight
        made(part, name)
    if tp_mesh.size() > 1:
        cut_ends(stage, tp_mesh, sequence_parallel=how.sequence_parallel)
    if copies_weights:
        of_ends = (weight for _, part in stage.ends() for weight in part.parameters())
        copy_weights(dict.fromkeys(of_ends), replicas.get_group())
    if tied and mesh["pp"].size() > 1:
        copy_to_last_stage(stage, mesh)
    for run in runs:
        sharded(run)
