"""kill -9 of a rank at every instant of a step: the others end, what was saved is whole, and going on changes nothing.

The runs of one layout go at the same time: a rank that lost another mostly waits.
"""

import csv
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.tiny_config import CONFIG
from support.training_process import Forked, forked_ranks, until_rows

from fourfold.launch.training.manifest import Manifest, damage
from fourfold.layouts.inputs.layout import Layout, write_layout_file
from fourfold.layouts.inputs.model import load_model

ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = {
    "z3": {"dp": 2, "zero_stage": 3},
    "pp": {"pp": 2},
    "async": {"pp": 2, "schedule": "lockstep"},
}
# Every instant once, and those that a layout does in a way of its own there.
INSTANTS = {
    "z3": ["optimizer", "write", "prune", "write in the background"],
    "pp": ["backward", "rename"],
    "async": ["forward", "write"],
}
# Rank 0 prunes and renames, and each rank writes its own shards.
KILLED = {"forward": 1, "backward": 0, "optimizer": 1, "write": 1, "rename": 0, "prune": 0} | {
    "write in the background": 1
}

LATER = " in the background"


def dies_at(instant: str) -> None:
    """Make this process kill itself at `instant`, of the step or the checkpoint after step 4's was saved."""
    if os.environ["RANK"] != str(KILLED[instant]):
        return
    instant = instant.removesuffix(LATER)
    import torch

    from fourfold.launch.training import checkpoints, manifest
    from fourfold.parallel.decoder.stage import DecoderStage

    saved = {"now": False}
    place = {
        "forward": (DecoderStage, "forward"),
        "backward": (torch.autograd, "backward"),
        "optimizer": (torch.optim.AdamW, "step"),
        "write": (manifest._ChecksummingStream, "write"),
        "rename": (checkpoints, "_put_in_place"),
        "prune": (checkpoints.shutil, "rmtree"),
    }[instant]
    plain, plain_save = getattr(*place), checkpoints.Checkpoints.save

    def dying(*arguments: Any, **options: Any) -> Any:
        if saved["now"] and (instant != "prune" or "removed_" in str(arguments[0])):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **options)

    def save(self: Any, *arguments: Any, step: int, **options: Any) -> Any:
        self.wait()  # for what is written in the background
        if step == 6 and instant in ("write", "rename", "prune"):
            saved["now"] = True
        path = plain_save(self, *arguments, step=step, **options)
        if step == 4 and instant in ("forward", "backward", "optimizer"):
            saved["now"] = True
        return path

    setattr(*place, dying)
    checkpoints.Checkpoints.save = save  # type: ignore[method-assign]


@pytest.fixture
def words(tmp_path, monkeypatch) -> Callable[..., list[object]]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def made(fields: dict[str, Any], out: Path) -> list[object]:
        file = tmp_path / f"{out.name}.toml"  # a run that has begun may still read its own
        write_layout_file(file, Layout(global_batch=4, seq_len=16, **fields), load_model(CONFIG))
        return [
            "--layout", file, "--out", out, "--steps", 8, "--checkpoint-every", 2, "--keep-checkpoints", 2,
            "--held-out-batches", 0, "--quiet", "--resume", "auto",
        ]  # fmt: skip

    return made


def losses(out: Path) -> list[str]:
    with (out / "metrics.csv").open(newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def whole(out: Path) -> list[str]:
    """The checkpoints whose files are all as they were written."""
    found = []
    for path in sorted((out / "checkpoints").glob("step_*")):
        manifest = Manifest.read(path)
        assert damage(path, manifest.files, list(manifest.files)) == []
        found.append(path.name)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_killed_rank_ends_the_run_and_going_on_changes_nothing(words, tmp_path, name):
    fields, instants = LAYOUTS[name], INSTANTS[name]
    undisturbed = forked_ranks(tmp_path / "whole", 2, words(fields, tmp_path / "undisturbed"))
    runs = {
        instant: forked_ranks(
            tmp_path / instant,
            2,
            [*words(fields, tmp_path / f"out_{instant}"), *(["--async-checkpoints"] if LATER in instant else [])],
            before=partial(dies_at, instant),
        )
        for instant in instants
    }
    try:
        assert [rank.wait(120.0) for rank in undisturbed] == [0, 0], undisturbed[0].text()
        for instant, ranks in runs.items():
            victim, survivor = ranks[KILLED[instant]], ranks[1 - KILLED[instant]]
            assert victim.wait(120.0) == -signal.SIGKILL, victim.text()
            assert survivor.wait(60.0) == 3, survivor.text()
            (line,) = survivor.errors()
            assert f"rank {1 - KILLED[instant]} lost another rank in " in line
            assert "Traceback" not in survivor.text()
            assert "step_00000004" in whole(tmp_path / f"out_{instant}")
        for instant in instants:
            again = forked_ranks(tmp_path / f"again_{instant}", 2, words(fields, tmp_path / f"out_{instant}"))
            assert [rank.wait(120.0) for rank in again] == [0, 0], again[0].text() + again[1].text()
            assert losses(tmp_path / f"out_{instant}") == losses(tmp_path / "undisturbed")
            assert whole(tmp_path / f"out_{instant}") == ["step_00000006", "step_00000008"]
            assert not [path.name for path in (tmp_path / f"out_{instant}" / "checkpoints").glob("[pr]*")]
    finally:
        for ranks in (undisturbed, *runs.values()):
            for rank in ranks:
                rank.kill()


def test_terminated_ranks_leave_what_was_saved(words, tmp_path):
    """SIGTERM, as Slurm and systemd send it, to every rank at once."""
    out = tmp_path / "out"
    command = words(LAYOUTS["z3"], out)
    longer = [100_000 if word == 8 else word for word in command]
    ranks = forked_ranks(tmp_path / "rank", 2, longer)
    until_rows(out / "metrics.csv", 8, ranks[0])
    for rank in ranks:
        rank.system.terminate()
    assert {rank.wait(30.0) for rank in ranks} == {-signal.SIGTERM}
    assert whole(out)


def test_a_taken_port_is_one_line(words, tmp_path):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        rank = Forked(
            tmp_path / "log", "fourfold.launch.train", words(LAYOUTS["pp"], tmp_path / "out"),
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        assert rank.wait(60.0) == 2, rank.text()
    (line,) = rank.errors()
    assert f"port {port}" in line
    assert "Traceback" not in rank.text()


def test_a_launcher_that_went_while_its_rank_started_is_noticed(words, tmp_path):
    rank = Forked(
        tmp_path / "log", "fourfold.launch.train", words({}, tmp_path / "out"),
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", FOURFOLD_LAUNCHER="1",
    )  # fmt: skip
    assert rank.wait(60.0) == 3
    assert "the launcher of these ranks is gone" in rank.text()
