"""Training state on disk, readable under any layout.

torch.distributed.checkpoint does the work: each rank writes its own part, and a reader of another layout finds its part
by name. Here is only what makes a stop at any moment safe: a checkpoint is written beside its place and renamed when
it is whole, and the one before it stays until then.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from fourfold.parallel.decoder.stage import DecoderStage

_LAYER = re.compile(r"model\.model\.layers\.(\d+)\.")
_NAME = re.compile(r"step_(\d{8})")
_RATIO = "updates_per_step"
# Names instead of positions, so that stages and shards of another layout find their part.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class HasStage(Protocol):
    """A ParallelModel, or this rank's stage of an asynchronous pipeline."""

    stage: DecoderStage


def save_checkpoint(
    folder: Path,
    model: HasStage,
    optimizer: Optimizer,
    *,
    step: int,
    updates_per_step: int = 1,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step_XXXXXXXX`; every rank calls. Older checkpoints but the last before this are removed.

    Args:
        updates_per_step: more than one where a step's micro-batches update one by one.
        extra: further tensors, under names that no other stage uses.
    Returns:
        The checkpoint's path, complete on return.
    Cost: each weight and optimizer state is written once over all ranks.
    """
    target = folder / f"step_{step:08d}"
    partial = folder / f"partial_{step:08d}"
    if dist.get_rank() == 0:
        for interrupted in folder.glob("partial_*"):
            shutil.rmtree(interrupted)
    dist.barrier()
    weights, states = get_state_dict(model.stage, optimizer, options=_OPTIONS)
    state = {"model": weights, "optimizer": states, "step": step, _RATIO: updates_per_step, "extra": dict(extra or {})}
    save(state, checkpoint_id=partial)
    if dist.get_rank() == 0:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        for old in _complete(folder)[:-2]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load_checkpoint(
    folder: Path,
    model: HasStage,
    optimizer: Optimizer,
    *,
    updates_per_step: int = 1,
    extra: dict[str, Tensor] | None = None,
) -> int:
    """Load the newest checkpoint of `folder` into model and optimizer; every rank calls.

    Args:
        extra: tensors to fill; those that the checkpoint has not are taken out.
    Returns:
        The step it was written after.
    Raises:
        ValueError: there is none, or it is of another model, or of a run with other updates a step (their
        hyper-parameters and counts differ).
    """
    complete = _complete(folder)
    if not complete:
        raise ValueError(f"{folder} holds no complete checkpoint: train without --resume first")
    # torch reads the names it is asked for and passes over the rest, so a deeper model would load without a word.
    names = FileSystemReader(complete[-1]).read_metadata().state_dict_metadata
    num_layers = len({match[1] for name in names if (match := _LAYER.match(name))})
    if num_layers != model.stage.num_layers:
        raise ValueError(f"{complete[-1]} is of a model of {num_layers} layers, but this has {model.stage.num_layers}")
    weights, states = get_state_dict(model.stage, optimizer, options=_OPTIONS)
    extra = {} if extra is None else extra
    for name in [name for name in extra if f"extra.{name}" not in names]:
        del extra[name]
    state: dict[str, Any] = {"model": weights, "optimizer": states, "step": 0, "extra": extra}
    state |= {_RATIO: 1} if _RATIO in names else {}
    try:
        load(state, checkpoint_id=complete[-1])
    except Exception as error:
        # DCP wraps whatever happened on any rank; the first line tells which key or file.
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(f"{complete[-1]} does not fit this model: {reason}") from error
    if state.get(_RATIO, 1) != updates_per_step:
        raise ValueError(
            f"{complete[-1]} was written with {state.get(_RATIO, 1)} updates a step, and this layout makes "
            f"{updates_per_step}: keep its schedule, dp and micro_batch, or start anew"
        )
    set_state_dict(model.stage, optimizer, model_state_dict=weights, optim_state_dict=states, options=_OPTIONS)
    return int(state["step"])


def refuse_overwriting(folder: Path) -> None:
    """Raises ValueError where `folder` holds checkpoints of an earlier run: a new one would replace them."""
    complete = _complete(folder)
    if complete:
        raise ValueError(f"{folder} holds {complete[-1].name} of an earlier run: add --resume, or give another --out")


def _complete(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / ".metadata").exists())
