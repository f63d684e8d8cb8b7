"""The benchmarks of a GPU where there is none: what they refuse, and the tables that they print of stored rows."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One process for all calls, most of whose time is the import of torch and transformers.
DRIVER = """
import contextlib, importlib, io, json, os, pathlib, sys
from unittest import mock
import torch

calls, rows = json.load(sys.stdin)
answers = []
for module, *words in calls:
    told, code = io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(told))
        stack.enter_context(contextlib.redirect_stderr(told))
        stack.enter_context(mock.patch.object(sys, "argv", ["x", *words]))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: False))
        try:
            importlib.import_module(f"benchmarks.{module}").main()
        except SystemExit as end:
            code = end.code
    answers.append([code, told.getvalue()])

def failing(error):
    def measure():
        raise error
    return measure

ring = importlib.import_module("benchmarks.ring_attention.cuda")
with contextlib.redirect_stdout(io.StringIO()):
    samples = ring.Samples([], pathlib.Path(os.devnull), "cpu", 60)
    lost = torch.AcceleratorError
    failures = {"refused": ValueError, "failed": RuntimeError, "device lost": lost, "after": ValueError}
    for name, kind in failures.items():
        samples.take("ring", (128, 2), name, failing(kind(name)))
kept = [[row["provider"] for row in samples.rows], samples.left]
results = {name: importlib.import_module(f"benchmarks.{name}").results(rows[name]) for name in rows}
print(json.dumps([answers, results, kept]))
"""
STREAM, RING, PROFILING = "stream_backprop.cuda", "ring_attention.cuda", "profiling.cuda"
TAKEN_WITH = {"torch": "2.11.0", "python": "3.12.1", "commit": "abc"}


def write(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def stream_row(provider: str, **changes: str) -> dict[str, str]:
    row = {
        "shape": "4B", "memory_gib": "0", "provider": provider, "seq_len": "8192", "peak_gib": "4", "step_s": "0.5",
        "base_gib": "15", "device_gib": "79", "loss": "12", "error": "", "device": "H100",
    }  # fmt: skip
    return {**row, **TAKEN_WITH, **changes}


def ring_row(kind: str, provider: str, **changes: str) -> dict[str, str]:
    row = {"kind": kind, "tokens": "65536", "ranks": "8", "provider": provider, "seconds": "0.01", "peak_mib": "700"}
    return {**row, "error": "", "device": "H100", **TAKEN_WITH, **changes}


def launched_row(layout: str, **changes: str) -> dict[str, str]:
    row = {
        "device": "H100", "num_devices": "1", "model": "llama-1.2b", "global_batch": "16", "seq_len": "2048",
        "layout": layout, "software": "fourfold", "compiled": "inductor", "said_s": "0.9", "ran_s": "1",
        "said_gib": "55", "held_gib": "50", "reserved_gib": "52", "error": "",
    }  # fmt: skip
    return {**row, **TAKEN_WITH, **changes}


HERE = ("--device", "cpu")
REFUSED = {
    (STREAM,): "no CUDA device here",
    (RING,): "no CUDA device here",
    (PROFILING,): "no CUDA device here",
    (STREAM, "--providers", "nonsense"): "'nonsense' is no provider",
    (STREAM, "--providers", "ours,chunk=abc"): "'ours,chunk=abc' is no provider",
    (STREAM, "--providers", "checkpoint,keep"): "'checkpoint,keep' is no provider",
    (STREAM, "--cases", "4B:0"): "give SHAPE:TOKENS",
    (STREAM, "--steps", "-1"): "whole number of at least 1",
    (STREAM, "--longest", "--resolution", "0"): "whole number of at least 1",
    (STREAM, "--minutes", "nan"): "number of at least 0",
    (STREAM, "--print", "--samples", "none/a.csv"): "in a folder that is there",
    (STREAM, "--print", "--samples", "pyproject.toml"): "has other columns",
    (RING, *HERE, "--ranks", "4"): "--ranks without --tokens",
    (RING, *HERE, "--tokens", "3"): "at least 128 tokens",
    (RING, *HERE, "--tokens", "128", "--repeats", "0"): "whole number of at least 1",
    (RING, "--print", "--samples", "pyproject.toml"): "has other columns",
    ("ring_attention.packed", "--ranks", "0"): "whole number of at least 1",
    ("ring_attention.packed", "--seq-len", "3"): "at least 128 tokens",
    (PROFILING, *HERE, "--steps", "-3"): "whole number of at least 1",
    (PROFILING, *HERE, "--model", "none.json"): "none.json: no such file",
    (PROFILING, "--print", "--out", "pyproject.toml"): "has other columns",
}


@dataclass(frozen=True)
class Answers:
    """Of each refused call (exit code, what it told), the tables by name, rows for results files by script; and of the
    ring's failing measurements those that were kept, and how many were left."""

    refused: list[tuple[int, str]]
    tables: dict[str, str]
    results: dict[str, list[dict[str, str]]]
    failed: list[Any]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Answers:
    """What the scripts say to REFUSED, and make of rows that are made up."""
    folder = tmp_path_factory.mktemp("rows")
    stream = [
        stream_row("liger+checkpoint"),
        stream_row("ours", step_s="0.4", peak_gib="2"),
        stream_row("ours", seq_len="16384", peak_gib="3"),
        # Other devices, and a device of which a part may be used: neither ratios nor lines mix them.
        stream_row("ours", device="cpu", peak_gib="0", device_gib="0", step_s="9"),
        stream_row("ours", memory_gib="40", seq_len="32768", peak_gib="4", device_gib="40"),
        stream_row("checkpoint", seq_len="16384", error="OutOfMemoryError", peak_gib="", step_s=""),
    ]
    ring = [
        ring_row("ring", "limit"),
        ring_row("ring", "cudnn", seconds="0.0104"),
        ring_row("ring", "flash_attn_3", seconds="", peak_mib="", error="not installed"),
        ring_row("ring", "cudnn", seconds="0.02", device="H200"),
    ]
    launched = [
        launched_row("dp1 mb4"),
        launched_row("dp1 mb8", ran_s="", held_gib="", reserved_gib="", error="out of memory"),
        launched_row("dp1 mb4", device="H200", ran_s="0.5"),
    ]
    printing = {
        "stream": (STREAM, "--print", "--samples", write(folder / "stream.csv", stream)),
        "ring": (RING, "--print", "--samples", write(folder / "ring.csv", ring)),
        "launched": (PROFILING, "--print", "--out", write(folder / "launched.csv", launched)),
        "nothing": (STREAM, "--print", "--samples", str(folder / "none.csv")),
    }
    asked = [[*REFUSED, *printing.values()], {STREAM: stream, RING: ring}]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert not done.returncode, done.stderr
    told, results, failed = json.loads(done.stdout)
    tables = told[len(REFUSED) :]
    assert [code for code, _ in tables] == [0] * len(printing)
    return Answers(
        [(code, text) for code, text in told[: len(REFUSED)]],
        dict(zip(printing, (text for _, text in tables), strict=True)), results, failed,
    )  # fmt: skip


