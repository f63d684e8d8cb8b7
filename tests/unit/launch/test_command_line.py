"""What a user gets wrong is told in one line, with the values and the mend, and exit code 2."""

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w

from fourfold.launch import cli
from fourfold.launch.processes import RankFailure
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model

CONFIG = Path(cli.__file__).parent / "data" / "byte-llama.json"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `layout-advisor` with these words; give exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["layout-advisor", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


def plan_words(
    config: object = CONFIG, *, cluster: object = "A100-80GB", gpus=8, batch=16, seq_len=256
) -> list[object]:
    sizes = ["--cluster", cluster, "--gpus", gpus, "--global-batch", batch, "--seq-len", seq_len]
    return ["plan", config, *sizes]


@pytest.mark.parametrize("cluster", ["A100-80GB", "H100-80GB"])
def test_plan_prints_what_it_found(command, cluster):
    code, out, _ = command(*plan_words(cluster=cluster), "--json", "--top", 3)
    assert code == 0
    found = json.loads(out)
    assert len(found["layouts"]) == 3
    steps = [layout["step_s"] for layout in found["layouts"]]
    assert steps == sorted(steps)
    assert all(layout["dp"] * layout["pp"] * layout["cp"] * layout["tp"] == 8 for layout in found["layouts"])


@pytest.mark.parametrize(
    "name", ["", "demo", "profile", "plan", "explain", "compare", "export", "launch", "validate", "calibrate"]
)
def test_help(command, name):
    code, out, _ = command(*([name] if name else []), "--help")
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize(("rank_ended_with", "code", "shown"), [(2, 2, ""), (3, 1, ""), (1, 1, "rank 1: its words\n")])
def test_what_a_rank_has_said_is_not_said_again(command, layout_file, monkeypatch, rank_ended_with, code, shown):
    def failing(*_: object, **__: object) -> None:
        raise RankFailure("rank 1: its words", rank_ended_with)

    monkeypatch.setattr("fourfold.launch.commands.launch.start_training", failing)
    assert command("launch", layout_file, "--out", layout_file.parent / "out") == (code, "", shown)


def assert_one_line(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("fix", "sizes", "parts"),
    [
        ("tp=3", {"gpus": 6}, ["tp", "8 attention heads"]),
        ("pp=8", {}, ["pp", "4 layers"]),
        ("cp=8", {"seq_len": 100}, ["cp", "100"]),
        ("dp=8", {"batch": 12}, ["12"]),
        ("tp=5", {}, ["tp=5", "8 devices"]),
        ("speed=3", {}, ["speed"]),
    ],
)
def test_what_no_layout_can_cut(command, fix, sizes, parts):
    assert_one_line(command(*plan_words(**sizes), "--fix", fix), *parts)


@pytest.mark.parametrize(("name", "value"), [("gpus", 0), ("batch", 0), ("seq_len", -1)])
def test_numbers_that_make_no_sense(command, name, value):
    assert_one_line(command(*plan_words(**{name: value})), str(value))


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_config_without_a_field(command, tmp_path, missing):
    config = json.loads(CONFIG.read_text())
    del config[missing]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert_one_line(command(*plan_words(path)), missing)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "bert"}'])
def test_a_config_that_is_none(command, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert_one_line(command(*plan_words(path)), "config.json")


@pytest.mark.parametrize(("memory_bytes", "said"), [(1e6, "no free memory"), (1e7, "GiB")])
def test_a_machine_without_free_memory(command, tmp_path, memory_bytes, said):
    cluster = {
        "schema": 1, "name": "full", "provenance": "made up", "num_devices": 2, "devices_per_node": 2,
        "device": {
            "name": "full", "type": "cpu", "dtype": "float32", "memory_bytes": memory_bytes, "peak_flops_per_s": 1e11,
            "memory_bandwidth_bytes_per_s": 1e10, "operator_overhead_s": 1e-5,
        },
        "link": [{"name": "host", "num_ranks": 2, "operation": [
            {"operation": "send", "group_size": 2, "latency_s": 1e-4, "bandwidth_bytes_per_s": 1e9}]}],
    }  # fmt: skip
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps(cluster))
    assert_one_line(command(*plan_words(cluster=path, gpus=2)), said)
    assert_one_line(command("demo", "--cluster", path, "--out", tmp_path / "out"), said)


@pytest.fixture
def layout_file(tmp_path):
    path = tmp_path / "layout.toml"
    write_layout_file(path, Layout(dp=2, global_batch=4, seq_len=32), load_model(CONFIG))
    return path


@pytest.mark.parametrize(
    ("table", "key", "value", "parts"),
    [
        ("layout", "dp", 0, ["dp=0"]),
        ("layout", "tp", 3, ["tp=3"]),
        ("layout", "pp", 64, ["pp=64", "4 layers"]),
        ("layout", "micro_batch", 3, ["micro_batch=3", "global_batch=4"]),
        ("layout", "checkpointing", "often", ["often"]),
        ("layout", "speed", 3, ["speed"]),
        ("model", "hidden_size", "wide", ["hidden_size"]),
    ],
)
def test_a_broken_layout_file(command, layout_file, table, key, value, parts):
    document = tomllib.loads(layout_file.read_text())
    document[table][key] = value
    layout_file.write_text(tomli_w.dumps(document))
    assert_one_line(command("launch", layout_file, "--out", layout_file.parent / "out"), "layout.toml", *parts)


def test_a_layout_file_that_is_none(command, tmp_path):
    path = tmp_path / "layout.toml"
    assert_one_line(command("launch", path), "cannot be read")
    path.write_text("[layout\n")
    assert_one_line(command("launch", path), "not a TOML file")
