"""The search gives what a loop over single layouts gives, refuses what makes no sense, and needs no torch."""

import subprocess
import sys
import time

import numpy as np
import pytest

from fourfold.layouts.cost.price import price
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import check, check_runnable
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.software import MEGATRON
from fourfold.layouts.output.tables import describe
from fourfold.layouts.search.explain import neighbours
from fourfold.layouts.search.rank import advice, rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.layouts.search.space import enumerate_space
from fourfold.parallel.grid import layer_ranges

A100 = load_cluster("A100-80GB")
LLAMA = load_model("llama-3.1-8b")


@pytest.mark.parametrize("space", ["runtime", "full"])
def test_the_best_is_the_best_of_a_loop_over_single_layouts(space):
    model = load_model("llama-2-13b")
    batch = {"global_batch": 32, "seq_len": 4096}
    result = rank_layouts(model, A100, SearchRequest(num_devices=8, space=space, **batch))
    candidates, _ = enumerate_space(model, result.request)
    assert len(candidates) == result.num_candidates
    rows = range(len(candidates)) if space == "runtime" else range(0, len(candidates), 23)
    one_by_one, expected = {}, {}
    for row in rows:
        layout = candidates.layout(row)
        check(layout, model)
        priced = price(model, A100, [layout], software=result.software)[0]
        if priced.fits:
            one_by_one[layout] = priced.step_s
            expected[layout] = priced.step_s / priced.fit_probability
    ranked = {priced.layout: priced.step_s for priced in result.layouts}
    assert set(one_by_one) <= set(ranked)
    for layout, step_s in one_by_one.items():
        assert ranked[layout] == pytest.approx(step_s, rel=1e-12)
    if space == "runtime":
        assert result.num_fitting == len(one_by_one)
        assert result.layouts[0].expected_s == pytest.approx(min(expected.values()), rel=1e-12)
    costs = [priced.step_s / priced.fit_probability for priced in result.layouts]
    assert costs == sorted(costs)
    assert result.slowest is not None
    assert result.slowest.expected_s == pytest.approx(costs[-1])


def test_blocks_do_not_change_the_answer(monkeypatch):
    batch = {"global_batch": 64, "seq_len": 2048}
    whole = rank_layouts(LLAMA, A100, SearchRequest(num_devices=16, **batch), top=20)
    monkeypatch.setattr("fourfold.layouts.search.rank.BLOCK", 37)
    pieces = rank_layouts(LLAMA, A100, SearchRequest(num_devices=16, **batch), top=20)
    assert [p.layout for p in pieces.layouts] == [p.layout for p in whole.layouts]
    assert pieces.num_fitting == whole.num_fitting


def test_every_combination_is_ranked_or_counted_under_a_reason():
    result = rank_layouts(LLAMA, A100, SearchRequest(num_devices=8, global_batch=8, seq_len=8192))
    assert result.num_fitting == len(result.layouts)
    assert result.infeasible["does not fit in memory"] == result.num_candidates - result.num_fitting > 0
    assert all(priced.layout.runnable for priced in result.layouts)


def test_a_heavy_head_gets_fewer_layers():
    # Of 8B parameters the head's 0.5B compute as much as two of the 32 layers.
    fix = {"pp": 8, "micro_batch": 1, "checkpointing": "none"}
    batch = {"global_batch": 32, "seq_len": 2048}
    best, *others = rank_layouts(LLAMA, A100, SearchRequest(num_devices=8, fix=fix, **batch)).layouts
    assert best.layout.head_counts_as == 2
    even = next(p for p in others if p.layout.embedding_counts_as == p.layout.head_counts_as == 0)
    assert even.step_s > 1.05 * best.step_s
    cuts = [
        (p.layout.embedding_counts_as, p.layout.head_counts_as) for p in (best, *others) if p.layout.zero_stage == 0
    ]
    stages = [tuple(map(len, layer_ranges(LLAMA.num_layers, 8, *cut))) for cut in cuts]
    assert len(set(stages)) == len(stages) > 3  # each once
    with pytest.raises(ValueError, match="less than the model's 32 layers"):
        rank_layouts(LLAMA, A100, SearchRequest(num_devices=8, fix={"head_counts_as": 10**30}, **batch))
    asked = rank_layouts(
        LLAMA, A100, SearchRequest(num_devices=8, fix={**fix, "embedding_counts_as": 3, "head_counts_as": 1}, **batch)
    ).layouts
    assert {(p.layout.embedding_counts_as, p.layout.head_counts_as) for p in asked} == {(3, 1)}


