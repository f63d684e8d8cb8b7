"""First weights of a model that no rank could hold whole.

A model built under `torch.device("meta")` has shapes and no storage. Its modules get storage and weights one at a time,
on the rank that keeps them, and are sharded before the next is made. Each module draws from a generator seeded by its
name, so the weights are the same under every layout. transformers' own `_init_weights` says what is drawn.
"""

from typing import Any, cast
from zlib import crc32

import torch
from torch import nn

from fourfold.parallel.decoder.adapters import draw_adapters, drawn_adapters
from fourfold.parallel.decoder.precision import store_weights_in


def materialise(
    module: nn.Module, name: str, model: nn.Module, *, seed: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Give `module` storage on `device`, and weights where it is on the meta device.

    Args:
        module: a part of `model`, changed in place.
        name: its name in `model`, which seeds its weights.
        model: a transformers model, asked only how its modules are initialised.
        seed: of the whole model.
        dtype: of the parameters. Weights are drawn in fp32, so that they are the same numbers in each dtype, rounded.
    Cost: no communication; at most the module's own size in host memory.
    """
    adapted = drawn_adapters(module)
    for path, part in module.named_modules():
        cast_by_hand = _widen_buffers(part)
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if cast_by_hand or any(tensor.is_meta for tensor in own):
            for parameter in part.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
            part.to_empty(device="cpu", recurse=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(crc32(f"{seed} {name} {path}".encode()))
                cast(Any, model)._init_weights(part)
    draw_adapters(adapted, name, seed)
    store_weights_in(module, dtype)
    module.to(device)


def _widen_buffers(part: nn.Module) -> bool:
    """Make room for what `part` computes from the config alone, in fp32; whether there was less.

    transformers has a rotary embedding's frequencies in fp32 whatever a model is stored in. After `model.to(dtype)`
    they are rounded to that dtype, and far positions are others.
    """
    computed = part._non_persistent_buffers_set
    narrow = [name for name in computed if part.get_buffer(name).is_floating_point()]
    narrow = [name for name in narrow if part.get_buffer(name).dtype.itemsize < 4]
    if not narrow or next(part.parameters(recurse=False), None) is not None:
        return False
    for name in narrow:
        part.register_buffer(name, part.get_buffer(name).float(), persistent=False)
    return True
