"""Pipelines that never drain, priced next to those that do: against the schedules themselves, and only when asked."""

import csv
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.layouts.cost import asynchronous
from fourfold.layouts.cost.candidates import Candidates
from fourfold.layouts.cost.price import PricedLayout, price
from fourfold.layouts.cost.shares import largest_share, layer_tensors
from fourfold.layouts.cost.stages import stages_of
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import SCHEDULES, Layout, read_layout_file, write_layout_file
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest
from fourfold.parallel.pipeline.mitigation import scale_adam_hyperparameters, scale_hyperparameters
from fourfold.parallel.pipeline.partition import owners

A100, LLAMA = load_cluster("A100-80GB"), load_model("llama-3.1-8b")
BATCH = {"global_batch": 32, "seq_len": 2048}
LATE = SCHEDULES[1:]


def late(**fields: object) -> Layout:
    return Layout(**{"pp": 4, "schedule": "lockstep", **BATCH, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", LATE)
@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_closed_forms_are_those_of_the_schedule(schedule, pp):
    layout = late(schedule=schedule, pp=pp)
    candidates = Candidates.of([layout])
    stages = stages_of(LLAMA, candidates)
    true = asynchronous.schedule_of(layout)
    index = stages.index[:, 0].tolist()
    assert sorted(set(index)) == sorted({0, min(1, pp - 1), pp - 1})
    assert stages.in_flight[:, 0].tolist() == [true.in_flight(stage) for stage in index]
    assert asynchronous.delays(candidates, stages.index)[:, 0].tolist() == [true.delay(stage) for stage in index]
    assert asynchronous.updates_per_step(candidates)[0] == layout.updates_per_step == (1 if schedule == "2bw" else 32)


def test_a_plan_has_them_only_when_asked():
    batch = {"num_devices": 8, **BATCH}
    plain, both = (
        rank_layouts(LLAMA, A100, SearchRequest(**batch)),
        rank_layouts(LLAMA, A100, SearchRequest(asynchronous=True, **batch)),
    )
    assert not any(priced.layout.asynchronous for priced in plain.layouts)
    assert plain.synchronous is None
    assert [p for p in both.layouts if not p.layout.asynchronous] == plain.layouts
    assert both.synchronous == plain.layouts[0]
    assert {priced.layout.schedule for priced in both.layouts} == set(SCHEDULES)
    assert all(priced.bubble_s == 0 for priced in both.layouts if priced.layout.asynchronous)
    fixed = rank_layouts(LLAMA, A100, SearchRequest(fix={"schedule": "2bw", "mitigation": "sc"}, **batch))
    assert {(priced.layout.schedule, priced.layout.mitigation) for priced in fixed.layouts} == {("2bw", "sc")}
    again = price(LLAMA, A100, [fixed.layouts[0].layout], software=fixed.software)[0]
    assert (again.step_s, again.peak_bytes) == (fixed.layouts[0].step_s, fixed.layouts[0].peak_bytes)


def test_each_update_costs_and_each_copy_of_the_weights_counts():
    def one(**fields: object) -> object:
        return price(LLAMA, A100, [late(**fields)])[0]

    drained = one(schedule="1f1b")
    plain, stash, both = (one(mitigation=name) for name in ("none", "stash", "lwpv+sc"))
    assert plain.memory_parts_bytes["weights"] == drained.memory_parts_bytes["weights"]
    assert plain.memory_parts_bytes["activations"] == drained.memory_parts_bytes["activations"] / 4 * 7
    # the first of 4 stages: its own copy, and predicted weights; or those of 6 versions in flight and the present one
    assert both.memory_parts_bytes["weights"] == pytest.approx(3 * plain.memory_parts_bytes["weights"])
    assert stash.memory_parts_bytes["weights"] == pytest.approx(9 * plain.memory_parts_bytes["weights"])
    # 7 passes of AdamW at every micro-batch, for its 7 and 3 of clipping a step; another stage is the slowest
    assert plain.optimizer_s == pytest.approx(32 * 0.7 * drained.optimizer_s, rel=0.1)
    assert both.optimizer_s > plain.optimizer_s
    assert one(schedule="2bw").optimizer_s < both.optimizer_s / 2
    assert plain.time_parts_s["overhead"] < drained.time_parts_s["overhead"]  # nothing to add a gradient to
    replicas = one(dp=2)
    assert replicas.time_parts_s["dp_communication"] > 8 * one(dp=2, schedule="2bw").time_parts_s["dp_communication"]


@pytest.mark.parametrize(
    ("fields", "first", "last"),
    [
        ({"schedule": "1f1b", "mitigation": "stash"}, 0, 0),
        ({"mitigation": "none"}, 0, 0),
        ({"mitigation": "stash"}, 2 + 4 + 4 + 2, 0),  # snapshot, forward, backward, new weights
        ({"mitigation": "lwpv+sc"}, 10 + 6 + 4 + 2, 0),
        ({"mitigation": "lwpw"}, 5 + 4 + 2, 0),
        ({"mitigation": "lwpw+stash"}, 5 + 4 + 4 + 2, 0),
        ({"mitigation": "pipemare-dc"}, 10 + (5 + 4) + 2, 0),
        ({"mitigation": "spectrain"}, 10 + 4 + 2, 10 + 4 + (10 + 4) + 2),
        ({"mitigation": "ef"}, 13, 0),
        ({"mitigation": "nesterov+stash"}, 6 + 2 + 4 + 4 + 2, 0),
        ({"schedule": "2bw", "mitigation": "none"}, 2 + 32 * (4 + 4) + 2, 2 + 32 * (4 + 4) + 2),
        ({"schedule": "2bw", "mitigation": "lwpw"}, 5 + 32 * (4 + 4) + 2, 5 + 32 * (4 + 4) + 2),
    ],
    ids=str,
)
def test_passes_over_the_weights_are_those_of_the_stage(fields, first, last):
    candidates = Candidates.of([late(**fields)])
    index = stages_of(LLAMA, candidates).index
    passes = asynchronous.mitigation_seconds(candidates, np.ones(index.shape), index, 4.0)
    assert passes[[0, 2], 0].tolist() == [first, last]


def test_a_cut_stage_holds_and_updates_its_part_and_pays_for_each_micro_batch():
    def one(**fields: object) -> Any:
        return price(LLAMA, A100, [late(mitigation="stash+sc", **fields)])[0]

    whole, cut, sequence = one(), one(tp=2), one(tp=2, sequence_parallel=True)
    for parts in (cut.memory_parts_bytes, sequence.memory_parts_bytes):
        for name in ("weights", "gradients", "optimizer"):  # all but the norms, which are a few thousandths
            assert parts[name] == pytest.approx(whole.memory_parts_bytes[name] / 2, rel=0.005)
    assert cut.optimizer_s == pytest.approx(whole.optimizer_s / 2, rel=0.005)
    assert sequence.memory_parts_bytes["activations"] < cut.memory_parts_bytes["activations"]
    # Its collectives are those of a stage that drains.
    for options in ({}, {"sequence_parallel": True}):
        drained = one(tp=2, schedule="1f1b", **options).time_parts_s["tp_communication"]
        assert one(tp=2, **options).time_parts_s["tp_communication"] == pytest.approx(drained)
        assert drained > 0
    assert whole.time_parts_s["tp_communication"] == 0


def test_a_plan_ranks_cut_stages_but_not_with_basis_rotation():
    batch = {"num_devices": 8, **BATCH}
    kinds = [
        {
            (priced.layout.tp > 1, priced.layout.sequence_parallel)
            for priced in found.layouts
            if priced.layout.asynchronous
        }
        for found in (
            rank_layouts(LLAMA, A100, SearchRequest(asynchronous=True, fix={"mitigation": words}, **batch))
            for words in ("ef", "ef+rotate")
        )
    ]
    assert kinds == [{(False, False), (True, False), (True, True)}, {(False, False)}]


@pytest.mark.parametrize(("mitigation", "products"), [("rotate", 6.8), ("rotate+lwpv+sc", 8.8), ("lwpv+sc", 0)])
def test_basis_rotation_costs_products_of_matrices(mitigation, products):
    candidates = Candidates.of([late(mitigation=mitigation)])
    index = stages_of(LLAMA, candidates).index
    asked = []

    def one_second(*shape: int) -> float:
        asked.append(shape)
        return 1.0

    found = asynchronous.rotation_seconds(candidates, np.full(index.shape, 5 * 64.0**2), index, 64, one_second)
    assert found[[0, -2, -1], 0] == pytest.approx([5 * products, 5 * products, 0])  # the last stage is never late
    assert asked == ([(64, 64, 64)] if products else [])
    plain, turned = (price(LLAMA, A100, [late(mitigation=name)])[0] for name in ("lwpv+sc", "rotate+lwpv+sc"))
    assert turned.optimizer_s > plain.optimizer_s
    assert turned.memory_parts_bytes["weights"] > plain.memory_parts_bytes["weights"]


def test_replicas_that_share_out_optimizer_states():
    """Whole tensors: the largest share, what answers keep by it, one more gather for each version of the weights."""

    def one(**fields: object) -> PricedLayout:
        return price(LLAMA, A100, [late(dp=2, **fields)])[0]

    for mitigation, whole_copies, kept in (("none", 1, 0), ("stash+ef", 9, 6), ("lwpv+sc", 3, 0), ("lwpw", 3, 1)):
        whole, sharded = (one(zero_stage=stage, mitigation=mitigation) for stage in (0, 1))
        # Stage 0: whole tensors, the largest an eighth of a half, do not halve to the last per mille.
        share = sharded.memory_parts_bytes["optimizer"] / whole.memory_parts_bytes["optimizer"]
        assert 0.5 <= share == pytest.approx(0.5, rel=2e-3)
        weights = whole.memory_parts_bytes["weights"] / (whole_copies + kept)
        masters = share if whole_copies == 1 else 0  # elsewhere they count among the copies
        assert sharded.memory_parts_bytes["weights"] == pytest.approx(weights * (whole_copies + share * kept + masters))
        assert sharded.optimizer_s < whole.optimizer_s
        assert sharded.time_parts_s["dp_communication"] > whole.time_parts_s["dp_communication"]
    plain, corrected = (one(zero_stage=1, mitigation=name) for name in ("none", "pipemare-dc"))
    more = corrected.memory_parts_bytes["weights"] / one(mitigation="none").memory_parts_bytes["weights"]
    assert more == pytest.approx(1 + 1 + 0.5 + 1, rel=1e-3)  # apart, drift of a share, and what backwards read
    for mitigation, times in (("none", [1, 1, 1]), ("lwpv+sc", [2, 2, 1]), ("spectrain", [2, 3, 3])):
        candidates = Candidates.of([late(dp=2, zero_stage=1, mitigation=mitigation)])
        assert asynchronous.gathers(candidates, stages_of(LLAMA, candidates).index)[:, 0].tolist() == times
    assert plain.time_parts_s["dp_communication"] < corrected.time_parts_s["dp_communication"]


def test_the_largest_share_of_a_small_stage_is_its_largest_tensor():
    assert largest_share(LLAMA, 1, (True, False), 8) == LLAMA.embedding_params
    # An even part where there is more to spread, and for mixtures of experts.
    assert largest_share(LLAMA, 32, (False, False), 4) == pytest.approx(LLAMA.layers_params / 4, rel=1e-3)
    mixture = load_model("mixtral-8x7b")
    assert largest_share(mixture, 32, (False, True), 4) == pytest.approx(
        (mixture.layers_params + mixture.head_params) / 4, rel=1e-3
    )
    for name in ("llama-3.1-8b", "qwen3-8b", "qwen2.5-7b", "gpt2", "gemma-7b"):
        model = load_model(name)
        assert sum(layer_tensors(model)) * model.num_layers == model.layers_params, name


def test_shares_are_those_of_the_runtime():
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from fourfold.parallel.decoder import decoder_stages

    sizes = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "tie_word_embeddings": False,
    }  # fmt: skip
    for family in ("llama", "qwen2", "qwen3"):
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        model = load_model(whole.config.to_dict())
        for number, num_layers in enumerate((2, 2, 1)):
            stage = decoder_stages(whole, 3, seq_len=4, only=number)[number]
            counts = [p.numel() for p in stage.parameters()]
            for replicas in (2, 3, 8, 40):
                loads = [0] * replicas
                for count, owner in zip(counts, owners(counts, replicas), strict=True):
                    loads[owner] += count
                assert max(loads) == largest_share(model, num_layers, (number == 0, number == 2), replicas), family


def test_what_changes_for_learning_follows_the_schedule():
    layout = late(dp=2, micro_batch=2)
    facts = asynchronous.convergence(layout)
    assert facts["delays"] == [6, 4, 2, 0]
    assert facts["update_batch"] == 4
    adam = scale_adam_hyperparameters(lr=1.0, betas=(0.9, 0.95), batch=32, new_batch=4)
    assert (facts["adamw"]["lr_factor"], tuple(facts["adamw"]["betas"])) == (adam.lr, adam.betas)
    rate, momentum = scale_hyperparameters(lr=1.0, momentum=0.9, batch=32, new_batch=4)
    assert facts["sgd"] == {"lr_factor": rate, "momentum": momentum}
    assert "6, 4, 2, 0 updates late" in asynchronous.convergence_text(layout)
    assert "hyper-parameters stay" in asynchronous.convergence_text(late(schedule="2bw"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "pb"}, "choose one of 1f1b, lockstep, 1f1b-async, 2bw"),
        ({"mitigation": "hope"}, "'hope' is not among"),
        ({"pp": 1}, "choose pp of at least 2, or '1f1b'"),
        ({"tp": 2, "mitigation": "rotate+lwpv"}, "choose tp=1, or zero_stage=0 and a mitigation without rotate"),
        ({"cp": 2, "tp": 2}, "shares sequences or is cut, not both; choose cp=1 or tp=1, or schedule='1f1b'"),
        ({"dp": 2, "zero_stage": 2}, "choose zero_stage=1 or 0, or schedule='1f1b'"),
        ({"dp": 2, "zero_stage": 3}, "choose zero_stage=1 or 0, or schedule='1f1b'"),
        ({"checkpointing": "selective"}, "choose none or full"),
        ({"schedule": "2bw", "micro_batch": 16}, "a larger global_batch or a smaller micro_batch"),
    ],
)
def test_what_no_stage_can_do_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        late(**fields)


