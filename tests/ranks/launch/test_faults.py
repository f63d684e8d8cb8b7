"""What can happen to a run from outside: each ends in bounded time, in one clear line, and leaves what was saved."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.tiny_config import CONFIG
from support.training_process import TRAIN, Forked, forked_ranks, until_rows
from torch.distributed import TCPStore

from fourfold.launch.training.watch import bounded_meeting
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model

ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = {"z3": {"dp": 2, "zero_stage": 3}, "pp": {"pp": 2}, "async": {"pp": 2, "schedule": "lockstep"}}
FOREVER = ["--steps", 100_000, "--held-out-batches", 0, "--warmup-steps", 0]
STARTING_S = 240.0


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")


@pytest.fixture
def layout_file(tmp_path) -> Callable[..., Path]:
    def write(**fields: object) -> Path:
        path = tmp_path / "layout.toml"
        write_layout_file(path, Layout(global_batch=4, seq_len=16, **fields), load_model(CONFIG))
        return path

    return write


class Launched:
    """A launcher, started for real, its ranks, and what they say."""

    def __init__(self, log: Path, *words: object) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = psutil.Popen([sys.executable, *map(str, words)], stdout=file, stderr=subprocess.STDOUT)
        self.family = [self.process]

    def until(self, path: Path, rows: int) -> None:
        """Until metrics.csv has `rows` lines."""
        deadline = time.monotonic() + STARTING_S
        while not (path.exists() and len(path.read_text().splitlines()) >= rows):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        self.family = [self.process, *self.process.children(recursive=True)]

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for child in self.process.children(recursive=True):
            if "fourfold.launch.train" in child.cmdline():
                found[int(child.environ()["RANK"])] = child
        return found

    def ends_within(self, seconds: float) -> int:
        """The exit code of the launcher; every process it started is gone by then."""
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        assert not alive, self.log.read_text()
        return self.process.wait()

    def kill(self) -> None:
        for process in self.family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(self.family, timeout=10)


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Launched]]:
    running: list[Launched] = []

    def begin(*words: object) -> Launched:
        running.append(Launched(tmp_path / f"log{len(running)}", *words))
        return running[-1]

    yield begin
    for launched in running:
        launched.kill()


@pytest.fixture
def ranks_of(tmp_path) -> Iterator[Callable[..., list[Forked]]]:
    """Starts the ranks of a training without a launcher."""
    running: list[Forked] = []

    def begin(*words: object, num_ranks: int = 2) -> list[Forked]:
        started = forked_ranks(tmp_path / f"rank{len(running)}_", num_ranks, words)
        running.extend(started)
        return started

    yield begin
    for process in running:
        process.kill()


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("error:")]


def torchrun(*words: object) -> list[object]:
    return ["-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", TRAIN, *words]


def test_a_stopped_rank_is_named_and_the_launcher_ends(layout_file, launch, tmp_path):
    words = ["launch", layout_file(pp=2), "--out", tmp_path / "out", "--steps", 100_000, "--timeout-minutes", 0.1]
    run = launch("-m", "fourfold.launch.cli", *words)
    run.until(tmp_path / "out" / "metrics.csv", 3)
    run.ranks()[1].send_signal(signal.SIGSTOP)
    assert run.ends_within(60.0) == 1
    is_named(errors(run.log))
    assert "Traceback" not in run.log.read_text()


def test_a_stopped_rank_is_named(layout_file, ranks_of, tmp_path):
    """Under two layouts at a time: the test mostly waits."""
    runs = {}
    for name in ("z3", "async"):
        words = ["--layout", layout_file(**LAYOUTS[name]), "--out", tmp_path / name, *FOREVER, "--timeout-minutes", 0.1]
        runs[name] = ranks_of(*words)
        until_rows(tmp_path / name / "metrics.csv", 3, runs[name][0])
        runs[name][1].system.suspend()
    for first, _ in runs.values():
        assert first.wait(60.0) == 3
        is_named(first.errors())
        assert "Traceback" not in first.text()


def is_named(told: list[str]) -> None:
    (line,) = told
    assert "no progress for " in line
    assert "rank 1 does not answer, last in " in line
    assert "rank 0 in step " in line


def test_ranks_end_with_a_killed_launcher(layout_file, launch, tmp_path):
    out = tmp_path / "out"
    run = launch(*torchrun("--layout", layout_file(dp=2), "--out", out, *FOREVER))
    run.until(out / "metrics.csv", 2)
    run.process.kill()
    run.ends_within(30.0)
    (line,) = errors(run.log)
    assert "the launcher of these ranks is gone: they end, too; go on with --resume auto" in line


WAITS_FOR_ITS_LAUNCHER = """
import os, sys, time
class BeforeTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            launcher = os.getppid()
            open("importing", "w").close()
            while os.getppid() == launcher:
                time.sleep(0.05)
