"""The emulator against plain training, and cutting models into stages."""

import time
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold.parallel import PipelinedBackpropEmulator, stream_backprop, use_ring_attention
from fourfold.parallel.decoder import cut_decoder_into_stages, cut_into_stages, decoder_stages
from fourfold.parallel.pipeline import balanced_ranges
from fourfold.parallel.pipeline.schedule import FLUSHED
from fourfold.parallel.testing.compare import assert_same

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def network() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(5, 7), nn.Sequential(nn.ReLU(), nn.Linear(7, 7)), nn.Tanh(), nn.Linear(7, 3)]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 5, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(count)
    ]


def plain(optimizer, data, every: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    model = nn.Sequential(*network())
    stepper = optimizer(list(model.parameters()))
    losses = []
    for number, (x, y) in enumerate(data, 1):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        if number % every == 0 or number == len(data):
            for p in model.parameters():
                if every > 1:
                    p.grad.div_(float((number - 1) % every + 1))
            stepper.step()
            stepper.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize(
    "mitigation", ["none", "lwpv+sc", "lwpw2d+sc2d", "stash", "spectrain", "pipemare-dc", "shrink"]
)
def test_without_delays_it_is_plain_training_bit_for_bit(optimizer, mitigation):
    data = batches(12)
    losses, weights = plain(optimizer, data)
    stages = network()
    trainer = PipelinedBackpropEmulator(
        stages, optimizer=optimizer, loss_fn=F.cross_entropy, mitigation=mitigation, delays=[0] * 4
    )
    assert trainer.run(data) == losses
    assert_same(nn.Sequential(*stages).named_parameters(), weights.items())


@pytest.mark.parametrize("schedule", FLUSHED)
def test_flushed_schedules_are_gradient_accumulation_bit_for_bit(schedule):
    data = batches(11)  # groups of 4, 4 and 3
    losses, weights = plain(SGD, data, every=4)
    stages = network()
    trainer = PipelinedBackpropEmulator(
        stages, optimizer=SGD, loss_fn=F.cross_entropy, schedule=f"{schedule}:4", mitigation="lwpv+sc"
    )
    assert trainer.run(data) == losses
    assert_same(nn.Sequential(*stages).named_parameters(), weights.items())


def test_delays_change_the_weights_and_stashing_changes_the_gradients():
    def weights(**arguments) -> Tensor:
        stages = network()
        PipelinedBackpropEmulator(stages, optimizer=SGD, loss_fn=F.cross_entropy, **arguments).run(batches(12))
        return stages[1][1].weight.detach()

    seen = [
        weights(mitigation=mitigation, delays=delays)
        for mitigation in ("none", "stash", "lwpv", "sc")
        for delays in ([3, 2, 1, 0], [6, 4, 2, 0])
    ]
    equal = [
        (at, at + 1 + by)
        for at, one in enumerate(seen)
        for by, other in enumerate(seen[at + 1 :])
        if torch.equal(one, other)
    ]
    assert equal == []


def test_many_stages_on_one_process():
    stages = [nn.Linear(4, 4) for _ in range(170)]
    trainer = PipelinedBackpropEmulator(stages, optimizer=SGD, loss_fn=F.cross_entropy)
    assert trainer.schedule.delays()[0] == 338
    losses = trainer.run((torch.randn(2, 4), torch.randint(0, 4, (2,))) for _ in range(3))
    assert len(losses) == 3


def test_wrong_delays_are_refused():
    for delays in ([1, 2], [1, 0, 0, -1]):
        with pytest.raises(ValueError, match="one number of updates, at least 0, for each of 4"):
            PipelinedBackpropEmulator(network(), optimizer=SGD, loss_fn=F.cross_entropy, delays=delays)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_the_slowest_stage_is_as_fast_as_any_cut_allows(costs, num_stages):
    if num_stages > len(costs):
        with pytest.raises(ValueError, match="cannot fill"):
            balanced_ranges(costs, num_stages)
        return
    ranges = balanced_ranges(costs, num_stages)
    assert [i for run in ranges for i in run] == list(range(len(costs)))
    assert [run for run in ranges if len(run) == 0] == []
    cuts = combinations(range(1, len(costs)), num_stages - 1)
    best = min(max(sum(costs[a:b]) for a, b in pairwise((0, *cut, len(costs)))) for cut in cuts)
    assert max(sum(costs[i] for i in run) for run in ranges) == best


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.linear(x)


def test_modules_are_cut_by_profiled_time():
    modules = [Slow(0.2), Slow(0.0), Slow(0.0), Slow(0.0)]
    stages = cut_into_stages(modules, 2, torch.randn(2, 3), repeats=2)
    assert [len(stage) for stage in stages] == [1, 3]
    assert [name for stage in stages for name, p in stage.named_parameters() if p.grad is not None] == []


def test_a_tied_decoder_is_not_cut():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="set tie_word_embeddings=False"):
        cut_decoder_into_stages(LlamaForCausalLM(config), 2, torch.zeros(1, 4, dtype=torch.int64))


def test_a_window_is_seen_or_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sliding_window=3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = MistralForCausalLM(config), torch.arange(8)[None]
    expected = model(ids).logits
    for refused in (
        lambda: decoder_stages(model, 2, seq_len=8),
        lambda: cut_decoder_into_stages(model, 2, ids),
    ):
        with pytest.raises(ValueError, match=r"sliding_window=3 .* call use_ring_attention"):
            refused()
    use_ring_attention(model, None)
    for first, last in (decoder_stages(model, 2, seq_len=8), cut_decoder_into_stages(model, 2, ids, repeats=1)):
        torch.testing.assert_close(last(first(ids)), expected)


class WholeModel(nn.Module):
    """A causal language model as a stage of its own: token ids in, loss out."""

    def __init__(self, *, streaming: bool) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).double()
        if streaming:
            stream_backprop(self.model, chunk_size=3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss


def test_stream_backprop_inside_a_stage():
    """With the forward's weights in the backward: with others, what StreamBP recomputes is rightly something else."""

    def train(streaming: bool) -> dict[str, Tensor]:
        stage = WholeModel(streaming=streaming)
        trainer = PipelinedBackpropEmulator(
            [stage], optimizer=SGD, loss_fn=lambda loss, target: loss, delays=[2], mitigation="stash+lwpv+sc"
        )
        generator = torch.Generator().manual_seed(6)
        trainer.run((torch.randint(0, 16, (2, 8), generator=generator), None) for _ in range(6))
        return {name: p.detach() for name, p in stage.named_parameters()}

    plain_weights, streamed = train(False), train(True)
    # transformers computes the loss in fp32 even of an fp64 model, StreamBP does not
    assert_same(streamed.items(), plain_weights.items(), atol=1e-7)
    start = WholeModel(streaming=False).named_parameters()
    assert not all(torch.allclose(streamed[name], p, atol=1e-3) for name, p in start)  # it did train
