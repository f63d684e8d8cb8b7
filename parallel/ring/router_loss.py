"""A mixture of experts' load-balancing loss over the tokens of all ranks.

The loss is num_experts * sum over experts of (share of the tokens that choose it) * (mean probability of it): a product
of two means over all tokens, so the sum of the ranks' own is another number. The shares have no gradient and are
summed over the group; with them each rank's probabilities give its part of the loss, exactly, and with its gradient.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.communication import place_in
from fourfold.parallel.ring.options import RingSettings
from fourfold.parallel.sequence.sharding import shard_ranges
from fourfold.parallel.sequence.tensors import document_ends, indices

REFUSAL = "set output_router_logits=False, or call stream_backprop(model) too, which sums it over the ring"


# Models that were seen to have the loss that this file knows.
_known: WeakSet[nn.Module] = WeakSet()


def ring_router_loss(model: nn.Module, output: Any, arguments: Mapping[str, Any], settings: RingSettings) -> Any:
    """A model's output with this rank's part of the whole sequence's load-balancing loss in place of its own tokens'.

    Args:
        output: what the model gave, with aux_loss and router_logits; where it has no router_logits (a streaming
            model), its aux_loss is the ring's already.
        arguments: of the call; all of the group's ranks have called.
    Raises:
        ValueError: the model's loss is not the one that this file knows.
    Cost: one all-reduce of num_experts + 1 numbers. A model's first loss is compared, for which the host waits on CUDA.
    """
    if isinstance(output, tuple):
        raise ValueError(f"output_router_logits with return_dict=False around a ring: {REFUSAL}")
    logits, own = getattr(output, "router_logits", None), getattr(output, "aux_loss", None)
    if logits is None or own is None:
        return output
    routers = [layer for layer in logits if layer is not None]
    num_experts = routers[0].shape[-1]
    top_k = int(_first_number(model, ("num_experts_per_tok", "top_k", "moe_top_k")))
    everything = routers[0].new_ones(routers[0].shape[0], dtype=torch.bool)
    coefficient = _first_number(model, ("router_aux_loss_coef", "aux_loss_coef"))
    if model not in _known:
        _check_formula(model, own, routers, top_k, everything)
        _known.add(model)
    real = _real_tokens(everything, arguments, settings)
    chosen, probability = _sums(routers, top_k, real)
    totals = torch.cat([chosen, (len(routers) * real.sum()).to(chosen.dtype)[None]]).detach()
    dist.all_reduce(totals, group=settings.group)
    chosen, rows = totals[:-1], totals[-1]
    part = num_experts * (chosen / rows * probability / rows).sum()
    if output.loss is not None:
        output.loss = output.loss + coefficient * (part - own).to(output.loss.device)
    output.aux_loss = part
    return output


def _check_formula(model: nn.Module, own: Tensor, routers: list[Tensor], top_k: int, everything: Tensor) -> None:
    """The same formula on this rank's tokens alone, all of them, must give what the model gave."""
    chosen, probability = _sums(routers, top_k, everything)
    rows = len(routers) * len(everything)
    known = routers[0].shape[-1] * (chosen / rows * probability / rows).sum()
    if not bool((own - known).abs() <= 1e-3 * known.abs()):
        raise ValueError(
            f"{type(model).__name__} has a load-balancing loss of its own ({float(own):.6g}, not {float(known):.6g}), "
            f"which each rank would make of its own tokens: {REFUSAL}"
        )


def _sums(routers: list[Tensor], top_k: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """(choices, probability) of each expert, summed over layers and real tokens; [num_experts] each."""
    num_experts = routers[0].shape[-1]
    choices = probability = torch.zeros((), device=routers[0].device)
    for logits in routers:
        weights = logits.to(routers[0].device).softmax(-1)
        chosen = torch.zeros_like(weights, dtype=torch.float32).scatter_(1, weights.topk(top_k, dim=-1).indices, 1.0)
        choices = choices + (chosen * real[:, None]).sum(0)
        probability = probability + (weights.float() * real[:, None]).sum(0)
    assert choices.shape == (num_experts,)
    return choices.detach(), probability


def _real_tokens(everything: Tensor, arguments: Mapping[str, Any], settings: RingSettings) -> Tensor:
    """Which of this rank's tokens [B*S_local] lie in a document: padding past the last end is not routed for."""
    ends = document_ends(arguments.get("ring_cu_seqlens"))
    if ends is None:
        return everything
    place, sharding = place_in(settings.group), settings.options.sharding
    shard = shard_ranges(arguments["ring_seq_len"], place.size, sharding, ends)[place.rank]
    return indices(shard, everything.device) < ends[-1]


def _first_number(model: nn.Module, names: tuple[str, ...]) -> float:
    """The first of these that the model or its config has."""
    for name in names:
        for holder in (model, getattr(model, "config", None)):
            value = getattr(holder, name, None)
            if isinstance(value, int | float):
                return value
    raise ValueError(f"{type(model).__name__} has none of {', '.join(names)}: {REFUSAL}")
