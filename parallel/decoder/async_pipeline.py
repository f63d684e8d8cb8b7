"""A Hugging Face decoder as stages of pipelined backpropagation, on the mesh that the synchronous layouts use.

parallelize.py puts a decoder on all four axes and drains its pipeline at every step; here the axes are dp, pp and
either tp or cp, and the pipeline never drains. Cut, weights and loss are the same: layers by grid.layer_ranges,
matrices by tensor_parallel.py, weights drawn by name, the mean over the targets of what an update sees. With tp a stage
is a group of ranks, each with its part of the matrices and in a pipeline of its own. With cp it is one of ranks that
share every sequence around a ring, each with all weights and in a pipeline of its own; for gradients they are replicas
with other tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Required, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel.communication import place_in
from fourfold.parallel.decoder.async_shards import LossOfShare
from fourfold.parallel.decoder.async_stage import AsyncDecoderStage
from fourfold.parallel.decoder.compiled import chosen_backend, compile_layer
from fourfold.parallel.decoder.limits import FP8, LOCKSTEP, SCHEDULES, Choice, as_number
from fourfold.parallel.decoder.precision import chosen_precision
from fourfold.parallel.decoder.stage import check_decoder, check_windows, has_sliding_window
from fourfold.parallel.decoder.taken_over import mark_replaced, refuse_taken_over, take_over
from fourfold.parallel.decoder.tensor_parallel import cross_entropy_sum, cut_cross_entropy, cut_ends, cut_layer
from fourfold.parallel.decoder.weights import materialise
from fourfold.parallel.grid import AXES, layer_ranges
from fourfold.parallel.mesh import replica_mesh
from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.optimizer import OptimizerFactory
from fourfold.parallel.pipeline.runtime import PipelinedBackprop
from fourfold.parallel.pipeline.schedule import PipelineSchedule
from fourfold.parallel.pipeline.settings import ClipNorm, SchedulerFactory
from fourfold.parallel.ring.transformers import stop_ring_attention, use_ring_attention
from fourfold.parallel.sequence.tensors import IGNORED_LABEL, on_device
from fourfold.parallel.stream.settings import StreamSettings


class CutOptions(TypedDict, total=False):
    """How a decoder is cut, for decoder_stages and pipeline_decoder.

    checkpointing: "none", "full" to keep each layer's input and recompute the layer, or "stream" to recompute in chunks
        of the sequence (StreamBP); either computes anew with the weights of the backward.
    stream: the chunks' sizes, with "stream"; None is stream_backprop's defaults.
    compile: run each layer through torch.compile, as for parallelize.
    precision, dtype: as for parallelize; "bf16-mixed" by autocast.
    seed: of the weights of a model on the meta device.
    embedding_counts_as, head_counts_as: in layers, see layer_ranges.
    """

    checkpointing: str
    stream: StreamSettings | None
    compile: bool | str | None
    precision: str | None
    dtype: torch.dtype | None
    seed: int
    embedding_counts_as: int
    head_counts_as: int


class DecoderPipelineOptions(CutOptions, total=False):
    """CutOptions, and those of PipelineSettings that a decoder does not set itself.

    sequence_parallel: with tp, as for parallelize.
    """

    sequence_parallel: bool
    optimizer: Required[OptimizerFactory]
    schedule: str | PipelineSchedule
    mitigation: str | Mitigation
    scheduler: SchedulerFactory | None
    master_dtype: torch.dtype | None
    clip: ClipNorm | float | None
    skip_nonfinite: bool
    on_gradients: Callable[[dict[str, Tensor]], None] | None
    observe: bool
    shard_optimizer: bool


def decoder_stages(
    model: nn.Module,
    num_stages: int,
    *,
    seq_len: int,
    only: int | None = None,
    device: torch.device | None = None,
    **cut: Unpack[CutOptions],
) -> list[nn.Module | None]:
    """Cut a decoder into `num_stages` stages from token ids [B, S] to logits [B, S, vocab].

    Padded and packed rows: AsyncDecoderStage.forward. A model that attends around a ring of several ranks
    (use_ring_attention) does so in its stages, each of which is then given whole rows and computes this rank's share.

    Args:
        model: a causal language model of the families in decoder.stage; its modules are shared. On the meta device
            each stage draws its own weights, as parallelize does.
        seq_len: of the usual micro-batch; others may have another S.
        only: make this stage alone, the others are None.
        cut: checkpointing, stream, compile, precision, dtype, seed, embedding_counts_as, head_counts_as; see
            CutOptions.
    Raises:
        ValueError: another family, fewer layers than stages, embeddings tied to the head across stages, a sliding
            window without ring attention (pipeline_decoder sets it).
    """
    return _stages(model, num_stages, seq_len, _Made(only=only, device=device), cut)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """Which stages are made, and where.

    Attributes:
        tp_mesh: that matrices are cut over; None for whole ones.
    """

    only: int | None
    device: torch.device | None
    tp_mesh: DeviceMesh | None = None
    sequence_parallel: bool = False


def _stages(model: nn.Module, num_stages: int, seq_len: int, made: _Made, cut: CutOptions) -> list[nn.Module | None]:
    checkpointing = cut.get("checkpointing", "none")
    ends = cut.get("embedding_counts_as", 0), cut.get("head_counts_as", 0)
    chosen = as_number("checkpointing", checkpointing)
    compiled, stream = cut.get("compile"), cut.get("stream")
    # Which schedule they will run under is not known yet, but that it never drains; 2bw refuses least.
    late = as_number("schedule", "2bw" if num_stages > 1 else "1f1b")
    fp8 = cut.get("precision") in FP8
    layout = Choice(pp=num_stages, checkpointing=chosen, schedule=late, compile=bool(compiled), fp8=fp8)
    check_decoder(model, layout)
    if fp8:  # one stage has no schedule that the table could refuse
        raise ValueError(f"precision={cut['precision']!r}: stages made by hand have no fp8; choose 'bf16-mixed'")
    if stream is not None and checkpointing != "stream":
        raise ValueError(f"stream={stream} with checkpointing={checkpointing!r}: they go with checkpointing='stream'")
    whole = cast(Any, model)
    device = made.device or torch.device("cpu")
    stored = chosen_precision(cut.get("precision"), cut.get("dtype"), model, device.type)
    backend = chosen_backend(compiled, device.type, layout)
    windows = has_sliding_window(model) and checkpointing != "stream"  # whose chunks know windows themselves
    ring = getattr(whole.model.layers[0].self_attn, "ring_settings", None)
    if windows:
        check_windows(model)
    elif ring is None or place_in(ring.group).size == 1:
        whole.set_attn_implementation("sdpa")
    stages: list[nn.Module | None] = []
    for index, layers in enumerate(layer_ranges(whole.config.num_hidden_layers, num_stages, *ends)):
        if made.only not in (None, index):
            stages.append(None)
            continue
        stage = AsyncDecoderStage(
            model, layers, checkpointing=checkpointing, stream=stream, autocast_dtype=stored.products
        )
        for name, part in stage.named_parts():
            materialise(part, name, model, seed=cut.get("seed", 0), device=device, dtype=stored.weights)
        if made.tp_mesh is not None:
            for layer in stage.layers.values():
                cut_layer(layer, made.tp_mesh, sequence_parallel=made.sequence_parallel)
            cut_ends(stage, made.tp_mesh, sequence_parallel=made.sequence_parallel)
            stage.sequence_shards = made.tp_mesh.size() if made.sequence_parallel else 1
        stage.position_ids = torch.arange(seq_len, device=device)[None]
        stage.windowed = windows
        for layer in stage.layers.values() if backend is not None else ():
            compile_layer(layer, cast(str, backend))
        stages.append(stage)
    return stages


def pipeline_decoder(
    model: nn.Module, mesh: DeviceMesh, *, seq_len: int, **options: Unpack[DecoderPipelineOptions]
) -> PipelinedBackprop:
    """Put a decoder on a (dp, pp, tp) or (dp, pp, cp) mesh as an asynchronous pipeline; every rank calls.

    Its `run` takes (token ids [B, S] int64, shifted targets [B, S], -100 where there is none), this replica's
    micro-batches; or (a dict for padded or packed rows, targets), see AsyncDecoderStage.forward. With cp they are whole
    rows on each of its ranks, as for parallelize. An update takes the mean over the targets of all micro-batches and
    replicas that it sees, however they are spread; the loss of a micro-batch is the mean over all of its targets. Leave
    micro-batches on the host: what must be known of them there (how many targets they have, whether tp or cp ranks were
    given the same) then waits for no device.

    Args:
        mesh: from init_mesh, with cp or tp of 1. The ranks of dp and cp average gradients at every update. With tp, all
            ranks of a stage take the same micro-batches and the first one's weights, and the model's parameters are
            replaced.
        seq_len: as for decoder_stages.
        options: optimizer, schedule, mitigation, scheduler, master_dtype, clip, skip_nonfinite, on_gradients, observe
            and shard_optimizer (`zero_stage=1` of a layout) as PipelineSettings has them;
            sequence_parallel; what CutOptions has.
    Raises:
        ValueError: a mesh that cuts both the sequence and the matrices, or has one stage only; spectrain or pipemare-dc
            in bf16-mixed; with tp an optimizer whose step needs whole matrices, basis rotation, or StreamBP; as
            decoder_stages. `run`: on all tp or cp ranks of a stage, where they are given different micro-batches.
    Cost: with tp, tensor_parallel's collectives at every micro-batch, and those of parts.py; with tp or cp those of
        joint_ranks.py.
    """
    sequence_parallel = options.pop("sequence_parallel", False)
    refuse_taken_over(model)
    cut = {key: options.pop(key) for key in CutOptions.__annotations__ if key in options}  # type: ignore[misc]
    schedule = options.get("schedule", "lockstep")
    mitigation = options.get("mitigation", "lwpv+sc")
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"the mesh has axes {mesh.mesh_dim_names}, not {AXES}: make it with init_mesh")
    sizes = {axis: mesh[axis].size() for axis in AXES}
    name = (schedule if isinstance(schedule, str) else schedule.name).partition(":")[0]
    late = as_number("schedule", name) if name in SCHEDULES[1:] else LOCKSTEP
    checkpointing = as_number("checkpointing", cut.get("checkpointing", "none"))
    layout = Choice(
        **sizes,
        checkpointing=checkpointing,
        schedule=late,
        compile=bool(cut.get("compile")),
        fp8=cut.get("precision") in FP8,
        sequence_parallel=sequence_parallel,
        zero_stage=int(options.get("shard_optimizer", False)),
        seq_len=seq_len if sequence_parallel else None,  # a ring's shares may be uneven
    )
    check_decoder(model, layout)
    chosen = Mitigation.named(mitigation) if isinstance(mitigation, str) else mitigation
    stored = chosen_precision(cut.get("precision"), cut.get("dtype"), model, mesh.device_type)
    if stored.products is not None and (chosen.spectrain or chosen.correction > 0):
        raise ValueError(
            f"mitigation={mitigation!r} computes backwards with weights of their own, but in {stored.name} the graph "
            "keeps the forward's as casts: choose stash or lwpv+sc, or precision='fp32'"
        )
    cuda = mesh.device_type == "cuda"
    if sizes["cp"] > 1 or (has_sliding_window(model) and cut.get("checkpointing") != "stream"):
        use_ring_attention(model, mesh.get_group("cp"))
    else:
        stop_ring_attention(model)
    tp_mesh = mesh["tp"] if sizes["tp"] > 1 else None
    made = _Made(
        only=mesh.get_local_rank("pp"),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device(mesh.device_type),
        tp_mesh=tp_mesh,
        sequence_parallel=sequence_parallel,
    )
    before = list(model.parameters())
    stages = _stages(model, sizes["pp"], seq_len, made, cast(CutOptions, cut))
    own = stages[mesh.get_local_rank("pp")]
    assert isinstance(own, AsyncDecoderStage)
    if tp_mesh is not None:  # each step of the cut makes parameters anew
        kept = {id(parameter) for parameter in model.parameters()}
        mark_replaced(parameter for parameter in before if id(parameter) not in kept)
        take_over(model)
    own.gives_hidden = own.checkpointing == "stream"
    loss = own.streamed_loss if own.gives_hidden else partial(next_token_loss, tp_mesh=tp_mesh)
    replicas = replica_mesh(mesh)
    return PipelinedBackprop(
        stages,
        group=mesh.get_group("pp"),
        dp_group=replicas.get_group() if replicas.size() > 1 else None,
        loss_fn=LossOfShare(own, loss) if sizes["cp"] > 1 else loss,
        loss_weight=num_targets,
        **options,  # type: ignore[misc]
    )


def next_token_loss(logits: Tensor, targets: Tensor, tp_mesh: DeviceMesh | None = None) -> Tensor:
    """Mean cross-entropy in fp32 (fp64 for fp64 logits); logits [B, S, vocab], targets [B, S] int64, -100 ignored.

    With `tp_mesh` logits are this rank's part of the vocabulary, [B, S, vocab / tp], and every rank of it must call. A
    micro-batch without any target has a loss of 0, and a gradient of zeros. Targets may be on the host.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    there = on_device(targets, logits.device)
    total = cross_entropy_sum(logits, there) if tp_mesh is None else cut_cross_entropy(logits, there, tp_mesh)
    return total / num_targets(there).clamp(min=1)


def num_targets(targets: Tensor) -> Tensor:
    """How much a micro-batch counts in the mean over targets: [B, S] int64 -> how many are not -100."""
    return (targets != IGNORED_LABEL).sum()
