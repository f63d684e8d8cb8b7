"""Ranks started for real: a failure is shown and ends all of them, and the whole demo keeps its promises."""

import csv
import json
import os
import time
import tomllib
from pathlib import Path

import psutil
import pytest
from support.tiny_config import CONFIG
from support.training_process import TRAIN, Forked, start_forked_ranks
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.launch.commands import demo, launch, profile
from fourfold.launch.commands.launch import start_training
from fourfold.launch.processes import RankFailure, start_ranks
from fourfold.launch.runs import COLUMNS
from fourfold.launch.train_layout import chosen_layout
from fourfold.launch.train_options import read_options
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout, read_layout_file, write_layout_file
from fourfold.layouts.inputs.model import load_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "support")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(("how", "shown"), [("raise", "ArithmeticError: deliberate failure"), ("kill", "SIGKILL")])
def test_a_rank_that_dies_ends_the_run(how, shown):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    start = time.monotonic()
    with pytest.raises(RankFailure, match=rf"(?s)rank 1 of 2 failed.*{shown}"):
        start_ranks("failing_rank", [how], num_ranks=2, device_type="cpu")
    assert time.monotonic() - start < 90  # rank 0 alone would wait half an hour
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not [child for child in left if "failing_rank" in " ".join(child.cmdline())]


def test_a_world_of_another_size_is_refused(tmp_path):
    layout = tmp_path / "layout.toml"
    write_layout_file(layout, Layout(dp=2, global_batch=2, seq_len=16), load_model(CONFIG))
    alone = Forked(tmp_path / "log", TRAIN, ["--layout", layout])
    assert alone.wait(60.0) == 2
    assert alone.text().strip().splitlines() == [
        "error: the layout dp2 mb1 needs 2 ranks, but 1 were started: "
        "use torchrun --nproc-per-node 2, or another layout"
    ]


def test_interleaved_stages_train_alike(tmp_path):
    losses = []
    for vp in (1, 2):
        file, out = tmp_path / f"{vp}.toml", tmp_path / str(vp)
        layout = Layout(pp=2, vp=vp, global_batch=4, seq_len=32)
        write_layout_file(file, layout, load_model({**CONFIG, "num_hidden_layers": 4}))
        words = ["--layout", file, "--steps", 2, "--held-out-batches", 1, "--quiet", "--out", out]
        start_forked_ranks(TRAIN, words, num_ranks=2, device_type="cpu")
        result = json.loads((out / "result.json").read_text())
        losses.append([*result["losses"], result["heldout_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_goes_on_and_keeps_its_history(tmp_path, monkeypatch):
    layout, out = tmp_path / "layout.toml", tmp_path / "out"
    streamed = Layout(global_batch=2, seq_len=32, checkpointing="stream", stream_chunks=4)
    write_layout_file(layout, streamed, load_model(CONFIG))
    words = ["--out", out, "--checkpoint-every", 2, "--quiet"]

    def rank(*more: object) -> Forked:
        return Forked(tmp_path / "log", TRAIN, ["--layout", layout, *words, *more])

    first = rank("--steps", 2)
    assert first.wait(60.0) == 0, first.text()
    monkeypatch.setattr(launch, "start_ranks", start_forked_ranks)
    second = CliRunner().invoke(app, ["launch", *map(str, [layout, *words, "--steps", 3, "--resume"])])
    assert second.exit_code == 0, second.exception
    with (out / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    for words_again, said in ((["--steps", 3], "add --resume"), (["--steps", 3, "--resume"], "asks for no more")):
        refused = rank(*words_again)
        assert refused.wait(60.0) == 2
        (line,) = refused.text().strip().splitlines()
        assert said in line


def test_demo_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    """Its ranks come from the fork server; that the launcher starts them, others test."""
    config, out = tmp_path / "tiny.json", tmp_path / "out"
    config.write_text(json.dumps(CONFIG))
    for command in (launch, profile):
        monkeypatch.setattr(command, "start_ranks", start_forked_ranks)
    demo.demo(out=out, model=config, steps=4, seq_len=32, global_batch=4, profile_seconds=1, ranks=2)
    assert load_cluster(out / "cluster.toml").measured
    assert read_layout_file(out / "layout.toml")[0].world_size == 2
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["layouts"]) == 4
    for row in summary["layouts"]:
        assert Layout(**row["layout"]).world_size == 2
        for name in ("predicted_step_s", "measured_step_s", "predicted_peak_gib", "measured_peak_gib"):
            assert row[name] > 0
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["heldout_loss"] > 0
    assert summary["tokens_per_s"] > 0
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 5  # four measured and the training
    page = (out / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page  # opens offline
    with (out / "plan.csv").open(newline="") as file:
        steps = [float(row["step_s"]) for row in csv.DictReader(file)]
    assert len(steps) > 4
    assert steps == sorted(steps)
    # The training is a file that was shown, and that goes on with it.
    file = out / "train.toml"
    told = capsys.readouterr().out
    for name, value in tomllib.loads(file.read_text()).items():
        assert any(line.startswith(f"{name} = ") for line in told.splitlines()), f"{name} = {value}"
    options = read_options(["--config", str(file), "--steps", "6", "--quiet"])
    plan, model = chosen_layout(options)
    start_training(plan, model, ["--config", str(file), "--steps", "6", "--quiet"])
    with (out / "training" / "metrics.csv").open(newline="") as metrics:
        assert [row["step"] for row in csv.DictReader(metrics)] == ["0", "1", "2", "3", "4", "5"]
