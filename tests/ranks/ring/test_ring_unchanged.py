"""What changes after use_ring_attention, or differs between ranks: an error on every rank, never a number or a hang."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ring_models import complaint, summed, tiny_batch, tiny_model
from torch import nn

from fourfold.parallel import shard_batch, stream_backprop, use_ring_attention


class Centering(nn.Module):
    """A module that mixes tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out - out.mean(1, keepdim=True)


def put_module(model: nn.Module) -> None:
    model.model.layers[0].mlp = Centering(model.model.layers[0].mlp)


def put_convolution(model: nn.Module) -> None:
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Conv1d(1, 1, 3))


def put_hook(model: nn.Module) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, out: out - out.mean(1, keepdim=True))


def put_pre_hook(model: nn.Module) -> None:
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))


def put_forward(model: nn.Module) -> None:
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: plain(x).roll(1, 1)


def attend_otherwise(model: nn.Module) -> None:
    model.set_attn_implementation("sdpa")


CHANGES = [
    (put_module, "model.layers.0.mlp (Centering) came after use_ring_attention"),
    (put_convolution, "(Conv1d) came after use_ring_attention"),
    (put_hook, "model.layers.1 (LlamaDecoderLayer) has a hook or forward (<lambda>) that came after"),
    (put_pre_hook, "model.norm (LlamaRMSNorm) has a hook or forward"),
    (put_forward, "model.layers.0.mlp (LlamaMLP) has a hook or forward"),
    (attend_otherwise, "attends by 'sdpa' since use_ring_attention"),
]


def changed(change: Callable[[nn.Module], None], streams: bool) -> str:
    model, batch = tiny_model("Llama"), shard_batch(tiny_batch(), None)
    use_ring_attention(model, None)
    if streams:
        stream_backprop(model, chunk_size=6)
    change(model)
    return complaint(lambda: model(**batch))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_what_came_after_the_trial_is_refused(ranks, change, words, streams):
    for answer in ranks(2)(changed, change, streams):
        assert words in answer
        assert "call use_ring_attention again" in answer


def tried_again() -> tuple[str, str]:
    """What a hook that acts on each token alone, and one that does not, come to when the model is tried once more."""
    model, batch = tiny_model("Llama"), shard_batch(tiny_batch(), None)
    use_ring_attention(model, None)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * 2)
    before = complaint(lambda: model(**batch))
    use_ring_attention(model, None)
    assert torch.isfinite(summed(model(**batch).loss))
    return before, complaint(put_hook, model) + complaint(use_ring_attention, model, None)


def test_trying_again_admits_what_acts_on_each_token_alone(ranks):
    for before, mixing in ranks(2)(tried_again):
        assert "has a hook or forward" in before
        assert "mixes tokens outside of attention" in mixing


def adapted() -> float:
    """LoRA and streaming that come after: frameworks' own."""
    import peft

    model, batch = tiny_model("Llama"), shard_batch(tiny_batch(), None)
    use_ring_attention(model, None)
    torch.manual_seed(0)
    adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    stream_backprop(adapter, chunk_size=6)
    return float(summed(adapter(**batch).loss))


def test_adapters_and_streaming_may_come_after(ranks):
    plain = tiny_model("Llama")(**tiny_batch(), use_cache=False).loss
    for loss in ranks(2)(adapted):
        assert abs(loss - plain) <= 1e-6 * plain


def one_rank(what: str) -> str:
    """What each rank says where the last one alone does something."""
    model, odd = tiny_model("Llama", attention_dropout=0.1 if what == "mode" else 0.0), dist.get_rank() == 1
    if what == "weights" and odd:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    model.train(what != "mode" or odd)
    use_ring_attention(model, None)
    whole = tiny_batch()
    if what == "label":
        whole["labels"][0, 7] = 64
    batch: dict[str, Any] = shard_batch(whole, None)
    if what == "mask" and odd:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"]).tril()
    if what == "cache" and odd:
        batch["use_cache"] = True
    if what == "tokens" and odd:
        batch["input_ids"] = None
    casts = what == "autocast" and odd
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts), torch.set_grad_enabled(what != "no_grad" or odd):
        return complaint(lambda: model(**batch))


ALONE = {
    "mask": "an attention_mask with padding",
    "cache": "a cache of keys",
    "tokens": "a call without input_ids or inputs_embeds",
    "label": "shift_labels from 0 to 64, of a vocabulary of 64",
    "mode": "differ in their modes (training, gradients, autocast, dtype)",
    "autocast": "differ in their modes",
    "no_grad": "differ in their modes",
    "weights": "differ in the weights of their models",
}


@pytest.mark.parametrize("what", ALONE)
def test_what_one_rank_alone_does_is_an_error_on_all(ranks, what):
    answers = ranks(2)(one_rank, what, timeout_s=30)
    assert any(ALONE[what] in answer for answer in answers)
    assert "accepted" not in answers
