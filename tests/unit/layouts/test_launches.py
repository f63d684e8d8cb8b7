"""Launches and compiled layers: what a profile of a GPU tells of them, made up here, and what a plan makes of it."""

from dataclasses import replace
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.layouts.cost.candidates import Candidates
from fourfold.layouts.cost.layer import saved_bytes
from fourfold.layouts.cost.price import PricedLayout, price
from fourfold.layouts.cost.pricing import Pricing
from fourfold.layouts.inputs.cluster import Cluster, load_cluster, read_cluster
from fourfold.layouts.inputs.constants import load_constants
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.software import RUNTIME_COMPILING, RUNTIME_CPU, RUNTIME_CUDA
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

LLAMA = load_model("llama-3.2-1b")
BATCH = {"global_batch": 16, "seq_len": 2048}
runner = CliRunner(env={"COLUMNS": "200"})


def document(kind: str = "cuda", *, compiled: bool = True, **device: Any) -> dict[str, Any]:
    """cluster.toml of two ranks that timed LLAMA's layers: a layer alone takes 1 ms a sequence, the host 3 ms each."""
    software, dtype = (RUNTIME_CUDA, "bfloat16") if kind == "cuda" else (RUNTIME_CPU, "float32")
    one = Candidates.of([Layout(global_batch=1, seq_len=2048)])
    pricing = Pricing(
        layouts=one, model=LLAMA, cluster=load_cluster("H100-80GB"), software=software, constants=load_constants()
    )  # fmt: skip
    kept = int(saved_bytes(pricing)[0][0])

    def row(micro_batch: int, milliseconds: float, host_ms: float, **fields: Any) -> dict[str, Any]:
        return {
            "dtype": dtype, "tp": 1, "micro_batch": micro_batch, "seq_len": 2048, "forward_s": milliseconds / 3e3,
            "backward_s": milliseconds / 1.5e3, "host_s": host_ms / 1e3, "activation_bytes": kept * micro_batch,
            **fields,
        }  # fmt: skip

    send = {"operation": "send", "group_size": 2, "latency_s": 1e-5, "bandwidth_bytes_per_s": 1e11}
    quick = [row(1, 0.7, 0.9, compiled=True), row(16, 11.2, 0.9, compiled=True)] if compiled else []
    cut = [row(1, 0.6, 5.0, tp=2, sequence_parallel=False), row(1, 0.6, 7.0, tp=2, sequence_parallel=True)]
    return {
        "schema": 1, "name": "made up", "num_devices": 2, "devices_per_node": 2,
        "device": {
            "name": "NVIDIA H100" if kind == "cuda" else "cpu", "type": kind, "dtype": dtype, "memory_bytes": 8e10,
            "peak_flops_per_s": 9e14, "memory_bandwidth_bytes_per_s": 3e12, "operator_overhead_s": 5e-6, **device,
        },
        "link": [{"name": "host", "num_ranks": 2, "operation": [send]}],
        "matmul": [{"dtype": dtype, "m": 2048, "n": 2048, "k": 2048, "seconds": 3e-5}],
        "layer": [row(1, 1.0, 3.0), row(16, 16.0, 3.0), row(1, 0.5, 3.0, tp=2), *quick],
        "tp_layer": cut,
    }  # fmt: skip


def measured(kind: str = "cuda", **how: Any) -> Cluster:
    return read_cluster(document(kind, **how), title="made up")


def priced(cluster: Cluster, **fields: Any) -> PricedLayout:
    return price(LLAMA, cluster, [Layout(**BATCH, **fields)])[0]


def test_a_device_waits_where_its_host_takes_longer_than_a_layer():
    one = priced(measured(), micro_batch=1, compile=False)
    # 16 micro-batches through 16 layers, each of which the host issues in 3 ms and the device does in 1 ms
    assert one.time_parts_s["launch"] == pytest.approx(16 * 16 * 2e-3)
    assert one.launch_bound
    assert one.compute_s == pytest.approx(
        sum(one.time_parts_s[name] for name in ("compute", "recompute", "launch", "overhead"))
    )
    # Recomputed, the host issues a forward again, and the device does it again in a third of a millisecond.
    full = priced(measured(), micro_batch=1, compile=False, checkpointing="full")
    assert full.time_parts_s["launch"] == pytest.approx(16 * 16 * (2 * 3e-3 - 4e-3 / 3))
    four = priced(measured(), micro_batch=4, compile=False)
    assert four.time_parts_s["launch"] == 0
    assert not four.launch_bound


