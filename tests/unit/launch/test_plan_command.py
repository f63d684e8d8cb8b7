"""The commands around the planner, as a user calls them."""

import csv
import json
import re
import shutil
import subprocess

import pytest
import typer
from typer.testing import CliRunner

from fourfold.launch.commands.explain import compare, explain
from fourfold.launch.commands.export import export
from fourfold.launch.commands.plan import parse_fix, plan
from fourfold.layouts.inputs.layout import read_layout_file

app = typer.Typer(pretty_exceptions_enable=False)
for command in (plan, explain, compare, export):
    app.command()(command)
BATCH = ["--cluster", "A100-80GB", "--gpus", "8", "--global-batch", "32", "--seq-len", "2048"]


def call(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])


def test_plan_prints_a_table_and_says_what_was_ruled_out():
    result = call("plan", "llama-3.1-8b", *BATCH, "--top", 3, "--tokens", "1e12")
    assert result.exit_code == 0
    assert "fast" in result.stdout
    assert "days" in result.stdout
    assert "Ruled out: " in result.stdout
    assert "does not fit in memory: " in result.stdout


def test_plan_as_json():
    document = json.loads(call("plan", "llama-3.1-8b", *BATCH, "--top", 2, "--json").stdout)
    assert document["num_params"] == 8030261248
    assert len(document["layouts"]) == 2
    best = document["layouts"][0]
    assert best["dp"] * best["pp"] * best["cp"] * best["tp"] == 8
    assert best["fits"] is True
    assert best["margin_gib"] == pytest.approx(best["capacity_gib"] - best["reserve_gib"] - best["peak_gib"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan")
    assert call("plan", "llama-3.1-8b", *BATCH, "--out", out).exit_code == 0
    return out


def test_plan_writes_what_launches_and_what_explains(written):
    layout, model = read_layout_file(written / "layout.toml")
    assert layout.world_size == 8
    assert layout.runnable
    assert model.num_params == 8030261248
    with (written / "plan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert rows[0]["layout"] == str(layout)


def test_the_report_needs_nothing_from_outside(written):
    page = (written / "report.html").read_text()
    assert page.count("<!doctype html>") == 1
    outside_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=", outside_scripts)
    assert 'name="viewport"' in page


def test_a_browser_opens_the_report(written):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    drawn = subprocess.run(
        [browser, *options, f"file://{written / 'report.html'}"], capture_output=True, text=True, timeout=120
    ).stdout
    assert drawn.count('class="main-svg"') >= 2  # plotly ran and drew both charts
    assert "Ranked layouts" in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "no-model", *BATCH], "neither a config.json nor a preset"),
        (["plan", "llama-3.1-8b", *BATCH[2:], "--cluster", "B52"], "neither a cluster.toml nor a preset"),
        (["plan", "llama-3.1-8b", *BATCH, "--gpus", "0"], "gpus=0"),
        (["plan", "llama-3.1-8b", *BATCH, "--top", "0"], "--top 0"),
        (["plan", "llama-3.1-8b", *BATCH, "--fix", "tp"], "write it as KEY=VALUE"),
        (["plan", "llama-3.1-8b", *BATCH, "--fix", "tp=x"], "give a whole number of at least 1"),
        (["plan", "llama-3.1-8b", *BATCH, "--fix", "tp=2", "--fix", "tp=4"], "tp is already fixed at 2"),
        (["plan", "llama-3.1-8b", *BATCH, "--fix", "ep=2"], "add --space full"),
        (["plan", "llama-3.1-8b", *BATCH, "--tokens", "nan"], "--tokens nan"),
        (["plan", "llama-3.1-8b", *BATCH, "--gpus-per-node", "3"], "does not fill nodes of 3"),
        (["plan", "llama-3.1-8b", *BATCH, "--fix", "checkpointing=x"], "choose one of none"),
        (["plan", "llama-3.1-405b", *BATCH], "nothing fits: the nearest"),
        (["explain", "llama-3.1-8b", *BATCH, "--layout", "tp2 qq4"], "'qq4' is none of"),
        (["explain", "llama-3.1-8b", *BATCH, "--layout", "dp2 tp2"], "its axes make 4 ranks"),
        (["compare", "llama-3.1-8b", "tp8", "tp16 dp1", *BATCH], "its axes make 16 ranks"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(arguments, message):
    result = call(*arguments)
    assert isinstance(result.exception, ValueError)  # cli.main prints it and exits with 2
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_fixed_fields_are_parsed():
    assert parse_fix(["tp=8", "checkpointing=full", "sequence-parallel=on", "zero_stage=0"]) == {
        "tp": 8, "checkpointing": "full", "sequence_parallel": True, "zero_stage": 0,
    }  # fmt: skip


def test_thousands_of_layouts_are_plain_lines_of_the_same_cells():
    few, many = (call("plan", "llama-3.1-8b", *BATCH, "--top", top).stdout for top in (3, 2000))
    lines = [line.split() for line in many.splitlines()]
    assert lines[0][:3] == ["#", "layout", "step"]
    assert sum(1 for line in lines if line and line[0].isdecimal()) > 200
    drawn = [line.split() for line in few.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])]
    assert len(drawn) == 3
    assert all(line in lines for line in drawn)


def test_explain_shows_terms_stages_schedule_and_neighbours():
    result = call("explain", "llama-3.1-8b", *BATCH, "--layout", "tp2 pp4 z1", "--space", "full")
    assert result.exit_code == 0
    for words in ("pipeline bubble", "last stage", "Schedule", "..0aa1bb", "tp /2", "micro-batch x2"):
        assert words in result.stdout


def test_compare_sets_two_side_by_side():
    result = call("compare", "llama-3.1-8b", "tp2 pp4", "tp8", *BATCH, "--space", "full")
    assert result.exit_code == 0
    assert "tensor-parallel communication" in result.stdout
    assert "against pp4 tp2 mb1" in result.stdout


@pytest.mark.parametrize("command", ["explain", "compare"])
@pytest.mark.parametrize(
    ("model", "words", "space", "message"),
    [
        ("llama-3.1-8b", "cp2 tp4 heads2", "runtime", "add --space full"),
        ("gpt2", "mb1", "runtime", "add --space full"),
        ("llama-3.1-8b", "mb1 sp", "full", "sequence parallelism needs tp of at least 2"),
        ("llama-3.1-8b", "mb1 offload", "full", "offloading moves the inputs of checkpointed layers"),
    ],
)
def test_a_layout_outside_the_space_is_refused(command, model, words, space, message):
    layouts = ["--layout", words] if command == "explain" else [words, "mb1"]
    sizes = ["--cluster", "A100-80GB", "--gpus", "8", "--global-batch", "16", "--seq-len", "512"]
    result = call(command, model, *layouts, *sizes, "--space", space)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
