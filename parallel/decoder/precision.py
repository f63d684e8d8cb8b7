"""In which dtypes a decoder is stored and computed, said by a word.

What a config or a folder stores is no choice of training: a bf16 checkpoint trained in bf16 loses most updates at usual
learning rates, because a bf16 weight changes only in steps of 1/256 of itself. So weights become fp32 masters unless
another word is given, and products run in bf16 where the device is made for them.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fourfold.parallel.decoder.limits import PRECISIONS


@dataclass(frozen=True, slots=True)
class Precision:
    """What a word of PRECISIONS means.

    Attributes:
        name: the word.
        weights: of parameters, gradients and optimizer states.
        products: what matrix products run in, where that is not `weights`: autocast, or FSDP2's mixed precision.
        fp8: whether the factors of the layers' products are rounded to fp8 before (decoder.float8).
        emulated: whether that is computed without a device's own products in fp8.
    """

    name: str
    weights: torch.dtype
    products: torch.dtype | None = None
    fp8: bool = False
    emulated: bool = False


_MEANINGS = {
    "fp32": Precision("fp32", torch.float32),
    "bf16-mixed": Precision("bf16-mixed", torch.float32, torch.bfloat16),
    "bf16": Precision("bf16", torch.bfloat16),
    "fp64": Precision("fp64", torch.float64),
    "fp8": Precision("fp8", torch.float32, torch.bfloat16, fp8=True),
    "fp8-emulated": Precision("fp8-emulated", torch.float32, torch.bfloat16, fp8=True, emulated=True),
}
assert tuple(_MEANINGS) == PRECISIONS
_OF_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16-mixed"}


def chosen_precision(precision: str | None, dtype: torch.dtype | None, model: nn.Module, device_type: str) -> Precision:
    """The precision of a training, from what was asked.

    Args:
        precision: a word of PRECISIONS; None or "auto" for the device's: fp32 on a CPU, bf16-mixed on CUDA. A model
            that was made fp64 by hand (`model.double()`, where its config stores another dtype) stays fp64.
        dtype: the older way to say it, what matrix products run in: torch.bfloat16 for bf16-mixed, torch.float32.
        model: looked at for fp64 weights only.
    Raises:
        ValueError: another word or dtype, or two that disagree.
    """
    if precision == "auto":
        precision = None
    if dtype is not None and dtype not in _OF_DTYPE:
        raise ValueError(f"dtype={dtype} is not supported (float16 needs loss scaling): use torch.bfloat16 or None")
    if precision is not None and precision not in _MEANINGS:
        raise ValueError(f"precision={precision!r}: choose one of auto, {', '.join(PRECISIONS)}")
    if dtype is not None:
        by_dtype = _OF_DTYPE[dtype]
        if precision not in (None, by_dtype):
            raise ValueError(f"precision={precision!r} with dtype={dtype}, which means {by_dtype!r}: give one of them")
        precision = by_dtype
    if precision is None:
        made_fp64 = any(p.dtype == torch.float64 and not p.is_meta for p in model.parameters())
        stored = str(getattr(cast(Any, model).config, "dtype", None)).removeprefix("torch.")
        of_device = "bf16-mixed" if device_type == "cuda" else "fp32"
        precision = "fp64" if made_fp64 and stored != "float64" else of_device
    return _MEANINGS[precision]


@torch.no_grad()
def store_weights_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert floating-point parameters, whose objects stay; buffers (rotary tables) stay in the dtype they have.

    Cost: a second copy of the largest parameter for a moment.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