def test_a_layer_that_tp_cuts_has_its_own_host_time():
    plain, cut = (priced(measured(), tp=2, sequence_parallel=sp, compile=False) for sp in (False, True))
    # 0.6 ms with messages each; the host takes 5 ms, and 7 ms with sequence parallelism
    assert plain.time_parts_s["launch"] == pytest.approx(16 * 16 * 4.4e-3)
    assert cut.time_parts_s["launch"] == pytest.approx(16 * 16 * 6.4e-3)
    # The compiler has done DTensor's work; what the messages take is as beside layers that are not compiled.
    compiled = priced(measured(), tp=2)
    assert compiled.time_parts_s["launch"] <= 16 * 16 * 0.9e-3
    assert compiled.time_parts_s["tp_communication"] == pytest.approx(plain.time_parts_s["tp_communication"])


def test_a_processor_is_its_own_host():
    for fields in ({}, {"tp": 2}, {"checkpointing": "full"}):
        one = priced(measured("cpu"), **fields)
        assert one.time_parts_s["launch"] == 0
        assert not one.launch_bound


def test_without_measured_launches_the_software_tells():
    rows = document()
    for row in (*rows["layer"], *rows["tp_layer"]):
        del row["host_s"]
    one = priced(read_cluster(rows, title="older"), micro_batch=1, compile=False)
    assert one.time_parts_s["launch"] == pytest.approx(16 * 16 * (RUNTIME_CUDA.layer_host_s - 1e-3))


def test_layers_are_priced_compiled_where_the_runtime_compiles_them():
    cluster = measured()
    names = {
        "": priced(cluster), "full": priced(cluster, checkpointing="full"), "no": priced(cluster, compile=False),
        "selective": priced(cluster, checkpointing="selective"), "tp": priced(cluster, tp=2),
        "stream": priced(cluster, checkpointing="stream", stream_chunks=4), "yes": priced(cluster, compile=True),
        "late": priced(cluster, pp=2, schedule="lockstep"), "cp": priced(cluster, cp=2, zero_stage=3),
    }  # fmt: skip
    compiled = {name for name, one in names.items() if one.software.name == "fourfold-compiled"}
    assert compiled == {"", "full", "yes", "cp", "late", "tp"}
    # 0.7 ms a layer instead of 1 ms, and the host 0.9 ms of which the device waits 0.2 ms
    assert names[""].time_parts_s["launch"] == pytest.approx(16 * 16 * 0.2e-3)
    saved = names["no"].time_parts_s["compute"] - names[""].time_parts_s["compute"]
    ends = names[""].time_parts_s["compute"] - 16 * 16 * 0.7e-3
    assert saved - 16 * 16 * 0.3e-3 == pytest.approx(0, abs=0.1 * ends)  # the ends are not compiled
    # Software that is named prices every layout; a processor compiles none unasked.
    layout = Layout(**BATCH)
    assert price(LLAMA, cluster, [layout], software=RUNTIME_CUDA)[0].software.name == "fourfold-cuda"
    assert priced(measured("cpu")).software.name == "fourfold-cpu"


def test_pure_bf16_is_priced_compiled_where_the_runtime_compiles_it():
    cluster = load_cluster("H100-80GB")
    cases = {
        "unasked": {}, "asked": {"compile": True}, "not": {"compile": False},
        "selective": {"checkpointing": "selective"},
    }  # fmt: skip
    found = {name: priced(cluster, precision="bf16", **fields) for name, fields in cases.items()}
    assert {name: one.software.name for name, one in found.items()} == {
        "unasked": "fourfold-bf16-compiled", "asked": "fourfold-bf16-compiled", "not": "fourfold-bf16",
        "selective": "fourfold-bf16",
    }  # fmt: skip
    assert found["unasked"].step_s == found["asked"].step_s < found["not"].step_s
    request = SearchRequest(num_devices=1, **BATCH, fix={"precision": "bf16"})
    plan = rank_layouts(LLAMA, cluster, request, top=5)
    assert plan.layouts[0].software.name == "fourfold-bf16-compiled"
    # A parameter's bytes: weight, gradient and AdamW's two moments, of 2 each.
    held = found["unasked"].memory_parts_bytes
    assert held["weights"] == held["optimizer"] / 2 == 2 * LLAMA.num_params


