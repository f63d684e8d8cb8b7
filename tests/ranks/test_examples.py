"""Every script of examples/ runs as its first lines say, in at most 40 lines, and reaches one process's losses."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.training_process import Forked, forked_ranks

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


LAUNCHED = ("accelerate_ring",)
"""Started as a user would, by accelerate; the others' ranks come from the fork server, and not from torchrun."""


@cache
def run(command: str) -> str:
    """What the command prints, run from the root with the interpreter of the tests."""
    words = shlex.split(command)
    script = ROOT / words[-1]
    if script.stem in LAUNCHED:
        assert words[:2] == ["accelerate", "launch"], command
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *words[2:]],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result.stdout
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        if words[0] == "python":
            started = [Forked(log, str(script), [])]
        else:
            assert words[:2] == ["torchrun", "--nproc-per-node"], command
            started = forked_ranks(log, int(words[2]), [], module=str(script))
        for rank in started:
            assert rank.wait(280.0) == 0, f"{command}\n{rank.text()}"
        return "".join(rank.text() for rank in started)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example(script):
    text = script.read_text()
    for library in set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    assert len(text.splitlines()) <= 40
    commands = re.findall(r"^    ((?:torchrun|python|accelerate) .*)$", text, re.MULTILINE)
    assert commands, f"{script.name} does not say how it is run"
    printed = run(commands[0])
    assert re.search(r"loss \d+\.\d+", printed), printed
    for error in re.findall(r"largest relative error of a gradient (\S+)", printed):
        assert float(error) < 2e-6  # fp32 rounding, as in the tests of each system
    for difference in re.findall(r"largest difference of a loss (\S+)", printed):
        assert float(difference) < 1e-5  # of losses of about 4, after a few fp32 updates
    streamed = re.findall(r"layers streamed (\d+)", printed)
    assert all(int(layers) >= 2 for layers in streamed), printed  # a model of two layers has streamed at least once
    assert bool(streamed) == ("streamed_layers" in text), printed


@pytest.mark.parametrize("name", ["parallelize", "loop"])
def test_the_mesh_does_not_change_the_losses(name):
    commands = (f"torchrun --nproc-per-node 2 examples/{name}.py", f"python examples/{name}.py")
    losses = [[float(loss) for loss in re.findall(r"loss (\S+)", run(command))] for command in commands]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # printed to 1e-4
