"""What the runtime and the emulator refuse alike, and the mode that they evaluate in."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fourfold.parallel.pipeline.mitigation import Mitigation
from fourfold.parallel.pipeline.program import Program
from fourfold.parallel.pipeline.schedule import PipelineSchedule
from fourfold.parallel.pipeline.settings import ClipNorm, PipelineSettings
from fourfold.parallel.pipeline.values import needs_gradient


def check_recomputation(
    module: nn.Module | None, delays: Sequence[float], mitigation: Mitigation, *, double_buffered: bool
) -> None:
    """Refuse a stage that recomputes around outputs of the forward which are of other weights than the backward's.

    Args:
        delays: of all stages, so that every rank refuses.
        double_buffered: as the schedule's; then, and with stashing, forward and backward read the same weights.
    """
    kept = getattr(module, "kept_outputs", None)
    if kept and max(delays) > 0 and not (mitigation.stash or double_buffered):
        name, without = kept
        raise ValueError(
            f"{name} in a pipeline that updates between a forward and its backward: the kept output would be of "
            f"other weights than what is recomputed around it; choose {without}, a mitigation with stash, 2bw, or a "
            "schedule that drains"
        )


def check_whole_backwards(module: nn.Module, schedule: PipelineSchedule | Program, stage: int) -> None:
    """A streamed layer makes both gradients at once and overwrites its output's: it cannot go back a second time."""
    if getattr(module, "checkpointing", "none") != "stream":
        return
    num_micro_batches = schedule.num_micro_batches if isinstance(schedule, Program) else 1
    if any(action.kind == "I" for action in schedule.actions(stage, iter(range(num_micro_batches)))):
        name = "a Program" if isinstance(schedule, Program) else repr(schedule.name)
        raise ValueError(
            f"schedule: {name} splits backward passes, and stage {stage} streams (checkpointing='stream'): choose a "
            "schedule of whole backward passes, or checkpointing='full'"
        )


def check_untied(stages: Sequence[nn.Module | None]) -> None:
    """Refuse a trained weight that two stages share: each would update it without the other's gradient.

    Raises:
        ValueError: naming both places.
    """
    owners: list[tuple[int, int, int, str, bool]] = []  # (first byte, end, stage, name, trained)
    for index, module in enumerate(stages):
        for name, tensor in () if module is None else (*module.named_parameters(), *module.named_buffers()):
            if not is_lazy(tensor) and not tensor.is_meta and tensor.numel():
                start = tensor.data_ptr()
                size = tensor.numel() * tensor.element_size()
                running = name.rpartition(".")[2] in ("running_mean", "running_var")  # written by every forward
                owners.append((start, start + size, index, name, tensor.requires_grad or running))
    owners.sort()
    # In the order of memory: a tensor overlaps one before it if it starts before that one's end.
    reach = owners[:1]
    for place in owners[1:]:
        for _, end, stage, name, trained in reach:
            if place[0] < end and stage != place[2] and (trained or place[4]):
                _refuse_tie(stage, name, place[2], place[3])
        reach = [each for each in reach if each[1] > place[0]] + [place]
    # Weights without storage (the meta device) are told by their objects.
    seen: dict[int, tuple[int, str]] = {}
    for index, module in enumerate(stages):
        for name, p in () if module is None else module.named_parameters():
            stage, first = seen.setdefault(id(p), (index, name))
            if stage != index and p.requires_grad:
                _refuse_tie(stage, first, index, name)


def _refuse_tie(stage: int, name: str, other: int, other_name: str) -> None:
    raise ValueError(
        f"stage {stage}'s {name} and stage {other}'s {other_name} are one weight: each stage would update it without "
        "the other's gradient; untie them (for a decoder tie_word_embeddings=False), freeze it, or put both in one"
    )


