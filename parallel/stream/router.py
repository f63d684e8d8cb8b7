"""A mixture of experts' load-balancing loss, exact over a sequence that goes through its layers in chunks.

The loss is num_experts * sum_e f_e * P_e: f_e is the part of all tokens, over all layers, that chose expert e, P_e the
mean probability that the routers gave it. f_e has no gradient, so the loss is linear in the probabilities: each layer
gives their sum and the counts over its chunks, the loss is made of these few numbers once all are known, and its
gradient, one number an expert, goes back to every chunk beside the layer's own. The mean is over all tokens, never of
means over chunks. transformers keeps every layer's router logits over the whole sequence for the same; a caller who
makes a loss of his own of them gets those of all chunks in one tensor.

Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6, as transformers' load_balancing_loss_func has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.communication import Place
from fourfold.parallel.stream.calls import BaseCall


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What one pass over a batch gathers of a model's routers.

    Attributes:
        router: class of the modules that choose experts, and `index`: the place of the logits in what they return.
        num_experts, top_k: of a layer.
        coefficient: of the loss in the model's.
        mask: [B, T], 0 at tokens that do not count; None counts all.
        whole: gather the routers' logits themselves instead of statistics.
        layers: for each layer that went forward, (sum of probabilities, tokens that chose), [num_experts] each; or with
            `whole`, (logits,), [B, T, num_experts].
    """

    router: type[nn.Module]
    index: int
    num_experts: int
    top_k: int
    coefficient: float
    mask: Tensor | None
    whole: bool = False
    layers: list[tuple[Tensor, ...]] = field(default_factory=list)

    def zeros(self, x: Tensor) -> tuple[Tensor, ...]:
        """What a layer's chunks are added to: (sum of probabilities, tokens that chose), or (logits [B, T, E],).

        Args:
            x: [B, T, d], the layer's input.
        """
        if self.whole:  # fp32 holds the logits of any narrower dtype exactly
            dtype = torch.promote_types(x.dtype, torch.float32)
            return (torch.zeros((*x.shape[:2], self.num_experts), device=x.device, dtype=dtype),)
        return tuple(torch.zeros(self.num_experts, device=x.device) for _ in range(2))

    def add(self, totals: Sequence[Tensor], chunk: Sequence[Tensor], start: int) -> None:
        """Add what `statistics` gave for the chunk at token `start`."""
        for total, more in zip(totals, chunk, strict=True):
            place = total[:, start : start + more.shape[1]] if self.whole else total
            place += more

    def gradient(self, grads: Sequence[Tensor], chunk: Sequence[Tensor], start: int) -> tuple[Tensor, Tensor]:
        """(what of the chunk's statistics has a gradient, this gradient), given those of the totals."""
        grad = grads[0][:, start : start + chunk[0].shape[1]].to(chunk[0].dtype) if self.whole else grads[0]
        return chunk[0], grad

    def statistics(self, logits: Tensor, start: int, length: int) -> tuple[Tensor, ...]:
        """Of the chunk at token `start`, given its logits [B*length, num_experts].

        Returns:
            (sum of probabilities, tokens that chose); only the first has a gradient. With `whole`, the logits as
            [B, length, num_experts].
        """
        if self.whole:
            return (logits.reshape(-1, length, logits.shape[-1]),)
        probabilities = logits.softmax(-1)
        chosen = probabilities.detach().topk(self.top_k, dim=-1).indices.flatten()
        probabilities = probabilities.float()
        weights = torch.ones(len(logits), device=logits.device)
        if self.mask is not None:
            weights = self.mask[:, start : start + length].reshape(-1).to(weights)
            probabilities = probabilities * weights.unsqueeze(-1)
        counts = torch.zeros(self.num_experts, device=logits.device)
        counts.scatter_add_(0, chosen, weights.repeat_interleave(self.top_k))
        return probabilities.sum(0), counts

    def logits(self) -> tuple[Tensor, ...]:
        """Each layer's logits [B*T, num_experts] as transformers gives them, in fp32 where the model's are narrower."""
        found = tuple(logits.flatten(0, 1) for (logits,) in self.layers)
        self.layers.clear()  # they refer to the layers' graph, which refers to this
        return found

    def loss(self, place: Place | None = None) -> Tensor:
        """The load-balancing loss of all layers, a fp32 scalar.

        Args:
            place: in the cp group, over whose tokens the means are: this rank's loss is then its part, to be summed
                over the group. None: this rank's tokens are all.
        Cost: with a group, one all-reduce of num_experts numbers.
        """
        probabilities, counts = (torch.stack(parts).sum(0) for parts in zip(*self.layers, strict=True))
        if place is not None and place.size > 1:
            dist.all_reduce(counts, group=place.group)
        self.layers.clear()  # they refer to the layers' graph, which refers to this
        rows = (counts.sum() / self.top_k).clamp_min(1)
        return self.num_experts * (counts / rows * probabilities / rows).sum()


def asks_for_routing(model: Any, wanted: bool | None) -> bool:
    """Whether a call gives router logits or their loss: as it says, or else as the model's config does."""
    return bool(getattr(model.config, "output_router_logits", False) if wanted is None else wanted)


def routing_of(model: Any, mask: Tensor | None, *, whole: bool) -> Routing:
    """What to gather of the routers of a transformers model.

    Args:
        mask, whole: Routing's.
    Raises:
        ValueError: it has none.
    """
    recorder = (model._can_record_outputs or {}).get("router_logits")
    if recorder is None or not (whole or hasattr(model, "router_aux_loss_coef")):
        raise ValueError(f"output_router_logits: {type(model).__name__} has no routers; leave it out")
    config = model.config
    num_experts = getattr(model, "num_experts", None) or getattr(config, "num_local_experts", None)
    return Routing(
        router=recorder.target_class,
        index=recorder.index,
        num_experts=num_experts or config.num_experts,
        top_k=getattr(model, "num_experts_per_tok", None) or config.num_experts_per_tok,
        coefficient=getattr(model, "router_aux_loss_coef", 0.0),
        mask=mask,
        whole=whole,
    )


def why_no_router_logits(
    model: nn.Module, router: type[nn.Module] | None, call: BaseCall, *, around_a_ring: bool
) -> str | None:
    """Why whole router logits cannot be had of a call that has no labels; None where they can."""
    mend = "call without output_router_logits (TRL: router_aux_loss_coef=0.0), or with labels"
    if router is None:
        return f"output_router_logits: {type(model).__name__} has no routers; leave it out"
    if call.return_dict is False:
        return f"output_router_logits with return_dict=False: {mend}"
    if around_a_ring:
        return f"output_router_logits around a ring, where no rank has those of all tokens: {mend}"
    return None
