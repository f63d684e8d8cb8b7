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
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from fourfold.parallel.decoder.draining_pipeline import Pipeline
from fourfold.parallel.decoder.limits import Choice, as_number
from fourfold.parallel.decoder.stage import DecoderStage, check_decoder, has_sliding_window
from fourfold.parallel.decoder.tensor_parallel import cut_ends, cut_layer
from fourfold.parallel.decoder.weights import materialise
from fourfold.parallel.gradients import average_gradients, clip_gradients, copy_weights, resolve_partial_gradients
from fourfold.parallel.grid import AXES, layer_ranges
from fourfold.parallel.ring.transformers import use_ring_attention
from fourfold.parallel.sequence.tensors import IGNORED_LABEL, shard_labels, shard_positions, shard_sequence
from fourfold.parallel.stream.settings import StreamSettings

# The only buffers are rotary frequencies, the same everywhere. torch 2.13 renamed the argument.
_DDP_ARGUMENTS = signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    micro_batch: int | None = None,
    checkpointing: str = "none",
    stream: StreamSettings | None = None,
    zero_stage: int = 0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    embedding_counts_as: int = 0,
    head_counts_as: int = 0,
) -> "ParallelModel":
    """Put a decoder on a mesh; every rank calls, and where their weights differ, the first dp x cp rank's count.

    A model that fits no rank is built under `with torch.device("meta")`: each rank then makes the weights it keeps, a
    layer at a time, the same under every layout.

    Args:
        model: a transformers causal language model of the Llama family (decoder.limits.FAMILIES). Its
            modules are taken over and changed in place: do not use `model` afterwards.
        mesh: from `init_mesh`. tp cuts matrices (DTensor), cp the sequence (ring attention), pp the layers
            (torch.distributed.pipelining, 1F1B), dp the batch.
        micro_batch: sequences a forward pass; None means one with pp > 1, the whole local batch without.
        checkpointing: "none", "full" (keep each layer's input, recompute the layer) or "stream" (the same in chunks of
            the sequence, head and loss too: see stream_backprop). "stream" needs tp=1.
        stream: the chunks' sizes; None is stream_backprop's defaults.
        zero_stage: 0 keeps weights on every dp x cp rank (DDP), 3 shards them there (FSDP2).
        dtype: what matrix products run in (torch.bfloat16, say); weights and gradient sums stay as they are.
        seed: of the weights of a model on the meta device; the weights of any other are kept.
        embedding_counts_as, head_counts_as: in layers, see layer_ranges.
    Returns:
        A ParallelModel that holds this rank's part.
    Raises:
        ValueError: what cannot be exact: another model family, heads that tp does not divide, fewer layers than
            stages, tied embeddings with pp > 1, streaming with tp > 1.
    Cost: weights that were not drawn here travel once, from the first dp x cp rank to the others.
    """
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"the mesh has axes {mesh.mesh_dim_names}, not {AXES}: make it with init_mesh")
    if zero_stage not in range(4):
        raise ValueError(f"zero_stage={zero_stage!r}: choose 0 (DDP) or 3 (FSDP2)")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not supported (float16 needs loss scaling): use torch.bfloat16 or None")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch}: at least one sequence")
    layout = Choice(
        **{axis: mesh[axis].size() for axis in AXES},
        checkpointing=as_number("checkpointing", checkpointing),
        zero_stage=zero_stage,
        embedding_counts_as=embedding_counts_as,
        head_counts_as=head_counts_as,
    )
    check_decoder(model, layout)
    if stream is not None and checkpointing != "stream":
        raise ValueError(f"stream={stream} with checkpointing={checkpointing!r}: they go with checkpointing='stream'")
    config = cast(Any, model).config
    pp, cp = layout.pp, layout.cp
    layers = layer_ranges(config.num_hidden_layers, pp, embedding_counts_as, head_counts_as)[mesh.get_local_rank("pp")]
    # Without a mask torch's kernel sees the whole sequence; the ring's blocks know windows, also on one rank.
    windows = has_sliding_window(model) and checkpointing != "stream"  # whose chunks know windows themselves
    ring = mesh.get_group("cp") if cp > 1 or windows else None
    if ring is not None:
        use_ring_attention(model, ring)
    else:
        cast(Any, model).set_attn_implementation("sdpa")
    stage = DecoderStage(
        model, layers, checkpointing=checkpointing, stream=stream, autocast_dtype=dtype if zero_stage == 0 else None
    )
    replicas = _replica_mesh(mesh)
    _place(stage, model, mesh, replicas, zero_stage=zero_stage, dtype=dtype, seed=seed)
    return ParallelModel(stage, mesh, replicas, micro_batch=micro_batch, zero_stage=zero_stage, dtype=dtype, ring=ring)


