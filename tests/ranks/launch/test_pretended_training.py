"""A training on two CUDA devices that are only pretended: each rank on its own, NCCL's ways, the CPU's losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.pretended_cuda import pretended
from support.pretended_library import only_pretended
from support.tiny_config import CONFIG
from support.training_process import forked_ranks

from fourfold.launch.runs import read_result
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model

pytestmark = only_pretended
KEPT: list[Any] = []


def on_two_devices() -> None:
    """To the end of this process."""
    KEPT.append(pretended(devices=2))
    KEPT[-1].__enter__()


def trained(folder: Path, before: Callable[[], None] | None) -> dict[str, Any]:
    folder.mkdir()
    layout = Layout(global_batch=4, seq_len=32, pp=2, micro_batch=1, precision="fp32")
    write_layout_file(folder / "layout.toml", layout, load_model(CONFIG))
    words = ["--layout", folder / "layout.toml", "--out", folder / "out", "--steps", 2, "--quiet"]
    more = ["--held-out-batches", 1, "--evaluate-every", 1, "--checkpoint-every", 2]
    for rank in forked_ranks(folder / "rank", 2, [*words, *more], before=before):
        assert rank.wait(120.0) == 0, rank.text()
    return read_result(folder / "out")


def test_ranks_train_on_devices_of_their_own(tmp_path):
    there, here = trained(tmp_path / "cuda", on_two_devices), trained(tmp_path / "cpu", None)
    assert (there["device"], here["device"]) == ("cuda", "cpu")
    # fp32, and operators in another order: a few roundings.
    assert there["losses"] == pytest.approx(here["losses"], rel=1e-5)
    assert there["heldout_loss"] == pytest.approx(here["heldout_loss"], rel=1e-5)
    assert there["reserved_bytes"] >= there["peak_bytes"] > 0
