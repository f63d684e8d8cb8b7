"""Memory on a GPU: what is said against runs of one H100, and what autocast and FSDP keep of casts."""

from dataclasses import replace

import numpy as np
import pytest

from fourfold.layouts.cost.candidates import FULL, Candidates
from fourfold.layouts.cost.layer import saved_bytes
from fourfold.layouts.cost.memory import memory_of
from fourfold.layouts.cost.price import GIB
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.constants import load_constants
from fourfold.layouts.inputs.huggingface import model_from_config
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.inputs.software import load_software

LARGE = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
}  # fmt: skip


def pricing_of(words: str, software: str, model: ModelConfig, *, global_batch: int, seq_len: int) -> Pricing:
    devices = 4 if "pp4" in words else 1
    layout = parse_layout(words, num_devices=devices, global_batch=global_batch, seq_len=seq_len)
    return Pricing(
        layouts=Candidates.of([layout]), model=model, cluster=load_cluster("H100-80GB"),
        software=load_software(software), constants=load_constants(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "software", "batch", "seq_len", "gib"),
    [
        ("dp1 mb4", "fourfold-cuda", 16, 2048, 48.4460),
        ("dp1 mb4 full", "fourfold-cuda", 16, 2048, 31.8668),
        ("dp1 mb1 full", "fourfold-cuda", 16, 2048, 22.1940),
        ("dp1 mb1 full", "fourfold-cuda", 2, 16384, 44.7723),
        ("dp1 mb1", "fourfold-bf16", 16, 2048, 15.5614),
        ("dp1 mb4", "fourfold-bf16", 16, 2048, 34.4049),
        ("dp1 mb8 full", "fourfold-bf16", 16, 2048, 34.0075),
    ],
)  # fmt: skip
def test_one_h100_held_what_is_said(words, software, batch, seq_len, gib):
    """Launches of this runtime with eager layers, by torch.cuda.max_memory_allocated (benchmarks/profiling); it made
    whole logits then."""
    model = model_from_config(LARGE, name="Llama of 1.24B")
    pricing = pricing_of(words, software, model, global_batch=batch, seq_len=seq_len)
    memory = memory_of(replace(pricing, software=replace(pricing.software, streams_head=False)))
    assert memory.peak[0] / GIB == pytest.approx(gib, rel=0.002)
    # What the allocator loses between tensors is not in the peak, and yet counted.
    assert memory.margin[0] < memory.capacity - memory.reserve - memory.peak[0]


def test_fsdp_casts_hidden_states_with_the_weights():
    model = model_from_config(LARGE, name="Llama of 1.24B")
    one = pricing_of("dp1 mb1", "fourfold-cuda", model, global_batch=2, seq_len=2048)
    columns = {"dp": np.array([2, 2]), "zero_stage": np.array([0, 3])}
    both = one.of(Candidates.from_columns(columns, global_batch=2, seq_len=2048))
    whole, sharded = saved_bytes(both)[1]
    assert (whole, sharded) == (2048 * 2048 * 4, 2048 * 2048 * 2)
    kept = saved_bytes(both)[0]
    # Of each norm fp32 hidden states, what it computed in fp32, and a copy a matrix; else a copy of each in bf16.
    assert kept[0] - kept[1] == 2048 * 2048 * ((2 * 8 + 5 * 2) - (2 * 6 + 2 * 2))
    pure = replace(one, software=load_software("fourfold-bf16"))
    assert saved_bytes(pure)[0][0] == kept[1]


@pytest.mark.parametrize(
    ("checkpointing", "seq_len", "copies"),
    [("none", 512, 4), ("full", 512, 1), ("full", 65536, 1 / 8)],
    ids=["in the graph of each in flight", "all at the end of a forward", "of the layer at work, of eight"],
)
def test_which_casts_of_weights_are_there(checkpointing, seq_len, copies):
    model = load_model("llama-3.1-8b")
    pricing = pricing_of("pp4 mb1", "fourfold-cuda", model, global_batch=8, seq_len=seq_len)
    pricing = pricing.of(
        replace(pricing.layouts, checkpointing=np.array([("none", "full").index(checkpointing) * FULL]))
    )
    bare = replace(pricing, software=replace(pricing.software, cast_bytes=0))
    cast, uncast = memory_of(pricing), memory_of(bare)
    params = sum(pricing.held_params)
    held = (cast.workspace - uncast.workspace)[0, 0] / (2 * params[0, 0])
    # Of a short sequence the layer at work is smaller than the casts, and was not there before they went.
    assert held == pytest.approx(copies, rel=0.05)
