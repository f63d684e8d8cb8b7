"""Zero-bubble of interleaved stages: its order is torch's, its price what that order takes, and who can run it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.launch.commands.export import exported
from fourfold.layouts.cost.candidates import Candidates
from fourfold.layouts.cost.price import price
from fourfold.layouts.cost.stages import stages_of
from fourfold.layouts.cost.time import MicroBatch
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout, check_runnable, read_layout_file, write_layout_file
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.software import load_software
from fourfold.layouts.output.export import torchtitan_config
from fourfold.layouts.output.round_trip import layout_of_torchtitan
from fourfold.layouts.search.explain import draw_schedule, neighbours, timed_orders, zero_bubble_order
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

A100, LLAMA = load_cluster("A100-80GB"), load_model("llama-3.1-8b")
MEGATRON = load_software("megatron")
SHAPES = [(2, 2, 2), (2, 2, 8), (3, 2, 6), (4, 2, 8), (4, 4, 4), (8, 3, 16)]
"""Ranks, runs of layers a rank, micro-batches."""


def split(**fields: Any) -> Layout:
    return Layout(**{"pp": 4, "vp": 2, "schedule": "zero-bubble", "global_batch": 32, "seq_len": 2048, **fields})


def orders(num_ranks: int, vp: int, count: int) -> list[list[tuple[str, int, int]]]:
    return [zero_bubble_order(rank, num_ranks, vp, count) for rank in range(num_ranks)]


@pytest.mark.parametrize(("num_ranks", "vp", "count"), SHAPES)
def test_the_order_is_torch_s(num_ranks, vp, count):
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    told = SimpleNamespace(
        n_local_stages=vp, microbatches_per_round=num_ranks, pp_group_size=num_ranks, _n_microbatches=count
    )
    for rank, order in enumerate(orders(num_ranks, vp, count)):
        actions = pipelining.ScheduleInterleavedZeroBubble._calculate_single_rank_operations(told, rank)
        assert [str(action) for action in actions if action] == [f"{stage}{kind}{at}" for kind, stage, at in order]


def test_it_is_drawn():
    assert draw_schedule(2, 4, vp=2, zero_bubble=True) == [
        "0101.aA2bB3aA2bB3cCdDcCdD",
        ".010a1bA2aB3bA2cB3dCcDdCD",
    ]


@pytest.mark.parametrize(("num_ranks", "vp", "count"), SHAPES)
@pytest.mark.parametrize(
    ("forward", "of_input", "weights"), [(1, 1, 1), (1, 1.5, 0.5), (0.4, 2, 1.5), (1, 0.5, 2), (2, 1, 0.5)]
)
def test_the_closed_form_is_what_the_order_takes(num_ranks, vp, count, forward, of_input, weights):
    """Whichever of the three is longest; what is besides compute is halved between forward and input gradient."""
    compute, sends = forward + of_input + weights - 0.2, 0.2
    parts = dict.fromkeys(MicroBatch.__dataclass_fields__, 0.0) | {"compute": compute, "pp_communication": sends}
    one = MicroBatch(**{**parts, "forward": forward - 0.1, "weights": weights})
    slots = orders(num_ranks, vp, count)
    seconds = {"F": forward / vp, "I": of_input / vp, "W": weights / vp}
    end = max(start + seconds[kind] for timed in timed_orders(slots, vp, seconds) for (kind, _, _), start in timed)
    assert end - count * one.total == pytest.approx((num_ranks - 1) * float(one.split_passing) / vp)


@pytest.mark.parametrize(("num_ranks", "vp", "count"), SHAPES)
def test_a_rank_holds_what_its_order_holds(num_ranks, vp, count):
    layout = split(pp=num_ranks, vp=vp, global_batch=count)
    stages = stages_of(LLAMA, Candidates.of([layout]))
    peaks = []
    for order in orders(num_ranks, vp, count):
        held = np.cumsum([{"F": 1, "I": 0, "W": -1}[kind] for kind, _, _ in order])
        peaks.append(held.max() / vp)
    assert stages.in_flight[:, 0].tolist() == [peaks[index] for index in stages.index[:, 0]]


def test_it_costs_memory_and_saves_most_of_the_bubble():
    plain, zero = (
        price(LLAMA, A100, [split(schedule=schedule)], software=MEGATRON)[0] for schedule in ("1f1b", "zero-bubble")
    )
    for name, seconds in plain.time_parts_s.items():
        if name not in ("bubble", "overhead"):  # stragglers lengthen the bubble as well
            assert zero.time_parts_s[name] == seconds, name
    # A third of it were all work matrices; attention's gradient has no weights to be put off.
    assert plain.bubble_s / 3 < zero.bubble_s < plain.bubble_s * 0.6
    assert zero.stage_peaks_bytes["last"] > plain.stage_peaks_bytes["last"]


def test_columns_and_single_layouts_agree():
    layouts = [split(), split(schedule="1f1b"), split(pp=2, vp=4), split(schedule="2bw", vp=1)]
    together, alone = price(LLAMA, A100, layouts), [price(LLAMA, A100, [layout])[0] for layout in layouts]
    np.testing.assert_allclose([p.step_s for p in together], [p.step_s for p in alone], rtol=1e-12)
    np.testing.assert_allclose([p.peak_bytes for p in together], [p.peak_bytes for p in alone], rtol=1e-12)


def test_no_gradient_is_late():
    layout = split(dp=2)
    assert (layout.asynchronous, layout.updates_per_step, layout.runnable) == (False, 1, True)
    assert str(layout) == "dp2 pp4 mb1 vp2 zero-bubble"
    assert not Candidates.of([layout]).any_asynchronous


def test_names_and_files_carry_it(tmp_path):
    layout = split(dp=2, zero_stage=1)
    assert parse_layout(str(layout), num_devices=8, global_batch=32, seq_len=2048) == layout
    write_layout_file(tmp_path / "layout.toml", layout, LLAMA)
    assert read_layout_file(tmp_path / "layout.toml")[0] == layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vp": 1}, r"vp=1 with schedule='zero-bubble': .*choose vp of at least 2, or schedule='1f1b'"),
        ({"checkpointing": "full"}, r"checkpointing='full' with schedule='zero-bubble': .*choose checkpointing='none'"),
        ({"checkpointing": "selective"}, "checkpointing='selective' with schedule='zero-bubble'"),
        ({"checkpointing": "stream"}, "checkpointing='stream' with schedule='zero-bubble'"),
        ({"compile": True}, "compile=True with schedule='zero-bubble': .*choose compile=false"),
    ],
)
def test_what_it_does_not_go_with_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        split(**fields)


def test_a_plan_has_it_in_the_full_space_or_when_asked():
    batch = {"num_devices": 8, "global_batch": 32, "seq_len": 2048}
    full = rank_layouts(LLAMA, A100, SearchRequest(space="full", **batch)).layouts
    assert {priced.layout.schedule for priced in full} == {"1f1b", "zero-bubble"}
    both = [priced.layout for priced in full if priced.layout.schedule == "zero-bubble"]
    assert {(layout.vp > 1, layout.checkpointing) for layout in both} == {(True, "none")}
    late = rank_layouts(LLAMA, A100, SearchRequest(asynchronous=True, **batch)).layouts
    assert "zero-bubble" not in {priced.layout.schedule for priced in late}
    asked = rank_layouts(LLAMA, A100, SearchRequest(fix={"schedule": "zero-bubble"}, **batch))
    assert {priced.layout.schedule for priced in asked.layouts} == {"zero-bubble"}
    for priced in asked.layouts:
        check_runnable(priced.layout, LLAMA)
    near = {entry.change: entry for entry in neighbours(asked.layouts[0], LLAMA, A100, space="runtime")}
    assert near["schedule 1f1b"].priced is not None
    assert near["checkpointing full"].priced is None


def test_torchtitan_runs_it_and_others_refuse_it():
    layout = split(dp=2, zero_stage=3)
    config = torchtitan_config(layout, LLAMA)
    assert config["parallelism"]["pipeline_parallel_schedule"] == "InterleavedZeroBubble"
    for each in (layout, replace(layout, schedule="1f1b")):
        assert layout_of_torchtitan(torchtitan_config(each, LLAMA), LLAMA) == each
    with pytest.raises(ValueError, match="megatron has no zero-bubble schedule"):
        exported(replace(layout, zero_stage=1), LLAMA, to="megatron", gpus_per_node=8, file="")
    with pytest.raises(ValueError, match="has no pipeline"):
        exported(layout, LLAMA, to="deepspeed", gpus_per_node=8, file="")


def test_explain_draws_it():
    words = ["--cluster", "A100-80GB", "--gpus", "2", "--global-batch", "4", "--seq-len", "2048"]
    told = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, ["explain", "llama-3.1-8b", *words, "--layout", "pp2 mb1 vp2 zero-bubble"]
    )
    assert told.exit_code == 0, told.output
    assert "zero-bubble, weight gradients in capitals" in told.output
    assert "0101.aA2bB3aA2bB3cCdDcCdD" in told.output
    assert "schedule 1f1b" in told.output
