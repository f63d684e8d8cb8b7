"""Batches as other people's code makes them, and models whose parts are no sums over tokens, around a ring: exact."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ring_models import (
    DYNAMIC,
    EXPERTS,
    LONGROPE,
    complaint,
    ring_errors,
    summed,
    tiny_batch,
    tiny_model,
)
from torch import Tensor
from transformers import DataCollatorWithFlattening

from fourfold.parallel import shard_batch, unshard_sequence, use_ring_attention
from fourfold.parallel.ring import ring_attention
from fourfold.parallel.sequence import shard_labels, shard_positions, shard_sequence
from fourfold.parallel.testing.compare import assert_ranks

TOLERANCE = 2e-6  # fp32 rounding over some hundred terms
LENGTHS = (11, 1, 29, 5)
LLAMA: tuple[str, dict[str, Any]] = ("Llama", {})
WINDOWED: tuple[str, dict[str, Any]] = ("Mistral", {"sliding_window": 7})


def flattened(**options: Any) -> dict[str, Any]:
    """Documents as transformers' collator packs them."""
    generator = torch.Generator().manual_seed(5)
    features = [{"input_ids": torch.randint(1, 64, (length,), generator=generator)} for length in LENGTHS]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **options)(features))


def packed_errors(model: Any, told: str, sharding: str, streams: bool) -> dict[str, float]:
    batch = flattened(return_flash_attn_kwargs=told == "cu_seq_lens", return_seq_idx=told == "seq_idx")
    truth = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    if told != "position_ids":
        del batch["position_ids"]
    return ring_errors(model, batch, truth, sharding=sharding, streams=streams)


PACKED = [
    (LLAMA, "position_ids", "zigzag", False),
    (LLAMA, "position_ids", "striped", False),
    (WINDOWED, "position_ids", "zigzag", True),
    (WINDOWED, "cu_seq_lens", "zigzag", False),
    (LLAMA, "seq_idx", "contiguous", False),
]


@pytest.mark.parametrize(("model", "told", "sharding", "streams"), PACKED)
def test_documents_as_collators_tell_them(ranks, model, told, sharding, streams):
    errors = ranks(2)(packed_errors, model, told, sharding, streams)
    assert_ranks(errors, TOLERANCE, f"{model} {told} {sharding}")


def restarting_rows_errors() -> dict[str, float]:
    """Two rows of two documents each: rows that a ring lays one after the other."""
    batch = tiny_batch(2, 30)
    starts = torch.tensor([[13], [22]])
    tokens = torch.arange(30)
    batch["position_ids"] = torch.where(tokens < starts, tokens, tokens - starts)
    return ring_errors(LLAMA, batch, batch)


def test_documents_in_several_rows(ranks):
    assert_ranks(ranks(2)(restarting_rows_errors), TOLERANCE)