def test_ranks_that_share_sequences_cost_their_ring_and_hold_less():
    def one(**fields: object) -> object:
        return price(LLAMA, A100, [late(**fields)])[0]

    whole, shared = one(), one(cp=2)
    # the ring's hops of every micro-batch, as in a pipeline that drains; 16 ranks' work does not hide them
    hops = [one(cp=16, schedule=schedule).time_parts_s["cp_communication"] for schedule in SCHEDULES]
    assert hops[0] > 0
    assert hops == hops[:1] * len(SCHEDULES)
    # half of each sequence's activations a rank, and all weights
    assert shared.memory_parts_bytes["activations"] == whole.memory_parts_bytes["activations"] / 2
    assert shared.memory_parts_bytes["weights"] == whole.memory_parts_bytes["weights"]
    # at every update gradients are reduced over dp x cp, and nothing hides it
    assert shared.time_parts_s["dp_communication"] > 8 * one(cp=2, schedule="2bw").time_parts_s["dp_communication"] > 0
    both = one(dp=2, cp=2).time_parts_s["dp_communication"], one(dp=4).time_parts_s["dp_communication"]
    assert both[0] / one(dp=2, cp=2).layout.num_micro_batches == pytest.approx(
        both[1] / one(dp=4).layout.num_micro_batches
    )


