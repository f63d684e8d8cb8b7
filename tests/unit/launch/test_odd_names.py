"""Names, paths and cells that mean something to a terminal, a shell or a parser are printed and used as they are."""

import json
import shlex
import subprocess

import pytest
import tomli_w
from support.clusters import measured_cluster

from fourfold.launch import cli
from fourfold.launch.commands.plan import parse_fix
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.model import model_presets
from fourfold.profiling.settings import MOST_SECONDS, MOST_SIZE, ProfileSettings
from fourfold.profiling.shapes import read_config

ODD = 'it\'s [/b] "x" $(touch pwned) `y` [red]é:smile:'
TINY = model_presets()["tiny-llama-bytes"]["config"]
COLUMNS = "hidden,layers,heads,vocab,seq_len,gpu_type,num_gpus,global_batch,step_time_s,mfu,model"


@pytest.fixture
def folder(tmp_path):
    """A model, a cluster and runs under a name that a shell and a terminal would read as something else."""
    folder = tmp_path / ODD.replace("/", "|")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    cluster = measured_cluster(2)
    cluster["name"] = cluster["device"]["name"] = ODD
    (folder / "cluster.toml").write_text(tomli_w.dumps(cluster), encoding="utf-8")
    rows = [f"64,2,4,128,64,A100-80GB,1,{batch},{batch / 8},,[/red]" for batch in (2, 4, 8, 16, 32)]
    rows += ["[/i],2,4,128,64,A100-80GB,1,8,1.0,,x", "64,2,4,128,64,[/green],1,8,1.0,,x"]
    (folder / "runs.csv").write_text("\n".join([COLUMNS, *rows]))
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `layout-advisor` with these words; give its exit code and what it printed."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["layout-advisor", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out + printed.err

    return run


def test_every_command_prints_odd_names_as_they_are(command, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    on = ["--cluster", folder / "cluster.toml"]
    sizes = ["--global-batch", "8", "--seq-len", "64"]
    two = [folder, *on, "--gpus", "2", *sizes]
    price = ["--price", f"{folder / 'cluster.toml'}=1", "--days", "9", "--tokens", "1e6", "--most-gpus", "2"]
    for words in (
        ["plan", *two, "--out", folder / "plan"], ["explain", *two],
        ["compare", folder, "dp2 mb1", "tp2 mb1", *two[1:]],
        ["cheapest", folder, *price, *sizes], ["largest", *two], ["validate", folder / "runs.csv"],
    ):  # fmt: skip
        code, said = command(*words)
        assert code == 0, said
        if words[0] in ("plan", "cheapest"):
            assert ODD in " ".join(said.split())  # a title is as wide as its table
        if words[0] == "validate":
            assert "[/red]" in said
            assert "hidden='[/i]' is not a number" in said
            assert "gpu_type='[/green]'" in said


@pytest.mark.parametrize("tool", ["torchrun", "slurm", "mpi"])
def test_a_script_gives_its_rank_the_path_whatever_is_in_it(command, folder, tmp_path, tool):
    """Run by bash, with programs in the launchers' place that write down what reaches them."""
    on = ["--cluster", folder / "cluster.toml", "--gpus", "2", "--global-batch", "8", "--seq-len", "64"]
    command("plan", folder, *on, "--out", folder)
    script = folder / "a script.sh"
    assert command("export", folder / "layout.toml", "--to", tool, "--out", script)[0] == 0
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    record = tmp_path / "seen"
    programs = {
        "torchrun": f'printf "%s\\n" "$@" > {shlex.quote(str(record))}',
        "mpiexec": f'printf "%s\\n" "$@" > {shlex.quote(str(record))}',
        "srun": 'exec "$@"',
        "scontrol": "echo host",
    }
    for name, text in programs.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "host"}
    words = ["bash", str(script), "--steps", "3 4"]
    subprocess.run(words, check=True, env=environment, cwd=tmp_path, timeout=30)
    seen = record.read_text(encoding="utf-8").splitlines()
    assert seen[seen.index("--layout") + 1 :] == [str(folder / "layout.toml"), "--steps", "3 4"]
    assert not (tmp_path / "pwned").exists()


def test_a_number_without_end_is_not_printed_whole():
    digits = "9" * 5000
    for ask in (
        lambda: parse_fix([f"cp={digits}"]),
        lambda: parse_layout(f"mb{digits}", num_devices=2, global_batch=2, seq_len=2),
    ):
        with pytest.raises(ValueError, match="999") as error:
            ask()
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seq_len": 2**63}, "at most"),
        ({"micro_batches": (1, MOST_SIZE + 1)}, "at most"),
        ({"seconds": float("inf")}, f"at most {MOST_SECONDS}"),
        ({"seconds": float("nan")}, "above 0"),
    ],
    ids=str,
)
def test_a_profile_has_bounds(settings, said):
    with pytest.raises(ValueError, match=said):
        ProfileSettings(**settings)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"hidden_size": ' + "9" * 5000 + "}"], ids=len)
def test_a_config_that_is_none_is_told_to_who_profiles_it(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        read_config(tmp_path / "config.json")
    assert len(str(error.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_part_of_a_config_to_profile(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8-sig")
    assert read_config(tmp_path / "config.json") == TINY


def test_a_profile_starts_no_more_ranks_than_the_machine_bears(command):
    code, said = command("profile", "--ranks", 10**9, "--device", "cpu")
    assert code == 2
    assert "choose at most eight a core" in said


@pytest.mark.parametrize("option", ["--seq-len", "--global-batch", "--steps"])
def test_the_demo_refuses_a_size_before_it_measures(command, tmp_path, option):
    code, said = command("demo", "--out", tmp_path / "run", option, 2**63)
    assert code == 2
    assert said.strip() == f"error: {option}=9223372036854775808, but it is at most 2147483648"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--ranks", 7, "--global-batch", 8], "no layout of 7 devices can cut this model and batch"),
        (["--cluster", "H100-80GB"], "was not measured on a machine"),
    ],
    ids=str,
)
def test_the_demo_refuses_what_no_layout_can_cut_before_it_measures(command, tmp_path, words, reason):
    code, said = command("demo", "--out", tmp_path / "run", *words)
    assert code == 2
    (line,) = said.strip().splitlines()
    assert line.startswith("error:")
    assert reason in line
    assert not (tmp_path / "run").exists()
