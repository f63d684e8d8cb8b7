"""`fourfold.launch.train` with a pipeline that never drains: the emulator's weights to the bit, stopped or not."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.digest import digest
from support.rank_pool import RankFailure
from support.training_process import start_forked_ranks
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.launch.commands import launch
from fourfold.launch.training.async_loop import (
    AsynchronousModel,
    rate_schedule,
    scaled_optimizer,
    train_asynchronously,
)
from fourfold.launch.training.blame import first_not_finite_of_stage
from fourfold.launch.training.checkpoints import CheckpointError, Checkpoints, Resume
from fourfold.launch.training.data import held_out_rows, training_rows
from fourfold.launch.training.loop import TrainingRun, train
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.settings import TrainSettings
from fourfold.launch.training.undrained import check_in_flight
from fourfold.layouts.cost.asynchronous import schedule_of
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model
from fourfold.parallel import PipelinedBackpropEmulator, init_mesh, parallelize
from fourfold.parallel.decoder import decoder_stages
from fourfold.parallel.decoder.async_pipeline import next_token_loss, pipeline_decoder
from fourfold.parallel.gradients import local_part
from fourfold.parallel.pipeline import ClipNorm
from fourfold.parallel.pipeline.report import StageReport
from fourfold.parallel.sequence.tensors import shard_labels
from fourfold.parallel.testing.compare import state_differences

ROOT = Path(__file__).resolve().parents[3]
CONFIG: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 256, "tie_word_embeddings": False,
}  # fmt: skip
TEXT = torch.randint(256, (2, 3000), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
# Below the norms of the model's gradients under all these layouts (0.7 to 9.8): every update by a late norm is clipped.
SETTINGS = TrainSettings(
    steps=4, learning_rate=0.02, warmup_steps=2, max_norm=0.6, held_out_batches=1, checkpoint_every=2
)
ALONE = replace(SETTINGS, checkpoint_every=0)
IN_FLIGHT = replace(SETTINGS, evaluate_every=1, checkpoints_in_flight=True)
SEQ_LEN = 12


def meta_model(**changes: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**CONFIG, **changes}))


def layout(**fields: Any) -> Layout:
    return Layout(**{"pp": 2, "global_batch": 6, "seq_len": SEQ_LEN, "schedule": "lockstep", **fields})


def trained(
    plan: Layout, folder: str, resume: bool, settings: TrainSettings = SETTINGS, kv_heads: int = 1
) -> tuple[list[float], float | None, str, list[torch.Tensor], list[tuple[int, float]]]:
    """Losses, held-out loss, this stage's state and weights, and evaluations on the way, after training on ranks."""
    if resume and dist.get_rank() == 0:
        shutil.rmtree(Path(folder) / "step_00000004")
    dist.barrier()
    mesh = init_mesh(dp=plan.dp, pp=plan.pp, cp=plan.cp, tp=plan.tp, device_type="cpu")
    model = AsynchronousModel(meta_model(num_key_value_heads=kv_heads), plan, mesh, settings)
    gauge = MemoryGauge(torch.device("cpu"))
    evaluations: list[tuple[int, float]] = []
    run = TrainingRun(
        gauge=gauge, checkpoints=Checkpoints(folder=Path(folder)), resume=Resume(choice="yes" if resume else "no"),
        on_evaluation=lambda step, loss: evaluations.append((step, loss)),
    )  # fmt: skip
    result = train_asynchronously(model, (TEXT[0], TEXT[1]), run)
    assert result.peak_bytes > sum(4 * local_part(p).numel() for p in model.stage.parameters())
    losses = [record.loss for record in result.records]
    state = model.pipeline.state_dict()
    kept = {name: state[name] for name in ("module", "num_forwards")}  # a scheduler also counts its own calls
    kept |= {name: state["optimizer"][name] for name in ("num_updates", "before", "drift")}
    kept["moments"] = list(state["optimizer"]["optimizer"]["state"].values())
    weights = [local_part(p).clone() for p in model.stage.parameters()]
    return losses, result.held_out_loss, digest([], kept), weights, evaluations


