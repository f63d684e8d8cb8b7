"""One rank's part of a decoder, and a step over all of them: forward, backward, gradients that every axis has summed.

torch gives each axis a wrapper (DDP, FSDP2, DTensor, pipelining), each with its own idea of when gradients are added
and when parameters are whole. This class calls them in the one order in which the sum is that of one process, and
leaves them between its calls as it found them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from fourfold.parallel.decoder.adapters import has_adapters, write_adapters
from fourfold.parallel.decoder.batch import BatchAgreement, LocalRows, trouble_with
from fourfold.parallel.decoder.documents import document_shards, trouble_with_ring, without_first_tokens
from fourfold.parallel.decoder.draining_pipeline import Pipeline
from fourfold.parallel.decoder.float8 import trouble_with_tokens
from fourfold.parallel.decoder.precision import Precision
from fourfold.parallel.decoder.pretrained_folder import write_pretrained
from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.decoder.tensor_parallel import cross_entropy_sum
from fourfold.parallel.decoder.tied_ends import TiedEnd
from fourfold.parallel.gradients import average_gradients, clip_gradients, resolve_partial_gradients
from fourfold.parallel.ring.options import AgreedLength
from fourfold.parallel.sequence.tensors import shard_labels, shard_positions, shard_sequence, take

# The only buffers are rotary frequencies, the same everywhere. torch 2.13 renamed the argument.
_DDP_ARGUMENTS = signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}

_SHARDING = "zigzag"
"""use_ring_attention's, as parallelize calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOptions:
    """How a ParallelModel runs its steps; the fields are parallelize's arguments.

    Attributes:
        ring: the cp group, where sequences are cut or windows need the ring's blocks; else None.
        schedule: of the pipeline, "1f1b" or "zero-bubble".
    """

    micro_batch: int | None
    zero_stage: int
    sharded_accumulation: bool
    sequence_parallel: bool
    compiled: bool
    precision: Precision
    ring: dist.ProcessGroup | None
    schedule: str = "1f1b"


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
        options: StepOptions,
        whole: nn.Module,
        runs: Sequence[DecoderStage] = (),
    ) -> None:
        """Made by `parallelize` only.

        Args:
            stage: this rank's layers, placed.
            replicas: the ranks that hold the same weights, dp and cp together.
            whole: the model that `stage` was cut from, or peft's wrapper of it, for its configuration.
            runs: of a rank that interleaves, its layers in unbroken runs, each a stage of the pipeline.
        """
        self.stage, self.mesh, self.device = stage, mesh, device_of(mesh)
        self.precision = options.precision.name
        """A word of decoder.limits.PRECISIONS."""
        self.compiled = options.compiled
        """Whether the layers run through torch.compile."""
        self._options, self._ring, self._micro_batch = options, options.ring, options.micro_batch
        self._whole = whole
        self._tp = mesh["tp"].size()
        # DDP and FSDP2 average gradients over the replicas, so the loss is made that many times too large.
        self._num_replicas = replicas.size()
        self._replica_group = replicas.get_group() if replicas.size() > 1 else None
        self._runs = list(runs) or [stage]
        self._module: nn.Module = stage
        self._averages_own_gradients = False
        if self._replica_group is not None and options.zero_stage == 0:
            trains = any(parameter.requires_grad for parameter in stage.parameters())
            if self._tp == 1 and len(self._runs) == 1 and trains:  # DDP refuses a stage that is frozen
                self._module = DistributedDataParallel(
                    stage, process_group=self._replica_group, gradient_as_bucket_view=True, init_sync=False,
                    **_NO_BUFFER_SYNC,
                )  # fmt: skip
            else:
                self._averages_own_gradients = True
        self._pipeline = None
        if mesh["pp"].size() > 1:
            stored, products = options.precision.weights, options.precision.products
            # FSDP2 casts the residual stream with the weights; autocast leaves it in the embedding's dtype.
            hidden_dtype = (products or stored) if options.zero_stage > 0 else stored
            modules = [self._module] if len(self._runs) == 1 else self._runs
            self._pipeline = Pipeline(
                modules, self._runs, mesh, self._loss, hidden_dtype=hidden_dtype, logits_dtype=products or stored,
                zero_bubble=options.schedule == "zero-bubble",
            )  # fmt: skip
        self._loss_dtype = torch.promote_types(torch.float32, options.precision.weights)
        self._tied_end = TiedEnd(stage, mesh)
        self._agreement = BatchAgreement(mesh)
        self._loss_scale = 1.0

    def forward_backward(
        self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """Run one step's forward and backward passes and add to the parameters' gradients.

        Args:
            input_ids: [B, S] int64, this dp rank's sequences, whole, on any device; the same on all ranks of its
                pp, cp and tp axes, and of the same shape on all ranks.
            labels: [B, S] int64, -100 where there is no target; position t holds the token that t-1 predicts
                (transformers' convention: the shift is made here). None takes `input_ids`.
            document_ids: [B, S] int64 where rows are packed: the number of each token's document. A token sees its own
                document only, positions count from its start, and its first token is no target, whatever `labels` say.
                Padding at a row's end is a document of its own, with labels of -100. None: each row is one document.
        Returns:
            The mean loss over all targets of the global batch, a detached float32 scalar, the same on every rank.
            Without any target: zero, and zero gradients.
        Raises:
            ValueError: on every rank, where one rank's batch has shapes that differ, does not divide by micro_batch, or
                holds an id or label that is no token; or where the ranks of one dp rank have different rows. The
                message names the rank. Likewise document_ids that are in pieces; or under cp > 1 with pp > 1 or
                sequence_parallel, where the ranks' shares of packed rows are not of one length.
        Cost: one forward and backward pass; the layout's collectives, and three of 8 to 32 bytes for count and loss.
            A batch on the host is checked there; one on a GPU has to be waited for. document_ids cost a mask of
            micro_batch x S^2 bytes where attention is neither a ring's nor streamed.
        """
        rows = self._prepare(input_ids, labels, document_ids, trains=True)
        with self._tied_end.gradients_summed(), self._loss_context():
            if self._pipeline is not None:
                losses = self._pipeline.step(rows, self._micro_batch or 1)
            else:
                losses = list(self._accumulate(rows))
            parameters = list(self.stage.parameters())
            resolve_partial_gradients(parameters)
            if self._averages_own_gradients:
                assert self._replica_group is not None
                average_gradients(parameters, self._replica_group)
        return self._mean_loss(losses)

    def evaluate(self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """The same mean loss as `forward_backward`, without gradients. Arguments, errors and cost likewise.

        Nothing else changes: gradients that wait for their step stay, and the next step is what it would have been.
        """
        # Under inference_mode DTensor's losses fail, and gathered weights would be of a kind that cannot be trained.
        with torch.inference_mode(False), torch.no_grad():
            rows = self._prepare(input_ids, labels, document_ids)
            with self._left_as_it_was(), self._loss_context():
                if self._pipeline is not None:
                    losses = self._pipeline.evaluate(rows, self._micro_batch or 1)
                else:
                    losses = [self._loss(self._run(part), part.targets) for part in self._cut(rows)]
            return self._mean_loss(losses)

    @contextmanager
    def _left_as_it_was(self) -> Iterator[None]:
        """Around a forward pass that no backward follows.

        FSDP2 keeps the parameters of its outermost module whole after a forward, for the backward to come, and
        remembers the order of its modules: without one, an optimizer would step parameters that no longer count.
        """
        try:
            yield
        finally:
            for run in self._runs:
                if not isinstance(run, FSDPModule):
                    continue
                if hasattr(run, "reset_iter_state"):  # torch 2.13 and later
                    run.reset_iter_state()
                for module in run.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip by the 2-norm over all parameters of the whole model; returns the norm before, a float64 scalar.

        Raises ValueError where `max_norm` is negative or no number: it would turn gradients round.
        """
        copy = self._tied_end.counted_elsewhere
        return clip_gradients(self.parameters(), self.mesh, max_norm=max_norm, counted_elsewhere=copy)

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
        """This rank's parameters, for an optimizer made after `parallelize`.

        To clip their gradients call `clip_grad_norm_` of this class: torch.nn.utils.clip_grad_norm_ sees one stage's
        gradients only, so that under pp every stage would be scaled by a norm of its own.
        """
        return self.stage.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`parameters` with their names in the whole model."""
        return self.stage.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """This rank's weights by their names in the whole model: tensors, or DTensors where an axis cuts them."""
        return self.stage.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over weights as `state_dict` gives them."""
        self.stage.load_state_dict(state_dict)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder that transformers' from_pretrained loads, or of a PeftModel its adapters for peft's.

        See decoder.pretrained_folder.write_pretrained and decoder.adapters.write_adapters.
        """
        write = write_adapters if has_adapters(self._whole) else write_pretrained
        write(Path(folder), self.stage, self._whole, self.mesh, dtype=dtype)

    def train(self, mode: bool = True) -> "ParallelModel":
        for module in (self._module, *self._runs):
            module.train(mode)
        return self

    def eval(self) -> "ParallelModel":
        return self.train(False)

    def _prepare(
        self, input_ids: Tensor, labels: Tensor | None, document_ids: Tensor | None, *, trains: bool = False
    ) -> LocalRows:
        """This rank's shard of inputs and shifted targets, both [B, S_local]; sets positions and the loss's scale.

        Packed rows stay whole here: around a ring each micro-batch is cut by its own documents (see _cut).
        """
        labels = input_ids if labels is None else labels
        # Checks, where the batch still is, and the global number of targets.
        trouble = trouble_with(
            input_ids, labels, document_ids, vocab_size=self.stage.vocab_size, micro_batch=self._micro_batch
        )
        if trains and not torch.is_grad_enabled():
            trouble = "forward_backward without gradients (torch.no_grad or inference_mode): use evaluate, or leave it"
        trouble = trouble or self._trouble_with_length(input_ids) or self._trouble_with_documents(document_ids)
        if trains and not trouble:
            shape = (self._micro_batch or (1 if self._pipeline else len(input_ids)), input_ids.shape[1])
            trouble = trouble_with_tokens(self.mesh, self._options.precision, shape, packed=document_ids is not None)
        if document_ids is not None and not trouble:
            labels = without_first_tokens(labels, document_ids)
        frozen = trains and self._tied_end.frozen
        num_targets = self._agreement.num_targets(input_ids, labels, trouble, document_ids, frozen_end=frozen)
        # Divided in fp32, as transformers' mean over the targets is: an fp64 model then takes the very same step.
        self._loss_scale = (self._num_replicas / torch.tensor(max(num_targets, 1))).item()
        # This rank's tokens: cut where the batch is, and sent to the device without waiting for it.
        seq_len = input_ids.shape[1]
        input_ids, labels = input_ids.to(torch.int64), labels.to(torch.int64)
        if document_ids is not None:
            # The ring and streaming read documents on the host, a mask is made on the device.
            on_host = self._ring is not None or self.stage.checkpointing == "stream"
            document_ids = document_ids.to("cpu" if on_host else document_ids.device, torch.int64)
            return LocalRows(input_ids, shard_labels(labels, (0, 1)), document_ids).on(self.device)
        place = (0, 1) if self._ring is None else self._ring  # without a ring this rank has the whole sequence
        positions = shard_positions(seq_len, place, device=self.device)
        for run in self._runs:
            run.position_ids = positions[None]
            if self._ring is not None:
                run.attention_arguments["ring_seq_len"] = AgreedLength(seq_len)
        return LocalRows(shard_sequence(input_ids, place, dim=1), shard_labels(labels, place)).on(self.device)

    def _trouble_with_length(self, input_ids: Tensor) -> str:
        """What is wrong with a sequence that sequence parallelism has to cut evenly; empty where nothing is."""
        cp = self.mesh["cp"].size()
        even = self._tp * cp * (2 if cp > 1 else 1)
        if not self._options.sequence_parallel or input_ids.dim() != 2 or input_ids.shape[1] % even == 0:
            return ""
        return (
            f"a sequence of {input_ids.shape[1]} tokens cannot be cut evenly over cp={cp} and, with "
            f"sequence_parallel=True, tp={self._tp}: give a multiple of {even}"
        )

    def _trouble_with_documents(self, document_ids: Tensor | None) -> str:
        """Why this layout cannot take these packed rows; empty where it can.

        A ring shares out the work of each document, so its ranks hold as many tokens as the documents make it.
        """
        cp, pp = self.mesh["cp"].size(), self.mesh["pp"].size()
        if document_ids is None or cp == 1:
            return ""
        if pp > 1:
            return (
                f"document_ids with cp={cp} and pp={pp}: a ring's shares of packed rows are of many lengths, and a "
                "pipeline's buffers of one: choose cp=1 or pp=1"
            )
        if self._options.sequence_parallel:
            return (
                f"document_ids with cp={cp} and sequence_parallel=True: a ring's shares of packed rows are of many "
                f"lengths, which tp={self._tp} does not always divide: choose cp=1 or sequence_parallel=False"
            )
        return trouble_with_ring(document_ids, size=cp, sharding=_SHARDING, micro_batch=self._micro_batch)

    def _accumulate(self, rows: LocalRows) -> Iterator[Tensor]:
        """Micro-batches one after the other; gradients travel with the last, or with each where they are sharded."""
        parts = self._cut(rows)
        for index, part in enumerate(parts):
            with self._gradient_sync(is_last=index == len(parts) - 1):
                loss = self._loss(self._run(part), part.targets)
                loss.backward()  # type: ignore[no-untyped-call]
            yield loss.detach()

    def _cut(self, rows: LocalRows) -> list[LocalRows]:
        """Micro-batches, of packed rows around a ring this rank's tokens, [1, S_local] of all rows of each."""
        parts = rows.cut(self._micro_batch or max(1, len(rows.inputs)))
        if rows.document_ids is None or self.mesh["cp"].size() == 1:
            return parts
        cp, index = self.mesh["cp"].size(), self.mesh.get_local_rank("cp")
        local = []
        for part in parts:
            assert part.document_ids is not None
            shard = document_shards(part.document_ids, cp, _SHARDING)[index]
            inputs, targets = (take(x.flatten()[None], shard, 1) for x in (part.inputs, part.targets))
            local.append(LocalRows(inputs, targets, part.document_ids))
        return local

    def _gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: whether its gradients travel, and whether weights stay whole."""
        if isinstance(self._module, FSDPModule):
            zero_stage = self._options.zero_stage
            self._module.set_requires_gradient_sync(is_last or zero_stage == 2 or self._options.sharded_accumulation)
            if zero_stage < 3:  # weights are gathered once a step
                self._module.set_reshard_after_backward(is_last)
        elif isinstance(self._module, DistributedDataParallel) and not is_last:
            return cast(AbstractContextManager[None], self._module.no_sync())
        return nullcontext()

    def _loss_context(self) -> AbstractContextManager[None]:
        return loss_parallel() if self._tp > 1 else nullcontext()

    def _run(self, rows: LocalRows) -> Tensor:
        """Logits, or where the stage `gives_loss` the sum of the targets' cross-entropies."""
        told = {} if rows.document_ids is None else {"document_ids": rows.document_ids}
        return cast(Tensor, self._module(rows.inputs, rows.targets, **told))

    def _loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The loss that is differentiated: a sum over [B, S_local] targets, times the step's scale."""
        return (self._summed(output, targets) if output.dim() else output) * self._loss_scale

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self._tp > 1:
            logits = DTensor.from_local(logits, self.mesh["tp"], [Shard(2)], run_check=False)
        return cross_entropy_sum(logits, targets)

    def _mean_loss(self, losses: list[Tensor]) -> Tensor:
        """The global mean from this rank's scaled sums: none of them on stages before the last."""
        total = torch.zeros((), dtype=self._loss_dtype, device=self.device)
        for loss in losses:
            total += loss.detach()
        total = total / self._num_replicas
        if self._replica_group is not None:
            dist.all_reduce(total, group=self._replica_group)
        if self.mesh["pp"].size() > 1:
            dist.all_reduce(total, group=self.mesh.get_group("pp"))
        return total


def device_of(mesh: DeviceMesh) -> torch.device:
    """This rank's device."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