def test_a_plan_ranks_rings_inside_of_stages():
    found = rank_layouts(LLAMA, A100, SearchRequest(num_devices=8, asynchronous=True, fix={"cp": 2, "pp": 4}, **BATCH))
    assert {priced.layout.schedule for priced in found.layouts} == set(SCHEDULES)


def test_layout_files_carry_the_schedule(tmp_path):
    layout = late(mitigation="stash", cp=2)
    write_layout_file(tmp_path / "layout.toml", layout, LLAMA)
    assert read_layout_file(tmp_path / "layout.toml")[0] == layout
    assert layout.runnable
    assert "schedule" not in Layout(**BATCH).as_dict()


def test_the_commands_say_what_changes(tmp_path):
    words = ["--cluster", "A100-80GB", "--gpus", "8", "--global-batch", "32", "--seq-len", "2048"]
    fixed = ["--fix", "pp=8", "--fix", "embedding_counts_as=0", "--fix", "head_counts_as=0"]
    runner = CliRunner(env={"COLUMNS": "120"})
    asked = runner.invoke(
        app, ["plan", "llama-3.1-8b", *words, "--async", "--top", "3", "--out", str(tmp_path), *fixed]
    )
    assert asked.exit_code == 0, asked.output
    for said in ("2bw", "sync", "14, 12, 10, 8, 6, 4, 2, 0 updates late", "AdamW's rate"):
        assert said in asked.output
    with (tmp_path / "plan.csv").open() as file:
        assert any(row["schedule"] == "lockstep" for row in csv.DictReader(file))
    told = runner.invoke(app, ["explain", "llama-3.1-8b", *words, "--layout", "pp8 mb8 full lockstep"])
    assert told.exit_code == 0, told.output
    assert "stage 7 | F0  B0* F1  B1*" in told.output
    assert "schedule 1f1b" in told.output


def test_columns_and_single_layouts_agree():
    layouts = [late(schedule=schedule, pp=pp) for schedule in SCHEDULES for pp in (2, 4)]
    together = price(LLAMA, A100, layouts)
    alone = [price(LLAMA, A100, [layout])[0] for layout in layouts]
    np.testing.assert_allclose([p.step_s for p in together], [p.step_s for p in alone], rtol=1e-12)
    np.testing.assert_allclose([p.peak_bytes for p in together], [p.peak_bytes for p in alone], rtol=1e-12)
