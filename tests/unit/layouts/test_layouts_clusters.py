"""Clusters of one device and of odd numbers, nodes of one device; MFU counts what there is; scripts on any path."""

import csv
import json
import os
import re
import shlex
import subprocess

import pytest
import tomli_w
from support.clusters import measured_cluster
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.launch.commands.export import exported
from fourfold.layouts.cost.price import mfu_of, price
from fourfold.layouts.inputs.cluster import cluster_presets, load_cluster, read_cluster
from fourfold.layouts.inputs.layout import Layout, read_prediction
from fourfold.layouts.inputs.model import load_model, model_presets
from fourfold.layouts.output.tables import legend
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

LLAMA = load_model("llama-3.1-8b")
runner = CliRunner(env={"COLUMNS": "120"})


def invoke(*words: str) -> str:
    result = runner.invoke(app, list(words))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.parametrize("nodes", [[], ["--gpus-per-node", "1"]], ids=["as measured", "nodes of one"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_commands_work_on_any_number_of_devices(tmp_path, count, nodes):
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps(measured_cluster(count)))
    words = ["--cluster", str(path), "--gpus", str(count), "--global-batch", "42", "--seq-len", "84", *nodes]
    plan = json.loads(invoke("plan", "tiny-llama-bytes", *words, "--json"))
    assert plan["num_fitting"] > 0
    assert all(0 < layout["mfu"] <= 1 for layout in plan["layouts"])
    best, last = plan["layouts"][0]["layout"], plan["layouts"][-1]["layout"]
    assert "Time of a step" in invoke("explain", "tiny-llama-bytes", *words)
    assert "step" in invoke("compare", "tiny-llama-bytes", best, last, *words)


def test_several_devices_need_a_link():
    alone = read_cluster(measured_cluster(1), title="alone")
    with pytest.raises(ValueError, match="was measured on one device and has no link to price 2 with"):
        rank_layouts(load_model("tiny-llama-bytes"), alone, SearchRequest(num_devices=2, global_batch=8, seq_len=64))
    with pytest.raises(ValueError, match="no link"):
        price(load_model("tiny-llama-bytes"), alone, [Layout(dp=2, global_batch=8, seq_len=64)])


@pytest.mark.parametrize("preset", sorted(cluster_presets()))
def test_nodes_of_one_device_pay_the_network(preset):
    layout = Layout(dp=2, global_batch=8, seq_len=2048)
    cluster = load_cluster(preset)
    together, apart = (price(LLAMA, machine, [layout])[0] for machine in (cluster, cluster.with_devices_per_node(1)))
    part = "dp_communication"
    assert apart.time_parts_s[part] > together.time_parts_s[part]


def test_mfu_counts_a_window_as_wide_as_it_is():
    model = load_model("mistral-7b")
    assert (model.sliding_window, model.num_windowed_layers) == (4096, 32)
    attention = model.flops_per_token(32768) - 6 * model.num_params
    assert attention == 12 * 32 * model.q_size * 4096
    assert model.flops_per_token(2048) - 6 * model.num_params == 12 * 32 * model.q_size * 2048
    layout = Layout(dp=8, micro_batch=1, checkpointing="full", global_batch=8, seq_len=32768)
    priced = price(model, load_cluster("A100-80GB"), [layout])[0]
    tokens = 8 * 32768
    assert priced.mfu == pytest.approx(tokens * model.flops_per_token(32768) / (priced.step_s * 8 * 312e12))
    assert mfu_of(model, layout, priced.step_s, 312e12) == priced.mfu < 0.6


@pytest.mark.parametrize("cluster", sorted(cluster_presets()))
def test_no_preset_passes_100_percent(cluster):
    machine = load_cluster(cluster)
    for name in model_presets():
        model = load_model(name)
        lengths = {1024, 4096, model.max_seq_len or 4096, min(model.max_seq_len or 32768, 32768)}
        for seq_len in sorted(length for length in lengths if length <= (model.learned_positions or length)):
            layouts = [Layout(dp=8, micro_batch=size, global_batch=64, seq_len=seq_len) for size in (1, 8)]
            assert all(0 < priced.mfu < 1 for priced in price(model, machine, layouts)), (name, seq_len)


def test_a_sequence_beyond_the_learned_positions_is_refused():
    gpt2 = load_model("gpt2")
    for seq_len in (1025, 2048):
        request = SearchRequest(num_devices=1, global_batch=8, seq_len=seq_len)
        with pytest.raises(ValueError, match=f"seq_len={seq_len} is beyond the 1024 positions"):
            rank_layouts(gpt2, load_cluster("A100-80GB"), request)
        with pytest.raises(ValueError, match="choose at most 1024"):
            price(gpt2, load_cluster("A100-80GB"), [Layout(global_batch=8, seq_len=seq_len)])


@pytest.mark.parametrize("name", ["a b.toml", "it's.toml", 'say "x" $HOME.toml', "päth;&.toml"])
@pytest.mark.parametrize("to", ["torchrun", "slurm", "mpi"])
def test_scripts_pass_any_path_on_as_it_is(tmp_path, to, name):
    layout = Layout(dp=4, global_batch=64, seq_len=2048)
    script = tmp_path / "run.sh"
    script.write_text(exported(layout, LLAMA, to=to, gpus_per_node=4, file=name))
    # Every launcher is replaced by one that runs or prints its last words, one a line.
    for tool in ("torchrun", "mpiexec"):
        (tmp_path / tool).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").write_text('#!/bin/bash\nSLURM_NODEID=0 exec "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho host\n")
    for tool in ("torchrun", "mpiexec", "srun", "scontrol"):
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n",
                   "MASTER_PORT": "12345"}  # fmt: skip
    printed = subprocess.run(
        ["bash", str(script), "--out", "x y"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert printed.returncode == 0, printed.stderr
    words = printed.stdout.splitlines()
    assert words[words.index("--layout") + 1] == name
    assert words[words.index("--out") + 1] == "x y"
    if to != "mpi":
        assert words[words.index("--master-port") + 1] == "12345"


def test_mpi_speaks_the_words_of_the_mpi_that_is_there(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(exported(Layout(dp=8, global_batch=8, seq_len=64), LLAMA, to="mpi", gpus_per_node=4, file="l"))
    for version, expected in (("mpiexec (Open MPI) 4.1", ["--map-by", "ppr:4:node"]), ("HYDRA 4.1", ["-ppn", "4"])):
        (tmp_path / "mpiexec").write_text(
            f'#!/bin/bash\nif [ "$1" = --version ]; then echo {shlex.quote(version)}; else printf "%s\\n" "$@"; fi\n'
        )
        (tmp_path / "mpiexec").chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        words = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment).stdout.split(
            "\n"
        )
        assert words[:4] == ["-n", "8", *expected]


def test_scripts_have_the_nodes_that_were_planned_for(tmp_path):
    words = ["--cluster", "GB200", "--gpus", "8", "--global-batch", "64", "--seq-len", "2048", "--gpus-per-node", "4"]
    invoke("plan", "llama-3.2-1b", *words, "--out", str(tmp_path), "--fix", "zero_stage=3")
    assert read_prediction(tmp_path / "layout.toml")["devices_per_node"] == 4
    script = invoke("export", str(tmp_path / "layout.toml"), "--to", "torchrun")
    assert "--nnodes 2 --nproc-per-node 4" in script
    asked = invoke("export", str(tmp_path / "layout.toml"), "--to", "torchrun", "--gpus-per-node", "8")
    assert "--nnodes 1 --nproc-per-node 8" in asked
    with (tmp_path / "plan.csv").open() as file:
        assert next(csv.DictReader(file))["layout"]


def test_the_legend_says_every_word_that_a_name_can_have():
    batch = {"global_batch": 64, "seq_len": 64}
    layouts = [
        Layout(dp=2, pp=2, cp=2, tp=2, micro_batch=2, zero_stage=3, checkpointing="full", checkpoint_every=2, **batch),
        Layout(pp=4, embedding_counts_as=1, head_counts_as=2, checkpointing="selective", **batch),
        Layout(pp=2, vp=2, tp=2, sequence_parallel=True, cp=2, cp_heads=2, ep=2, **batch),
        Layout(checkpointing="stream", stream_chunks=4, offload=True, **batch),
        Layout(dp=2, zero_stage=3, sharded_accumulation=True, **batch),
        Layout(pp=2, schedule="2bw", mitigation="sc", **batch),
    ]  # fmt: skip
    for priced in price(load_model("mixtral-8x7b"), load_cluster("H100-80GB"), layouts[:5]) + price(
        LLAMA, load_cluster("H100-80GB"), layouts[5:]
    ):
        for word in str(priced.layout).split():
            name = re.match(r"[a-z]+|\d[a-z]+\d?", word)
            assert name is not None
            assert name[0] in legend([priced]), word
    assert "streamxN" not in legend([])
    assert all(word in legend() for word in ("lessA+B", "mbN", "zN", "P(fits)", "fast+safe"))


def test_plan_prints_the_legend_of_what_it_shows():
    words = ["--cluster", "A100-80GB", "--gpus", "8", "--global-batch", "64", "--seq-len", "2048"]
    shown = invoke("plan", "llama-3.1-8b", *words, "--top", "1", "--fix", "zero_stage=3")
    assert "zN: ZeRO stage N" in shown
    assert "P(fits): probability" in shown
    assert "streamxN" not in shown