def test_a_ring_adds_to_compiled_layers_what_it_added_to_others():
    table = document()
    both = [{**row, "cp": 2, "forward_s": 2 * row["forward_s"]} for row in table["layer"] if row["tp"] == 1]
    table["cp_layer"] = [row for row in both if not row.get("compiled")]
    cluster = read_cluster(table, title="made up")
    compiled, plain = (priced(cluster, cp=2, compile=how) for how in (True, False))
    assert compiled.time_parts_s["cp_communication"] == pytest.approx(plain.time_parts_s["cp_communication"])
    assert plain.time_parts_s["cp_communication"] > 0


def test_a_plan_ranks_both_kinds_and_each_as_it_is_priced_alone():
    request = SearchRequest(num_devices=2, **BATCH)
    plan = rank_layouts(LLAMA, measured(), request)
    assert plan.software == RUNTIME_COMPILING
    assert {one.software.name for one in plan.layouts} == {"fourfold-cuda", "fourfold-compiled"}
    for one in plan.layouts[:: len(plan.layouts) // 20]:
        again = price(LLAMA, plan.cluster, [one.layout])[0]
        assert (again.step_s, again.peak_bytes, again.software) == (one.step_s, one.peak_bytes, one.software)
    expected = [one.expected_s for one in plan.layouts]
    assert expected == sorted(expected)


@pytest.mark.parametrize("words", [["plan"], ["explain", "--layout", "tp2 selective"]], ids=str)
def test_a_launch_bound_layout_is_told_with_what_mends_it(tmp_path, words):
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps(document()))
    command, *more = words
    common = ["llama-3.2-1b", "--cluster", str(path), "--gpus", "2", "--global-batch", "16", "--seq-len", "2048"]
    asked = ("tp=2", "micro_batch=1", "checkpointing=selective")
    fix = [word for field in asked for word in ("--fix", field)] if command == "plan" else []
    result = runner.invoke(app, [command, *common, *more, *fix], catch_exceptions=False)
    assert "is launch-bound: its devices wait" in result.stdout
    assert "a larger micro-batch, or a layout whose layers the runtime compiles" in result.stdout
    busy = [command, *common, *(["--fix", "micro_batch=4"] if command == "plan" else ["--layout", "dp2 mb4"])]
    assert "launch-bound" not in runner.invoke(app, busy, catch_exceptions=False).stdout


@pytest.mark.parametrize("compiled", [True, False])
def test_a_profile_without_compiled_layers_is_told(tmp_path, compiled):
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps(document(compiled=compiled)))
    words = ["plan", "llama-3.2-1b", "--cluster", str(path), "--gpus", "2", "--global-batch", "16", "--seq-len", "2048"]
    told = runner.invoke(app, words, catch_exceptions=False).stdout
    assert ("the profile timed none of this model's so" in told) != compiled
    eager = runner.invoke(app, [*words, "--fix", "compile=false"], catch_exceptions=False).stdout
    assert "the profile timed none" not in eager


def test_what_a_device_holds_outside_the_allocator_is_what_was_measured():
    known, unknown = measured(reserve_bytes=3e8), measured()
    assert priced(known).reserve_bytes == 3e8
    assert priced(unknown).reserve_bytes == load_constants().reserve_bytes
    assert priced(known).margin_bytes - priced(unknown).margin_bytes == load_constants().reserve_bytes - 3e8
    assert priced(measured("cpu", reserve_bytes=3e8)).reserve_bytes == 0
    with pytest.raises(ValueError, match="reserve_bytes=-1"):
        measured(reserve_bytes=-1)


@pytest.mark.parametrize("field", ["compiled", "sequence_parallel"])
def test_a_flag_of_a_row_is_true_or_false(field):
    table = document()
    table["layer"][0][field] = "yes"
    with pytest.raises(ValueError, match=f"{field}='yes', but it is true or false"):
        read_cluster(table, title="made up")


def test_doubt_counts_the_wait_for_launches():
    one = priced(measured(), micro_batch=1, compile=False)
    steady = replace(RUNTIME_CUDA, network_spread=0.0)
    sure = price(LLAMA, measured(), [one.layout], software=steady)[0]
    assert one.step_high_s / one.step_s > sure.step_high_s / sure.step_s
