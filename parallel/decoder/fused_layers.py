"""Liger-Kernel's norm, rotary embedding and gated activation in layers that no compiler and no streaming fuses.

On a GPU each of these is some ten kernels in a model's own code; stream.fused takes Liger's in their places, for
kinds of modules of which they were found to compute the same. Not yet run on a GPU.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from torch import nn

from fourfold.parallel.decoder.choice import SELECTIVE, STREAM, ZERO_BUBBLE, Choice
from fourfold.parallel.stream.fused import liger
from fourfold.parallel.stream.patching import Patches, Rotary, fused_rotary


def use_fused(layers: Iterable[nn.Module], layout: Choice) -> None:
    """Let the layers run with fused kernels from now on, where they are installed and the layout allows it.

    Not where StreamBP has the layers, which takes them by itself; where tp has made their weights DTensors; where
    products are in fp8, of which a few rows cannot be tried; nor under zero-bubble, which takes a backward apart that
    is one kernel here.
    Under selective checkpointing the rotary embedding stays plain: its kernel overwrites queries and keys, which are
    the outputs that such a layer keeps.

    Args:
        layers: of a decoder, with their weights, uncompiled.
    """
    kernels = liger()
    elsewhere = layout.checkpointing == STREAM or layout.schedule == ZERO_BUBBLE
    if kernels is None or elsewhere or layout.tp > 1 or layout.fp8:
        return
    patches = Patches()
    for layer in layers:
        kernels.replace_in(layer, patches)
        attention = cast(nn.Module, layer.self_attn)
        rotary = None if layout.checkpointing == SELECTIVE else kernels.rotary(attention)
        if rotary is not None:
            patches.add(attention, partial(_rotated, rotary))


def _rotated(rotary: Rotary, plain: Any, *args: Any, **kwargs: Any) -> Any:
    with fused_rotary(rotary):
        return plain(*args, **kwargs)
