"""A stage in torch's synchronous pipeline: which schedule, which shapes, and an evaluation pass.

torch.distributed.pipelining runs the schedule. It builds its buffers for one shape of micro-batch and one number of
them; this file keeps a schedule for each that was asked for, tells torch the shapes (so that no trial run of the model,
with its collectives, is needed to find them), and picks 1F1B, or GPipe where there are too few micro-batches for it.
With several stages a rank these are interleaved 1F1B, and breadth-first where micro-batches do not go into its rounds.
Where zero-bubble was asked for, rounds of as many micro-batches as ranks run so, and other numbers as without it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from fourfold.parallel.decoder.batch import LocalRows
from fourfold.parallel.decoder.stage import DecoderStage

_KEPT_SCHEDULES = 4
"""Each holds receive buffers; a loop that trains and evaluates at one length needs two."""


_Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class Pipeline:
    """This rank's stages on the mesh's pp axis.

    Args:
        modules: what runs: each of `stages`, or DDP around it.
        stages: the decoder stages inside: one, or vp of them, of which the c-th is stage rank + c * pp of the model.
        mesh: (dp, pp, cp, tp).
        loss: (what the last stage returns, targets) -> the scalar that it differentiates, already scaled.
        hidden_dtype, logits_dtype: of the stages' outputs.
        zero_bubble: whether several stages a rank put off their weight gradients to when they would idle.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        stages: Sequence[DecoderStage],
        mesh: DeviceMesh,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        hidden_dtype: torch.dtype,
        logits_dtype: torch.dtype,
        zero_bubble: bool = False,
    ) -> None:
        self._modules, self._stages, self._loss = list(modules), list(stages), loss
        self._hidden_dtype, self._logits_dtype = hidden_dtype, logits_dtype
        self._zero_bubble = zero_bubble
        self._local_vocab_size = stages[0].vocab_size // mesh["tp"].size()
        self._group = mesh.get_group("pp")
        self._rank, self._num_ranks = mesh.get_local_rank("pp"), mesh["pp"].size()
        self._schedules: dict[tuple[int, int, int, bool], tuple[_Schedule, list[PipelineStage]]] = {}

    def step(self, rows: LocalRows, micro_batch: int) -> list[Tensor]:
        """Forward and backward over [B, S_local] inputs; the last stage returns its micro-batches' losses."""
        return self._run(rows, micro_batch, train=True)

    def evaluate(self, rows: LocalRows, micro_batch: int) -> list[Tensor]:
        """Forward only; the last stage returns its micro-batches' losses."""
        return self._run(rows, micro_batch, train=False)

    def _run(self, rows: LocalRows, micro_batch: int, *, train: bool) -> list[Tensor]:
        inputs, targets = rows.inputs, rows.targets
        schedule, stages = self._schedule(inputs, micro_batch, train)
        first, last = self._stages[0], self._stages[-1]
        losses: list[Tensor] = []
        arguments = (inputs,) if first.is_first else ()
        keywords: dict[str, Any] = {"target": targets, "losses": losses} if last.is_last else {}
        if rows.document_ids is not None:
            keywords["document_ids"] = rows.document_ids  # torch cuts it with the micro-batches
        if last.is_last:
            keywords["targets"] = targets  # of the stage's forward, which may give their loss
        run = schedule.step if train else schedule.eval
        run(*arguments, return_outputs=False, **keywords)
        if not train:  # nothing goes backward, so nothing would let go of the outputs
            for stage in stages:
                stage.clear_runtime_states()
        return losses

    def _schedule(self, inputs: Tensor, micro_batch: int, train: bool) -> tuple[_Schedule, list[PipelineStage]]:
        batch, seq_len = inputs.shape
        num_micro_batches = batch // micro_batch
        # torch rebuilds a schedule's buffers when it turns from training to evaluation and back: keep one for each.
        key = (micro_batch, num_micro_batches, seq_len, train)
        if key not in self._schedules:
            tokens = inputs[:micro_batch]
            stages = [self._torch_stage(chunk, tokens, train) for chunk in range(len(self._stages))]
            if len(self._schedules) >= _KEPT_SCHEDULES:
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = self._made(stages, num_micro_batches, train), stages
        return self._schedules[key]

    def _made(self, stages: Sequence[PipelineStage], num_micro_batches: int, train: bool) -> _Schedule:
        arguments: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        if len(stages) == 1:
            drains_late = train and num_micro_batches >= self._num_ranks
            return (Schedule1F1B if drains_late else ScheduleGPipe)(stages[0], num_micro_batches, **arguments)
        if train and self._zero_bubble and num_micro_batches % self._num_ranks == 0:
            return ScheduleInterleavedZeroBubble(list(stages), num_micro_batches, **arguments)
        rounds = max(1, num_micro_batches // self._num_ranks)
        interleaves = train and num_micro_batches % rounds == 0
        return (ScheduleInterleaved1F1B if interleaves else ScheduleLoopedBFS)(
            list(stages), num_micro_batches, **arguments
        )

    def _torch_stage(self, chunk: int, tokens: Tensor, train: bool) -> PipelineStage:
        stage, (batch, seq_len) = self._stages[chunk], tokens.shape

        def activations(length: int, width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, length, width, dtype=dtype, device="meta", requires_grad=train)

        hidden = activations(seq_len // stage.sequence_shards, stage.hidden_size, self._hidden_dtype)
        if stage.gives_loss(tokens.numel(), tokens.device.type):
            dtype = torch.promote_types(torch.float32, self._hidden_dtype)
            last = torch.empty((), dtype=dtype, device="meta", requires_grad=train)
        else:
            last = activations(seq_len, self._local_vocab_size, self._logits_dtype)
        return PipelineStage(
            self._modules[chunk],
            self._rank + chunk * self._num_ranks,
            self._num_ranks * len(self._stages),
            device=tokens.device,
            input_args=torch.empty_like(tokens, device="meta") if stage.is_first else hidden,
            output_args=last if stage.is_last else hidden,
            group=self._group,
        )
