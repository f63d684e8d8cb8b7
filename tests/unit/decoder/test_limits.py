"""The table of limits says the same of one layout and of a column, and a plan ranks only what the launcher takes."""

from itertools import product

import numpy as np
import pytest

from fourfold.launch.commands.launch import run_layout
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout, check_runnable, facts_of
from fourfold.layouts.inputs.model import load_model, model_presets
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.layouts.search.space import EVERY_PLAN, OPTIONS
from fourfold.parallel.decoder import limits
from fourfold.parallel.decoder.limits import FAMILIES, FORMS, RUNTIME, SHAPES, Choice, DecoderFacts

H100 = load_cluster("H100-80GB")


def plan(model, *, top=None, **request):
    return rank_layouts(model, H100, SearchRequest(**request), top=top)


EVERY_LIMIT = (*SHAPES, *FORMS, *RUNTIME, *OPTIONS, *EVERY_PLAN)
VALUES = {
    "dp": (1, 2, 3), "pp": (1, 2, 8), "cp": (1, 2, 3), "tp": (1, 2, 3), "micro_batch": (1, 2, 5), "vp": (1, 2),
    "ep": (1, 2, 3), "cp_heads": (1, 2), "zero_stage": (0, 1, 2, 3), "sequence_parallel": (False, True),
    "checkpoint_every": (1, 2), "checkpointing": range(4), "offload": (False, True), "stream_chunks": (1, 4),
    "embedding_counts_as": (0, 1), "head_counts_as": (0, 2), "schedule": range(5), "global_batch": (12,),
    "seq_len": (64,), "sharded_accumulation": (False, True), "compile": (False, True),
    "rotates": (False, True), "fp8": (False, True),
}  # fmt: skip
MODELS = [
    DecoderFacts(
        family="llama", num_layers=4, num_heads=4, num_kv_heads=2, head_size=8, hidden_size=32, ffn_size=48,
        vocab_size=64,
    ),
    DecoderFacts(
        family="mixtral", num_layers=3, num_heads=6, num_kv_heads=3, ffn_size=9, vocab_size=63, num_experts=4,
        tied_embeddings=True, attention_dropout=0.1, rope_type="dynamic", adapters=True, hidden_size=48, head_size=8,
    ),
]  # fmt: skip


@pytest.mark.parametrize("limit", EVERY_LIMIT, ids=lambda limit: limit.reason)
def test_a_limit_says_the_same_of_one_layout_and_of_a_column(limit):
    rows = list(product(*(VALUES[name] for name in limit.fields)))
    together = {name: np.array(column) for name, column in zip(limit.fields, zip(*rows, strict=True), strict=True)}
    together |= {name: VALUES[name][0] for name in ("global_batch", "seq_len")}
    for model in MODELS:
        column = np.broadcast_to(limit.allows(model, Choice(**together)), len(rows))
        for answer, row in zip(column.tolist(), rows, strict=True):
            given = dict(zip(limit.fields, row, strict=True)) | {"global_batch": 12, "seq_len": 64}
            assert bool(limit.allows(model, Choice(**given))) == answer, given


@pytest.mark.parametrize("limit", EVERY_LIMIT, ids=lambda limit: limit.reason)
def test_a_limit_reads_only_the_fields_that_it_names(limit):
    class Watched(Choice):
        def __getattribute__(self, name):
            if name in VALUES:
                read.add(name)
            return super().__getattribute__(name)

    read: set[str] = set()
    for model, late in product(MODELS, range(4)):
        limit.allows(model, Watched(global_batch=12, seq_len=64, schedule=late, checkpointing=late))
    assert read <= {*limit.fields, "global_batch", "seq_len"}


@pytest.mark.parametrize("limit", [limit for limit in RUNTIME if limit.fields], ids=lambda limit: limit.reason)
def test_each_limit_of_the_runtime_refuses_something_in_words_that_name_its_value(limit):
    refused = [
        choice
        for values in product(*(VALUES[name] for name in limit.fields))
        if not limit.allows(MODELS[1], choice := Choice(**dict(zip(limit.fields, values, strict=True))))
    ]
    assert refused
    told = limit.told(MODELS[1], refused[0])
    assert any(f"{name}=" in told for name in limit.fields)
    assert "choose" in told or "use" in told or "supported" in told


@pytest.mark.parametrize("name", [name for name in model_presets() if not name.startswith("gpt2-")])
def test_what_a_plan_ranks_the_launcher_takes(name):
    """Of the model's own family; and what it refuses, the launcher refuses in the same words."""
    model = load_model(name)
    batch = {"num_devices": 8, "global_batch": 16, "seq_len": 1024}
    if model.config["model_type"] in FAMILIES:
        found = plan(model, asynchronous=True, **batch)
        for priced in found.layouts:
            check_runnable(priced.layout, model)
        return
    layout = Layout(dp=8, global_batch=16, seq_len=1024)
    with pytest.raises(ValueError, match="is not supported by fourfold's runtime") as planned:
        plan(model, **batch)
    with pytest.raises(ValueError, match="is not supported") as launched:
        run_layout(layout, model, out=None)  # type: ignore[arg-type]
    assert str(launched.value) in str(planned.value)
    assert plan(model, space="full", top=1, **batch).num_candidates > 0


