"""Every streamed objective beside the same formula on whole logits: a value and all gradients of each."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.parallel.stream import TokenStatistics, dpo_loss, grpo_loss, kto_loss, sft_loss
from fourfold.parallel.stream.losses import sequence_logprobs
from fourfold.parallel.testing.compare import gradients
from fourfold.parallel.testing.tiny_models import batch

# Chunks that divide neither the 19 tokens of `masked_batch` nor each other.
CHUNKS = {"chunk_size": 8, "mlp_chunk": 3, "logits_chunk": 5}
Gradients = dict[str, Tensor]


def whole_statistics(model: nn.Module, ids: Tensor, labels: Tensor) -> TokenStatistics:
    """token_statistics from whole logits."""
    logits = model(input_ids=ids).logits.float()
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    mask = targets != -100
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return TokenStatistics(
        logprobs=logprobs * mask, logsumexp=logits.logsumexp(-1) * mask, mean_logits=logits.mean(-1) * mask, mask=mask
    )


def objectives(statistics: TokenStatistics, fixed: Tensor) -> dict[str, Tensor]:
    """Each objective of the same four rows; `fixed` [4, T] stands for log-probabilities of other models."""
    logprobs, mask = statistics.logprobs, statistics.mask
    assert logprobs is not None
    assert mask is not None
    rows, others = sequence_logprobs(logprobs, mask), sequence_logprobs(fixed, mask)
    gains = torch.tensor([1.0, -0.5, 0.3, -1.2])
    return {
        "smoothed, z": sft_loss(statistics, weights=fixed.abs(), label_smoothing=0.1, z_loss=1e-2),
        "dpo": dpo_loss(rows[:2], rows[2:], others[:2], others[2:], beta=0.1, label_smoothing=0.1),
        "grpo": grpo_loss(logprobs, fixed, gains, mask, reference_logprobs=fixed, beta=0.04),
        "ppo": grpo_loss(logprobs, fixed, gains.unsqueeze(-1).expand_as(fixed), mask, per_sequence=False),
        "kto": kto_loss(rows, others, gains > 0, torch.tensor(0.3), undesirable_weight=1.5),
    }


def masked_batch() -> tuple[Tensor, Tensor]:
    """(ids, labels), [4, 19]: a prompt masked, and one row shorter."""
    ids = batch(4, 19)
    labels = ids.clone()
    labels[:, :5] = labels[2, 11:] = -100
    return ids, labels


def every_loss(
    model: nn.Module, fixed: Tensor, statistics: Callable[[nn.Module, Tensor, Tensor], TokenStatistics]
) -> dict[str, tuple[Tensor, Gradients]]:
    """Value and gradients of the model's own loss and of each objective."""
    ids, labels = masked_batch()
    extra = {"output_router_logits": True} if hasattr(model, "router_aux_loss_coef") else {}
    model.zero_grad()  # as in a first micro-batch
    own = model(input_ids=ids, labels=labels, **extra).loss
    found = {"cross-entropy": (own.detach(), gradients(model, own))}
    for name in objectives(statistics(model, ids, labels), fixed):
        loss = objectives(statistics(model, ids, labels), fixed)[name]
        found[name] = loss.detach(), gradients(model, loss)
    return found
