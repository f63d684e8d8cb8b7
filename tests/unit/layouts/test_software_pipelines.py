"""What runs of pipelines and of sharded optimizers told: stalls, uneven stages, reduction that ZeRO 1 does not hide."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fourfold.layouts.cost.price import price
from fourfold.layouts.evidence.software_fit import stalls
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.software import MEGATRON, Software, load_software
from fourfold.layouts.output.tables import plan_table
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

H100 = load_cluster("H100-80GB")
LLAMA = load_model("llama-3.1-8b")
BATCH = {"global_batch": 256, "seq_len": 4096}


def priced(software: Software, **layout: int):
    return price(LLAMA, H100, [Layout(**layout, **BATCH)], software=software)[0]  # type: ignore[arg-type]


def test_runs_that_are_late_by_the_same_have_stalled():
    exchanges = np.array([0.0] * 4 + [32.0] * 12)
    predicted = np.full(16, 2.0)
    measured = predicted + np.where(np.arange(16) >= 6, 0.6 * exchanges, 0.0)
    stalled, stall_s, chance = stalls(measured, predicted, exchanges)
    assert stalled.tolist() == [False] * 6 + [True] * 10
    assert stall_s == pytest.approx(0.6)
    assert chance == pytest.approx(10 / 12)


def test_runs_that_are_late_by_this_and_that_have_not():
    exchanges = np.full(12, 32.0)
    predicted = np.full(12, 2.0)
    stalled, stall_s, chance = stalls(predicted + exchanges * np.geomspace(0.3, 20, 12), predicted, exchanges)
    assert not stalled.any()
    assert (stall_s, chance) == (0.0, 0.0)


def test_an_interval_holds_both_of_what_a_pipeline_may_do():
    calm = replace(MEGATRON, stall_s=0.0, stall_chance=0.0)
    moody = replace(MEGATRON, stall_s=0.5, stall_chance=0.4)
    whole, piped = ({"dp": 8, "tp": 8}, {"dp": 4, "tp": 8, "pp": 2})
    assert priced(moody, **whole).step_high_s == priced(calm, **whole).step_high_s
    for software in (calm, moody):
        assert priced(software, **piped).step_low_s < priced(software, **piped).step_s
    waits = 0.5 * Layout(**piped, **BATCH).num_micro_batches  # type: ignore[arg-type]
    assert priced(moody, **piped).step_s == priced(calm, **piped).step_s
    assert priced(moody, **piped).step_high_s > priced(calm, **piped).step_s + waits


def test_a_bubble_passes_each_stage_as_large_as_it_is():
    """32 layers over 5 stages: 6, 7, 7, 6, 6 layers are 32, not the 6 + 3 x 7 + 6 of stages as large as the largest."""
    even, uneven = priced(MEGATRON, pp=4), priced(MEGATRON, pp=5)
    micro_batches = BATCH["global_batch"]
    # Fill and drain are a micro-batch through the whole model, less the part of the slowest stage.
    through = {
        one.layout.pp: one.bubble_s + (one.step_s - one.bubble_s - one.optimizer_s) / micro_batches
        for one in (even, uneven)
    }
    assert through[5] == pytest.approx(through[4], rel=0.05)


def test_zero_1_pays_for_what_it_packs_rank_by_rank():
    packs = replace(MEGATRON, piece_s=1e-4)
    cost = priced(packs, dp=64, zero_stage=1).step_s - priced(MEGATRON, dp=64, zero_stage=1).step_s
    assert cost == pytest.approx(1e-4 * LLAMA.num_layers * 64, rel=0.2)
    assert priced(packs, dp=64, zero_stage=0).step_s == priced(MEGATRON, dp=64, zero_stage=0).step_s


def test_nanotron_hides_an_all_reduce_and_not_what_zero_1_does():
    """Of 8.86B on 256 GPUs every ZeRO 0 layout without a pipeline ran a fifth to a third quicker than with ZeRO 1."""
    nanotron = load_software("nanotron")
    cut = {"dp": 32, "tp": 8, "micro_batch": 8}
    assert priced(nanotron, **cut, zero_stage=0).step_s < priced(nanotron, **cut, zero_stage=1).step_s


REQUEST = SearchRequest(num_devices=64, global_batch=512, seq_len=8192, space="full")


def test_layouts_are_ranked_by_what_they_cost_with_those_that_fail():
    result = rank_layouts(load_model("llama-3.1-70b"), H100, REQUEST, top=None)
    assert any(not one.safe for one in result.layouts)  # else nothing is at risk here
    expected = [one.step_s / one.fit_probability for one in result.layouts]
    assert expected == sorted(expected)


def test_a_table_of_80_columns_cuts_no_number_and_no_mark():
    result = rank_layouts(load_model("llama-3.1-70b"), H100, REQUEST, top=12)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(plan_table(result, result.layouts, width=80))
    text = console.export_text()
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for rank in range(1, 13):
        assert any(line.split()[:1] == [str(rank)] for line in text.splitlines())
    assert "safe" in text