def check_pipeline(stages: Sequence[nn.Module | None], settings: PipelineSettings) -> None:
    """Refuse what is no sequence of stages, and a pipeline without a loss.

    Raises:
        ValueError: naming what was given.
    """
    if not isinstance(stages, Sequence | nn.Sequential | nn.ModuleList):
        raise ValueError(f"stages is a {type(stages).__name__}: give a list of modules, one a stage")
    for index, module in enumerate(stages):
        if not isinstance(module, nn.Module | None):
            raise ValueError(f"stage {index} is a {type(module).__name__}: give a torch.nn.Module")
    if settings.loss_fn is None:
        raise ValueError("no loss_fn: give one, (output of the last stage, target) -> scalar mean")


def check_passable(outputs: list[Tensor], stage: int) -> list[Tensor]:
    """Returns the outputs; refuses tensors that are not plain numbers in memory, which no other rank could be sent."""
    for output in outputs:
        if output.is_nested or output.layout != torch.strided:
            what = "nested" if output.is_nested else str(output.layout)
            raise ValueError(
                f"stage {stage} hands on a tensor that is {what}: stages pass dense tensors; pass its parts (values, "
                "indices, offsets) and put it together in the next stage"
            )
    return outputs


def check_module(module: nn.Module, stage: int, dp_group: dist.ProcessGroup | None) -> None:
    """Refuse a stage that averages or shards by itself, whose weights are not made yet, or whose cp ranks train apart.

    Raises:
        ValueError: naming the part.
    """
    for name, part in module.named_modules():
        if isinstance(part, DistributedDataParallel | DataParallel):
            raise ValueError(
                f"stage {stage}: {name or 'the module'} is wrapped in {type(part).__name__}, which averages at every "
                "backward, over ranks of its own: give the module inside, and the stage's replicas as dp_group"
            )
        if isinstance(part, FSDPModule):
            raise ValueError(
                f"stage {stage}: {name or 'the module'} is sharded by fully_shard, which averages at every backward, "
                "over ranks of its own: give the module as it was before, and the stage's replicas as dp_group"
            )
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"stage {stage}: {name or 'the module'} makes its weights at its first forward: run one before the "
                "pipeline is made"
            )
    check_batch_norms(module, stage, dp_group)
    _check_storage(module, stage)
    cp_group = getattr(module, "cp_group", None)
    if cp_group is not None:
        replicas = [dist.get_rank()] if dp_group is None else dist.get_process_group_ranks(dp_group)
        missing = sorted(set(dist.get_process_group_ranks(cp_group)) - set(replicas))
        if missing:
            raise ValueError(
                f"stage {stage}: its module computes each micro-batch together with ranks {missing}, which are not in "
                "dp_group, so that they would train as several models: give dp_group the ranks of dp and cp together"
            )


def _check_storage(module: nn.Module, stage: int) -> None:
    """Refuse two trained parameters in one memory: each would be updated without the other's gradient."""
    places = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in module.named_parameters()
        if p.requires_grad and p.numel() and not p.is_meta and not hasattr(p, "to_local") and p.is_contiguous()
    )
    for (_, end, name), (start, _, other) in pairwise(places):
        if start < end:
            raise ValueError(
                f"stage {stage}: {name} and {other} are two parameters in one memory: use one Parameter in both "
                "places, or clone one"
            )


def measured_loss(settings: PipelineSettings, output: Any, target: Any) -> tuple[Tensor, float]:
    """The loss, and how much its micro-batch counts. Raises ValueError for what is no scalar or no weight."""
    assert settings.loss_fn is not None
    loss = settings.loss_fn(output, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        what = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn returned {what}: give a scalar mean over the micro-batch")
    weigh = settings.loss_weight
    found = 1.0 if weigh is None else weigh(target)
    if not isinstance(found, int | float) and not (isinstance(found, Tensor) and found.numel() == 1):
        what = str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"loss_weight returned {what}: give one number, how much the micro-batch counts")
    weight = float(found)
    if not 0 <= weight < float("inf"):
        raise ValueError(f"loss_weight returned {weight}: how much a micro-batch counts is finite and at least 0")
    return loss, weight


