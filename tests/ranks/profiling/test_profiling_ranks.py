"""A profile on gloo ranks: two hosts' tiers, interruption and resumption, a failing rank, memory against real FSDP2."""

import json
import os
import time
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.training_process import forked_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fourfold.launch.commands.profile import profile_machine
from fourfold.launch.processes import RankFailure, start_ranks
from fourfold.launch.profile_ranks import TrainingParallelism
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.profiling.clock import Clock
from fourfold.profiling.decoder import local_model
from fourfold.profiling.links import find_tiers
from fourfold.profiling.memory import AllocationPeak, TracedStep, _LossModel, step_memory
from fourfold.profiling.partial import PartialProfile
from fourfold.profiling.plan import profile_cases
from fourfold.profiling.ranks import profile_ranks
from fourfold.profiling.session import LATE_ROUNDS, Case, Timings, measure
from fourfold.profiling.settings import ProfileSettings

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
OPERATIONS = {"send", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"}


def write_profile(folder: str, ranks_per_host: int, seconds: float, model: bool) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_host)
    config = Path(folder) / "config.json"
    if dist.get_rank() == 0 and model:
        config.write_text(json.dumps(CONFIG))
    dist.barrier()
    try:
        settings = ProfileSettings(
            out=Path(folder) / "cluster.toml", seconds=seconds, model=config if model else None, seq_len=32,
            micro_batches=(1,), device="cpu",
        )  # fmt: skip
        profile_ranks(settings, TrainingParallelism())
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def test_two_hosts_have_two_tiers(ranks, tmp_path):
    ranks(4)(write_profile, str(tmp_path), 2, 0.1, False)
    table = tomllib.loads((tmp_path / "cluster.toml").read_text())
    assert (table["num_devices"], table["devices_per_node"]) == (4, 2)
    assert len(load_cluster(tmp_path / "cluster.toml").links) == 2  # the planner reads it
    assert [(link["name"], link["num_ranks"]) for link in table["link"]] == [("host", 2), ("network", 2)]
    for link in table["link"]:
        assert {entry["operation"] for entry in link["operation"]} == OPERATIONS
        assert all(entry["bandwidth_bytes_per_s"] > 0 for entry in link["operation"])


def test_a_model_is_measured_with_its_shapes_and_layers(ranks, tmp_path):
    ranks(2)(write_profile, str(tmp_path), 2, 0.5, True)
    table = tomllib.loads((tmp_path / "cluster.toml").read_text())
    layers = {row["tp"]: row for row in table["layer"]}
    assert set(layers) == {1, 2}
    # Half the heads and half the MLP: less is kept, but norms and residuals stay whole.
    assert layers[1]["activation_bytes"] / 2 < layers[2]["activation_bytes"] < layers[1]["activation_bytes"]
    assert all(row["forward_s"] > 0 and row["backward_s"] > 0 for row in table["layer"])
    assert all(row["peak_bytes"] > row["activation_bytes"] for row in table["layer"])
    for name in ("tp_layer", "tp_ends"):  # hidden states whole between the matrices, and cut along the sequence
        assert [(row["tp"], row["sequence_parallel"]) for row in table[name]] == [(2, False), (2, True)]
    assert [row["cp"] for row in table["cp_layer"]] == [2]
    assert all(row["head_backward_s"] > 0 for row in table["ends"] + table["tp_ends"])
    assert {row["fused"] for row in table["optimizer"]} == {True, False}
    # one layer has 32*8*2*(4+2) + 3*32*64 + 64 weights; embedding and head 40*32 each, the last norm 32
    assert table["optimizer"][0]["parameters"] == 3 * 9280 + 2 * 40 * 32 + 32
    assert {(row["m"], row["n"], row["k"]) for row in table["matmul"]} >= {(32, 32, 32), (32, 16, 32), (64, 32, 32)}
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith((".", "cluster.toml."))] == []


