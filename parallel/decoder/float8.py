"""Matrix products of decoder layers in fp8, by torchao: which matrices, which recipe, and where a device has them.

Weights, gradients and optimizer states are bf16-mixed's fp32; each product of a layer's nn.Linear rounds its two
factors to fp8 first. Embedding, norms, attention, head and peft's small matrices stay as in bf16-mixed.

The recipe is torchao's "rowwise", torchtitan's default: e4m3 throughout, a scale for each row and column that is
summed over, rounded down to a power of two. A row's scale depends on no other row, so what a token gets is the same
however a layout cuts the batch; "tensorwise" is faster, but one scale for a whole micro-batch makes each token's
rounding depend on its neighbours. Weights are gathered and gradients reduced as in bf16-mixed.

Source: torchtitan/components/quantization/float8.py; Micikevicius et al. 2022 (arXiv 2209.05433) for the formats.
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel.decoder.adapters import is_adapter
from fourfold.parallel.decoder.choice import Choice
from fourfold.parallel.decoder.facts import DecoderFacts
from fourfold.parallel.decoder.fp8_limits import FP8_PACKED, MULTIPLE
from fourfold.parallel.decoder.precision import Precision
from fourfold.parallel.stream.gradients import autocast_now
from fourfold.parallel.stream.patching import hooks_of

RECIPE = "rowwise"


def refuse_without_fp8(stored: Precision, device_type: str) -> None:
    """Refuse fp8 where it cannot run.

    Raises:
        ValueError: torchao is not installed; or the device has no products in fp8 and no emulation was asked for.
    """
    if not stored.fp8:
        return
    if find_spec("torchao") is None:
        raise ValueError(f"precision={stored.name!r} needs torchao: pip install 'torchao>=0.18'")
    if not stored.emulated and not _has_fp8(device_type):
        name = torch.cuda.get_device_name() if device_type == "cuda" else device_type
        raise ValueError(
            f"precision='fp8' on {name}, which has no products in fp8 (NVIDIA: compute capability 8.9 and later): "
            "choose 'bf16-mixed', or 'fp8-emulated' for the same roundings in slower products"
        )


def use_fp8(layer: nn.Module, stored: Precision) -> None:
    """Replace every nn.Linear of a decoder layer but adapters' by torchao's Float8Linear, in place.

    Parameters stay the objects that they are, under their names; so this comes before an axis or a compiler wraps them.

    Args:
        layer: a decoder layer with its weights; every matrix's sides in multiples of 16 (decoder.limits).
    Raises:
        ValueError: a module that is more than an nn.Linear, which torchao would turn into a plain one.
    Cost: in a step each factor of each product is read twice more and written once, unless a compiler fuses that.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not is_adapter(name) and not _is_plain(module):
            raise ValueError(
                f"{name} is a {type(module).__name__} with code of its own (a subclass, a replaced forward, or hooks), "
                "which fp8 would pass by: take that off, or choose precision='bf16-mixed'"
            )
    config = replace(Float8LinearConfig.from_recipe_name(RECIPE), emulate=stored.emulated)
    convert_to_float8_training(layer, config=config, module_filter_fn=lambda _, name: not is_adapter(name))
    if stored.emulated:
        for module in layer.modules():
            if type(module).__name__ == "Float8Linear":
                module.register_forward_pre_hook(_autocast_input)


def _is_plain(module: nn.Linear) -> bool:
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not hooks_of(module)


def trouble_with_tokens(mesh: DeviceMesh, stored: Precision, shape: tuple[int, int], *, packed: bool) -> str:
    """Why a micro-batch of so many (sequences, tokens of each) cannot be trained on in fp8; empty where it can."""
    rows, seq_len, cp = *shape, mesh["cp"].size()
    if not stored.fp8:
        return ""
    if packed and cp > 1:
        return FP8_PACKED.told(DecoderFacts(), Choice(cp=cp))
    even = cp == 1 or seq_len % (2 * cp) == 0
    if even and rows * seq_len // cp % MULTIPLE == 0:
        return ""
    return (
        f"a micro-batch of {rows} x {seq_len} tokens over cp={cp} with precision={stored.name!r}: a rank's part must "
        f"be a multiple of {MULTIPLE} tokens; choose another micro_batch or length"
    )


def _autocast_input(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What F.linear does to its input under autocast; Float8Linear does it under CUDA's only."""
    x: Tensor = given[0]
    autocast = autocast_now(x.device.type)
    return given if autocast is None else (x.to(autocast[1]), *given[1:])


def _has_fp8(device_type: str) -> bool:
    if device_type != "cuda":
        return False
    return torch.cuda.get_device_capability() >= ((9, 4) if torch.version.hip else (8, 9))