def test_what_cannot_be_measured_is_refused_in_a_line(answers):
    for call, (code, told) in zip(REFUSED, answers.refused, strict=True):
        assert code == 2, (call, told)
        assert REFUSED[call] in told.splitlines()[-1], (call, told)


def test_streaming_is_told_beside_its_peers_of_the_same_device(answers):
    lines = answers.tables["stream"].splitlines()
    assert "4B, T 8192, H100" in lines
    assert "| ours | 0.400 | 2.00 | 0.80 | 0.50 | 516096 |" in lines  # 1 GiB for 8192 tokens, of 79 - 15 GiB
    assert "| ours | 9.000 | 0.00 |  |  |  |" in lines  # a CPU, without a peer there
    assert "4B, T 32768, H100, 40 GiB of it" in lines
    assert "| checkpoint | OutOfMemoryError | | | | |" in lines
    assert "nothing was measured yet" in answers.tables["nothing"]


def test_a_ring_is_told_over_the_limit_of_the_same_device(answers):
    lines = answers.tables["ring"].splitlines()
    assert "| 65536, 8 | ring: cudnn | 0.0104 | 1.04 | 700 |" in lines
    assert "| 65536, 8 | ring: cudnn | 0.0200 |  | 700 |" in lines
    assert "| 65536, 8 | ring: flash_attn_3 | not installed | | |" in lines


def test_what_is_not_installed_is_asked_for_again_and_a_lost_device_for_nothing_more(answers):
    assert answers.failed == [["failed", "device lost"], 1]


def test_launches_are_told_case_by_case_with_what_failed(answers):
    lines = answers.tables["launched"].splitlines()
    assert "llama-1.2b on 1 x H100, 16 sequences of 2048:" in lines
    assert "| dp1 mb4 | 0.900 | 1.000 | -10.0% | 55.00 | 50.00 | +10.0% | 52.00 |" in lines
    assert "| dp1 mb4 | 0.900 | 0.500 | +80.0% | 55.00 | 50.00 | +10.0% | 52.00 |" in lines
    assert "| dp1 mb8 | 0.900 | out of memory | | 55.00 | | | |" in lines


def test_results_keep_what_was_measured_when(answers):
    """A later call on another commit, or another machine, does not claim earlier rows for itself."""
    # A row of a device for each metric of what ran, and the longest of what ran out of memory.
    assert [row["kind"] for row in answers.results[STREAM]] == ["gpu"] * 6 + ["cpu"] * 2 + ["gpu"] * 3
    assert len(answers.results[RING]) == 6
    for row in (*answers.results[STREAM], *answers.results[RING]):
        assert {name: row[name] for name in TAKEN_WITH} == TAKEN_WITH
