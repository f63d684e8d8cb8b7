"""What a user gives is read or refused in one line: no nan, no infinity, nothing beyond 64 bits, no endless nesting."""

import json
import math
import sys
from pathlib import Path

import pytest
import tomli_w
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.clusters import measured_cluster

from fourfold.launch.cli import main
from fourfold.layouts.evidence.runs import read_runs
from fourfold.layouts.inputs.cluster import load_cluster, read_cluster
from fourfold.layouts.inputs.layout import Layout, read_layout_file
from fourfold.layouts.inputs.model import load_model, model_presets
from fourfold.layouts.inputs.reading import number, read_csv, read_json_object, read_toml, whole
from fourfold.layouts.search.rank import rank_layouts
from fourfold.layouts.search.request import SearchRequest

BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
TINY = model_presets()["tiny-llama-bytes"]["config"]
BAD_NUMBERS = [0, -1.0, math.nan, math.inf, -math.inf, "0.1", None, True, 10**400, [1.0]]
HEADER = "hidden,layers,heads,vocab,seq_len,gpu_type,num_gpus,global_batch,step_time_s,mfu"
ROW = {"hidden": "64", "layers": "2", "heads": "4", "vocab": "128", "seq_len": "64", "gpu_type": "A100-80GB",
       "num_gpus": "1", "global_batch": "8", "step_time_s": "1.0", "mfu": ""}  # fmt: skip


def refused(error: ValueError) -> None:
    assert "\n" not in str(error)


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800
    return str(error.value)


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("table", ["matmul", "attention", "elementwise", "layer", "ends", "optimizer", "cp_layer"])
def test_every_measured_second_is_a_finite_number_above_0(table, bad):
    document = measured_cluster()
    seconds = next(name for name in document[table][0] if name.endswith("_s") or name == "seconds")
    document[table][0][seconds] = bad
    with pytest.raises(ValueError, match=seconds) as error:
        read_cluster(document, title="cluster.toml")
    assert f"[[{table}]] 0" in one_line(error)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", math.nan, 2**63, True], ids=repr)
def test_every_measured_shape_is_a_whole_number(bad):
    for table, name in (
        ("matmul", "m"),
        ("attention", "seq_len"),
        ("layer", "micro_batch"),
        ("optimizer", "parameters"),
    ):
        document = measured_cluster()
        document[table][0][name] = bad
        with pytest.raises(ValueError, match=name) as error:
            read_cluster(document, title="cluster.toml")
        one_line(error)


@given(
    st.sampled_from(["matmul", "attention", "elementwise", "layer", "ends", "tp_layer", "cp_layer", "optimizer"]),
    st.integers(0, 30),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({})),
)
@example("elementwise", 1, 1.1125369292536007e-308)  # bytes of a sample whose rate is none
@settings(max_examples=120)
def test_a_cluster_of_anything_is_priced_with_numbers_or_refused(table, place, value):
    document = measured_cluster()
    row = document[table][0]
    row[list(row)[place % len(row)]] = value
    try:
        cluster = read_cluster(document, title="cluster.toml")
    except ValueError as error:
        refused(error)
        return
    best = rank_layouts(
        load_model("tiny-llama-bytes"), cluster, SearchRequest(num_devices=2, global_batch=4, seq_len=64)
    )
    assert all(math.isfinite(priced.step_s) and priced.step_s > 0 for priced in best.layouts)


CONFIG_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3), st.just({}),
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(model_presets()))
def test_a_config_of_anything_is_a_model_or_refused(name):
    config = model_presets()[name]["config"]

    @given(st.sampled_from([*config, "layer_types", "sliding_window", "head_dim", "model_type"]), CONFIG_VALUES)
    @settings(max_examples=25)
    def check(field, value):
        try:
            model = load_model({**config, field: value})
        except ValueError as error:
            refused(error)
            return
        assert 0 < model.num_params < 10**30
        assert model.flops_per_token(4096) > 0

    check()


@given(st.sampled_from(sorted(Layout.__dataclass_fields__)), CONFIG_VALUES)
@settings(max_examples=120)
def test_a_layout_file_of_anything_is_a_layout_or_refused(tmp_path_factory, field, value):
    path = tmp_path_factory.mktemp("layout") / "layout.toml"
    entries = {"global_batch": 8, "seq_len": 64, field: value}
    path.write_text(
        tomli_w.dumps({"layout": {k: _no_null(v) for k, v in entries.items() if v is not None}, "model": TINY})
    )
    try:
        layout, _ = read_layout_file(path)
    except ValueError as error:
        refused(error)
        return
    assert layout.num_micro_batches >= 1


def _no_null(value):
    return [entry for entry in value if entry is not None] if isinstance(value, list) else value


@given(st.sampled_from(sorted(ROW)), st.text(max_size=6) | st.floats().map(str) | st.integers().map(str))
@settings(max_examples=120)
def test_a_row_of_anything_is_priced_or_listed(tmp_path_factory, column, cell):
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    cell = cell.replace("\x00", "")
    row = {**ROW, column: cell}
    quoted = ['"' + value.replace('"', '""') + '"' for value in row.values()]
    path.write_text(HEADER + "\n" + ",".join(quoted) + "\n", encoding="utf-8", errors="replace")
    _, runs, refused = read_runs(path)
    assert len(runs) + len(refused) >= 1
    assert all("\n" not in reason for reason in refused.values())
    assert all(run.step_s is None or 0 < run.step_s < math.inf for run in runs)


