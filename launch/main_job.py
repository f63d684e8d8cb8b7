"""What `layout-advisor demo` trains where nobody says: a model and a batch that keep this machine's devices busy.

On processors that is a model of three million parameters. On GPUs it would be all launches and no arithmetic, so there
the model is the largest of a few that memory and time have room for.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fourfold.layouts.inputs.huggingface import model_from_config
from fourfold.layouts.inputs.model import ModelConfig

TRAINING_S = 240.0
REACHED = 0.3
"""Of the devices' peak, what a training surely reaches."""
BYTES_A_PARAMETER = 16
"""fp32 weights, gradients and two moments."""
MEMORY_SHARE = 0.25
"""Of a device's memory, for these: layouts that shard nothing and keep all activations are to fit as well."""
UNKNOWN_PEAK = 1e14
"""FLOP/s of a GPU that no preset has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the choice depends on; FLOP/s of one device in the training dtype, bytes of one device."""

    device_type: str
    num_devices: int
    memory_bytes: float
    peak_flops_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MainJob:
    """A Hugging Face config; tokens a sequence, sequences a step; the learning rate's peak."""

    name: str
    config: Mapping[str, Any]
    seq_len: int
    global_batch: int
    learning_rate: float

    @property
    def model(self) -> ModelConfig:
        return model_from_config(dict(self.config))


# Hidden size, layers, heads, key heads, feed-forward width, and the learning rate that GPT-3's table has for the size.
_SIZES = {
    "byte-llama-100m": (768, 16, 12, 4, 2048, 6e-4),
    "byte-llama-400m": (1024, 36, 16, 8, 2816, 3e-4),
    "byte-llama-1b": (2048, 24, 16, 8, 5632, 2e-4),
}


def main_job(machine: Machine, *, steps: int) -> MainJob:
    """The model, batch and learning rate of a training of `steps` steps on `machine`.

    On a GPU: the largest model whose states take a quarter of a device's memory at most, and that takes its steps in
    some four minutes; the smallest has 100 million parameters and is taken in any case.
    The batch is the first number of sequences from 8 on, on GPUs from 32 on, that can be shared among all devices: any
    number of them then has a layout.
    """
    shipped = json.loads(files("fourfold.launch").joinpath("data/byte-llama.json").read_text())
    least = 8 if machine.device_type == "cpu" else 32
    global_batch = -(-least // machine.num_devices) * machine.num_devices
    if machine.device_type == "cpu":
        return MainJob(name="byte-llama", config=shipped, seq_len=256, global_batch=global_batch, learning_rate=3e-3)
    chosen = None
    for name, (hidden, layers, heads, key_heads, width, rate) in _SIZES.items():
        sizes = {
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": key_heads, "head_dim": hidden // heads, "intermediate_size": width,
        }  # fmt: skip
        job = MainJob(
            name=name, config={**shipped, **sizes}, seq_len=1024, global_batch=global_batch, learning_rate=rate
        )
        flops = 6.0 * job.model.num_params * steps * job.global_batch * job.seq_len
        seconds = flops / (REACHED * machine.peak_flops_per_s * machine.num_devices)
        fits = BYTES_A_PARAMETER * job.model.num_params <= MEMORY_SHARE * machine.memory_bytes and seconds <= TRAINING_S
        if chosen is None or fits:
            chosen = job
    assert chosen is not None
    return chosen


def this_machine(num_ranks: int | None) -> Machine:
    """The GPUs of this host, or its processors where it has none."""
    import torch

    from fourfold.layouts.inputs.cluster import load_cluster, preset_for_gpu
    from fourfold.profiling.hardware import default_num_ranks

    if not torch.cuda.is_available():
        num_devices = num_ranks or default_num_ranks("cpu")
        return Machine(device_type="cpu", num_devices=num_devices, memory_bytes=0.0, peak_flops_per_s=0.0)
    properties = torch.cuda.get_device_properties(0)
    try:
        peak = load_cluster(preset_for_gpu(properties.name)).device.peak_flops_per_s
    except ValueError:
        peak = UNKNOWN_PEAK
    return Machine(
        device_type="cuda",
        num_devices=num_ranks or torch.cuda.device_count(),
        memory_bytes=float(properties.total_memory),
        peak_flops_per_s=peak,
    )
