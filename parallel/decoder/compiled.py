"""torch.compile of each decoder layer, as torchtitan does it.

The layers of a decoder share their code, so the compiler works once for all of them, in seconds; what is around them
(sharding, gradient buckets, checkpoints, pipelines) stays plain torch and works as without a compiler. A ring's
messages are no business of a compiler's either: its attention runs between two compiled halves of the layer.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import AttentionInterface

from fourfold.parallel.decoder.choice import Choice
from fourfold.parallel.decoder.limits import FORMS, RUNTIME, DecoderFacts, broken
from fourfold.parallel.ring.transformers import NAME as RING

BACKEND = "inductor"


def chosen_backend(compile: bool | str | None, device_type: str, layout: Choice) -> str | None:
    """The compiler of a stage's layers; None for none.

    Args:
        compile: True for inductor, or a backend's name for torch.compile; False for none; None for inductor where it is
            of use: on CUDA with Triton, and where the table of limits allows it in `layout`.
    Raises:
        ValueError: a name that torch.compile does not know.
    """
    if compile is None:
        allowed = not any(broken((*FORMS, *RUNTIME), DecoderFacts(), replace(layout, compile=True)))
        return BACKEND if device_type == "cuda" and allowed and _has_triton() else None
    if compile is False:
        return None
    backend = BACKEND if compile is True else compile
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"compile={compile!r}: choose true, false, or one of torch's backends: {', '.join(known)}")
    return backend


def compile_layer(layer: nn.Module, backend: str, *, rounds: bool = False) -> None:
    """Let calls of `layer` run compiled; its parameters and their names stay. FSDP2's hooks may be added later.

    Args:
        rounds: whether inductor rounds between fused operators as it would between single ones. Without, scales of fp8
            follow values that were never rounded, and losses became NaN (pytorch/pytorch issue 150859).

    Cost: seconds at the first forward and backward, once for all layers of one kind and each shape.
    """
    forward = AttentionInterface()._global_mapping.get(RING)
    if forward is not None and not hasattr(forward, "_torchdynamo_disable"):
        AttentionInterface.register(RING, torch.compiler.disable(forward))  # type: ignore[no-untyped-call]
    options = {"emulate_precision_casts": True} if rounds and backend == BACKEND else None
    layer.compile(backend=backend, options=options)


def _has_triton() -> bool:
    """Whether inductor can compile for this GPU: Triton is installed, and the device is new enough for it."""
    from torch.utils._triton import has_triton

    return bool(has_triton())