def test_streaming_layouts_are_ranked_where_asked_for_and_where_their_chunks_are_long():
    batch = {"num_devices": 4, "global_batch": 8}
    model = load_model("llama-3.2-1b")
    asked = plan(model, seq_len=4096, fix={"checkpointing": "stream"}, **batch)
    assert asked.layouts
    assert {p.layout.checkpointing for p in asked.layouts} == {"stream"}
    assert {p.layout.tp for p in asked.layouts} == {1}
    assert {p.layout.cp for p in asked.layouts} == {1, 2, 4}
    assert {p.layout.checkpointing for p in plan(model, seq_len=4096, **batch).layouts} == {
        "none", "selective", "full", "stream",
    }  # fmt: skip
    short = plan(model, seq_len=512, **batch)
    assert {p.layout.stream_chunks for p in short.layouts if p.layout.checkpointing == "stream"} == {1}
    assert short.infeasible["StreamBP's chunks have fewer than 256 tokens"]


def test_a_window_goes_around_the_ring():
    model = load_model("mistral-7b")
    assert model.sliding_window
    found = plan(model, num_devices=8, global_batch=8, seq_len=8192, fix={"cp": 2}, top=5)
    assert {priced.layout.cp for priced in found.layouts} == {2}


def test_offloading_is_for_layers_that_stream():
    found = plan(load_model("llama-3.1-8b"), num_devices=8, global_batch=8, seq_len=32768, fix={"offload": True}, top=9)
    assert {priced.layout.checkpointing for priced in found.layouts} == {"stream"}
    plain = Layout(offload=True, checkpointing="full", global_batch=1, seq_len=64)
    assert plain.unrunnable_reason() == "offload"


@pytest.mark.parametrize(
    ("config", "rope_type"),
    [
        ({}, "default"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"full": {"rope_type": "default"}, "near": {"rope_type": "longrope"}}}, "longrope"),
    ],
)
def test_rotary_types_are_read_in_every_form(config, rope_type):
    assert limits.decoder_facts(config).rope_type == rope_type


def test_a_preset_s_facts_are_those_of_its_config():
    for name in ("llama-3.1-8b", "qwen3-8b"):
        model = load_model(name)
        assert facts_of(model) == limits.decoder_facts(model.config)


def test_gradients_sharded_at_every_micro_batch_take_less_memory_and_more_time():
    model = load_model("llama-3.1-8b")
    fix = {"zero_stage": 3, "checkpointing": "full", "micro_batch": 1, "pp": 1, "cp": 1, "tp": 1}
    batch = {"num_devices": 8, "global_batch": 64, "seq_len": 2048}
    both = {p.layout.sharded_accumulation: p for p in plan(model, fix=fix, **batch).layouts}
    assert both.keys() == {False, True}
    whole, shards = (both[kind].memory_parts_bytes["gradients"] for kind in (False, True))
    assert whole == pytest.approx(4 * model.num_params, rel=0.01)
    assert shards == pytest.approx(whole / 8, rel=0.01)
    assert both[True].step_s > both[False].step_s
    assert str(both[True].layout) == "dp8 mb1 z3 shardacc full"
    once = plan(model, fix={**fix, "micro_batch": 8}, **batch).layouts
    assert [p.layout.sharded_accumulation for p in once] == [False]


def test_a_precision_is_priced_where_it_was_measured():
    model, batch = load_model("llama-3.2-1b"), {"num_devices": 4, "global_batch": 8, "seq_len": 2048}
    usual, said, pure = (
        plan(model, fix={"dp": 4, "zero_stage": 0, "micro_batch": 1, "checkpointing": "none", **fix}, **batch).layouts[
            0
        ]
        for fix in ({}, {"precision": "bf16-mixed"}, {"precision": "bf16"})
    )
    assert (said.step_s, said.peak_bytes) == (usual.step_s, usual.peak_bytes)
    # Weights and two moments: 4 + 8 bytes a parameter, or 2 + 4.
    kept = ("weights", "optimizer")
    assert [sum(p.memory_parts_bytes[part] for part in kept) / model.num_params for p in (usual, pure)] == [12, 6]
    assert str(pure.layout).endswith(" bf16")
    with pytest.raises(ValueError, match=r"precision=fp32 on .*: only bf16-mixed was measured there"):
        plan(model, fix={"precision": "fp32"}, **batch)
