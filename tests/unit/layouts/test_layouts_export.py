"""Exported files are what the named tools accept, and refuse what they have not."""

import itertools
import json
import os
import subprocess
import tomllib
from dataclasses import replace

import pytest

from fourfold.launch.commands.export import exported
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.output.export import (
    deepspeed_config,
    torchtitan_config,
)
from fourfold.layouts.output.megatron import megatron_arguments, megatron_config

LLAMA = load_model("llama-3.1-70b")
THREE_D = Layout(dp=8, pp=4, tp=8, vp=2, sequence_parallel=True, zero_stage=1, global_batch=512, seq_len=8192)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_megatron_core_accepts_its_config(checkpointing):
    config = pytest.importorskip("megatron.core.transformer.transformer_config")
    torch = pytest.importorskip("torch")
    layout = Layout(**{**THREE_D.as_dict(), "checkpointing": checkpointing})
    fields = megatron_config(layout, LLAMA)
    fields["pipeline_dtype"] = getattr(torch, fields["pipeline_dtype"])
    built = config.TransformerConfig(**fields)
    assert (built.tensor_model_parallel_size, built.pipeline_model_parallel_size, built.num_query_groups) == (8, 4, 8)


def test_megatron_arguments_by_hand():
    arguments = megatron_arguments(THREE_D, LLAMA)
    pairs = dict(itertools.pairwise(arguments))
    assert pairs["--tensor-model-parallel-size"] == "8"
    assert pairs["--num-layers-per-virtual-pipeline-stage"] == "10"
    assert pairs["--num-query-groups"] == "8"
    assert {"--sequence-parallel", "--tp-comm-overlap", "--use-distributed-optimizer", "--swiglu"} <= set(arguments)


def test_uneven_stages_reach_the_tools():
    # Llama 3.1 405B was trained with a layer less in the first stage and in the last: 126 layers in 16 stages.
    model = load_model("llama-3.1-405b")
    layout = Layout(dp=8, pp=16, tp=8, sequence_parallel=True, zero_stage=1, global_batch=512, seq_len=8192)
    fields = megatron_config(layout, model)
    assert (fields["num_layers_in_first_pipeline_stage"], fields["num_layers_in_last_pipeline_stage"]) == (7, 7)
    words = dict(itertools.pairwise(megatron_arguments(replace(layout, head_counts_as=1), model)))
    assert (words["--decoder-first-pipeline-num-layers"], words["--decoder-last-pipeline-num-layers"]) == ("8", "6")
    assert "--decoder-first-pipeline-num-layers" not in megatron_arguments(replace(layout, pp=14), model)
    for pp, less, expected in ((16, 0, (1, 0)), (14, 0, (0, 0)), (14, 2, (1, 2))):
        sharded = replace(layout, pp=pp, head_counts_as=less, zero_stage=3)
        parallelism = torchtitan_config(sharded, model)["parallelism"]
        written = [parallelism[f"pipeline_parallel_{end}_stage_less_layers"] for end in ("first", "last")]
        assert tuple(written) == expected


def test_deepspeed_accepts_its_config():
    runtime = pytest.importorskip("deepspeed.runtime.config")
    layout = Layout(zero_stage=3, micro_batch=2, global_batch=64, seq_len=2048)
    parsed = runtime.DeepSpeedConfig(deepspeed_config(layout, LLAMA))
    assert parsed.zero_optimization_stage == 3
    assert (parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps) == (2, 32)


def test_torchtitan_sections():
    layout = Layout(dp=8, pp=2, tp=4, zero_stage=3, sequence_parallel=True, global_batch=64, seq_len=8192)
    config = tomllib.loads(exported(layout, LLAMA, to="torchtitan", gpus_per_node=8, file="layout.toml"))
    assert config["parallelism"]["data_parallel_shard_degree"] == 8
    assert config["parallelism"]["pipeline_parallel_schedule"] == "1F1B"
    assert config["training"]["local_batch_size"] == 8
    assert torchtitan_config(layout, LLAMA) == config


@pytest.mark.parametrize(
    ("to", "layout", "message"),
    [
        ("megatron", Layout(zero_stage=3, global_batch=8, seq_len=64), "megatron has no ZeRO 2 or 3"),
        ("megatron", Layout(pp=16, vp=2, global_batch=32, seq_len=64), "80 layers are no multiple of pp=16 x vp=2"),
        ("megatron", Layout(pp=7, global_batch=8, seq_len=64), "stages of \\[11, 12, 12, 12, 11, 11, 11\\] layers"),
        ("deepspeed", Layout(tp=2, global_batch=8, seq_len=64), "tensor parallelism"),
        ("torchtitan", Layout(tp=2, global_batch=8, seq_len=64), "without sequence parallelism"),
        (
            "slurm",
            Layout(cp=2, cp_heads=2, global_batch=8, seq_len=64),
            "uses cp_heads, which fourfold's own runtime does not have",
        ),
        ("torchrun", Layout(dp=12, global_batch=12, seq_len=64), "12 ranks do not fill nodes of 8 devices"),
        ("k8s", Layout(global_batch=8, seq_len=64), "--to k8s: choose one of megatron"),
    ],
)
def test_what_a_tool_has_not_is_refused(to, layout, message):
    with pytest.raises(ValueError, match=message):
        exported(layout, LLAMA, to=to, gpus_per_node=8, file="layout.toml")


@pytest.mark.parametrize("to", ["torchrun", "slurm", "mpi"])
def test_scripts_start_every_rank(tmp_path, to):
    layout = Layout(dp=8, pp=2, tp=2, global_batch=64, seq_len=2048)
    script = tmp_path / "run.sh"
    script.write_text(exported(layout, LLAMA, to=to, gpus_per_node=8, file="layout.toml"))
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    # The tools are replaced by ones that print what they were called with.
    for tool in ("torchrun", "srun", "mpiexec", "scontrol"):
        (tmp_path / tool).write_text('#!/bin/bash\necho "$(basename "$0") $*"\n')
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[0-3]"}
    printed = subprocess.run(["bash", str(script), "--steps", "5"], capture_output=True, text=True, env=environment)
    assert printed.returncode == 0
    assert "fourfold.launch.train --layout layout.toml" in printed.stdout
    assert ("-n 32 -ppn 8" if to == "mpi" else "--nnodes 4 --nproc-per-node 8") in printed.stdout
    assert "--steps 5" in printed.stdout


def test_json_is_json():
    layout = Layout(dp=8, zero_stage=3, global_batch=64, seq_len=2048)
    assert json.loads(exported(layout, LLAMA, to="deepspeed", gpus_per_node=8, file="x"))["train_batch_size"] == 64