def emulated(plan: Layout) -> tuple[list[float], float, list[list[torch.Tensor]]]:
    """The same in one process; replicas' micro-batches of one update side by side."""
    cut_model = decoder_stages(
        meta_model(),
        plan.pp,
        seq_len=SEQ_LEN,
        checkpointing=plan.checkpointing,
        embedding_counts_as=plan.embedding_counts_as,
    )
    stages = [stage for stage in cut_model if stage is not None]
    # Two stages: the last has made two updates more than the first in lockstep, one with the other schedules.
    lag = 2 if plan.schedule == "lockstep" else 1
    clip = ClipNorm(max_norm=SETTINGS.max_norm, scope="model", lag_updates=lag, first_wait=False)
    emulator = PipelinedBackpropEmulator(
        stages, optimizer=scaled_optimizer(plan, SETTINGS), loss_fn=next_token_loss, schedule=schedule_of(plan),
        mitigation=plan.mitigation, scheduler=rate_schedule(plan, SETTINGS), clip=clip,
    )  # fmt: skip

    def cut(ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        replicas = ids.view(plan.dp, plan.num_micro_batches, plan.micro_batch, SEQ_LEN)
        return [(part, shard_labels(part, (0, 1))) for part in replicas.transpose(0, 1).flatten(1, 2)]

    batch, rows = plan.global_batch, slice(0, plan.global_batch)
    losses: list[float] = []
    for start in range(0, SETTINGS.steps, SETTINGS.checkpoint_every):  # drained at each checkpoint
        stream = []
        for step in range(start, start + SETTINGS.checkpoint_every):
            stream += cut(training_rows(TEXT[0], seq_len=SEQ_LEN, global_batch=batch, step=step, seed=0, rows=rows))
        losses += torch.tensor(emulator.run(stream), dtype=torch.float64).view(-1, plan.num_micro_batches).mean(1)
    held_out = emulator.evaluate(cut(held_out_rows(TEXT[1], seq_len=SEQ_LEN, num_rows=batch, rows=rows)))
    mean = torch.tensor(held_out, dtype=torch.float64).mean().item()
    return [float(loss) for loss in losses], mean, [[p.detach() for p in stage.parameters()] for stage in stages]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mitigation": "lwpw+sc", "schedule": "1f1b-async", "micro_batch": 2},
        {"mitigation": "pipemare-dc", "checkpointing": "full"},
        {"schedule": "2bw", "mitigation": "none", "embedding_counts_as": 1},
    ],
    ids=str,
)
def test_training_equals_the_emulator_and_resuming_equals_no_stop(ranks, tmp_path, fields):
    plan, folder = layout(**fields), str(tmp_path / "checkpoints")
    whole = ranks(2)(trained, plan, folder, False)
    again = ranks(2)(trained, plan, folder, True)
    losses, held_out, weights = emulated(plan)
    for stage in range(2):
        assert whole[stage][0] == losses
        assert whole[stage][1] == held_out
        assert state_differences(whole[stage][3], weights[stage], f"stage {stage}") == []
        assert again[stage][0] == losses[2:]
        assert again[stage][1:3] == whole[stage][1:3]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dp": 2, "mitigation": "lwpw+sc", "schedule": "1f1b-async", "zero_stage": 1},
        {"schedule": "2bw", "mitigation": "none", "micro_batch": 2, "checkpointing": "full"},
        {"mitigation": "stash+sc", "precision": "bf16-mixed", "checkpointing": "stream"},
        {"cp": 2, "zero_stage": 1},
    ],
    ids=str,
)
def test_checkpoints_and_evaluations_in_flight_leave_training_as_it_is(ranks, tmp_path, fields):
    plan, folder = layout(**fields), str(tmp_path / "checkpoints")
    pool, other = ranks(plan.world_size), str(tmp_path / "drained")
    alone = pool(trained, plan, "", False, ALONE, 2)
    drained = pool(trained, plan, other, False, SETTINGS, 2)
    saved = pool(trained, plan, folder, False, IN_FLIGHT, 2)
    again = pool(trained, plan, folder, True, IN_FLIGHT, 2)
    for rank, (losses, held_out, state, *_) in enumerate(alone):
        assert drained[rank][2] != state  # draining at step 2 changes training
        assert saved[rank][:3] == (losses, held_out, state)
        assert again[rank][:3] == (losses[2:], held_out, state)
        assert [step for step, _ in saved[rank][4]] == [1, 2, 3]
        assert again[rank][4] == saved[rank][4][2:] == saved[0][4][2:]


def test_a_drained_checkpoint_goes_from_cut_stages_to_whole_ones_and_back(ranks, tmp_path):
    cut = layout(tp=2, sequence_parallel=True, mitigation="lwpw+sc+ef")
    plans = (cut, replace(cut, tp=1, sequence_parallel=False))
    losses = []
    for plan, other in (plans, plans[::-1]):
        folder = str(tmp_path / f"tp{plan.tp}")
        through = ranks(plan.world_size)(trained, plan, folder, False, SETTINGS, 2)
        changed = ranks(other.world_size)(trained, other, folder, True, SETTINGS, 2)
        assert {tuple(each[0]) for each in through} == {tuple(through[0][0])}  # one loss on every rank
        losses += [through[0][0][2:], changed[0][0]]
    for after in losses[1:]:
        assert after == pytest.approx(losses[0], rel=1e-5)  # sums over tp, in fp32, in another order