class CompilesOnSomeRanks(TrainingParallelism):
    """Layers compiled by torch's simplest backend, on a CPU; `ranks` of them see a compiler."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def compiles_on(self, device_type: str) -> bool:
        return dist.get_rank() < self._ranks

    def compile_layer(self, layer: torch.nn.Module) -> None:
        layer.compile(backend="eager")


def compiled_cases(folder: str, ranks_with_compiler: int) -> list[str]:
    """Every case of a profile, by its key, where so many ranks have a compiler."""
    config = Path(folder) / "config.json"
    if dist.get_rank() == 0:
        config.write_text(json.dumps(CONFIG))
    dist.barrier()
    settings = ProfileSettings(out=Path(folder) / "c.toml", model=config, seq_len=32, micro_batches=(1,), device="cpu")
    cases = profile_cases(settings, torch.device("cpu"), find_tiers("cpu"), CompilesOnSomeRanks(ranks_with_compiler))
    return [case.key for case in cases if case.table == "layer"]


@pytest.mark.parametrize("ranks_with_compiler", [1, 2])
def test_ranks_measure_compiled_layers_where_all_have_a_compiler(ranks, tmp_path, ranks_with_compiler):
    first, second = ranks(2)(compiled_cases, str(tmp_path), ranks_with_compiler, timeout_s=60.0)
    assert first == second
    assert any('"compiled": true' in key for key in first) == (ranks_with_compiler == 2)


def test_each_host_of_two_measures_what_cuts_its_layers(ranks, tmp_path):
    ranks(4)(write_profile, str(tmp_path), 2, 0.1, True)
    table = tomllib.loads((tmp_path / "cluster.toml").read_text())
    for name in ("tp_layer", "tp_ends"):  # hidden states whole between the matrices, and cut along the sequence
        assert [(row["tp"], row["sequence_parallel"]) for row in table[name]] == [(2, False), (2, True)]
    assert [row["cp"] for row in table["cp_layer"]] == [2]


def test_ranks_of_a_launcher_measure_them_too(tmp_path):
    """`torchrun -m fourfold.profiling.run`: the entry hands the profile what cuts layers."""
    config, out = tmp_path / "config.json", tmp_path / "c.toml"
    config.write_text(json.dumps(CONFIG))
    words = ["--out", out, "--model", config, "--seq-len", 32, "--micro-batch", 1, "--seconds", 0.1, "--device", "cpu"]
    for rank in forked_ranks(tmp_path / "rank", 2, words, module="fourfold.profiling.run"):
        assert rank.wait(240.0) == 0, rank.text()
    table = tomllib.loads(out.read_text())
    assert table["tp_layer"][0]["tp"] == table["tp_ends"][0]["tp"] == table["cp_layer"][0]["cp"] == 2


def test_one_rank_has_no_links(ranks, tmp_path):
    ranks(1)(write_profile, str(tmp_path), 1, 0.1, False)
    table = tomllib.loads((tmp_path / "cluster.toml").read_text())
    assert (table["num_devices"], table["link"]) == (1, [])
    assert load_cluster(tmp_path / "cluster.toml").device.peak_flops_per_s > 0


def unequal_hosts() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + dist.get_rank())
    try:
        find_tiers("cpu")
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def test_hosts_of_unequal_size_are_refused(ranks):
    with pytest.raises(AssertionError, match="between 1 and 2 ranks a host"):
        ranks(2)(unequal_hosts)


def profile_of_other_lengths(folder: str) -> str:
    """Why a rank refuses its part in a profile of which each rank has another length."""
    settings = ProfileSettings(out=Path(folder) / "c.toml", seq_len=32 + dist.get_rank(), device="cpu", seconds=0.1)
    with pytest.raises(ValueError, match="ranks have other options") as refusal:
        profile_ranks(settings)
    return str(refusal.value)


def test_options_that_differ_between_ranks_are_refused_on_every_rank(ranks, tmp_path):
    first, second = ranks(2)(profile_of_other_lengths, str(tmp_path), timeout_s=30.0)
    assert first == second
    assert "give the same command on every host, with the same model" in first


def interrupted_and_resumed(folder: str) -> tuple[int, int, int]:
    """Rounds kept by a profile that is interrupted in its third round; rounds and calls of the one after it."""
    calls, last = 0, 2 + 2  # two warm-up calls, two rounds

    def work(clock: Clock, iterations: int) -> tuple[float]:
        nonlocal calls
        calls += 1
        if calls > last:
            raise KeyboardInterrupt
        return (1e-3 * (1 + dist.get_rank()),)

    case = Case(table="matmul", fields={"m": 1}, run=work, essential=True)
    partial = PartialProfile(ProfileSettings(out=Path(folder) / "c.toml"), [case], {"ranks": 2})
    clock = Clock(torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        measure([case], clock, seconds=1e-3, keep=partial.save)
    dist.barrier()
    calls, last = 0, 1000
    taken = partial.load()
    kept = len(taken.rounds[case.key])
    timings, _ = measure([case], clock, seconds=1e-6, timings=taken if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        assert timings.row(case)["seconds"] == pytest.approx(1.5e-3)  # the median of the ranks' 1 and 2 ms
    return kept, len(timings.rounds.get(case.key, ())), calls


def test_an_interrupted_profile_goes_on_where_it_stopped(ranks, tmp_path):
    first, second = ranks(2)(interrupted_and_resumed, str(tmp_path), timeout_s=30.0)
    warm_up = 2
    assert first == (2, LATE_ROUNDS, warm_up + LATE_ROUNDS - 2)
    assert second == (2, 0, first[2])


def calls_once_the_budget_is_spent() -> tuple[list[str], list[str]]:
    """Names of the cases that were called, and of those left out, where essential ones take the whole budget."""
    called: list[str] = []

    def case(name: str, *, essential: bool) -> Case:
        def run(clock: Clock, iterations: int) -> tuple[float]:
            called.append(name)
            time.sleep(0.06 if essential else 0.0)  # beyond LONG_S, so that it is not called again to warm up
            return (0.06,)

        return Case(table="matmul", fields={"m": name}, run=run, essential=essential)

    cases = [case("general", essential=False), case("ours", essential=True)]
    _, left_out = measure(cases, Clock(torch.device("cpu")), seconds=0.05)
    return sorted(set(called)), [str(case.fields["m"]) for case in left_out]


def test_once_the_budget_is_spent_nothing_is_tried_that_is_not_essential(ranks):
    for called, left_out in ranks(2)(calls_once_the_budget_is_spent, timeout_s=30.0):
        assert (called, left_out) == (["ours"], ["general"])


def budgets_that_differ() -> list[str]:
    """The cases that a rank left out, where its own budget alone would leave out others than its peer's."""

    def case(name: str, seconds: float) -> Case:
        return Case(table="matmul", fields={"m": name}, run=lambda *_: (seconds,), essential=name == "first")

    cases = [case("first", 1e-3), case("second", 2e-3), case("third", 4e-3)]
    _, left_out = measure(cases, Clock(torch.device("cpu")), seconds=0.1 if dist.get_rank() == 0 else 1e-4)
    return [str(case.fields["m"]) for case in left_out]