sys.meta_path.insert(0, BeforeTorch())
"""


def test_a_launcher_that_goes_during_imports_is_noticed(layout_file, tmp_path, monkeypatch):
    """Of any kind, torchrun's too, which leaves no word of its own number."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(WAITS_FOR_ITS_LAUNCHER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "slow"), str(ROOT / "src")]))
    monkeypatch.chdir(tmp_path)
    rank = f"{sys.executable} -m {TRAIN} --layout {layout_file()} {' '.join(map(str, FOREVER))}"
    launcher = ["sh", "-c", f"{rank} >log 2>&1 & until [ -e importing ]; do sleep 0.05; done"]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    subprocess.run(launcher, env={**os.environ, **alone, "TORCHELASTIC_RUN_ID": "none"}, check=True, timeout=60)
    deadline = time.monotonic() + STARTING_S
    while "the launcher of these ranks is gone" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)


def test_a_run_that_is_stopped_from_the_keyboard_says_so_in_a_line(layout_file, ranks_of, tmp_path):
    out = tmp_path / "out"
    ranks = ranks_of("--layout", layout_file(dp=2), "--out", out, "--quiet", *FOREVER)
    until_rows(out / "metrics.csv", 8, ranks[0])
    for rank in ranks:
        rank.system.send_signal(signal.SIGINT)
    assert [rank.wait(30.0) for rank in ranks] == [130, 130], ranks[0].text()
    assert ranks[0].text().strip().splitlines() == ["stopped: the last checkpoint is whole; go on with --resume auto"]


def test_a_folder_has_one_run_at_a_time(layout_file, ranks_of, tmp_path):
    layout, out = layout_file(), tmp_path / "out"
    words = ["--layout", layout, "--out", out]
    (first,) = ranks_of(*words, *FOREVER, num_ranks=1)
    until_rows(out / "metrics.csv", 2, first)
    before = len((out / "metrics.csv").read_text().splitlines())
    (second,) = ranks_of(*words, *FOREVER, num_ranks=1)
    assert second.wait(60.0) == 2
    (line,) = second.text().strip().splitlines()
    assert f"--out {out} is in use by another run (process {first.pid} on " in line
    assert len((out / "metrics.csv").read_text().splitlines()) > before
    first.kill()
    (third,) = ranks_of(*words, "--steps", 1, num_ranks=1)
    assert third.wait(60.0) == 0


def test_one_account_of_a_rank_that_fails(layout_file, launch, tmp_path, monkeypatch):
    """Of one that is killed, test_kills_at_each_instant.py and test_launching.py have the account."""
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "sitecustomize.py").write_text(FAIL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "failing"), str(ROOT / "src")]))
    run = launch(*torchrun("--layout", layout_file(dp=2), "--out", tmp_path / "out", "--quiet", *FOREVER))
    run.until(tmp_path / "out" / "metrics.csv", 2)
    assert run.ends_within(60.0) == 1
    log = run.log.read_text()
    assert "ArithmeticError: deliberate" in log
    assert "gloo" not in log.split("ArithmeticError: deliberate")[0], log  # the survivor's complaint comes later


FAIL = """
import os
if os.environ.get("RANK") == "1":
    def fail():
        from fourfold.launch.training import loop
        plain = loop.learning_rate_at
        def rate(step, settings):
            if step == 20:
                raise ArithmeticError("deliberate")
            return plain(step, settings)
        loop.learning_rate_at = rate
    import importlib.abc, sys
    class AfterImport(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "fourfold.launch.training.progress":  # imported after the loop
                sys.meta_path.remove(self)
                fail()
            return None
    sys.meta_path.insert(0, AfterImport())
"""