def check_gradients(stage: int, outputs: Sequence[Tensor], *, wanted: bool, loss: bool) -> None:
    """Refuse a forward after which this stage, or those before it, could not train.

    Args:
        wanted: whether there is something to train, here or before.
        loss: whether the output is the loss.
    """
    if wanted and not any(needs_gradient(output) for output in outputs):
        what = "its loss" if loss else "what it hands to the next stage"
        kinds = ", ".join(f"{output.dtype} {list(output.shape)}" for output in outputs)
        raise ValueError(
            f"stage {stage} and those before it would not train: {what} ({kinds or 'no tensor'}) has no "
            "gradient; is it detached, or an integer?"
        )


def check_batch_norms(module: nn.Module, stage: int, dp_group: dist.ProcessGroup | None) -> None:
    """Refuse a SyncBatchNorm over other ranks than the stage's replicas: it would wait for other stages for ever."""
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm) and (dp_group is None or part.process_group is not dp_group):
            raise ValueError(
                f"stage {stage}: {name} is a SyncBatchNorm over another group than dp_group, whose ranks run other "
                "stages or other micro-batches: make it with process_group=dp_group, or use BatchNorm"
            )


def pairs(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The (input, target) micro-batches of a stream. Raises ValueError for one that is no pair, and no stream."""
    if not isinstance(batches, Iterable):
        raise ValueError(f"the stream is a {type(batches).__name__}: give an iterable of pairs (input, target)")
    for pair in batches:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise ValueError(f"the stream gave a {type(pair).__name__}: give pairs (input, target)")
        yield pair[0], pair[1]


class OneRunAtATime:
    """Refuses what is asked of a pipeline in mid-stream (from a stream, a hook or on_loss) and needs it drained."""

    def __init__(self) -> None:
        self._runs = False

    def check(self, what: str) -> None:
        """Raises ValueError while a stream runs; `what` was asked for."""
        if self._runs:
            raise ValueError(
                f"{what} while a stream runs, whose micro-batches in flight are in no state: end the run before (a "
                "stream may end at any micro-batch), then go on with another"
            )

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Around a stream; also after an error the next may run."""
        self.check(what)
        self._runs = True
        try:
            yield
        finally:
            self._runs = False


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode; afterwards, also after an error, every module inside has the mode that it had."""
    modes: list[tuple[nn.Module, bool]] = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_pause(clipping: ClipNorm | None, schedule: PipelineSchedule | Program) -> None:
    """Refuse to leave micro-batches in flight where there are none, or where stages wait for one another's norms.

    Raises:
        ValueError: naming what to choose.
    """
    if isinstance(schedule, Program) or schedule.flushed:
        name = "a Program" if isinstance(schedule, Program) else repr(schedule.name)
        raise ValueError(f"drain=False with {name}, which ends drained by itself: leave drain out")
    apart = schedule.distance_in_updates
    if clipping is None or clipping.scope == "stage" or not apart:
        return
    if clipping.first_wait or clipping.lag_updates < apart:
        raise ValueError(
            f"drain=False with clip of scope='model', lag_updates={clipping.lag_updates} and "
            f"first_wait={clipping.first_wait}: stages that pause at different updates would wait for one another's "
            f"norms; choose lag_updates={apart} with first_wait=False, scope='stage', or drain=True"
        )


def check_model_norm(clipping: ClipNorm | None, schedule: PipelineSchedule | Program) -> None:
    """Refuse clipping by the whole model's norm where stages update after different micro-batches: there is none."""
    if clipping is None or clipping.scope == "stage" or isinstance(schedule, PipelineSchedule):
        return
    groups = {tuple(own for _, own in schedule.versions(stage)) for stage in range(schedule.num_stages)}
    if len(groups) > 1:
        raise ValueError(
            "clip with scope='model': this program's stages update after different micro-batches, so that no gradient "
            "is the whole model's; choose scope='stage', or put the updates after the same micro-batches"
        )
