"""What the planner says that a layer keeps for backpropagation is what autograd keeps, in fp32 and under autocast."""

import pytest
import torch

from fourfold.layouts.cost.candidates import Candidates
from fourfold.layouts.cost.layer import saved_bytes
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.constants import load_constants
from fourfold.layouts.inputs.huggingface import model_from_config
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.software import load_software
from fourfold.profiling.decoder import local_model
from fourfold.profiling.layer import _Work

SMALL = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096, "head_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_a_layer_keeps_is_what_autograd_keeps(family, dtype):
    config = {**SMALL, "model_type": family}
    work = _Work(local_model(config, num_layers=2), torch.device("cpu"), dtype, 2, 256)
    layout = parse_layout("dp1 mb2", num_devices=1, global_batch=2, seq_len=256)
    pricing = Pricing(
        layouts=Candidates.of([layout]), model=model_from_config(config, name=family),
        cluster=load_cluster("H100-80GB"), constants=load_constants(),
        software=load_software("fourfold-cpu" if dtype == torch.float32 else "fourfold-cuda"),
    )  # fmt: skip
    # The count leaves out one fp32 value a token for each norm, of heads a head.
    assert saved_bytes(pricing)[0][0] == pytest.approx(work.layer_facts()["activation_bytes"], rel=0.003)
