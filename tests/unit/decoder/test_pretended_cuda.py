"""Steps on a CUDA device that is only pretended: the CPU's numbers, nothing on the wrong device, nobody waiting.

Rank 0 of a pool of its own runs them: autograd counts the devices once a process (support.pretended_cuda).
"""

from typing import Any

import pytest
import torch
from support.large_logits import with_large_logits
from support.pretended_cuda import pretended
from support.pretended_library import only_pretended, own_pool
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold.parallel import init_mesh, parallelize
from fourfold.parallel.stream.settings import StreamSettings

pytestmark = only_pretended
rank = own_pool(1)
IDS = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(2))
DOCUMENTS = torch.arange(32).ge(9).long().expand(2, -1)
BY_HEADS = StreamSettings(chunk_size=16, mlp_chunk=16, head_groups=2)
KEPT = StreamSettings(chunk_size=16, mlp_chunk=32, head_groups=2, offload="host", keep_attention=True)
BY_QUERIES = StreamSettings(chunk_size=16, mlp_chunk=16, head_groups=0, offload="host", keep_attention=1)
STEPS = 2
# What is offloaded leaves the device only once the host has seen its copy done.
STREAMED = {"Event.synchronize"}


def steps(device: str, documents: torch.Tensor | None, **options: Any) -> list[tuple[float, float]]:
    """(loss, norm of the gradients) of each step; waits are counted from the last one's start to its end."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    whole = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = parallelize(whole, init_mesh(device_type=device), compile=False, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(STEPS):
        _mark(device)
        loss, norm = model.forward_backward(IDS, document_ids=documents), model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        _mark(device)
        found.append((loss.item(), norm.item()))
    return found


MARKS: list[int] = []
SEEN: list[Any] = []


def _mark(device: str) -> None:
    if device == "cuda":
        MARKS.append(len(SEEN[-1].waits))


def on_both(documents: torch.Tensor | None, options: dict[str, Any]) -> tuple[Any, Any, list[Any], list[str]]:
    with pretended() as seen:
        SEEN.append(seen)
        there = steps("cuda", documents, **options)
    return there, steps("cpu", documents, **options), seen.waits[MARKS[-2] : MARKS[-1]], seen.faults


@pytest.mark.parametrize(
    ("options", "documents"),
    [
        ({"micro_batch": 1}, None),
        ({}, DOCUMENTS),
        ({"checkpointing": "full", "zero_stage": 3}, None),
        ({"precision": "bf16-mixed", "zero_stage": 1}, None),
        ({"checkpointing": "stream", "stream": BY_HEADS}, DOCUMENTS),
        ({"checkpointing": "stream", "stream": KEPT}, None),
        ({"checkpointing": "stream", "stream": BY_QUERIES}, None),
    ],
    ids=["plain", "documents", "full, zero 3", "bf16, zero 1", "heads, documents", "heads, kept", "queries, kept"],
)
def test_a_step_is_the_cpu_s_and_waits_for_nothing(rank, options, documents):
    check(rank(on_both, documents, {"precision": "fp32", **options})[0], options)


@pytest.mark.parametrize(
    "options", [{"micro_batch": 2}, {"micro_batch": 2, "checkpointing": "selective", "zero_stage": 1}], ids=str
)
def test_large_logits_wait_for_nothing(rank, options):
    found, streamed = rank(with_large_logits, on_both, None, {"precision": "fp32", **options})[0]
    assert streamed == 2 * STEPS
    check(found, options)


def check(found: Any, options: dict[str, Any]) -> None:
    there, here, waits, faults = found
    # fp32, and operators in another order: a few roundings. In bf16 autocast keeps others in fp32 than on a CPU.
    rel = 1e-2 if "precision" in options else 1e-5
    for one, other in zip(there, here, strict=True):
        assert one == pytest.approx(other, rel=rel)
    allowed = STREAMED if options.get("checkpointing") == "stream" else set()
    assert [wait for wait in waits if wait[0] not in allowed] == []
    assert faults == []
