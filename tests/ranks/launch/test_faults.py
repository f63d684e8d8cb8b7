"""What can happen to a run from outside: each ends in bounded time, in one clear line, and leaves what was saved."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.tiny_config import CONFIG

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


class Started:
    """A run in a process of its own, its ranks, and what it says."""

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
def start(tmp_path) -> Iterator[Callable[..., Started]]:
    running: list[Started] = []

    def begin(*words: object) -> Started:
        running.append(Started(tmp_path / f"log{len(running)}", *words))
        return running[-1]

    yield begin
    for started in running:
        started.kill()


def torchrun(*words: object) -> list[object]:
    return ["-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "fourfold.launch.train", *words]


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_a_stopped_rank_is_named_and_the_run_ends(layout_file, start, tmp_path, fields):
    words = ["launch", layout_file(**fields), "--out", tmp_path / "out", "--steps", 100_000, "--timeout-minutes", 0.2]
    run = start("-m", "fourfold.launch.cli", *words)
    run.until(tmp_path / "out" / "metrics.csv", 3)
    run.ranks()[1].send_signal(signal.SIGSTOP)
    assert run.ends_within(60.0) == 1
    (line,) = errors(run.log)
    assert "no progress for " in line
    assert "rank 1 does not answer, last in " in line
    assert "rank 0 in step " in line
    assert "Traceback" not in run.log.read_text()


@pytest.mark.parametrize("module", ["fourfold.launch.cli", "torch.distributed.run"])
def test_ranks_end_with_a_killed_launcher(layout_file, start, tmp_path, module):
    layout, out = layout_file(dp=2), tmp_path / "out"
    words = ["-m", module, "launch", layout, "--out", out, "--steps", 100_000]
    run = start(*(words if module == "fourfold.launch.cli" else torchrun("--layout", layout, "--out", out, *FOREVER)))
    run.until(out / "metrics.csv", 2)
    run.process.kill()
    run.ends_within(30.0)
    (line,) = errors(run.log)
    assert "the launcher of these ranks is gone: they end, too; go on with --resume auto" in line


def test_a_folder_has_one_run_at_a_time(layout_file, start, tmp_path):
    layout, out = layout_file(), tmp_path / "out"
    words = ["-m", "fourfold.launch.train", "--layout", layout, "--out", out, *FOREVER]
    first = start(*words)
    first.until(out / "metrics.csv", 2)
    before = len((out / "metrics.csv").read_text().splitlines())
    second = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=240)
    assert second.returncode == 2
    (line,) = second.stderr.strip().splitlines()
    assert f"--out {out} is in use by another run (process {first.process.pid} on " in line
    assert len((out / "metrics.csv").read_text().splitlines()) > before
    first.kill()
    assert subprocess.run([sys.executable, *map(str, words[:6]), "--steps", "1"], timeout=240).returncode == 0


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_one_account_of_a_rank_that_fails(layout_file, start, tmp_path, how, monkeypatch):
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "sitecustomize.py").write_text(FAIL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "failing"), str(ROOT / "src")]))
    monkeypatch.setenv("FAIL_HOW", how)
    run = start(*torchrun("--layout", layout_file(dp=2), "--out", tmp_path / "out", "--quiet", *FOREVER))
    run.until(tmp_path / "out" / "metrics.csv", 2)
    assert run.ends_within(60.0) == 1
    log = run.log.read_text()
    told = [line for line in log.splitlines() if "ArithmeticError: deliberate" in line or "SIGKILL" in line]
    assert told, log
    assert "gloo" not in log.split(told[0])[0], log  # the survivor's complaint does not come before what matters


FAIL = """
import os, signal, threading, time
if os.environ.get("RANK") == "1":
    def fail():
        from fourfold.launch.training import loop
        plain = loop.learning_rate_at
        def rate(step, settings):
            if step == 20:
                if os.environ["FAIL_HOW"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
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


@pytest.mark.parametrize("fields", [LAYOUTS["z3"], LAYOUTS["async"]], ids=["z3", "async"])
def test_a_loss_that_is_no_number_is_one_line(layout_file, start, tmp_path, fields):
    words = ["--out", tmp_path / "out", "--steps", 100, "--learning-rate", 1e20, "--quiet"]
    run = start("-m", "fourfold.launch.cli", "launch", layout_file(**fields), *words)
    assert run.ends_within(STARTING_S) == 2
    (line,) = run.log.read_text().strip().splitlines()
    assert line.startswith("error: loss nan")
    assert "lower the learning rate 1e+20" in line


def by_hand(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fourfold.launch.train", *map(str, words)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240)


def test_a_one_rank_layout_under_two_tasks_is_refused(layout_file, tmp_path):
    words = ["--layout", layout_file(), "--out", tmp_path / "out", "--steps", 1]
    run = by_hand(*words, SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_LOCALID="0", SLURM_JOB_ID="7")
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "error: the layout dp1 mb1 needs 1 ranks, but 2 were started: "
        "use torchrun --nproc-per-node 1, or another layout"
    ]
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("mpiexec is not installed: pip install 'fourfold[mpi]'")
    command = [str(mpiexec), "-n", "2", sys.executable, "-m", "fourfold.launch.train", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 2
    assert run.stderr.count("needs 1 ranks, but 2 were started") == 1


def test_srun_starts_ranks_that_meet(layout_file, tmp_path):
    """srun itself is not here: its variables are."""
    words = ["--layout", layout_file(dp=2), "--out", tmp_path / "out", "--steps", 2, "--quiet"]
    command = [sys.executable, "-m", "fourfold.launch.train", *map(str, words)]
    shared = {**os.environ, "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(command, env=shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ("0", "1")
    ]
    assert [task.wait(timeout=180) for task in tasks] == [0, 0]
    assert len(json.loads((tmp_path / "out" / "result.json").read_text())["losses"]) == 2


def test_one_command_line_starts_and_goes_on(layout_file, tmp_path):
    out = tmp_path / "out"
    words = ["--layout", layout_file(), "--out", out, "--checkpoint-every", 2, "--resume", "auto", "--quiet"]
    assert by_hand(*words, "--steps", 2).returncode == 0
    assert (out / "checkpoints" / "step_00000002").is_dir()
    again = by_hand(*words, "--steps", 4)
    assert again.returncode == 0, again.stderr
    assert "note: step_00000002 was written with steps=2 (now 4)" in again.stderr
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + 4
    assert len(json.loads((out / "result.json").read_text())["losses"]) == 2
    # Another seed, rate, and detail of the model that no shape shows.
    other = tmp_path / "other.toml"
    write_layout_file(other, Layout(global_batch=4, seq_len=16), load_model({**CONFIG, "rms_norm_eps": 1e-3}))
    words += ["--steps", 6, "--layout", other, "--seed", 1, "--learning-rate", 0.01]
    refused = by_hand(*words)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    for told in ("seed=0 (now 1)", "learning_rate=0.003 (now 0.01)", "model.rms_norm_eps=1e-06 (now 0.001)"):
        assert told in line
    assert "add --resume-anyway" in line
    asked = by_hand(*words, "--resume-anyway")
    assert asked.returncode == 0, asked.stderr