def padded_errors(model: Any, side: str, streams: bool, extra: dict[str, Any]) -> dict[str, float]:
    batch = tiny_batch(3, 24)
    mask = torch.ones(3, 24, dtype=torch.int64)
    if side == "left":
        mask[0, :9] = mask[2, :1] = 0
    elif side == "right":
        mask[0, 15:] = mask[2, 23:] = 0
    batch["attention_mask"] = mask
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    # On the left nobody asks for the first real token: what a row that sees nothing says differs between kernels.
    batch["labels"][:, 1:] = batch["labels"][:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return ring_errors(model, batch, batch, streams=streams, extra=extra)


PADDED = [
    (LLAMA, "none", False, {}),
    (LLAMA, "left", False, {}),
    (WINDOWED, "right", False, {}),
    (LLAMA, "left", True, {}),
    (("Phi3", LONGROPE), "right", False, {}),
    (("Mixtral", EXPERTS), "right", False, {"output_router_logits": True}),
]


@pytest.mark.parametrize(("model", "side", "streams", "extra"), PADDED)
def test_padding_masks(ranks, model, side, streams, extra):
    errors = ranks(2)(padded_errors, model, side, streams, extra)
    assert_ranks(errors, TOLERANCE, f"{model[0]} {side}")


def length_errors(model: Any, streams: bool) -> dict[str, float]:
    batch = tiny_batch()
    return ring_errors(model, batch, batch, streams=streams)


LONG = [
    (("Phi3", LONGROPE), False),
    (("Phi3", LONGROPE), True),
    (("Llama", LONGROPE), False),
    (("Llama", DYNAMIC), False),
    (("Qwen3", DYNAMIC), True),
]


@pytest.mark.parametrize(("model", "streams"), LONG)
def test_rotary_embeddings_that_depend_on_the_length(ranks, model, streams):
    """45 tokens of which a shard has less than the length at which frequencies change; the sequence has more."""
    assert_ranks(ranks(2)(length_errors, model, streams), TOLERANCE, f"{model[0]}, {streams=}")


def router_errors(family: str, streams: bool) -> dict[str, float]:
    batch = tiny_batch()
    model = (family, EXPERTS | {"router_aux_loss_coef": 0.5, "aux_loss_coef": 0.5})
    return ring_errors(model, batch, batch, streams=streams, extra={"output_router_logits": True})


@pytest.mark.parametrize(
    ("family", "streams"),
    [("Mixtral", False), ("Mixtral", True), ("Qwen3Moe", False), ("Olmoe", False), ("GraniteMoe", False)],
)
def test_the_load_balancing_loss_is_that_of_all_tokens(ranks, family, streams):
    assert_ranks(ranks(2)(router_errors, family, streams), TOLERANCE, family)


def misuses() -> list[str]:
    """What the ring says to calls that mean something else on each rank; every rank is told."""
    rank = dist.get_rank()
    model, batch = tiny_model("Llama"), tiny_batch()
    use_ring_attention(model, None)
    ids, labels = batch["input_ids"], batch["labels"]
    shard = shard_batch(batch, None)
    restarting = torch.arange(23 - rank)[None] % 7
    answers = [
        complaint(model, ids, labels=labels),
        complaint(model, ids),
        complaint(model, **{**shard, "num_items_in_batch": None}),
        complaint(model, **{**shard, "position_ids": restarting}),
        complaint(model, **{**shard, "position_ids": torch.arange(23 - rank)[None]}),
        complaint(model, **{**shard, "position_ids": shard["position_ids"] + rank}),
        complaint(model, **shard_batch(flattened(), None, sharding="striped")),
        complaint(model, **{**shard, "logits_to_keep": 1}),
        complaint(model, **shard_batch(tiny_batch(1, 1), None)),
        complaint(model.generate, ids, max_new_tokens=1),
        complaint(shard_batch, tiny_batch(seed=rank), None),
        complaint(shard_batch, tiny_batch(seq_len=40 + rank), None),
        complaint(model, **shard_batch(tiny_batch(seq_len=40 + 2 * rank), (rank, 2))),
        complaint(model, **shard_batch(tiny_batch(rows=1 + rank), (rank, 2))),
        complaint(model, **(shard if rank else {"input_ids": ids, "labels": labels})),
    ]
    x = torch.randn(1 + rank, 1, 4, 8)
    answers.append(complaint(ring_attention, x, x, x, None))
    x = torch.randn(1, 1, 4, 8)
    answers.append(complaint(ring_attention, x, x, x, None, causal=bool(rank)))
    uneven = torch.randn(1, 1, 20 + rank, 8)
    contiguous = {"sharding": "contiguous"}
    return [
        *answers,
        complaint(ring_attention, uneven, uneven, uneven, None, seq_len=40 + 2 * rank, **contiguous),
        complaint(ring_attention, uneven, uneven, uneven, None, seq_len=40, **contiguous),
        complaint(ring_attention, x, x, x, None, seq_len=8 if rank else None),
        complaint(ring_attention, x, x.half() if rank else x, x, None),
        complaint(ring_attention, x, x, x, None, soft_cap=1.0 + rank),
        complaint(model.model, ids),
        complaint(model.model, ids, position_ids=torch.arange(45)[None] % 7),
        complaint(model, **{**shard, "attention_mask": {"full_attention": None}}),
    ]


def test_misuse_is_told_to_every_rank(ranks):
    messages = [
        ["a call without position_ids, shift_labels, num_items_in_batch around a ring"],
        ["a call without position_ids around a ring"],
        ["a call without num_items_in_batch around a ring"],
        ["the position_ids of rank 0 are not those", "the position_ids of rank 1 are not those"],
        ["the position_ids of rank 0 are not those", "ranks [0] of the group refuse"],
        ["the ranks of one group differ in the position of the sequence's first token"],
        ["its zigzag shard of ring_seq_len=46 has"],
        ["logits_to_keep around a ring"],
        ["the ranks hold"],
        ["a cache of keys"],
        ["the ranks of one group differ in input_ids."],
        ["the ranks of one group differ in the shapes of their batches"],
        ["the ranks of one group differ in ring_seq_len: [40, 42] in rank order"],
        ["the ranks of one group differ in rows: [1, 2] in rank order"],
        ["a call without position_ids", "ranks [0] of the group refuse their arguments"],
        ["the ranks of one group differ in the batch size: [1, 2] in rank order"],
        ["the ranks of one group differ in dtype or options"],
        ["the ranks of one group differ in seq_len: [40, 42] in rank order"],
        ["ranks [1] of the group refuse", "rank 1 holds 21 tokens, but its contiguous shard of seq_len=40 has 20"],
        ["the ranks of one group differ in seq_len"],
        ["ranks [1] of the group refuse", "cast and move them to one dtype"],
        ["the ranks of one group differ in dtype or options"],
        ["a call without position_ids around a ring"],
        ["the position_ids of rank 0 are not those", "the position_ids of rank 1 are not those"],
        ["an attention mask that is not [B, S] around a ring"],
    ]
    for rank, answers in enumerate(ranks(2)(misuses)):
        for answer, wanted in zip(answers, messages, strict=True):
            assert wanted[min(rank, len(wanted) - 1)] in answer


def refusals() -> list[str]:
    batch, ids = tiny_batch(1, 12), torch.arange(12)[None]
    mask = torch.ones(1, 12, dtype=torch.int64)
    holes = mask.clone()
    holes[0, 5] = 0
    right = mask.clone()
    right[0, 9:] = 0
    restarting = ids % 5
    return [
        complaint(shard_batch, {**batch, "attention_mask": holes}, None),
        complaint(shard_batch, {**batch, "attention_mask": mask * 2}, None),
        complaint(shard_batch, {**batch, "attention_mask": right}, None),
        complaint(shard_batch, {**batch, "position_ids": restarting, "seq_idx": ids // 6}, None),
        complaint(shard_batch, {**batch, "cu_seq_lens_q": [0, 5, 12], "cu_seq_lens_k": [0, 6, 12]}, None),
        complaint(shard_batch, {**batch, "position_ids": restarting, "max_length_q": 4}, None),
        complaint(shard_batch, {**tiny_batch(2, 12), "cu_seq_lens_q": [0, 12]}, None),
    ]


def test_what_a_batch_cannot_mean_is_refused(ranks):
    messages = [
        "row 0 of attention_mask has padding between its tokens",
        "give [B, S] of ones, and zeros at padding",
        "row 0 has labels at its padding: set them to -100",
        "position_ids and seq_idx say different things of row 0: documents end at [0, 5, 10, 12] and at [0, 6, 12]",
        "cu_seq_lens_k and cu_seq_lens_q say different things",
        "max_length_q=4, but the longest document has 5 tokens",
        "cu_seq_lens_q with 2 rows",
    ]
    for answer, message in zip(ranks(1)(refusals)[0], messages, strict=True):
        assert message in answer


def positional() -> float:
    """Arguments by position, as some loops call a model."""
    batch = tiny_batch()
    model = tiny_model("Llama")
    truth = model(**batch).logits
    use_ring_attention(model, None)
    shard = shard_batch({"input_ids": batch["input_ids"]}, None)
    logits = model(shard["input_ids"], None, shard["position_ids"], ring_seq_len=45).logits
    return float((unshard_sequence(logits.detach(), None, dim=1) - truth).detach().abs().max())


def test_arguments_by_position(ranks):
    assert max(ranks(2)(positional)) < 1e-5


def one_rank_documents() -> float:
    """A ring of one rank takes plain calls, and restarting position ids as transformers does."""
    batch = flattened()
    truth = tiny_model("Llama")(**batch, use_cache=False).loss
    model = tiny_model("Llama")
    use_ring_attention(model, None)
    return float((abs(model(**batch).loss - truth) / truth).detach())


def test_a_ring_of_one_rank_reads_documents_from_positions(ranks):
    assert ranks(1)(one_rank_documents)[0] < TOLERANCE


def by_hand(batch: dict[str, Tensor]) -> float:
    """Arguments made without shard_batch: the length is asked for once a call."""
    model = tiny_model("Llama")
    truth = model(**batch).loss
    use_ring_attention(model, None)
    labels = shard_labels(batch["labels"], None)
    loss = model(
        input_ids=shard_sequence(batch["input_ids"], None, dim=1),
        position_ids=shard_positions(batch["input_ids"].shape[1], None)[None] + 3,
        labels=labels,
        shift_labels=labels,
        num_items_in_batch=int((batch["labels"][:, 1:] != -100).sum()),
    ).loss.detach()
    dist.all_reduce(loss)
    return float((abs(loss - truth) / truth).detach())


def test_arguments_made_by_hand(ranks):
    assert max(ranks(2)(by_hand, tiny_batch())) < TOLERANCE


def inside(family: str, options: dict[str, Any]) -> float:
    """The model without its head, as trainers with a head of their own call it."""
    batch = tiny_batch()
    model = tiny_model(family, **options)
    truth = model.model(batch["input_ids"]).last_hidden_state
    use_ring_attention(model, None)
    hidden = model.model(**shard_batch({"input_ids": batch["input_ids"]}, None)).last_hidden_state
    return float((unshard_sequence(hidden.detach(), None, dim=1) - truth).detach().abs().max())


@pytest.mark.parametrize(("family", "options"), [("Llama", {}), ("Phi3", LONGROPE)])
def test_the_model_inside_is_called_by_itself(ranks, family, options):
    assert max(ranks(2)(inside, family, options)) < 1e-5


def embedded_errors() -> dict[str, float]:
    """Embeddings that somebody made, of images say, and their gradient; with padding on the left."""
    batch, embeddings = tiny_batch(), {}
    mask = torch.ones(2, 45, dtype=torch.int64)
    mask[1, :9] = 0
    labels = batch["labels"].clone()
    labels[1, :10] = -100
    losses = {}
    for name in ("whole", "ring"):
        model = tiny_model("Llama")
        embeddings[name] = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
        arguments = {"inputs_embeds": embeddings[name], "labels": labels, "attention_mask": mask}
        if name == "ring":
            use_ring_attention(model, None)
            arguments = shard_batch(arguments, None)
        losses[name] = model(**arguments).loss
        losses[name].backward()
    found, expected = summed(embeddings["ring"].grad), embeddings["whole"].grad
    return {
        "loss": float(abs(summed(losses["ring"]) - losses["whole"].detach()) / losses["whole"].detach()),
        "embeddings": float((found - expected).norm() / expected.norm()),
    }


def test_embeddings_instead_of_tokens(ranks):
    assert_ranks(ranks(2)(embedded_errors), TOLERANCE, "inputs_embeds")


LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip


@pytest.mark.parametrize(("family", "options"), [("DeepseekV3", LATENT), ("Cohere", {}), ("StableLm", {})])
def test_heads_of_two_sizes_and_scaled_logits(ranks, family, options):
    assert_ranks(ranks(2)(length_errors, (family, options), False), TOLERANCE, family)
