"""Streamed losses against the same formulas on whole logits, and each formula against its paper in another form."""

import pytest
import torch
import torch.nn.functional as F

from fourfold.parallel.stream.losses import dpo_loss, grpo_loss, kto_loss, sft_loss
from fourfold.parallel.stream.model import stream_backprop
from fourfold.parallel.stream.statistics import TokenStatistics, token_logprobs, token_statistics
from fourfold.parallel.testing.compare import assert_gradients
from fourfold.parallel.testing.objectives import CHUNKS, every_loss, masked_batch, whole_statistics
from fourfold.parallel.testing.tiny_models import batch, tiny

TOLERANCE = 2e-6  # fp32 against fp32, see test_stream_backprop.py


@pytest.mark.parametrize("family", ["qwen3", "gemma3, windows", "phi"])
def test_every_objective_has_plain_gradients(family):
    model, (ids, labels) = tiny(family), masked_batch()
    logprobs = whole_statistics(model, ids, labels).logprobs.detach()
    fixed = logprobs + 0.1 * torch.randn_like(logprobs)
    plain = every_loss(model, fixed, whole_statistics)
    streamed = every_loss(stream_backprop(model, **CHUNKS), fixed, token_statistics)
    for name, (loss, found) in streamed.items():
        torch.testing.assert_close(loss, plain[name][0], rtol=2e-6, atol=1e-6)
        assert_gradients(found, plain[name][1], TOLERANCE, name)


def test_token_logprobs_are_the_losses_own():
    model, ids = stream_backprop(tiny("llama"), **CHUNKS), batch(2, 21)
    logprobs = token_logprobs(model, ids, ids)
    assert logprobs.shape == ids.shape
    assert logprobs.dtype == torch.float32
    assert not logprobs[:, -1].any()
    torch.testing.assert_close(-logprobs.sum() / 40, model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(sft_loss(token_statistics(model, ids, ids)), model(input_ids=ids, labels=ids).loss)


def test_label_smoothing_is_torchs():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 5))
    statistics = TokenStatistics(
        logprobs=logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        logsumexp=logits.logsumexp(-1),
        mean_logits=logits.mean(-1),
        mask=torch.ones(2, 5, dtype=torch.bool),
    )
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(sft_loss(statistics, label_smoothing=0.2), expected)
    with pytest.raises(ValueError, match="label_smoothing=1"):
        sft_loss(statistics, label_smoothing=1)


def test_dpo_of_equal_policies_is_log_2_and_pushes_the_pair_apart():
    rows = torch.zeros(3, requires_grad=True)
    other = torch.zeros(3, requires_grad=True)
    loss = dpo_loss(rows, other, torch.zeros(3), torch.zeros(3), beta=0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0).log())
    loss.backward()
    torch.testing.assert_close(rows.grad, torch.full((3,), -0.2 / 2 / 3))  # beta * sigmoid(0) / N
    torch.testing.assert_close(other.grad, -rows.grad)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        dpo_loss(rows, other, rows, other, label_smoothing=0.5)


def test_grpo_clips_only_what_would_move_further_out():
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    gains = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    grpo_loss(new, old, gains, torch.ones(1, 4), clip=(0.2, 0.2)).backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]) / 4)
    masked = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = grpo_loss(masked, torch.zeros(1, 2), torch.ones(1), torch.tensor([[True, False]]), beta=0.1,
                     reference_logprobs=torch.zeros(1, 2))  # fmt: skip
    loss.backward()
    assert masked.grad.isfinite().all()
    assert masked.grad[0, 1] == 0
    with pytest.raises(ValueError, match=r"beta=0\.1"):
        grpo_loss(new, old, gains, torch.ones(1, 4), beta=0.1)


def test_kto_values_gains_and_losses_apart():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    loss = kto_loss(logprobs, torch.zeros(2), torch.tensor([True, False]), torch.tensor(-3.0), undesirable_weight=2.0)
    torch.testing.assert_close(loss.detach(), torch.tensor((0.5 + 2 * 0.5) / 2))  # a negative estimate counts as 0
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.1 / 4, 2 * 0.1 / 4]) / 2)