def test_checkpoints_in_flight_of_cut_stages_are_refused():
    with pytest.raises(ValueError, match=r"checkpoints_in_flight with tp=2: .* choose tp=1"):
        check_in_flight(layout(tp=2), IN_FLIGHT)


def gone_on(folder: str) -> list[str]:
    """What is said where another layout would go on from micro-batches in flight."""
    messages = []
    for fields in ({"schedule": "1f1b"}, {"mitigation": "stash"}, {"micro_batch": 2}, {"global_batch": 12}):
        plan = layout(**fields)
        mesh = init_mesh(pp=2, device_type="cpu")
        run = TrainingRun(
            gauge=MemoryGauge(torch.device("cpu")), checkpoints=Checkpoints(folder=Path(folder)),
            resume=Resume(choice="2"),
        )  # fmt: skip
        texts = TEXT[0], TEXT[1]
        if plan.asynchronous:
            model = AsynchronousModel(meta_model(), plan, mesh, SETTINGS)
            begin = partial(train_asynchronously, model, texts, run)
        else:
            begin = partial(train, parallelize(meta_model(), mesh, micro_batch=1), plan, texts, SETTINGS, run)
        with pytest.raises(CheckpointError) as error:
            begin()
        messages.append(str(error.value))
    return messages


def test_only_its_own_layout_goes_on_from_micro_batches_in_flight(ranks, tmp_path):
    ranks(2)(trained, layout(), str(tmp_path), False, IN_FLIGHT)
    first, second = ranks(2)(gone_on, str(tmp_path))
    assert first == second
    for message in first:
        assert "has micro-batches in flight of the layout pp2 mb1 lockstep, 6 rows of 12: go on with that" in message


def test_replicas_train_as_one_pipeline_of_their_micro_batches(ranks, tmp_path):
    plan = layout(dp=2)
    results = ranks(4)(trained, plan, str(tmp_path), False)
    losses, held_out, _ = emulated(plan)
    assert results[0][0] == results[3][0] == pytest.approx(losses, rel=1e-5)  # fp32: a mean of two means
    assert results[2][1] == pytest.approx(held_out, rel=1e-5)  # likewise
    assert results[0][2] == results[2][2]  # replicas hold the same weights, to the bit
    assert results[1][2] == results[3][2]


def test_sharded_optimizer_states_train_as_whole_ones_and_either_reads_the_others_checkpoints(ranks, tmp_path):
    whole, sharded = layout(dp=2), layout(dp=2, zero_stage=1)
    folders = str(tmp_path / "whole"), str(tmp_path / "sharded")
    pool = ranks(4)
    first = [pool(trained, plan, folder, False) for plan, folder in zip((whole, sharded), folders, strict=True)]
    again = [pool(trained, plan, folder, True) for plan, folder in zip((sharded, whole), folders, strict=True)]
    for rank, (losses, held_out, state, weights, _) in enumerate(first[0]):
        assert first[1][rank][:2] == (losses, held_out)
        assert first[1][rank][2] != state  # of a part of the weights
        for results in (first[1], *again):
            assert state_differences(results[rank][3], weights, f"rank {rank}") == []
            assert results[rank][1] == held_out
        assert again[0][rank][0] == again[1][rank][0] == losses[2:]
        assert again[0][rank][2] == first[1][rank][2]
        assert again[1][rank][2] == state
    alone = [ranks(2)(trained, layout(micro_batch=2), folder, True) for folder in folders]  # without replicas
    for stage in range(2):
        assert alone[0][stage][:3] == alone[1][stage][:3]


def test_ranks_that_share_sequences_train_as_one_pipeline(ranks, tmp_path):
    plan = layout(cp=2)
    results = ranks(4)(trained, plan, str(tmp_path), False)
    losses, held_out, _ = emulated(plan)
    assert results[0][0] == results[3][0] == pytest.approx(losses, rel=1e-5)  # fp32: a ring adds in another order
    assert results[2][1] == pytest.approx(held_out, rel=1e-5)  # likewise
    assert results[0][2] == results[1][2]  # the ranks of a stage hold the same weights, to the bit
    assert results[2][2] == results[3][2]


