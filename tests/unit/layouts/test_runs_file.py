"""runs.csv: what a run was comes back as the layout it was, and what is there already is kept."""

import csv
from dataclasses import replace

import pytest

from fourfold.launch.runs import append_runs, run_row
from fourfold.layouts.evidence.runs import read_runs
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import load_model
from fourfold.layouts.inputs.software import software_names

RESULT = {"steps_s": [3.0, 1.0, 1.0, 1.0], "device": "cpu", "peak_bytes": 1 << 30, "torch": "2.13.0"}
A100 = load_cluster("A100-80GB")
CPU = replace(A100, device=replace(A100.device, name="cpu", type="cpu"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pp": 4, "embedding_counts_as": 1, "head_counts_as": 2, "checkpointing": "full"},
        {"pp": 2, "checkpointing": "stream", "stream_chunks": 8, "cp": 2},
        {"tp": 2, "sequence_parallel": True, "checkpointing": "selective", "zero_stage": 2},
        {"pp": 2, "schedule": "2bw", "mitigation": "sc"},
        {"pp": 2, "schedule": "lockstep", "mitigation": "none"},
    ],
    ids=str,
)
def test_a_run_comes_back_as_its_layout(tmp_path, monkeypatch, fields):
    monkeypatch.setattr("fourfold.layouts.evidence.runs.preset_for_gpu", lambda name: "A100-80GB")
    layout = Layout(**{"dp": 2, "micro_batch": 2, "global_batch": 16, "seq_len": 1024, **fields})
    append_runs(tmp_path / "runs.csv", [run_row(layout, load_model("llama-3.1-8b"), CPU, RESULT)])
    _, runs, refused = read_runs(tmp_path / "runs.csv")
    assert not refused
    assert runs[0].layout == layout
    assert runs[0].step_s == 1.0


@pytest.mark.parametrize(
    ("result", "software"),
    [
        ({}, "fourfold-cpu"),
        ({"device": "cuda", "precision": "bf16-mixed"}, "fourfold-cuda"),
        ({"device": "cuda", "precision": "bf16-mixed", "compiled": True}, "fourfold-compiled"),
        ({"device": "cuda", "precision": "bf16"}, "fourfold-bf16"),
        ({"device": "cuda", "precision": "bf16", "compiled": True}, "fourfold-bf16-compiled"),
    ],
    ids=str,
)
def test_a_run_says_what_ran_it(result, software):
    row = run_row(Layout(global_batch=1, seq_len=8), load_model("llama-3.1-8b"), CPU, {**RESULT, **result})
    assert row["software"] == software
    assert software in software_names()


def test_other_columns_are_kept(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("model,colour,step_time_s\nold,red,2\nolder,blue,3,one too many\n")
    append_runs(path, [run_row(Layout(global_batch=1, seq_len=8), load_model("llama-3.1-8b"), CPU, RESULT)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["model"], row["colour"], row["step_time_s"]) for row in rows]
    assert found == [("old", "red", "2"), ("older", "blue", "3"), ("llama-3.1-8b", "", "1.0")]
    assert "older,blue,3,one too many" in path.read_text()


def test_files_that_count_layers_by_the_former_names_are_read(tmp_path):
    layout = Layout(pp=4, embedding_counts_as=1, head_counts_as=2, global_batch=16, seq_len=1024)
    row = run_row(layout, load_model("llama-3.1-8b"), CPU, RESULT)
    row = {**row, "gpu_type": "A100-80GB", "first_less": 1, "last_less": 2}
    row = {name: value for name, value in row.items() if not name.endswith("_counts_as")}
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    assert read_runs(tmp_path / "runs.csv")[1][0].layout == layout