def test_ranks_measure_the_same_cases_whatever_time_each_has_left(ranks):
    first, second = ranks(2)(budgets_that_differ, timeout_s=30.0)
    assert first == second


def test_another_machines_partial_profile_is_refused(tmp_path):
    settings = ProfileSettings(out=tmp_path / "c.toml")
    PartialProfile(settings, [], {"ranks": 2}).save(Timings())
    with pytest.raises(ValueError, match=r"c\.toml\.partial: measured with other ranks"):
        PartialProfile(settings, [], {"ranks": 4}).load()
    settings.out.with_name("c.toml.partial").write_text("{")
    with pytest.raises(ValueError, match="broken"):
        PartialProfile(settings, [], {"ranks": 2}).load()


def test_bad_input_ends_with_one_line_and_code_2(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3] / "src"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 3}))
    settings = ProfileSettings(out=tmp_path / "c.toml", model=tmp_path / "config.json")
    with pytest.raises(ValueError, match="4 attention heads do not divide into 3"):
        profile_machine(settings, num_ranks=2)
    with pytest.raises(ValueError, match="--ranks 0"):
        profile_machine(ProfileSettings(out=tmp_path / "c.toml"), num_ranks=0)
    # The same from a rank, as under torchrun.
    with pytest.raises(RankFailure) as failure:
        start_ranks("fourfold.profiling.run", settings.arguments(), num_ranks=2, device_type="cpu")
    assert failure.value.exit_code == 2
    error = capfd.readouterr().err
    assert error.count("error: 4 attention heads do not divide into 3 key/value heads") == 1
    assert "Traceback" not in error


def real_sharded_peak(checkpointing: str) -> int:
    """Peak of the second step of real FSDP2 on this world, traced with real tensors."""
    torch.manual_seed(0)
    model = _LossModel(local_model(CONFIG, num_layers=3), checkpointing)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.decoder.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(40, (2, 64))
    held = 0
    for step in range(2):
        with AllocationPeak() as peak:
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            # The tracker sees the weights of modules that are called; of states it sees new ones only.
            held = sum(value.to_local().nbytes if hasattr(value, "to_local") else value.nbytes
                        for state in optimizer.state.values() for value in state.values())  # fmt: skip
    return held + peak.bytes


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_dry_run_of_fsdp_agrees_with_two_real_ranks(ranks, checkpointing):
    real = max(ranks(2)(real_sharded_peak, checkpointing))
    step = TracedStep(micro_batch=2, seq_len=64, checkpointing=checkpointing, zero_stage=3, dp=2)
    dry = step_memory(CONFIG, step)
    assert dry.peak_bytes == real
