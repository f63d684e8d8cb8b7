"""StreamBP around the ring: every rank streams its shard, and the summed gradients are one plain process's, in fp32.

The tolerance is a few roundings of fp32 over sums of some hundred terms, as in tests/unit/stream/
test_stream_backprop.py.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel import shard_batch, stream_backprop, token_logprobs, unshard_sequence, use_ring_attention
from fourfold.parallel.stream import dpo_loss
from fourfold.parallel.stream.losses import sequence_logprobs
from fourfold.parallel.testing.compare import assert_errors, assert_ranks, gradient_errors, gradients
from fourfold.parallel.testing.tiny_models import batch, tiny

TOLERANCE, LOSS_TOLERANCE = 2e-6, 1e-6
CHUNKS = {"chunk_size": 6, "mlp_chunk": 4, "logits_chunk": 5}
# family, rows, tokens, ring options, stream options, arguments of the call
CASES = [
    ("qwen3", 2, 45, {"heads_degree": 2}, {}, {}),
    ("llama", 1, 37, {"sharding": "contiguous"}, {"keep_attention": True}, {}),
    ("gemma3, windows", 2, 50, {"sharding": "striped"}, {}, {}),
    ("mistral, window", 1, 51, {"heads_degree": 2}, {"keep_attention": True}, {}),
    ("mixtral", 2, 33, {}, {}, {"output_router_logits": True}),
    ("gpt_oss", 2, 33, {}, {}, {}),
    ("gpt_oss", 1, 37, {"heads_degree": 2}, {"keep_attention": True}, {}),
]


def summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value, group=group)
    return value


def prompt_masked(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, : ids.shape[1] // 3] = -100
    return labels


def streamed(model: nn.Module, group: Any, ring: dict[str, Any], stream: dict[str, Any]) -> nn.Module:
    use_ring_attention(model, group, **ring)
    return stream_backprop(model, **{**CHUNKS, **stream})


def compare(case: tuple[Any, ...], group: dist.ProcessGroup | None) -> tuple[float, dict[str, float]]:
    """The loss's error and each gradient's."""
    family, rows, tokens, ring, stream, extra = case
    ids = batch(rows, tokens)
    labels = prompt_masked(ids)
    plain = tiny(family)
    truth = plain(input_ids=ids, labels=labels, use_cache=False, **extra).loss
    expected = gradients(plain, truth)
    model = streamed(tiny(family), group, ring, stream)
    sharding = {"sharding": ring["sharding"]} if "sharding" in ring else {}
    loss = model(**shard_batch({"input_ids": ids, "labels": labels}, group, **sharding), **extra).loss
    mine = {name: summed(grad, group) for name, grad in gradients(model, loss).items()}
    return float(abs(summed(loss, group) - truth.detach()) / truth.detach()), gradient_errors(mine, expected)


def compare_all(cases: list[tuple[Any, ...]]) -> list[tuple[float, dict[str, float]]]:
    return [compare(case, None) for case in cases]


@pytest.mark.parametrize(("size", "cases"), [(2, CASES), (4, CASES[:2])])
def test_shards_that_stream_have_plain_gradients(ranks, size, cases):
    for rank, answers in enumerate(ranks(size)(compare_all, cases)):
        for case, (loss_error, errors) in zip(cases, answers, strict=True):
            where = f"{case}, rank {rank} of {size}"
            assert_errors({"loss": loss_error}, LOSS_TOLERANCE, where)
            assert_errors(errors, TOLERANCE, where)


CU_SEQLENS = (0, 11, 12, 40)


def packed(family: str) -> dict[str, float]:
    """Packed documents and a tail of padding against each document alone."""
    ids, plain = batch(1, 45), tiny(family)
    total, count = torch.zeros(()), 0
    for start, stop in pairwise(CU_SEQLENS):
        if stop - start > 1:
            part = ids[:, start:stop]
            total, count = (
                total + plain(input_ids=part, labels=part).loss * (stop - start - 1),
                count + stop - start - 1,
            )
    expected = gradients(plain, total / count)
    model = streamed(tiny(family), None, {}, {})
    arguments = shard_batch({"input_ids": ids, "labels": ids}, None, cu_seqlens=CU_SEQLENS)
    mine = {name: summed(grad, None) for name, grad in gradients(model, model(**arguments).loss).items()}
    return gradient_errors(mine, expected)


def preference() -> dict[str, float]:
    """A loss of whole rows: each rank gathers the log-probabilities and takes its part of the loss."""
    ids = batch(2, 29)
    plain, reference = tiny("llama"), torch.tensor([-90.0, -95.0])

    def loss(logprobs: Tensor) -> Tensor:
        rows = sequence_logprobs(logprobs, torch.ones_like(logprobs))
        return dpo_loss(rows[:1], rows[1:], reference[:1], reference[1:])

    whole = plain(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    expected = gradients(plain, loss(whole))
    model = streamed(tiny("llama"), None, {}, {})
    logprobs = token_logprobs(model, **shard_batch({"input_ids": ids, "labels": ids}, None))
    part = loss(unshard_sequence(logprobs, None, dim=1)) / dist.get_world_size()
    return gradient_errors({name: summed(grad, None) for name, grad in gradients(model, part).items()}, expected)


def test_packed_documents_and_losses_of_whole_rows(ranks):
    for family in ("qwen2", "gpt_oss"):
        assert_ranks(ranks(2)(packed, family), TOLERANCE, f"packed documents, {family}")
    assert_ranks(ranks(2)(preference), TOLERANCE, "preference of rows")


def refusals() -> list[str]:
    ids = batch(2, 9)
    arguments = shard_batch({"input_ids": ids, "labels": ids}, None)
    model, answers = streamed(tiny("llama"), None, {}, {}), []
    padding = torch.ones_like(ids)
    padding[0, 0] = 0
    for name, value in (
        ("position_ids", None),
        ("shift_labels", None),
        ("num_items_in_batch", None),
        ("attention_mask", padding),
    ):
        answers.append(complaint(model, {**arguments, name: value}))
    answers.append(complaint(stream_backprop(tiny("llama")), arguments))
    short = shard_batch({"input_ids": ids, "labels": ids}, (0, 12))
    answers.append(complaint(model, {**short, "ring_seq_len": 0}))
    return answers


def complaint(model: nn.Module, arguments: dict[str, Any]) -> str:
    try:
        model(**arguments)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_what_a_shard_cannot_mean_is_refused(ranks):
    messages = [
        "without position_ids: make the arguments with shard_batch",
        "without shift_labels",
        "without num_items_in_batch",
        "padding around a ring",
        "call use_ring_attention(model, group) first",
        "0 tokens in zigzag shards are [0]",
    ]
    for answer, message in zip(ranks(1)(refusals)[0], messages, strict=True):
        assert message in answer
