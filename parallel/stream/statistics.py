"""What losses need of each token of a streaming model: log-probability, lse and mean of the logits, never the logits.

autograd through these few numbers a token gives the gradient that the streamed backward starts from, so any loss of
them streams (losses.py has the usual ones).
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.utils import ModelOutput

from fourfold.parallel.stream.checks import causal_lm
from fourfold.parallel.stream.patching import ATTRIBUTE


@dataclass
class TokenStatistics(ModelOutput):  # type: ignore[misc]
    """What losses need of each token, [B, T] in fp32, differentiable. Entry t scores the prediction of token t+1.

    Attributes:
        logprobs: log-probability of the label; 0 where there is none.
        logsumexp: lse of the logits; 0 there.
        mean_logits: the logits' mean over the vocabulary; 0 there.
        mask: bool, where there is a label.
        aux_loss: a mixture of experts' load-balancing loss, where output_router_logits asked for it.
    """

    logprobs: Tensor | None = None
    logsumexp: Tensor | None = None
    mean_logits: Tensor | None = None
    mask: Tensor | None = None
    aux_loss: Tensor | None = None


def token_logprobs(model: nn.Module, input_ids: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
    """log p(label t+1 | tokens up to t) at entry t, differentiable, logits never whole.

    Args:
        model: streaming (stream_backprop), also inside DDP, FSDP2 or peft.
        input_ids: [B, T]. labels: [B, T], not shifted, -100 where none is wanted: those cost no logits.
        arguments: the model's others: attention_mask, position_ids.
    Returns:
        [B, T], fp32; 0 where there is no label, and in the last entry.
    Raises:
        ValueError: the model does not stream, or does not end in a plain norm and projection.
    Cost: the head's logits once more than the fused loss of `model(input_ids, labels=labels)`.
    """
    return cast(Tensor, token_statistics(model, input_ids, labels, **arguments).logprobs)


def token_statistics(model: nn.Module, input_ids: Tensor, labels: Tensor, **arguments: Any) -> TokenStatistics:
    """token_logprobs with lse and mean of the logits, which z-loss and label smoothing need. Args: as there."""
    if ATTRIBUTE not in causal_lm(model).__dict__:
        raise ValueError("the model does not stream: call stream_backprop(model) first")
    out = model(input_ids=input_ids, labels=labels, return_token_statistics=True, **arguments)
    if not isinstance(out, TokenStatistics):
        raise ValueError(f"{type(model).__name__} has a head of its own: token statistics need a causal language model")
    return out
