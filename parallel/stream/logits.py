"""Logits that are computed where somebody reads them: an evaluation that only wants the loss pays nothing for them.

transformers returns logits with the loss, and evaluation loops look at them, or do not. LazyLogits is a tensor of their
shape that holds the last hidden states; the first operation on it computes them, and a slice of tokens computes those
alone. Operations that only ask for shape, dtype or device compute nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fourfold.parallel.stream.patching import tensor_without_memory, untouched

Compute = Callable[[Tensor], Tensor]
# What may be asked of a tensor without its values.
PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "itemsize")
METADATA = frozenset(vars(Tensor.__base__)[name].__get__ for name in PROPERTIES) | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.__hash__,
}  # fmt: skip


class LazyLogits(Tensor):
    """[B, T, V], not yet computed: by the weights that there are when it is, and without a gradient if made without.

    Args:
        hidden: [B, T, d], the last layer's output.
        compute: gives the logits [..., V] of some of them.
        width: V. dtype: of the logits.
    """

    hidden: Tensor
    compute: Compute
    differentiable: bool
    _whole: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, compute: Compute, width: int, dtype: torch.dtype) -> "LazyLogits":
        made: LazyLogits = tensor_without_memory(cls, (*hidden.shape[:-1], width), dtype, hidden.device)
        made.hidden, made.compute, made._whole = hidden, compute, None
        made.differentiable = torch.is_grad_enabled()
        return made

    def __init__(self, hidden: Tensor, compute: Compute, width: int, dtype: torch.dtype) -> None:
        super().__init__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def whole(self) -> Tensor:
        """The logits as a plain tensor, computed once."""
        if self._whole is None:
            self._whole = self._of(self.hidden)
        return self._whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, LazyLogits):
            if func in METADATA:
                with untouched():
                    return func(*args, **(kwargs or {}))
            if func is Tensor.__getitem__ and first._whole is None and _of_tokens(args[1]):
                return first._part(args[1])
            if func is Tensor.detach and first._whole is None:
                with torch.no_grad():
                    return LazyLogits(first.hidden.detach(), first.compute, first.shape[-1], first.dtype)
        with untouched():
            return func(*_computed(args), **_computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Operations that come another way than by torch's Python functions: collectives, for example."""
        return func(*_computed(args), **_computed(kwargs or {}))

    def _part(self, index: Any) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            hidden = self.hidden[index]
            if hidden.dim() != 3:
                return self._of(hidden)
            return LazyLogits(hidden, self.compute, self.shape[-1], self.dtype)

    def _of(self, hidden: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.compute(hidden)


def _of_tokens(index: Any) -> bool:
    """Whether an index takes rows and tokens only, and all of the vocabulary."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(part, int | slice) for part in parts) or len(parts) > 3:
        return False
    return len(parts) < 3 or parts[2] == slice(None)


def _computed(values: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.whole, values)
