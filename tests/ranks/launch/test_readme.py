"""Every command of the README and of docs/ runs as it stands there; those that `make` starts are .ci/run's.

layout-advisor runs in this process, and the ranks that it starts come from the fork server: that it starts them for
real, test_faults.py and test_training_file.py see. It measures for a second or two instead of ten.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_config import CONFIG
from support.training_process import start_forked_ranks
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from fourfold.launch.cli import app
from fourfold.launch.commands import launch, profile
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
GUIDES = sorted((ROOT / "docs").glob("*.md"))


def commands_of(text: str) -> list[str]:
    """The lines of the ```console blocks that start a program, without their comments."""
    lines = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    starts = r"(layout-advisor|torchrun|mpiexec|make|python) "
    return [line.split("  #")[0].strip() for line in lines if re.match(starts, line)]


COMMANDS = commands_of(README)
LAUNCHERS = ("torchrun", "mpiexec")
SHORT_TRAINING = """
model = "launch/data/byte-llama.json"
data = "text.txt"
layout = "dp2"
global_batch = 2
seq_len = 32
steps = 2
out = "out"
"""
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def tiny_llama() -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}))


def test_the_readme_has_commands():
    assert {"make run", "make test"} < set(COMMANDS)
    assert any(command.startswith("torchrun") for command in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("layout-advisor")])
def test_command(command, planned, run):
    run(command)


def test_launchers_train_alike(planned, run):
    """torchrun and mpiexec, started for real."""
    by_launcher = {command.split()[0]: command for command in COMMANDS if command.startswith(LAUNCHERS)}
    assert set(by_launcher) == set(LAUNCHERS)
    losses = [re.findall(r"loss (\S+)", run(command)) for command in by_launcher.values()]
    assert len(losses[0]) >= 2  # of the last step, and of what was held out
    assert losses[0] == losses[1]


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if commands_of(guide.read_text())], ids=lambda p: p.stem)
def test_a_guides_commands_one_after_the_other(guide, tmp_path, run):
    for folder in ("launch", "examples"):  # as in the root, where the guide's reader is
        (tmp_path / folder).symlink_to(ROOT / folder)
    # The training file that stands in a guide names texts and weights of its reader's; this one has its own.
    (tmp_path / "text.txt").write_text("One line of text after the other.\n" * 400)
    (tmp_path / "train.toml").write_text(SHORT_TRAINING)
    for command in commands_of(guide.read_text()):
        run(command)


@pytest.fixture
def planned(tmp_path) -> None:
    """A plan where the README's reader has one."""
    (tmp_path / "run").mkdir()
    write_layout_file(tmp_path / "run" / "layout.toml", Layout(dp=2, global_batch=4, seq_len=32), load_model(CONFIG))


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Runs a command in the test's folder and gives what it prints; it must end well."""
    bin_folder = Path(sys.executable).parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(bin_folder), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for module in (launch, profile):
        monkeypatch.setattr(module, "start_ranks", start_forked_ranks)

    def started(command: str) -> str:
        words = shlex.split(command.replace("--seconds 10", "--seconds 2"))
        if words[0] == "mpiexec" and not (bin_folder / "mpiexec").exists():
            pytest.skip("mpiexec is not installed: pip install 'fourfold[mpi]'")
        if words[0] == "layout-advisor":
            told = CliRunner().invoke(app, words[1:])
            assert told.exit_code == 0, f"{command}\n{told.output}{told.exception}"
            return told.output
        result = subprocess.run(words, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result.stdout

    return started


def readme_example() -> tuple[float, float]:
    """The README's lines in a world of one, and transformers alone, on the same batch."""
    torch.manual_seed(0)
    model = tiny_llama()
    batch = torch.arange(64).view(2, 32)
    truth = model(batch, labels=batch).loss.item()
    code = EXAMPLES[0].replace("dp=2, tp=2", "")
    names = {"model": model, "loader": [batch], "optimizer": torch.optim.SGD(model.parameters())}
    exec(code, names)
    return names["loss"].item(), truth


def test_the_example_gives_the_same_loss(ranks):
    loss, truth = ranks(1)(readme_example)[0]
    assert loss == pytest.approx(truth, rel=1e-6)


def test_the_streaming_example_gives_the_same_loss_and_gradients():
    torch.manual_seed(0)
    model = tiny_llama()
    batch = torch.arange(64).view(2, 32)
    truth = model(batch, labels=batch).loss
    truth.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    names = {"model": model, "input_ids": batch, "labels": batch}
    exec(EXAMPLES[1], names)
    assert names["loss"].item() == pytest.approx(truth.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
