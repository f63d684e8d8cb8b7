"""Shapes of a model, settings and their command line, and the file that is written."""

import tomllib
from pathlib import Path

import pytest

from fourfold.profiling.cluster_file import cluster_table, write_cluster
from fourfold.profiling.settings import ProfileSettings, parse_settings
from fourfold.profiling.shapes import matmul_shapes, model_shape, read_config

CONFIG = {"hidden_size": 8, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
          "num_hidden_layers": 3, "vocab_size": 50}  # fmt: skip


def test_matmuls_of_a_tensor_parallel_layer():
    shapes = matmul_shapes(model_shape(CONFIG), tokens=16, tp=2)
    assert shapes[:3] == [(16, 4, 8, "nt"), (16, 8, 4, "nn"), (4, 8, 16, "tn")]  # the query projection's three
    assert (16, 12, 8, "nt") in shapes  # half the MLP
    assert (16, 25, 8, "nt") in shapes  # half the vocabulary
    # Of six different linear layers, none shares its shapes with another here.
    assert len(shapes) == 18
    flops = sum(2 * m * n * k for m, n, k, operands in shapes if operands == "nt")
    assert flops == sum(2 * m * n * k for m, n, k, operands in shapes if operands == "nn")


def test_tensor_parallel_degrees_divide_heads_and_ranks():
    assert model_shape(CONFIG).tp_degrees(4) == [1, 2]
    assert model_shape(CONFIG).tp_degrees(3) == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": None}, "hidden=None"), ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3")],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model_shape(CONFIG | change)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="no intermediate_size, vocab_size"):
        model_shape({key: CONFIG[key] for key in CONFIG if key not in ("intermediate_size", "vocab_size")})


def test_a_broken_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable config"):
        read_config(tmp_path / "config.json")


def test_settings_survive_the_command_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = ProfileSettings(
        out=tmp_path / "c.toml", seconds=7.5, model=tmp_path / "config.json", seq_len=64, micro_batches=(2, 8),
        layers=False, resume=True, device="cpu",
    )  # fmt: skip
    assert parse_settings(settings.arguments()) == settings
    assert parse_settings([]) == ProfileSettings()


@pytest.mark.parametrize(
    "options",
    [{"seconds": 0}, {"seq_len": 0}, {"micro_batches": ()}, {"micro_batches": (0,)}, {"device": "tpu"},
     {"model": Path("nowhere.json")}, {"out": Path("no/such/folder/c.toml")}],
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"\d|tpu|nowhere|no/such"):
        ProfileSettings(**options)


def test_the_written_table(tmp_path):
    device = {"name": "x", "type": "cpu", "dtype": "float32", "memory_bytes": 10}
    link = {"tier": "host", "num_ranks": 2, "group_size": 2}
    rows = {
        "matmul": [
            {"dtype": "float32", "m": 10, "n": 10, "k": 10, "operands": "nt", "seconds": 1e-6},
            {"dtype": "bfloat16", "m": 10, "n": 10, "k": 10, "operands": "nt", "seconds": 1e-9},
        ],
        "copy": [{"dtype": "float32", "bytes": 10, "seconds": 1.0}, {"dtype": "float32", "bytes": 80, "seconds": 4.0}],
        "overhead": [{"seconds": 5e-6}],
        "link": [
            {**link, "operation": "send", "bytes": 1000, "seconds": 2e-6},
            {**link, "operation": "send", "bytes": 3000, "seconds": 4e-6},
            {**link, "operation": "ring_shift", "bytes": 3000, "seconds": 4e-6},
        ],
    }
    path = tmp_path / "cluster.toml"
    path.write_text("old")
    write_cluster(path, cluster_table({"name": "two"}, device, rows))
    table = tomllib.loads(path.read_text())
    assert table["device"]["peak_flops_per_s"] == pytest.approx(2e9)  # of the training dtype, not bfloat16's
    assert table["device"]["memory_bandwidth_bytes_per_s"] == 20.0
    (tier,) = table["link"]
    assert (tier["name"], tier["num_ranks"]) == ("host", 2)
    (send,) = tier["operation"]
    assert send["latency_s"] == pytest.approx(1e-6)
    assert send["bandwidth_bytes_per_s"] == pytest.approx(1e9)
    assert [sample["operation"] for sample in tier["sample"]] == ["send", "send", "ring_shift"]
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays
