"""Every command of the README runs as it stands there; those that `make` starts are .ci/run's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_config import CONFIG
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if re.match(r"(layout-advisor|torchrun|mpiexec|make|python) ", line)
]


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def tiny_llama() -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}))


def test_the_readme_has_commands():
    assert {"make run", "make test"} < set(COMMANDS)
    assert any(command.startswith("torchrun") for command in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make")])
def test_command(command, tmp_path):
    words = shlex.split(command)
    bin_folder = Path(sys.executable).parent
    if words[0] == "mpiexec" and not (bin_folder / "mpiexec").exists():
        pytest.skip("mpiexec is not installed: pip install 'fourfold[mpi]'")
    if words[0] == "layout-advisor" and not (bin_folder / words[0]).exists():  # run from the source tree
        words[:1] = [sys.executable, "-m", "fourfold.launch.cli"]
    (tmp_path / "run").mkdir()
    write_layout_file(tmp_path / "run" / "layout.toml", Layout(dp=2, global_batch=4, seq_len=32), load_model(CONFIG))
    environment = os.environ | {
        "PATH": os.pathsep.join([str(bin_folder), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr


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
