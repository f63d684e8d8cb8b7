"""Rotary embeddings whose frequencies depend on the length of the sequence, given the whole length on every rank.

longrope and dynamic NTK take the length from the largest position id of a call, and a shard's is not the sequence's. So
the call gets one position more, the largest of all ranks, and what it computes for that one is dropped.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# A position beyond any that a model was made for.
FAR = 1 << 24


def depends_on_length(rotary: nn.Module) -> bool:
    """Whether early tokens get another embedding when a late one is there too; tried on a copy."""
    if any(buffer.is_meta for buffer in rotary.buffers()):
        kinds = getattr(rotary, "rope_type", "default")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        return any("dynamic" in kind or kind == "longrope" for kind in kinds)
    x = torch.zeros(1, 1, 1, device=next((buffer.device for buffer in rotary.buffers()), None))
    positions = torch.tensor([[0, 1, 2, FAR]], device=x.device)
    for arguments in _layer_types(rotary):
        short, long = (_flat(copy.deepcopy(rotary)(x, given, **arguments)) for given in (positions[:, :3], positions))
        if any(not torch.equal(a, b[..., :3, :]) for a, b in zip(short, long, strict=True)):
            return True
    return False


def give_whole_length(rotary: nn.Module, largest_position: Callable[[], int]) -> list[RemovableHandle]:
    """Make calls of `rotary` see `largest_position()` beside their own positions; returns what undoes it."""

    def extend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        last = positions.new_full((*positions.shape[:-1], 1), largest_position())
        positions = torch.cat([positions, last], dim=-1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def drop(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output[..., :-1, :]
        return type(output)(part[..., :-1, :] for part in output)

    return [rotary.register_forward_pre_hook(extend, with_kwargs=True), rotary.register_forward_hook(drop)]


def _layer_types(rotary: nn.Module) -> list[dict[str, Any]]:
    """Arguments of the calls that a model makes of it: one, or one for each type of layer."""
    kinds = getattr(rotary, "rope_type", None)
    return [{"layer_type": kind} for kind in kinds] if isinstance(kinds, dict) else [{}]


def _flat(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)
