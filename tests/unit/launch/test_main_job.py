"""The demo's model follows the machine: small on processors, 100 million parameters and more on GPUs."""

from dataclasses import replace

import pytest

from fourfold.launch.main_job import Machine, main_job
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

H100 = Machine(device_type="cuda", num_devices=1, memory_bytes=80e9, peak_flops_per_s=989e12)


def test_on_processors_the_job_is_the_small_one():
    job = main_job(Machine(device_type="cpu", num_devices=2, memory_bytes=0.0, peak_flops_per_s=0.0), steps=200)
    assert (job.name, job.seq_len, job.global_batch, job.learning_rate) == ("byte-llama", 256, 8, 3e-3)
    assert job.model.num_params < 5e6


@pytest.mark.parametrize(
    ("change", "steps", "name"),
    [
        ({}, 200, "byte-llama-1b"),
        ({}, 2000, "byte-llama-100m"),  # time decides
        ({"num_devices": 8}, 1000, "byte-llama-1b"),
        ({"memory_bytes": 40e9}, 200, "byte-llama-400m"),  # memory decides
        ({"memory_bytes": 8e9, "peak_flops_per_s": 1e13}, 200, "byte-llama-100m"),  # the smallest in any case
    ],
    ids=str,
)
def test_on_gpus_memory_and_time_decide(change, steps, name):
    job = main_job(replace(H100, **change), steps=steps)
    assert job.name == name
    assert job.model.num_params > 9e7


@pytest.mark.parametrize("num_devices", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_every_number_of_devices_has_a_layout_that_fits(device_type, num_devices):
    job = main_job(replace(H100, device_type=device_type, num_devices=num_devices), steps=200)
    assert job.global_batch % num_devices == 0
    request = SearchRequest(num_devices=num_devices, global_batch=job.global_batch, seq_len=job.seq_len)
    plan = rank_layouts(job.model, load_cluster("H100-80GB"), request, top=3)
    assert plan.layouts[0].safe
