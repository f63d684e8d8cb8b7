"""The training loop of a pipeline that never drains: the same text, metrics and checkpoints as loop.py's.

A step is still `global_batch` sequences, so learning rates, logs and checkpoints mean the same; a schedule that updates
at every micro-batch makes many updates in it, each with hyper-parameters scaled to its own batch. The stream stops for
checkpoints and held-out losses only, hence nobody waits for a step to end: the last stage, which knows the losses,
reports them. Held-out losses leave what is in flight there, and so do checkpoints where the settings say so.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fourfold.launch.training.blame import first_not_finite_of_stage
from fourfold.launch.training.checkpoints import Checkpoints, Resume
from fourfold.launch.training.chunks import chunks_of
from fourfold.launch.training.loop import COUNTED_STEPS, StepRecord, TrainingRun, TrainResult, refuse_no_more_steps
from fourfold.launch.training.optimizers import check_optimizer
from fourfold.launch.training.packing import Batch
from fourfold.launch.training.rows import Order, Rows, as_rows, relative_targets
from fourfold.launch.training.settings import TrainSettings, decay_groups, learning_rate_at, precision_of
from fourfold.launch.training.undrained import as_bytes, check_in_flight, from_bytes, name_in_flight
from fourfold.layouts.cost.asynchronous import schedule_of
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel.decoder import pipeline_decoder
from fourfold.parallel.decoder.documents import without_first_tokens
from fourfold.parallel.decoder.pretrained_folder import write_pretrained
from fourfold.parallel.decoder.stage import DecoderStage
from fourfold.parallel.pipeline import ClipNorm, scale_adam_hyperparameters
from fourfold.parallel.pipeline.failure import replica_lost
from fourfold.parallel.sequence.tensors import on_device, shard_labels


def scaled_optimizer(layout: Layout, settings: TrainSettings) -> Callable[[list[nn.Parameter]], Optimizer]:
    """make_optimizers' AdamW, with hyper-parameters for the batch of one update instead of the global one."""
    update_batch = layout.global_batch // layout.updates_per_step
    scaled = scale_adam_hyperparameters(
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        batch=layout.global_batch,
        new_batch=update_batch,
        weight_decay=settings.weight_decay,
    )

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        groups = decay_groups(parameters, scaled.weight_decay)
        return AdamW(groups, lr=scaled.lr, betas=scaled.betas, eps=scaled.eps, fused=True)

    return make