class ParallelModel:
    """This rank's part of a decoder under a layout; made by `parallelize`.

    Not an nn.Module, because with pipeline stages a forward pass alone has no meaning on most ranks: a step goes
    forward and backward in one call. `parameters`, `state_dict` and `load_state_dict` are the local part's, under the
    names of the whole model, as torch.distributed.checkpoint wants them.
    """

    def __init__(
        self,
        stage: DecoderStage,
        mesh: DeviceMesh,
        replicas: DeviceMesh,
        *,
        micro_batch: int | None,
        zero_stage: int,
        dtype: torch.dtype | None,
        ring: dist.ProcessGroup | None,
    ) -> None:
        self.stage, self.mesh, self.device = stage, mesh, _device(mesh)
        self._ring = ring
        self._micro_batch = micro_batch
        self._tp = mesh["tp"].size()
        # DDP and FSDP2 average gradients over the replicas, so the loss is made that many times too large.
        self._num_replicas = replicas.size()
        self._replica_group = replicas.get_group() if replicas.size() > 1 else None
        self._module: nn.Module = stage
        self._averages_own_gradients = False
        if self._replica_group is not None and zero_stage == 0:
            if self._tp == 1:
                self._module = DistributedDataParallel(
                    stage, process_group=self._replica_group, gradient_as_bucket_view=True, init_sync=False,
                    **_NO_BUFFER_SYNC,
                )  # fmt: skip
            else:
                self._averages_own_gradients = True
        self._pipeline = None
        if mesh["pp"].size() > 1:
            weight_dtype = next(stage.parameters()).dtype
            # FSDP2 casts the residual stream with the weights; autocast leaves it in the embedding's dtype.
            hidden_dtype = (dtype or weight_dtype) if zero_stage == 3 else weight_dtype
            self._pipeline = Pipeline(
                self._module, stage, mesh, self._loss, hidden_dtype=hidden_dtype, logits_dtype=dtype or weight_dtype
            )
        self._loss_dtype = torch.promote_types(torch.float32, next(stage.parameters()).dtype)
        self._loss_scale = torch.ones((), device=self.device)

    def forward_backward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run one step's forward and backward passes and add to the parameters' gradients.

        Args:
            input_ids: [B, S] int64, this dp rank's sequences, whole, on any device; the same on all ranks of its
                pp, cp and tp axes, and of the same shape on all ranks.
            labels: [B, S] int64, -100 where there is no target; position t holds the token that t-1 predicts
                (transformers' convention: the shift is made here). None takes `input_ids`.
        Returns:
            The mean loss over all targets of the global batch, a detached float32 scalar, the same on every rank.
            Without any target: zero, and zero gradients.
        Raises:
            ValueError: shapes that differ, or a batch that micro_batch does not divide.
        Cost: one forward and backward pass; the layout's collectives, and three of 8 bytes for count and loss.
        """
        inputs, targets, num_targets = self._prepare(input_ids, labels)
        self._loss_scale = self._num_replicas / num_targets
        with self._loss_context():
            if self._pipeline is not None:
                losses = self._pipeline.step(inputs, targets, self._micro_batch or 1)
            else:
                losses = list(self._accumulate(inputs, targets))
        parameters = list(self.stage.parameters())
        resolve_partial_gradients(parameters)
        if self._averages_own_gradients:
            assert self._replica_group is not None
            average_gradients(parameters, self._replica_group)
        return self._mean_loss(losses, num_targets)

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same mean loss as `forward_backward`, without gradients. Arguments, errors and cost likewise."""
        inputs, targets, num_targets = self._prepare(input_ids, labels)
        self._loss_scale = self._num_replicas / num_targets
        with self._loss_context():
            if self._pipeline is not None:
                losses = self._pipeline.evaluate(inputs, targets, self._micro_batch or 1)
            else:
                pairs = zip(self._cut(inputs), self._cut(targets), strict=True)
                losses = [self._loss(self._run(part, target), target) for part, target in pairs]
        return self._mean_loss(losses, num_targets)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip by the 2-norm over all parameters of the whole model; returns the norm before, a float64 scalar."""
        return clip_gradients(self.parameters(), self.mesh, max_norm=max_norm)

    def batch_rows(self, global_batch: int) -> slice:
        """Which rows of a global batch of `global_batch` sequences this rank's `forward_backward` takes.

        Raises ValueError where dp does not divide the batch.
        """
        dp = self.mesh["dp"].size()
        if global_batch % dp:
            raise ValueError(f"global_batch={global_batch} does not divide by dp={dp}: choose a multiple of {dp}")
        rows = global_batch // dp
        start = self.mesh.get_local_rank("dp") * rows
        return slice(start, start + rows)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.stage.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.stage.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        return self.stage.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stage.load_state_dict(state_dict)

    def train(self, mode: bool = True) -> "ParallelModel":
        self._module.train(mode)
        return self

    def eval(self) -> "ParallelModel":
        return self.train(False)

    def _prepare(self, input_ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's shard of inputs and shifted targets, both [B, S_local], and the global number of targets."""
        labels = input_ids if labels is None else labels
        if input_ids.dim() != 2 or labels.shape != input_ids.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and labels {tuple(labels.shape)}: both are [batch, sequence]"
            )
        batch, seq_len = input_ids.shape
        if not batch or not seq_len:
            raise ValueError(f"input_ids {tuple(input_ids.shape)} holds no token: give each dp rank its sequences")
        if batch % (self._micro_batch or 1):
            raise ValueError(
                f"a local batch of {batch} sequences does not divide by micro_batch={self._micro_batch}: "
                "choose a divisor"
            )
        input_ids, labels = input_ids.to(self.device), labels.to(self.device)
        if self._ring is not None:
            self.stage.attention_arguments["ring_seq_len"] = seq_len
        place = (0, 1) if self._ring is None else self._ring  # without a ring this rank has the whole sequence
        inputs = shard_sequence(input_ids, place, dim=1)
        targets = shard_labels(labels, place)
        positions = shard_positions(seq_len, place, device=self.device)
        self.stage.position_ids = positions[None]
        num_targets = (targets != IGNORED_LABEL).sum()
        self._sum_over_replicas(num_targets)
        return inputs, targets, num_targets.clamp(min=1)

    def _accumulate(self, inputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Micro-batches one after the other; gradients travel with the last."""
        pairs = list(zip(self._cut(inputs), self._cut(targets), strict=True))
        for index, (part, target) in enumerate(pairs):
            with self._gradient_sync(index == len(pairs) - 1):
                loss = self._loss(self._run(part, target), target)
                loss.backward()  # type: ignore[no-untyped-call]
            yield loss.detach()

    def _cut(self, batch: Tensor) -> tuple[Tensor, ...]:
        return torch.split(batch, self._micro_batch or max(1, len(batch)))

    def _gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(enabled)
        elif isinstance(self._module, DistributedDataParallel) and not enabled:
            return cast(AbstractContextManager[None], self._module.no_sync())
        return nullcontext()

    def _loss_context(self) -> AbstractContextManager[None]:
        return loss_parallel() if self._tp > 1 else nullcontext()

    def _run(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Logits, or where the stage streams the sum of the targets' cross-entropies."""
        given = (inputs, targets) if self.stage.checkpointing == "stream" else (inputs,)
        return cast(Tensor, self._module(*given))

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss that is differentiated: a sum over [B, S_local] targets, times the step's scale."""
        if self.stage.checkpointing == "stream":  # what came is the sum already
            return logits * self._loss_scale
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self._tp > 1:
            logits = DTensor.from_local(logits, self.mesh["tp"], [Shard(2)], run_check=False)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        if isinstance(total, DTensor):
            total = total.to_local()
        return total * self._loss_scale

    def _mean_loss(self, losses: list[Tensor], num_targets: Tensor) -> Tensor:
        """The global mean from this rank's scaled sums: none of them on stages before the last."""
        total = torch.zeros((), dtype=self._loss_dtype, device=self.device)
        for loss in losses:
            total += loss.detach()
        total = total / self._num_replicas
        self._sum_over_replicas(total)
        if self.mesh["pp"].size() > 1:
            dist.all_reduce(total, group=self.mesh.get_group("pp"))
        return total

    def _sum_over_replicas(self, value: Tensor) -> None:
        if self._replica_group is not None:
            dist.all_reduce(value, group=self._replica_group)


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def _replica_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that hold the same weights and different tokens: dp and cp in one axis."""
    if mesh["cp"].size() == 1:
        return mesh["dp"]
    if mesh["dp"].size() == 1:
        return mesh["cp"]
    return mesh["dp", "cp"]._flatten("dp_cp")


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


def _place(
    stage: DecoderStage,
    model: nn.Module,
    mesh: DeviceMesh,
    replicas: DeviceMesh,
    *,
    zero_stage: int,
    dtype: torch.dtype | None,
    seed: int,
) -> None:
    """Give the stage its weights on this rank, cut over tp and sharded over the replicas, a layer at a time."""
    device, tp_mesh = _device(mesh), mesh["tp"]
    # Unless they were drawn alike. DDP would copy them all at once, through a second copy of the model.
    drawn_alike = all(parameter.is_meta for parameter in stage.parameters())
    copies_weights = replicas.size() > 1 and not drawn_alike
    if replicas.size() > 1:
        _check_alike(stage, seed, device, replicas.get_group())
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype is not None else None)
    for index, layer in stage.layers.items():
        materialise(layer, f"model.layers.{index}", model, seed=seed, device=device)
        if tp_mesh.size() > 1:
            cut_layer(layer, tp_mesh)
        if copies_weights:
            copy_weights(layer.parameters(), replicas.get_group())
        if zero_stage == 3:
            fully_shard(layer, mesh=replicas, mp_policy=policy)
    for name, part in stage.ends():
        materialise(part, name, model, seed=seed, device=device)
    if tp_mesh.size() > 1:
        cut_ends(stage, tp_mesh)
    if copies_weights:
        copy_weights((weight for _, part in stage.ends() for weight in part.parameters()), replicas.get_group())
    if cast(Any, model).config.tie_word_embeddings:  # each step above makes parameters anew
        stage.lm_head.weight = cast(Any, stage.model).embed_tokens.weight
    if zero_stage == 3:
        fully_shard(stage, mesh=replicas, mp_policy=policy)