@pytest.mark.parametrize("name", ["z3", "async"])
def test_a_loss_that_is_no_number_is_one_line(layout_file, ranks_of, tmp_path, name):
    words = ["--layout", layout_file(**LAYOUTS[name]), "--out", tmp_path / "out", "--steps", 100, "--quiet"]
    first, last = ranks_of(*words, "--learning-rate", 1e20)
    told, waits = (last, first) if name == "async" else (first, last)  # of an asynchronous pipeline its end knows
    assert told.wait(STARTING_S) == 2
    assert waits.text() == ""
    (line,) = told.text().strip().splitlines()
    assert line.startswith("error: loss nan")
    assert "lower the learning rate 1e+20" in line


def by_hand(log: Path, *words: object, **environment: str) -> Forked:
    """A rank that somebody started without torchrun; it has ended."""
    run = Forked(log, TRAIN, words, **environment)
    run.wait(STARTING_S)
    return run


def test_a_one_rank_layout_under_two_tasks_is_refused(layout_file, tmp_path):
    words = ["--layout", layout_file(), "--out", tmp_path / "out", "--steps", 1]
    task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    run = by_hand(tmp_path / "log", *words, **task)
    assert run.poll() == 2
    assert run.text().strip().splitlines() == [
        "error: the layout dp1 mb1 needs 1 ranks, but 2 were started: "
        "use torchrun --nproc-per-node 1, or another layout"
    ]
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("mpiexec is not installed: pip install 'fourfold[mpi]'")
    command = [str(mpiexec), "-n", "2", sys.executable, "-m", TRAIN, *map(str, words)]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert tried.returncode == 2
    assert tried.stderr.count("needs 1 ranks, but 2 were started") == 1


def test_srun_starts_ranks_that_meet(layout_file, tmp_path):
    """srun itself is not here: its variables are."""
    words = ["--layout", layout_file(dp=2), "--out", tmp_path / "out", "--steps", 2, "--quiet"]
    shared = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        Forked(tmp_path / f"task{rank}", TRAIN, words, **shared, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in ("0", "1")
    ]
    assert [task.wait(180.0) for task in tasks] == [0, 0]
    assert len(json.loads((tmp_path / "out" / "result.json").read_text())["losses"]) == 2


def test_a_port_that_is_taken_is_told_by_the_rank_that_needs_it(layout_file, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["--layout", layout_file(dp=2), "--out", tmp_path / "out", "--steps", 1]
        task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
        run = by_hand(tmp_path / "log", *words, **task, MASTER_PORT=port)
        assert run.poll() == 2
        (line,) = run.text().strip().splitlines()
        assert line.startswith(f"error: the ranks cannot meet at 127.0.0.1, port {port}: ")
        assert "give another MASTER_PORT" in line


def meets_in_vain() -> None:
    with bounded_meeting(timeout_s=1.0):
        TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, False)


def test_a_rank_that_meets_another_program_ends(tmp_path):
    """What holds the port neither answers nor hangs up, and torch's own limit does not count."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        run = Forked(tmp_path / "log", "this", [], before=meets_in_vain, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert run.wait(STARTING_S) == 2
    assert run.errors() == [
        f"error: rank 0 has met no others at 127.0.0.1, port {port}, for 1 s: see that every rank was started, or give "
        "another MASTER_PORT"
    ]


def test_one_command_line_starts_and_goes_on(layout_file, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["--layout", layout_file(), "--out", out, "--checkpoint-every", 2, "--resume", "auto", "--quiet"]
    assert by_hand(log, *words, "--steps", 2).poll() == 0
    assert (out / "checkpoints" / "step_00000002").is_dir()
    again = by_hand(log, *words, "--steps", 4)
    assert again.poll() == 0, again.text()
    assert "note: step_00000002 was written with steps=2 (now 4)" in again.text()
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + 4
    assert len(json.loads((out / "result.json").read_text())["losses"]) == 2
    # Another seed, rate, and detail of the model that no shape shows.
    other = tmp_path / "other.toml"
    write_layout_file(other, Layout(global_batch=4, seq_len=16), load_model({**CONFIG, "rms_norm_eps": 1e-3}))
    words += ["--steps", 6, "--layout", other, "--seed", 1, "--learning-rate", 0.01]
    refused = by_hand(log, *words)
    assert refused.poll() == 2
    (line,) = refused.text().strip().splitlines()
    for told in ("seed=0 (now 1)", "learning_rate=0.003 (now 0.01)", "model.rms_norm_eps=1e-06 (now 0.001)"):
        assert told in line
    assert "add --resume-anyway" in line
    asked = by_hand(log, *words, "--resume-anyway")
    assert asked.poll() == 0, asked.text()