def rate_schedule(layout: Layout, settings: TrainSettings) -> Callable[[Optimizer], LambdaLR]:
    """learning_rate_at's shape over updates instead of steps."""

    def factor(update: int) -> float:
        return learning_rate_at(update // layout.updates_per_step, settings) / settings.learning_rate

    def make(optimizer: Optimizer) -> LambdaLR:
        scheduler = LambdaLR(optimizer, factor)
        for group in optimizer.param_groups:
            del group["initial_lr"]  # the scheduler has its own copy; checkpoints are those of any other layout
        return scheduler

    return make


def late_clipping(layout: Layout, settings: TrainSettings) -> ClipNorm:
    """Clipping at max_norm by the whole model's norm, so many updates late that no stage waits for another's.

    The exact norm would take from 2bw, too, most of what it gains over a pipeline that drains.
    """
    late = schedule_of(layout).distance_in_updates
    return ClipNorm(max_norm=settings.max_norm, scope="model", lag_updates=late, first_wait=False)


class AsynchronousModel:
    """This rank's stage of a decoder under an asynchronous layout; as ParallelModel, it has `stage` and `device`."""

    def __init__(self, model: nn.Module, layout: Layout, mesh: DeviceMesh, settings: TrainSettings) -> None:
        check_optimizer(layout, settings)
        check_in_flight(layout, settings)
        self.layout, self.mesh, self.settings, self._whole = layout, mesh, settings, model
        self.pipeline = pipeline_decoder(
            model,
            mesh,
            seq_len=layout.seq_len,
            optimizer=scaled_optimizer(layout, settings),
            schedule=schedule_of(layout),
            mitigation=layout.mitigation,
            scheduler=rate_schedule(layout, settings),
            clip=late_clipping(layout, settings),
            checkpointing=layout.checkpointing,
            stream=chunks_of(layout),
            sequence_parallel=layout.sequence_parallel,
            compile=layout.compile,
            precision=precision_of(layout, settings),
            seed=settings.seed,
            embedding_counts_as=layout.embedding_counts_as,
            head_counts_as=layout.head_counts_as,
            observe=settings.observe,
            shard_optimizer=layout.zero_stage == 1,
        )
        self.stage: DecoderStage = self.pipeline.stage.module  # type: ignore[assignment]
        self.last_input: Any = None
        """What the last stage was last called with, to look for what was no number in it; None elsewhere."""
        if self.pipeline.is_last:
            self.stage.register_forward_pre_hook(self._note_input)
        self.device = next(self.stage.parameters()).device
        self.precision = precision_of(layout, settings) or ("bf16-mixed" if self.device.type == "cuda" else "fp32")
        replica_rows = layout.global_batch // layout.dp
        start = mesh.get_local_rank("dp") * replica_rows
        self.rows = slice(start, start + replica_rows)
        self._in_flight = name_in_flight(layout, mesh)

    def _note_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.last_input = inputs[0]

    def micro_batches(self, ids: Callable[[], Tensor | Batch]) -> Iterator[tuple[Any, Any]]:
        """This replica's micro-batches of a global batch, as far as this stage reads them; on the host.

        Args:
            ids: makes the rows, [rows, seq_len] int64 or a Batch; called where tokens are read, on the first and the
                last stage.
        """
        shape = self.layout.micro_batch, self.layout.seq_len
        unread = torch.empty(shape, dtype=torch.int64, device="meta")
        if not (self.pipeline.is_first or self.pipeline.is_last):
            yield from [(unread, None)] * self.layout.num_micro_batches
            return
        drawn = ids()
        batch = drawn if isinstance(drawn, Batch) else Batch(drawn)
        inputs, documents = batch.ids, batch.document_ids
        labels = inputs if batch.labels is None else batch.labels
        if documents is not None:
            labels = without_first_tokens(labels, documents)
        for start in range(0, len(inputs), self.layout.micro_batch):
            part = slice(start, start + self.layout.micro_batch)
            if not self.pipeline.is_first:
                yield unread, shard_labels(labels[part], (0, 1))
            elif documents is None:
                yield inputs[part], None
            else:  # the stages after this one are handed the documents
                yield {"input_ids": inputs[part], "document_ids": documents[part]}, None

    def relative_targets(self, targets: Tensor) -> Tensor:
        """How much the loss of each of this replica's micro-batches counts in the mean over all targets.

        Args:
            targets: [n global_batch], of each row of some global batches.
        Returns:
            [n num_micro_batches] float64, 1 on average over the replicas.
        """
        layout = self.layout
        counts = targets.view(-1, layout.dp, layout.num_micro_batches, layout.micro_batch).sum(-1)
        return on_device(relative_targets(counts)[:, self.mesh.get_local_rank("dp")].flatten(), self.device)

    def average_over_replicas(self, values: Tensor) -> Tensor:
        """The mean of a tensor over dp, in place; every replica of this stage must call.

        Raises:
            PipelineError: a replica is gone.
        """
        self._reduce_over_replicas(values, dist.ReduceOp.SUM)
        return values.div_(self.layout.dp)

    def largest_over_replicas(self, values: Tensor) -> Tensor:
        """The largest of a tensor over dp, on this stage's device; every replica calls. Raises PipelineError, too."""
        values = values.to(self.device)
        self._reduce_over_replicas(values, dist.ReduceOp.MAX)
        return values

    def _reduce_over_replicas(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self.layout.dp > 1:
            group = self.mesh.get_group("dp")
            try:
                dist.all_reduce(values, operation, group=group)
            except RuntimeError as error:
                raise replica_lost(self.pipeline.stage.index, group, error) from error

    def save(self, checkpoints: Checkpoints, *, step: int) -> None:
        """Between two runs of the pipeline, with what the last one has left in flight.

        Cost: beside weights and optimizer states, for each micro-batch in flight on a stage its input and the weights
        that it read, which micro-batches of one update share.
        """
        stage, extra, in_flight = self.pipeline.stage, self.pipeline.stage.remembered(), self.pipeline.in_flight()
        if in_flight is not None:
            assert stage.num_updates  # see check_in_flight
            extra[self._in_flight] = as_bytes({"num_updates": stage.num_updates, "stream": in_flight})
        with stage.optimizer_parameters() as optimizer:
            checkpoints.save(
                self,
                [] if optimizer is None else optimizer,
                step=step,
                updates_per_step=self.layout.updates_per_step,
                extra=extra,
            )

    def save_pretrained(self, folder: Path) -> None:
        """The weights between two runs of the pipeline, as ParallelModel.save_pretrained writes them."""
        write_pretrained(folder, self.stage, self._whole, self.mesh)

    def load(self, checkpoints: Checkpoints, resume: Resume) -> int:
        """The checkpoint that `resume` means; returns its step. Raises CheckpointError as Checkpoints.load does."""
        stage, extra = self.pipeline.stage, self.pipeline.stage.remembered(blank=True)
        extra[self._in_flight] = torch.empty(0, dtype=torch.uint8)
        with stage.optimizer_parameters() as optimizer:
            step = checkpoints.load(
                self,
                [] if optimizer is None else optimizer,
                resume,
                updates_per_step=self.layout.updates_per_step,
                extra=extra,
            )
        if not step:
            return 0
        # Drained, every stage has made all updates; otherwise each lacks those of what is in flight on it.
        updates, saved = step * self.layout.updates_per_step, extra.pop(self._in_flight, None)
        state = None if saved is None else from_bytes(saved, self.device)
        if state is not None:
            updates = state["num_updates"]
        stage.go_on(num_updates=updates, num_forwards=step * self.layout.num_micro_batches, remembered=extra)
        if state is not None:  # after the norms that all stages have written under one name
            self.pipeline.go_on(state["stream"])
        for scheduler in stage.schedulers:  # none, where this replica owns no weights
            scheduler.last_epoch = updates - 1
            scheduler.step()  # sets the rates of the coming update
        return step


class _StepClock:
    """On the last stage: gathers micro-batches into steps, and reports each as its last loss is known."""

    def __init__(
        self, model: AsynchronousModel, batches: Rows, first: int, on_step: Callable[[StepRecord], None]
    ) -> None:
        self._model, self._batches, self._step, self._on_step = model, batches, first, on_step
        self._losses: list[Tensor] = []
        self._since = time.perf_counter()
        self.records: list[StepRecord] = []

    def __call__(self, micro_batch: int, loss: Tensor) -> None:
        self._losses.append(loss)
        if len(self._losses) < self._model.layout.num_micro_batches:
            return
        took_s = time.perf_counter() - self._since
        counts = self._model.relative_targets(self._batches.training_targets(self._step))
        mean = self._model.average_over_replicas((torch.stack(self._losses).double() * counts).mean()).item()
        settings = self._model.settings
        if not math.isfinite(mean):
            of_all = self._model.pipeline.stage.joint.told
            where = first_not_finite_of_stage(self._model.stage, self._model.last_input, of_all)
            raise FloatingPointError(
                f"loss {mean} at step {self._step}{', ' if where else ''}{where}: "
                f"lower the learning rate {settings.learning_rate:.2g}"
            )
        slowest_s = self._model.largest_over_replicas(torch.tensor(took_s, dtype=torch.float64)).item()
        rate = learning_rate_at(self._step, settings)
        # The norms of a step's updates are known some updates later only.
        record = StepRecord(self._step, mean, math.nan, rate, slowest_s)
        self.records.append(record)
        self._on_step(record)
        self._losses, self._since, self._step = [], self._since + took_s, self._step + 1


def train_asynchronously(model: AsynchronousModel, text: tuple[Tensor, Tensor] | Rows, run: TrainingRun) -> TrainResult:
    """loop.train for an asynchronous pipeline; every rank calls. `run.on_step` is called on the last stage's ranks.

    The pipeline drains at the end, and before a checkpoint unless `checkpoints_in_flight`. For a held-out loss it does
    not drain: each stage evaluates with the weights that it has, those before the updates of what is in flight.

    Returns:
        Losses on every rank; `step_s` as the last stage saw it, from one step's last loss to the next's.
    Raises:
        ValueError: as loop.train; a checkpoint of a run with another number of updates a step.
        FloatingPointError: the loss is no longer a finite number.
        PipelineError: another stage, or a replica of this one, is gone.
    """
    layout, settings = model.layout, model.settings
    batches = as_rows(text, _order(model), held_out=settings.held_out_batches > 0)
    # Where to start: at a checkpoint, or at step 0 in a folder that holds none.
    first = 0
    if run.resume:
        run.activity.now("reading a checkpoint")
        first = model.load(run.kept_checkpoints(), run.resume)
        refuse_no_more_steps(first, settings, run.resume)
    elif settings.checkpoint_every:
        run.kept_checkpoints().refuse_overwriting()
    # Memory is counted until the optimizer's states are there and the pipeline has filled.
    counted = first + max(COUNTED_STEPS, -(-4 * layout.pp // layout.num_micro_batches))
    # From checkpoint or held-out loss to the next without a stop in between.
    result = TrainResult(device=model.device.type, precision=model.precision)
    while first < settings.steps:
        periods = [every for every in (settings.checkpoint_every, settings.evaluate_every) if every]
        last = min([settings.steps, *((first // every + 1) * every for every in periods)])
        ends = last == settings.steps
        saves = settings.checkpoint_every > 0 and (ends or last % settings.checkpoint_every == 0)
        evaluates = settings.evaluate_every > 0 and not ends and last % settings.evaluate_every == 0
        clock = _StepClock(model, batches, first, run.on_step)
        stream = _training_stream(model, batches, range(first, last), run, counted)
        drain = ends or (saves and not settings.checkpoints_in_flight)
        model.pipeline.run(stream, on_loss=clock, drain=drain)
        result.records += _shared(model, clock.records, range(first, last))
        if settings.observe:
            run.on_reports(last, model.pipeline.reports)
        if evaluates:
            run.activity.now(f"held-out evaluation after step {last - 1}")
            run.on_evaluation(last, held_out_loss_asynchronously(model, batches, settings.held_out_batches))
        if saves:
            run.activity.now(f"writing the checkpoint of step {last}")
            model.save(run.kept_checkpoints(), step=last)
        first = last
    if settings.held_out_batches:
        run.activity.now("held-out evaluation")
        result.held_out_loss = held_out_loss_asynchronously(model, batches, settings.held_out_batches)
    run.finish_checkpoint()
    run.gauge.stop()
    result.peak_bytes, result.reserved_bytes = run.gauge.peak_bytes, run.gauge.reserved_bytes
    return result


def held_out_loss_asynchronously(model: AsynchronousModel, text: Tensor | Rows, num_batches: int) -> float:
    """loop.held_out_loss for an asynchronous pipeline, with the weights that each stage has; every rank calls."""
    batches = as_rows((text, text), _order(model), held_out=True) if isinstance(text, Tensor) else text
    losses = model.pipeline.evaluate(_held_out_stream(model, batches, num_batches))
    counts = model.relative_targets(batches.held_out_targets(num_batches * model.layout.global_batch))
    mean = (torch.tensor(losses, dtype=torch.float64, device=model.device) * counts).mean()
    return model.average_over_replicas(mean).item()


def _order(model: AsynchronousModel) -> Order:
    layout = model.layout
    return Order(seq_len=layout.seq_len, global_batch=layout.global_batch, seed=model.settings.seed)


def _training_stream(
    model: AsynchronousModel, batches: Rows, steps: range, run: TrainingRun, counted: int
) -> Iterator[tuple[Any, Any]]:
    for step in steps:
        run.activity.now(f"step {step}")
        if run.checkpoint_failed():  # the other stages find it too, or lose this one
            run.finish_checkpoint()
        if step == counted:
            run.gauge.stop()
        yield from model.micro_batches(partial(batches.training, step, model.rows))


def _held_out_stream(model: AsynchronousModel, batches: Rows, num_batches: int) -> Iterator[tuple[Any, Any]]:
    global_batch = model.layout.global_batch
    for batch in range(num_batches):
        shift = batch * global_batch
        inside = slice(shift + model.rows.start, shift + model.rows.stop)
        yield from model.micro_batches(partial(batches.held_out, num_batches * global_batch, inside))


def _shared(model: AsynchronousModel, records: list[StepRecord], steps: range) -> list[StepRecord]:
    """The last stage's records, on every rank: one broadcast of 16 bytes a step."""
    values = torch.tensor(
        [[record.loss, record.step_s] for record in records], dtype=torch.float64, device=model.device
    )
    if not model.pipeline.is_last:
        values = torch.empty(len(steps), 2, dtype=torch.float64, device=model.device)
    model.pipeline.broadcast_from_last(values, "sharing the steps' records")
    rates = [learning_rate_at(step, model.settings) for step in steps]
    return [
        StepRecord(step, loss, math.nan, rate, step_s)
        for step, rate, (loss, step_s) in zip(steps, rates, values.tolist(), strict=True)
    ]