def shares_without_numbers() -> list[str]:
    """What the last stage's ranks say of infinities in the share of the first of them alone."""
    mesh = init_mesh(pp=2, cp=2, device_type="cpu")
    model = AsynchronousModel(meta_model(), layout(cp=2), mesh, SETTINGS)
    if not model.pipeline.is_last:
        return []
    said, of_all = [], model.pipeline.stage.joint.told
    for width in (1.0, float("inf") if mesh.get_local_rank("cp") == 0 else 1.0):
        value = {"hidden": torch.full((1, SEQ_LEN // 2, CONFIG["hidden_size"]), width), "seq_len": SEQ_LEN}
        said.append(first_not_finite_of_stage(model.stage, value, of_all))
    head = model.stage.lm_head
    head.register_forward_hook(lambda *call: call[2] * (float("nan") if mesh.get_local_rank("cp") else 1.0))
    whole = {**value, "hidden": torch.ones_like(value["hidden"])}
    said.append(first_not_finite_of_stage(model.stage, whole, of_all))
    return said


def test_a_nan_in_one_share_is_named_by_all_ranks_of_its_stage(ranks):
    found = ranks(4)(shares_without_numbers)
    assert found[:2] == [[], []]
    assert found[2] == found[3] == ["", "first in a stage before the last", "first in the output of lm_head"]


def observed(folder: str) -> list[tuple[int, list[int]]]:
    """At which steps which stages reported."""
    plan, told = layout(), []
    mesh = init_mesh(pp=2, device_type="cpu")
    model = AsynchronousModel(meta_model(), plan, mesh, replace(SETTINGS, observe=True))
    gauge = MemoryGauge(torch.device("cpu"))

    def note(step: int, reports: Sequence[StageReport]) -> None:
        told.append((step, [report.stage for report in reports if report.total_s > 0]))

    run = TrainingRun(gauge=gauge, checkpoints=Checkpoints(folder=Path(folder)), on_reports=note)
    train_asynchronously(model, (TEXT[0], TEXT[1]), run)
    return told


def test_stages_report_on_themselves_at_each_checkpoint(ranks, tmp_path):
    first, second = ranks(2)(observed, str(tmp_path))
    assert first == second
    assert first == [(2, [0, 1]), (4, [0, 1])]


@pytest.mark.parametrize(
    ("weight", "value", "said"),
    [
        (None, 0.0, ""),
        ("lm_head.weight", float("nan"), "the weights of lm_head.weight hold no numbers already"),
        ("model.layers.2.mlp.gate_proj.weight", 3e38, "first in the output of model.layers.2.mlp.gate_proj"),
    ],
)
def test_what_made_a_nan_in_the_last_stage_is_named(weight, value, said):
    stage = decoder_stages(meta_model(), 2, seq_len=SEQ_LEN)[1]
    assert stage is not None
    for name, parameter in stage.named_parameters():
        if name == weight:
            parameter.data.fill_(value)
    hidden = torch.ones(2, SEQ_LEN, CONFIG["hidden_size"])
    assert first_not_finite_of_stage(stage, hidden) == said
    if weight is None:
        assert first_not_finite_of_stage(stage, hidden * float("inf")) == "first in a stage before the last"


def refused() -> list[str]:
    mesh = init_mesh(dp=1, pp=1, tp=2, device_type="cpu")
    flat = init_mesh(dp=2, pp=1, device_type="cpu")
    cut = init_mesh(dp=1, pp=2, device_type="cpu")
    cases = ((meta_model(), mesh), (meta_model(), flat), (meta_model(tie_word_embeddings=True), cut))
    messages = []
    for model, on in cases:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            pipeline_decoder(model, on, seq_len=4, optimizer=torch.optim.SGD)
        messages.append(str(error.value))
    with pytest.raises(ValueError, match="choose stash or lwpv"):
        pipeline_decoder(
            meta_model(), cut, seq_len=4, optimizer=torch.optim.SGD, mitigation="spectrain", dtype=torch.bfloat16
        )
    return messages


def test_meshes_and_models_that_cannot_be_are_refused(ranks):
    for messages in ranks(2)(refused):
        for message, words in zip(messages, ("pp of at least 2", "pp of at least 2", "untie them"), strict=True):
            assert words in message


def test_a_checkpoint_of_other_updates_a_step_is_refused(ranks, tmp_path):
    folder = str(tmp_path / "checkpoints")
    ranks(2)(trained, layout(), folder, False)
    with pytest.raises(RankFailure, match="written with 6 updates a step, and this layout makes 3: keep its schedule"):
        ranks(2)(trained, layout(micro_batch=2), folder, True)


def test_the_command_trains_and_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch, "start_ranks", start_forked_ranks)
    out = tmp_path / "out"
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64, **CONFIG}))
    write_layout_file(tmp_path / "layout.toml", layout(), load_model(str(tmp_path / "model.json")))
    run = CliRunner().invoke(app, ["launch", str(tmp_path / "layout.toml"), "--out", str(out), "--steps", "3"])
    assert run.exit_code == 0, run.output
    assert "tokens/s" in run.output
    assert "held-out loss" in run.output
    result = json.loads((out / "result.json").read_text())
    with (out / "metrics.csv").open(newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == result["losses"]
    assert len(result["losses"]) == len(result["steps_s"]) == 3
    assert min(result["steps_s"]) > 0
    assert result["layout"]["schedule"] == "lockstep"
