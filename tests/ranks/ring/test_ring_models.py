"""Hugging Face models around the ring: loss and every parameter gradient equal the unwrapped model's."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fourfold.parallel import shard_batch, use_ring_attention
from fourfold.parallel.testing.compare import assert_ranks, gradient_errors

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager",
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 7},
    "Gemma3": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma2": {
        "attn_logit_softcapping": 1.0, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
# The models are fp64, but transformers does norms, rotary embeddings and the loss in fp32.
TOLERANCE = 2e-6


def make_model(family: str, **options: Any) -> nn.Module:
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**SIZES, **FAMILIES[family], **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).double()


def make_batch(batch: int = 2, seq_len: int = 45) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (batch, seq_len), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    full = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        full[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
    return full


def summed(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def compare(family: str, options: dict[str, Any], wrap: str) -> dict[str, float]:
    """Errors of the loss and of each gradient of the ring against the same model whole."""
    batch = make_batch()
    whole = make_model(family)
    truth = whole(**batch)
    truth.loss.backward()

    model = make_model(family)
    use_ring_attention(model, None, **options)
    size = 1
    if wrap == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    elif wrap == "fsdp":
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif wrap == "compile":
        model = torch.compile(model, backend="eager")
    elif wrap == "compiled layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    sharding = {"sharding": options["sharding"]} if "sharding" in options else {}
    loss = model(**shard_batch(batch, None, **sharding)).loss
    # FSDP averages what the ranks hold; the loss is their sum.
    (loss * size).backward()
    mine = gradients(getattr(model, "_orig_mod", model))
    if wrap != "fsdp":
        mine = {name: summed(gradient) for name, gradient in mine.items()}
    return {"loss": abs(summed(loss) - truth.loss).item(), **gradient_errors(mine, gradients(whole))}


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma3", "Gemma2"])
def test_families(ranks, family):
    assert_ranks(ranks(2)(compare, family, {}, ""), TOLERANCE, family)


@pytest.mark.parametrize("wrap", ["checkpoint", "fsdp", "compile", "compiled layers"])
def test_under_wrappers(ranks, wrap):
    answers = ranks(2)(compare, "Llama", {"heads_degree": 2, "sharding": "striped"}, wrap)
    assert_ranks(answers, TOLERANCE, f"Llama, striped, heads_degree 2, {wrap}")


def accumulate() -> dict[str, float]:
    """Two micro-batches, gradients left to add up, against both at once."""
    batch = make_batch()
    whole = make_model("Llama")
    whole(**batch).loss.backward()
    model = make_model("Llama")
    use_ring_attention(model, None)
    for row in range(2):
        arguments = shard_batch({key: value[row : row + 1] for key, value in batch.items()}, None)
        arguments["num_items_in_batch"] = arguments["num_items_in_batch"] * 2
        model(**arguments).loss.backward()
    return gradient_errors({name: summed(gradient) for name, gradient in gradients(model).items()}, gradients(whole))


def test_gradient_accumulation(ranks):
    assert_ranks(ranks(2)(accumulate), TOLERANCE, "two micro-batches")


CU_SEQLENS = (0, 11, 12, 40)


def packed() -> dict[str, float]:
    """Documents packed in one row (and a tail of padding) against each document alone."""
    batch = make_batch(batch=1)
    whole = make_model("Mistral")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start, stop in pairwise(CU_SEQLENS):
        labels = batch["labels"][:, start:stop]
        number = int((labels[:, 1:] != -100).sum())
        if number:
            total = total + whole(input_ids=batch["input_ids"][:, start:stop], labels=labels).loss * number
            count += number
    (total / count).backward()
    model = make_model("Mistral")
    use_ring_attention(model, None)
    model(**shard_batch(batch, None, cu_seqlens=CU_SEQLENS)).loss.backward()
    return gradient_errors({name: summed(gradient) for name, gradient in gradients(model).items()}, gradients(whole))


def test_packed_documents_in_a_model(ranks):
    assert_ranks(ranks(2)(packed), TOLERANCE, "packed documents")


def complaint(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "accepted"


def refusals() -> list[str]:
    batch = make_batch()
    ids = batch["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    dropping, plain = make_model("Llama", attention_dropout=0.1), make_model("Llama")
    answers = [complaint(lambda: use_ring_attention(nn.Linear(2, 2), None))]
    answers.append(complaint(lambda: use_ring_attention(plain, None, heads_degree=3)))
    for model in (dropping, plain):
        use_ring_attention(model, None)
    answers.append(complaint(lambda: dropping.train()(ids)))
    answers.append(complaint(lambda: plain(ids, attention_mask=padded)))
    answers.append(complaint(lambda: shard_batch(batch | {"pixel_values": padded}, None)))
    stranger = make_model("Llama")
    stranger.set_attn_implementation("fourfold_ring")
    answers.append(complaint(lambda: stranger(ids)))
    return answers


def test_what_the_ring_does_not_do_is_refused(ranks):
    messages = [
        "Linear does not call transformers' attention interface",
        "heads_degree=3 does not divide the group's 1 ranks",
        "attention dropout of 0.1: set attention_dropout=0",
        "an attention_mask with padding: pack the documents",
        "['pixel_values'] in the batch",
        "call use_ring_attention(model, group)",
    ]
    for answer, message in zip(ranks(1)(refusals)[0], messages, strict=True):
        assert message in answer
