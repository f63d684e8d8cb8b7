"""What a training tells besides its loss: phases, TensorBoard, a trace, and the module that made a NaN."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.one_loss import tiny_model
from support.tiny_config import CONFIG
from support.training_process import TRAIN, Forked
from torch.distributed.tensor import DTensor

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.blame import first_not_finite
from fourfold.launch.training.loop import TrainingRun, train
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.settings import TrainSettings
from fourfold.launch.training.trackers import made_trackers
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model
from fourfold.parallel import init_mesh, parallelize

TEXT = torch.randint(64, (2, 4000), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


def test_phases_tensorboard_and_a_trace(tmp_path):
    layout, out = tmp_path / "layout.toml", tmp_path / "out"
    write_layout_file(layout, Layout(global_batch=2, seq_len=16), load_model(CONFIG))
    words = ["--layout", layout, "--out", out, "--steps", 6, "--evaluate-every", 3, "--held-out-batches", 1, "--quiet"]
    trace = tmp_path / "trace.json"
    words += ["--tensorboard", "--trace", trace, "--peak-flops-per-s", 1e12]
    run = Forked(tmp_path / "log", TRAIN, words)
    assert run.wait(120.0) == 0, run.text()
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 6
    for step in steps:
        phases = [step[name] for name in ("data_s", "forward_backward_s", "clip_s", "update_s")]
        assert sum(phases) == pytest.approx(step["step_s"], rel=1e-6)
        assert 0 < step["mfu"] < 1
        assert step["memory_bytes"] > 1 << 20
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = EventAccumulator(str(out / "tensorboard"))
    told.Reload()
    assert [point.value for point in told.Scalars("loss")] == pytest.approx([step["loss"] for step in steps])
    assert [point.step for point in told.Scalars("heldout_loss")] == [3]
    assert len([event for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "cpu_op"]) > 100


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2},
    "z3": {"dp": 2, "zero_stage": 3},
    "tp": {"tp": 2},
    "pp": {"pp": 2},
}


def blamed(fields: dict[str, Any]) -> list[str]:
    layout = Layout(global_batch=4, seq_len=24, **fields)
    mesh = init_mesh(dp=layout.dp, pp=layout.pp, tp=layout.tp, device_type="cpu")
    told = []
    for weight, value in ((None, 0.0), ("model.layers.1.mlp.down_proj.weight", 3e38), ("lm_head.weight", float("nan"))):
        model = parallelize(tiny_model(num_hidden_layers=2), mesh, micro_batch=1, zero_stage=layout.zero_stage)
        for name, parameter in model.named_parameters():
            if name == weight:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.data.fill_(value)
        ids = TEXT[0][:96].view(4, 24).long()[model.batch_rows(4)]
        if weight == "lm_head.weight":
            settings = TrainSettings(steps=1, warmup_steps=0, held_out_batches=0)
            with MemoryGauge(torch.device("cpu")) as gauge, pytest.raises(FloatingPointError) as error:
                train(model, layout, (TEXT[0], TEXT[1]), settings, TrainingRun(gauge=gauge))
            told.append(str(error.value))
        else:
            told.append(first_not_finite(model, ids))
    return told


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_the_first_module_that_made_a_nan_is_named(ranks, fields):
    first, second = ranks(2)(blamed, fields)
    assert first == second
    healthy, overflow, weight = first
    assert healthy == ""
    assert overflow == "first in the output of model.layers.1.mlp.down_proj"
    assert "at step 0, the weights of lm_head.weight hold no numbers already" in weight


def test_what_cannot_be_told_is_refused_before_it_starts(tmp_path):
    layout = tmp_path / "layout.toml"
    write_layout_file(layout, Layout(global_batch=2, seq_len=16), load_model(CONFIG))
    for words, said in (
        (["--tensorboard"], "tensorboard needs a folder"),
        (["--trace", tmp_path / "t.json", "--steps", 2], "it starts after 2 steps"),
        (["--trace", tmp_path], "is a folder"),
        (["--observe"], "observe with schedule='1f1b', which drains at every step: leave it out"),
    ):
        run = Forked(Path(tmp_path / "log"), TRAIN, ["--layout", layout, *words])
        assert run.wait(60.0) == 2
        (line,) = run.text().strip().splitlines()
        assert said in line


@pytest.mark.parametrize("name", ["log.jsonl", "metrics.csv", ".lock"])
def test_a_file_that_is_none_is_one_line(tmp_path, name):
    layout, out = tmp_path / "layout.toml", tmp_path / "out"
    write_layout_file(layout, Layout(global_batch=2, seq_len=16), load_model(CONFIG))
    (out / name).mkdir(parents=True)
    run = Forked(tmp_path / "log", TRAIN, ["--layout", layout, "--out", out, "--steps", 2, "--quiet"])
    assert run.wait(60.0) == 2, run.text()
    (line,) = run.errors()
    assert name in line
    assert "directory" in line
    assert "Traceback" not in run.text()


def test_a_tracker_that_does_not_start_is_one_line(monkeypatch, tmp_path):
    def init(**_: object) -> None:
        raise RuntimeError("api_key not configured\nsee there")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(ValueError, match=r"^wandb='mine': api_key not configured: log in \(wandb login\), or leave"):
        made_trackers(TrainOptions(wandb="mine", out=str(tmp_path)), {})