@pytest.mark.parametrize("cell", ["inf", "-inf", "nan(1)", "1e400", "9" * 400, "1e300"])
def test_a_cell_that_is_no_number_refuses_its_row_alone(tmp_path, cell):
    for column in ("num_gpus", "hidden", "step_time_s"):
        path = tmp_path / "runs.csv"
        row = {**ROW, column: cell}
        path.write_text("\n".join([HEADER, ",".join(ROW.values()), ",".join(row.values())]))
        _, runs, refused = read_runs(path)
        assert len(runs) == 1
        assert column in refused[3]


def test_an_mfu_beside_a_step_time_has_no_say(tmp_path):
    path = tmp_path / "runs.csv"
    rows = [{**ROW, "mfu": "0"}, {**ROW, "mfu": "n/a?"}, {**ROW, "step_time_s": "", "mfu": "0"},
            {**ROW, "step_time_s": "", "mfu": "1.2"}]  # fmt: skip
    path.write_text("\n".join([HEADER, *(",".join(row.values()) for row in rows)]))
    _, runs, refused = read_runs(path)
    assert [run.step_s for run in runs] == [1.0, 1.0]
    assert "mfu=0: not a number above 0" in refused[4]
    assert "mfu=1.2: a share of the peak" in refused[5]


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "config.json").write_text(BOM + json.dumps(TINY), encoding="utf-8")
    assert load_model(tmp_path).num_params == load_model("tiny-llama-bytes").num_params
    (tmp_path / "cluster.toml").write_text(BOM + tomli_w.dumps(measured_cluster()), encoding="utf-8")
    assert load_cluster(tmp_path / "cluster.toml").measured
    (tmp_path / "runs.csv").write_text(BOM + HEADER + "\n" + ",".join(ROW.values()), encoding="utf-8")
    header, rows = read_csv(tmp_path / "runs.csv", "")
    assert header[0] == "hidden"
    assert rows[0]["hidden"] == "64"
    (tmp_path / "layout.toml").write_text(
        BOM + tomli_w.dumps({"layout": {"global_batch": 8, "seq_len": 64}, "model": TINY}), encoding="utf-8"
    )
    assert read_layout_file(tmp_path / "layout.toml")[0].global_batch == 8


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_brackets_without_end_are_refused_in_one_line(tmp_path, opening):
    path = tmp_path / "file"
    path.write_text(opening * 100_000)
    with pytest.raises(ValueError, match=r"nested too deep|not a JSON file") as error:
        read_json_object(path, "give another")
    one_line(error)
    path.write_text("a = " + "[" * 100_000)
    with pytest.raises(ValueError, match="not a TOML file") as error:
        read_toml(path, "give another")
    one_line(error)


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
def test_numbers_and_whole_numbers_have_bounds(bad):
    for read in (number, whole):
        with pytest.raises(ValueError, match=r"size=|at least|above") as error:
            read(bad, "size")
        one_line(error)
    assert number(0, "size", zero=True) == 0.0
    assert whole(2**31, "size") == 2**31


COMMON = ["--cluster", "A100-80GB", "--global-batch", "8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "gpt2", *COMMON, "--gpus", "99999999999", "--seq-len", "512"], "gpus=99999999999: give at most"),
        (["plan", "gpt2", *COMMON, "--gpus", "8", "--seq-len", "4611686018427387904"], "seq_len=4611686018427387904"),
        (["plan", "gpt2", *COMMON, "--gpus", "8", "--seq-len", "512", "--fix", "tp=" + "9" * 5000], "--fix tp"),
        (["plan", "gpt2", *COMMON, "--gpus", "8", "--seq-len", "512", "--tokens", "nan"], "--tokens"),
        (["explain", "gpt2", *COMMON, "--gpus", "8", "--seq-len", str(2**62)], "seq_len"),
        (["explain", "gpt2", *COMMON, "--gpus", "8", "--seq-len", "512", "--layout", "mb" + "9" * 5000], "layout"),
        (["compare", "gpt2", "tp1", "tp2", *COMMON, "--gpus", "-8", "--seq-len", "512"], "gpus=-8"),
        (["plan", "gpt2", *COMMON, "--gpus", "8", "--seq-len", "512", "--gpus-per-node", "-1"], "gpus per node"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_arguments_out_of_bounds_end_at_once_with_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layout-advisor", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert len(told.splitlines()) == 1


def test_no_file_is_read_without_the_reader():
    """Nothing in layouts/ or the commands opens, parses or decodes a user's file itself."""
    root = Path(__file__).resolve().parents[3]
    for path in [*(root / "layouts").rglob("*.py"), *(root / "launch" / "commands").glob("*.py")]:
        text = path.read_text()
        if path.name != "reading.py":
            for call in ("tomllib.load(", "json.load(", "csv.reader(", 'read_text(encoding="utf-8"))['):
                assert call not in text, f"{path}: {call}"
