"""Losses of token log-probabilities: supervised, preference and reinforcement objectives as their papers write them.

Each takes what token_logprobs or token_statistics gives, [B, T] with a mask, so each streams: autograd through these
few numbers a token gives the gradient that the streamed backward starts from. TRL and Liger-Kernel fuse every
objective with the logits by hand; here none knows of logits. Masked tokens take no part, whatever they hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.parallel.stream.statistics import TokenStatistics


def sft_loss(
    statistics: TokenStatistics,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy, smoothed over the vocabulary, plus z_loss * lse^2; the (weighted) mean over labels.

    Args:
        statistics: of token_statistics.
        weights: [B, T], of each entry of the statistics; None is 1.
        label_smoothing: s in (1-s)*CE + s*mean over the vocabulary of -log p, as torch's cross_entropy.
        z_loss: coefficient of the squared log-partition (PaLM, arXiv 2204.02311, 1e-4 there).
        num_items: what the sum is divided by; None: the weights' sum.
    Returns:
        A scalar, fp32.
    Raises:
        ValueError: label_smoothing outside [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: give at least 0 and less than 1")
    logprobs, lse, mean, mask = (
        statistics.logprobs, statistics.logsumexp, statistics.mean_logits, statistics.mask,
    )  # fmt: skip
    assert logprobs is not None
    assert lse is not None
    assert mean is not None
    assert mask is not None
    token = -logprobs
    if label_smoothing:
        token = (1 - label_smoothing) * token + label_smoothing * (lse - mean)
    if z_loss:
        token = token + z_loss * lse.square()
    share = mask.to(token.dtype) if weights is None else weights * mask
    return (token * share).sum() / (share.sum() if num_items is None else num_items)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B]: the log-probability of each row's labels, the sum of its tokens'."""
    return (logprobs * mask).sum(-1)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, the mean over pairs of -log sigmoid(beta * margin).

    Args:
        chosen, rejected: [N], sequence_logprobs of the policy.
        reference_chosen, reference_rejected: [N] of the reference model, computed now or long ago; no gradient.
        beta: strength of the reference.
        label_smoothing: chance that a pair's label is wrong (conservative DPO), below 0.5.
    Returns:
        A scalar.
    Raises:
        ValueError: label_smoothing outside [0, 0.5).
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Mitchell's note on conservative DPO.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}: give at least 0 and less than 0.5")
    margin = beta * ((chosen - reference_chosen.detach()) - (rejected - reference_rejected.detach()))
    return -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).mean()


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
    per_sequence: bool = True,
) -> Tensor:
    """The clipped policy-gradient surrogate of PPO, with GRPO's per-token penalty against a reference.

    Args:
        logprobs, old_logprobs: [B, T] of the policy now and when it sampled (no gradient).
        advantages: [B] (GRPO: the group's standardised rewards) or [B, T] (PPO).
        mask: [B, T], the completions' tokens.
        clip: (low, high): the ratio is held within 1-low and 1+high.
        reference_logprobs: [B, T], for beta > 0.
        beta: weight of the KL estimate exp(r) - r - 1, r = reference - policy.
        per_sequence: mean over each row's tokens, then over rows (GRPO, equation 3); else over all tokens (DAPO).
    Returns:
        A scalar.
    Raises:
        ValueError: beta without reference_logprobs.
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Shao et al. 2024 (arXiv 2402.03300), equations 3, 4.
    """
    if beta and reference_logprobs is None:
        raise ValueError(f"beta={beta} without reference_logprobs: give them, or beta=0")
    gain = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    # Masked before exp: what masked entries hold may overflow, and 0 * inf is no 0.
    ratio = ((logprobs - old_logprobs.detach()) * mask).exp()
    token = -torch.minimum(ratio * gain, ratio.clamp(1 - clip[0], 1 + clip[1]) * gain)
    if beta:
        assert reference_logprobs is not None
        distance = (reference_logprobs.detach() - logprobs) * mask
        token = token + beta * (distance.exp() - distance - 1)
    share = mask.to(token.dtype)
    if per_sequence:
        return ((token * share).sum(-1) / share.sum(-1).clamp_min(1)).mean()
    return (token * share).sum() / share.sum().clamp_min(1)


def kto_loss(
    logprobs: Tensor,
    reference: Tensor,
    desirable: Tensor,
    divergence: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation: single answers, each good or bad; the mean of weight - value.

    Args:
        logprobs, reference: [N], sequence_logprobs of policy and reference model (no gradient to the latter).
        desirable: [N], bool.
        divergence: scalar, the estimate of KL(policy || reference) from mismatched pairs; held at 0 or above, and
            without gradient.
        beta: sharpness of the value function.
        desirable_weight, undesirable_weight: lambda_D and lambda_U.
    Returns:
        A scalar.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8.
    """
    baseline = divergence.detach().clamp_min(0)
    gain = beta * (logprobs - reference.detach() - baseline)
    value = torch.where(desirable, gain, -gain).sigmoid()
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(value.dtype)
    return (weight * (1 - value)).mean()
