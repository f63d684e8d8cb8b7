"""A decoder's asynchronous stages on rows of any length, padded or packed, and the mean over all targets."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.pipeline_models import small_llama
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from fourfold.parallel import PipelinedBackpropEmulator
from fourfold.parallel.decoder import decoder_stages
from fourfold.parallel.decoder.async_pipeline import next_token_loss, num_targets
from fourfold.parallel.ring.transformers import use_ring_attention
from fourfold.parallel.stream import StreamSettings

SGD = partial(torch.optim.SGD, lr=0.1)


def llama() -> LlamaForCausalLM:
    return small_llama().double()


def stages(**cut: Any) -> tuple[LlamaForCausalLM, list[Any]]:
    model = llama()
    return model, decoder_stages(model, 3, seq_len=8, **cut)


def through(parts: list[Any], value: Any) -> Tensor:
    for part in parts:
        value = part(value)
    return value


def ids(*shape: int) -> Tensor:
    return torch.randint(32, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("length", [8, 5, 11])
def test_rows_of_any_length(length):
    model, parts = stages()
    torch.testing.assert_close(through(parts, ids(2, length)), model(ids(2, length)).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_padding_is_as_in_the_model_itself(checkpointing):
    model, parts = stages(checkpointing=checkpointing)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 6:], mask[1, :3] = 0, 0
    batch = {"input_ids": ids(2, 8), "attention_mask": mask}
    expected = model(**batch).logits
    got = through(parts, batch)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-12)
    assert torch.isfinite(got).all()


def test_packed_documents_are_as_if_alone():
    model, parts = stages()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4, 4, 4]])
    got = through(parts, {"input_ids": ids(2, 8), "document_ids": documents})
    for row, start, stop in ((0, 0, 3), (0, 3, 7), (0, 7, 8), (1, 0, 8)):
        alone = model(ids(2, 8)[row : row + 1, start:stop]).logits[0]
        torch.testing.assert_close(got[row, start:stop], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 8), "input_ids are torch.float32"),
        (ids(8), r"input_ids is shape \[8\]"),
        ({"ids": ids(2, 8)}, "input_ids is NoneType"),
        ({"input_ids": ids(2, 8), "labels": ids(2, 8)}, "knows no 'labels'"),
        ({"input_ids": ids(2, 8), "attention_mask": ids(2, 7)}, r"attention_mask is shape \[2, 7\]"),
    ],
)
def test_other_inputs_are_refused(value, words):
    _, parts = stages()
    with pytest.raises(ValueError, match=words):
        parts[0](value)


def test_an_update_takes_the_mean_over_the_targets_of_its_micro_batches():
    """2, 7 and no targets in three micro-batches of one update: as one batch of nine."""
    data = []
    for number, count in enumerate((2, 7, 0)):
        targets = torch.full((1, 8), -100)
        targets[0, :count] = ids(1, 8)[0, :count]
        data.append((ids(3, 8)[number : number + 1], targets))
    gradients: list[dict[str, Tensor]] = []
    _, parts = stages()
    losses = PipelinedBackpropEmulator(
        parts, optimizer=SGD, loss_fn=next_token_loss, loss_weight=num_targets, schedule="1f1b:3",
        on_gradients=lambda found: gradients.append({name: g.clone() for name, g in found.items()}),
    ).run(data)  # fmt: skip
    assert losses[2] == 0
    model = llama()
    logits = model(torch.cat([x for x, _ in data])).logits
    F.cross_entropy(logits.flatten(0, 1), torch.cat([y for _, y in data]).flatten(), ignore_index=-100).backward()
    found = {name: gradient for each in gradients for name, gradient in each.items()}
    assert found.keys() == dict(model.named_parameters()).keys()
    # transformers' RMSNorm computes in fp32 even of an fp64 model
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            found[name], p.grad, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def trained(parts: list[Any], mitigation: str, schedule: str = "lockstep") -> list[Tensor]:
    """Weights after eight micro-batches; the last stage gives hidden states where it is told to."""
    last = parts[-1]
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(32, (2, 9), generator=generator) for _ in range(8)]
    PipelinedBackpropEmulator(
        parts, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), loss_weight=num_targets,
        loss_fn=last.streamed_loss if last.gives_hidden else next_token_loss, mitigation=mitigation, schedule=schedule,
    ).run([(row[:, :-1], row[:, 1:]) for row in rows])  # fmt: skip
    return [p.detach() for part in parts for p in part.parameters()]


SMALL = StreamSettings(chunk_size=3, mlp_chunk=2, logits_chunk=2)


@pytest.mark.parametrize("mitigation", ["none", "lwpv+sc", "spectrain", "stash+lwpv+sc"])
def test_streams_recompute_as_checkpoints_do(mitigation):
    """With the backward's weights, whichever these are; logits in chunks, too."""
    whole = trained(stages(checkpointing="full")[1], mitigation)
    for gives_hidden in (False, True):
        parts = stages(checkpointing="stream", stream=SMALL)[1]
        parts[-1].gives_hidden = gives_hidden
        for got, expected in zip(trained(parts, mitigation), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    kept = trained(stages()[1], mitigation)
    assert all(map(torch.equal, kept, whole)) == mitigation.startswith("stash")


KEEPS = [{"checkpointing": "selective"}, {"checkpointing": "stream", "stream": replace(SMALL, keep_attention=True)}]


@pytest.mark.parametrize("cut", KEEPS, ids=["selective", "keep_attention"])
@pytest.mark.parametrize(
    ("schedule", "mitigation"), [("2bw", "none"), ("2bw", "lwpv+sc"), ("lockstep", "stash+sc"), ("1f1b", "none")]
)
def test_what_is_kept_of_a_layer_is_of_the_weights_that_the_rest_is_recomputed_with(cut, schedule, mitigation):
    kept = trained(stages(**cut)[1], mitigation, schedule)
    for got, expected in zip(kept, trained(stages()[1], mitigation, schedule), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("cut", "name"), zip(KEEPS, ("checkpointing='selective'", "keep_attention"), strict=True))
def test_where_forward_and_backward_read_other_weights_nothing_is_kept(cut, name):
    with pytest.raises(ValueError, match=f"{name} in a pipeline that updates between a forward and its backward"):
        trained(stages(**cut)[1], "lwpv+sc")


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("mitigation", ["none", "lwpv+sc", "spectrain"])
def test_compiled_layers_read_the_weights_that_are_there(mitigation, checkpointing):
    """Also in a backward, whose weights are others than its forward's: a compiler may keep none of them."""
    plain = trained(stages(checkpointing=checkpointing)[1], mitigation)
    compiled = trained(stages(checkpointing=checkpointing, compile="aot_eager")[1], mitigation)
    for got, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_streams_know_windows_by_themselves():
    ends = []
    for checkpointing in ("full", "stream"):
        torch.manual_seed(4)
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=4, sliding_window=3, tie_word_embeddings=False,
            )
        ).double()  # fmt: skip
        if checkpointing == "full":
            use_ring_attention(model, None)
        chunks = SMALL if checkpointing == "stream" else None
        ends.append(trained(decoder_stages(model, 2, seq_len=8, checkpointing=checkpointing, stream=chunks), "lwpv+sc"))
    for got, expected in zip(*ends, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ({"stream": SMALL}, "they go with checkpointing='stream'"),
        ({"checkpointing": "stream", "compile": True}, "StreamBP runs layers in pieces"),
        ({"compile": "fast"}, "choose true, false, or one of"),
    ],
)
def test_what_goes_with_nothing_else_is_refused(cut, words):
    with pytest.raises(ValueError, match=words):
        stages(**cut)
