"""A profile on a CUDA device: bfloat16 with events and NCCL, and a layer of a model."""

import json
import tomllib

import pytest
import torch

from fourfold.launch.commands.profile import profile_machine
from fourfold.profiling.settings import ProfileSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip


def test_a_gpu_is_measured(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "cluster.toml"
    profile_machine(ProfileSettings(out=out, seconds=20, model=tmp_path / "config.json", seq_len=256))
    table = tomllib.loads(out.read_text())
    device = table["device"]
    assert (device["type"], device["dtype"]) == ("cuda", "bfloat16")
    # Any data-centre GPU of the last decade: above 10 TFLOP/s and 100 GB/s, and no more than 10 PFLOP/s.
    assert 1e13 < device["peak_flops_per_s"] < 1e16
    assert device["memory_bandwidth_bytes_per_s"] > 1e11
    assert table["num_devices"] == torch.cuda.device_count()
    assert {row["dtype"] for row in table["layer"]} == {"bfloat16"}
