"""Selective checkpointing: of a layer, what is dear to compute is kept, and what is cheap is computed again.

torch.utils.checkpoint keeps a layer's input and runs the layer again in backward. With a policy for single operators
the outputs of matrix products and of attention stay as well, so that only norms, rotary embeddings, the activation and
the residual sums between them run again: most of the memory of "none" goes, for a few percent of its time.

Source: torch.utils.checkpoint.create_selective_checkpoint_contexts; torchtitan's "selective, op" has the same list.
Megatron's word "selective" (Korthikanti et al. 2022) is another thing: it computes attention's scores again, which
kernels that never store them have made pointless.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_KEPT_NAMES = (
    "mm", "addmm", "bmm", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
KEPT = frozenset(getattr(_aten, name).default for name in _KEPT_NAMES if hasattr(_aten, name))
"""Operators whose outputs a layer keeps."""


def run_selectively(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """`layer(hidden, **arguments)` that keeps its input and the outputs of KEPT.

    Args:
        hidden: [B, S, hidden].
    Cost: the operators that are not kept run twice.
    """
    output: Tensor = checkpoint(
        layer,
        hidden,
        use_reentrant=False,
        preserve_rng_state=False,  # no randomness in a supported layer
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
        **arguments,
    )
    return output


def _policy(_: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
