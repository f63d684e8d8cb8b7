"""Training state on disk, readable under any layout.

torch.distributed.checkpoint does the work: each rank writes its own part, and a reader of another layout finds its part
by name. Here is only what makes a stop at any moment safe: a checkpoint is written beside its place and renamed when
it is whole, and the one before it stays until then.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from fourfold.parallel import ParallelModel

_LAYER = re.compile(r"model\.model\.layers\.(\d+)\.")
_NAME = re.compile(r"step_(\d{8})")
# Names instead of positions, so that stages and shards of another layout find their part.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(folder: Path, model: ParallelModel, optimizer: Optimizer, *, step: int) -> Path:
    """Write `folder/step_XXXXXXXX`; every rank calls. Older checkpoints but the last before this are removed.

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
    save({"model": weights, "optimizer": states, "step": step}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        for old in _complete(folder)[:-2]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load_checkpoint(folder: Path, model: ParallelModel, optimizer: Optimizer) -> int:
    """Load the newest checkpoint of `folder` into model and optimizer; every rank calls.

    Returns:
        The step it was written after.
    Raises:
        ValueError: there is none, or it is of another model.
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
    state: dict[str, Any] = {"model": weights, "optimizer": states, "step": 0}
    try:
        load(state, checkpoint_id=complete[-1])
    except Exception as error:
        # DCP wraps whatever happened on any rank; the first line tells which key or file.
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(f"{complete[-1]} does not fit this model: {reason}") from error
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