def test_interleaved_layouts_are_ranked_and_their_neighbours_obey_the_same_limits():
    request = SearchRequest(num_devices=8, global_batch=64, seq_len=2048, fix={"vp": 2})
    plan = rank_layouts(LLAMA, A100, request)
    assert {priced.layout.vp for priced in plan.layouts} == {2}
    assert all(priced.layout.runnable for priced in plan.layouts)
    interleaved = next(priced for priced in plan.layouts if priced.layout.zero_stage == 1)
    near = {entry.change: entry for entry in neighbours(interleaved, LLAMA, A100, space="runtime")}
    assert near["ZeRO 3"].priced is None
    assert "zero_stage=3 with vp=2" in near["ZeRO 3"].reason
    assert near["interleaving /2"].priced is not None
    assert neighbours(interleaved, LLAMA, A100)  # other software's: no such limit


def test_fixed_fields_are_held():
    fixed = {"tp": 2, "checkpointing": "full", "micro_batch": 2}
    result = rank_layouts(LLAMA, A100, SearchRequest(num_devices=8, global_batch=32, seq_len=2048, fix=fixed))
    assert result.layouts
    assert all((p.layout.tp, p.layout.checkpointing, p.layout.micro_batch) == (2, "full", 2) for p in result.layouts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_devices": 0}, "gpus=0: give a whole number of at least 1"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"space": "all"}, "space='all': choose one of runtime, full"),
        ({"fix": {"tp": 3}}, "tp=3 makes 3, which does not divide 8 devices"),
        ({"fix": {"tp": 2, "pp": 2, "dp": 1, "cp": 1}}, "makes 4 ranks, but there are 8 devices"),
        ({"fix": {"cp_heads": 2}}, "cp_heads=2: fourfold's runtime has no such layouts: add --space full"),
        ({"fix": {"vp": 2, "pp": 1}}, "interleaving needs pp of at least 2"),
        ({"fix": {"vp": 2, "zero_stage": 3, "dp": 2}}, "interleaving with ZeRO 2 or 3"),
        ({"fix": {"ep": 2}}, "ep=2: fourfold's runtime has no such layouts: add --space full"),
        ({"fix": {"zero_stage": 2, "pp": 2}}, "zero_stage=2 needs pp=1"),
        ({"fix": {"sequence_parallel": True, "tp": 1}}, "sequence parallelism needs tp of at least 2"),
        ({"fix": {"compile": True, "checkpointing": "selective"}}, "compile with selective checkpointing or StreamBP"),
        ({"fix": {"checkpointing": "stream", "tp": 2}}, "checkpointing=stream with tp"),
        ({"fix": {"cp": 2}, "seq_len": 2050}, "2 cp does not divide the sequence of 2050"),
        ({"fix": {"ep": 2}, "space": "full"}, "ep does not divide the experts"),
        ({"fix": {"checkpointing": "stream", "stream_chunks": 3}, "space": "full"}, "do not divide the sequence"),
        ({"fix": {"micro_batch": 3}}, "no layout of 8 devices can cut this model and batch"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    arguments = {"num_devices": 8, "global_batch": 32, "seq_len": 2048, **change}
    with pytest.raises(ValueError, match=message):
        rank_layouts(LLAMA, A100, SearchRequest(**arguments))


def test_where_nothing_fits_the_nearest_is_told():
    result = rank_layouts(
        load_model("llama-3.1-405b"), A100, SearchRequest(num_devices=8, global_batch=8, seq_len=8192)
    )
    assert not result.layouts
    told = advice(result)
    assert "what may: 128 devices or --space full" in told
    assert rank_layouts(
        load_model("llama-3.1-405b"), A100, SearchRequest(num_devices=128, global_batch=8, seq_len=8192)
    ).layouts


def test_streambp_comes_in_chunks_that_divide_the_sequence():
    batch = {"num_devices": 8, "global_batch": 8, "seq_len": 1000, "space": "full"}
    held = {"cp": 1, "tp": 1, "pp": 1, "zero_stage": 3, "checkpointing": "stream"}
    chunks = {p.layout.stream_chunks for p in rank_layouts(LLAMA, A100, SearchRequest(fix=held, **batch)).layouts}
    assert chunks == {1, 4, 8}
    asked = rank_layouts(LLAMA, A100, SearchRequest(fix={"cp": 1, "tp": 1, "pp": 1, "stream_chunks": 5}, **batch))
    assert {(p.layout.checkpointing, p.layout.stream_chunks) for p in asked.layouts} == {("stream", 5)}
    assert asked.infeasible["only StreamBP has chunks"]


def test_advice_names_the_fixed_field_that_is_in_the_way():
    held = {"tp": 1, "pp": 1, "cp": 1, "zero_stage": 0}
    result = rank_layouts(LLAMA, A100, SearchRequest(num_devices=8, global_batch=8, seq_len=2048, fix=held))
    assert not result.layouts
    told = advice(result)
    assert "another zero_stage than 0" in told
    assert "devices or" not in told  # more replicas hold no less each


def test_the_safe_pick_is_safe_and_no_faster_than_the_fastest():
    result = rank_layouts(
        load_model("llama-2-13b"),
        A100,
        SearchRequest(num_devices=8, global_batch=64, seq_len=4096, space="full"),
        top=1,
    )
    assert result.safe is not None
    assert result.safe.fit_probability >= 0.95
    assert result.safe.step_s >= result.layouts[0].step_s


def test_half_a_million_layouts_in_seconds():
    # Measured at under a second on one core; the bound leaves room for a busy machine, not for a slower method.
    model = load_model("llama-3.1-405b")
    start = time.process_time()
    result = rank_layouts(
        model,
        load_cluster("H100-80GB"),
        SearchRequest(num_devices=16384, global_batch=2048, seq_len=8192, space="full"),
        top=5,
    )
    assert result.num_candidates > 400_000
    assert time.process_time() - start < 10
    assert len(result.layouts) == 5


def test_experts_are_cut():
    model = load_model("mixtral-8x7b")
    result = rank_layouts(
        model, A100, SearchRequest(num_devices=64, global_batch=256, seq_len=4096, space="full", fix={"ep": 8}), top=5
    )
    assert all(priced.layout.ep == 8 for priced in result.layouts)
    whole = rank_layouts(
        model, A100, SearchRequest(num_devices=64, global_batch=256, seq_len=4096, space="full", fix={"ep": 1}), top=5
    )
    assert result.layouts[0].peak_bytes != whole.layouts[0].peak_bytes


def test_no_torch_is_imported():
    script = (
        "import sys, fourfold.layouts.search.rank, fourfold.layouts.output.report\n"
        "import fourfold.layouts.evidence.calibration\n"
        "import fourfold.layouts.output.export, fourfold.layouts.search.explain, fourfold.layouts.output.tables\n"
        "from fourfold.layouts.inputs.model import load_model\n"
        "from fourfold.layouts.inputs.cluster import load_cluster\n"
        "from fourfold.layouts.search.request import SearchRequest\n"
        "request = SearchRequest(num_devices=8, global_batch=8, seq_len=2048)\n"
        "fourfold.layouts.search.rank.rank_layouts(load_model('llama-3.1-8b'), load_cluster('A100-80GB'), request)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_sequence_parallelism_and_interleaving_do_what_they_are_for():
    from fourfold.layouts.inputs.layout import Layout

    def one(**fields: object) -> object:
        layout = Layout(global_batch=64, seq_len=4096, **fields)  # type: ignore[arg-type]
        return price(LLAMA, A100, [layout], software=MEGATRON)[0]

    assert one(tp=8, sequence_parallel=True).peak_bytes < one(tp=8).peak_bytes  # type: ignore[attr-defined]
    assert one(pp=8, vp=4).bubble_s == pytest.approx(one(pp=8).bubble_s / 4, rel=0.05)  # type: ignore[attr-defined]
    assert one(pp=8, vp=4).peak_bytes > one(pp=8).peak_bytes  # type: ignore[attr-defined]
    assert np.isfinite(one(tp=2, cp=4, dp=2, cp_heads=2).step_s)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "other_family"), [("gpt2", True), ("qwen3-4b", False)])
def test_a_plan_marks_as_runnable_what_the_runtime_launches_of_this_very_model(name, other_family):
    """A family that the runtime does not cut is no matter of the layout alone."""
    model = load_model(name)
    request = SearchRequest(num_devices=2, global_batch=4, seq_len=512, space="full")
    plan = rank_layouts(model, A100, request)
    refused = []
    for priced in plan.layouts:
        try:
            check_runnable(priced.layout, model)
        except ValueError as error:
            refused.append(str(error))
            assert not describe(priced)["runnable"], priced.layout
        else:
            assert describe(priced)["runnable"], priced.layout
    assert any("model_type" in message for message in refused) == other_family, refused[:3]
    assert any(priced.layout.runnable and not priced.runnable for priced in plan.layouts) == other_family
