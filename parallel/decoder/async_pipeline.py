"""A Hugging Face decoder as stages of pipelined backpropagation, on the mesh that the synchronous layouts use.

parallelize.py puts a decoder on all four axes and drains its pipeline at every step; here the axes are dp and pp only,
a stage is one rank with all of its weights, and the pipeline never drains. Cut, weights and loss are the same: layers
by grid.layer_ranges, weights drawn by name, the mean over the targets of what an update sees.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel.decoder.limits import LOCKSTEP, SCHEDULES, Choice, as_number
from fourfold.parallel.decoder.stage import DecoderStage, check_decoder, check_windows, has_sliding_window
from fourfold.parallel.decoder.weights import materialise
from fourfold.parallel.grid import AXES, layer_ranges
from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.optimizer import OptimizerFactory
from fourfold.parallel.pipeline.runtime import PipelinedBackprop
from fourfold.parallel.pipeline.schedule import PipelineSchedule
from fourfold.parallel.pipeline.settings import SchedulerFactory
from fourfold.parallel.ring.transformers import use_ring_attention
from fourfold.parallel.sequence.tensors import IGNORED_LABEL


def decoder_stages(
    model: nn.Module,
    num_stages: int,
    *,
    seq_len: int,
    only: int | None = None,
    checkpointing: str = "none",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    seed: int = 0,
    embedding_counts_as: int = 0,
    head_counts_as: int = 0,
) -> list[nn.Module | None]:
    """Cut a decoder into `num_stages` stages from token ids [B, seq_len] to logits [B, seq_len, vocab].

    Args:
        model: a causal language model of the families in decoder.stage; its modules are shared. On the meta device
            each stage draws its own weights, as parallelize does.
        only: make this stage alone, the others are None.
        checkpointing: "none", or "full" to keep each layer's input and recompute the layer.
        dtype: what matrix products run in (torch.bfloat16, by autocast); None for the weights' own.
        seed: of the weights of a model on the meta device.
        embedding_counts_as, head_counts_as: in layers, see layer_ranges.
    Raises:
        ValueError: another family, fewer layers than stages, embeddings tied to the head across stages, a sliding
            window without ring attention (pipeline_decoder sets it).
    """
    chosen = as_number("checkpointing", checkpointing)
    check_decoder(model, Choice(pp=num_stages, checkpointing=chosen))
    whole = cast(Any, model)
    device = device or torch.device("cpu")
    windows = has_sliding_window(model)
    check_windows(model)
    if not windows:
        whole.set_attn_implementation("sdpa")
    stages: list[nn.Module | None] = []
    for index, layers in enumerate(
        layer_ranges(whole.config.num_hidden_layers, num_stages, embedding_counts_as, head_counts_as)
    ):
        if only not in (None, index):
            stages.append(None)
            continue
        stage = DecoderStage(model, layers, checkpointing=checkpointing, autocast_dtype=dtype)
        for name, part in stage.named_parts():
            materialise(part, name, model, seed=seed, device=device)
        stage.position_ids = torch.arange(seq_len, device=device)[None]
        if windows:
            stage.attention_arguments["ring_seq_len"] = seq_len
        stages.append(stage)
    return stages


def pipeline_decoder(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    seq_len: int,
    optimizer: OptimizerFactory,
    schedule: str | PipelineSchedule = "lockstep",
    mitigation: str | Mitigation = "lwpv+sc",
    scheduler: SchedulerFactory | None = None,
    checkpointing: str = "none",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    embedding_counts_as: int = 0,
    head_counts_as: int = 0,
) -> PipelinedBackprop:
    """Put a decoder on a (dp, pp) mesh as an asynchronous pipeline; every rank calls.

    Its `run` takes (token ids [B, seq_len] int64, shifted targets [B, seq_len], -100 where there is none), this
    replica's micro-batches.

    Args:
        mesh: from init_mesh, with cp and tp of 1. Replicas average gradients at every update.
        optimizer, schedule, mitigation, scheduler: as for PipelinedBackprop.
        seq_len, checkpointing, dtype, seed, embedding_counts_as, head_counts_as: as for decoder_stages.
    Raises:
        ValueError: a mesh that cuts the sequence or the matrices, or has one stage only; spectrain or pipemare-dc
            with a dtype; as decoder_stages.
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"the mesh has axes {mesh.mesh_dim_names}, not {AXES}: make it with init_mesh")
    sizes = {axis: mesh[axis].size() for axis in AXES}
    name = schedule if isinstance(schedule, str) else schedule.name
    late = as_number("schedule", name) if name in SCHEDULES[1:] else LOCKSTEP
    check_decoder(model, Choice(**sizes, checkpointing=as_number("checkpointing", checkpointing), schedule=late))
    chosen = Mitigation.named(mitigation) if isinstance(mitigation, str) else mitigation
    if dtype is not None and (chosen.spectrain or chosen.correction > 0):
        raise ValueError(
            f"mitigation={mitigation!r} computes backwards with weights of their own, but under autocast ({dtype}) the "
            "graph keeps the forward's as casts: choose stash or lwpv+sc, or dtype=None"
        )
    cuda = mesh.device_type == "cuda"
    if has_sliding_window(model):
        use_ring_attention(model, mesh.get_group("cp"))
    stages = decoder_stages(
        model,
        sizes["pp"],
        seq_len=seq_len,
        only=mesh.get_local_rank("pp"),
        checkpointing=checkpointing,
        dtype=dtype,
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(mesh.device_type),
        seed=seed,
        embedding_counts_as=embedding_counts_as,
        head_counts_as=head_counts_as,
    )
    return PipelinedBackprop(
        stages,
        group=mesh.get_group("pp"),
        optimizer=optimizer,
        loss_fn=next_token_loss,
        schedule=schedule,
        mitigation=mitigation,
        scheduler=scheduler,
        dp_group=mesh.get_group("dp") if sizes["dp"] > 1 else None,
    )


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 (fp64 for fp64 logits); logits [B, S, vocab], targets [B, S] int64, -100 ignored."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL)
