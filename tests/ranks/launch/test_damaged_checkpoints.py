"""What can happen to a checkpoint is told in one line, the same on every rank, that names a whole one."""

import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.one_loss import tiny_model

from fourfold.launch.training import checkpoints
from fourfold.launch.training.async_loop import AsynchronousModel, train_asynchronously
from fourfold.launch.training.background import Background
from fourfold.launch.training.checkpoints import CheckpointError, Checkpoints, Resume
from fourfold.launch.training.loop import TrainingRun, train
from fourfold.launch.training.manifest import MANIFEST
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.settings import TrainSettings
from fourfold.layouts.inputs.layout import Layout
from fourfold.parallel import init_mesh, parallelize

TEXT = torch.randint(64, (2, 4000), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
SETTINGS = TrainSettings(steps=4, warmup_steps=2, held_out_batches=0, checkpoint_every=2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "z0": {"dp": 2},
    "z3": {"dp": 2, "zero_stage": 3},
    "pp": {"pp": 2},
    "tp": {"tp": 2},
    "async": {"pp": 2, "schedule": "lockstep"},
}


def trained(fields: dict[str, Any], checkpoints: Checkpoints, resume: Resume, **sizes: Any) -> list[float]:
    """The losses of a training to step 4, from scratch or resumed."""
    layout = Layout(global_batch=4, seq_len=24, micro_batch=1, **fields)
    mesh = init_mesh(dp=layout.dp, pp=layout.pp, tp=layout.tp, device_type="cpu")
    kept = TrainingRun(gauge=MemoryGauge(torch.device("cpu")), checkpoints=checkpoints, resume=resume)
    with kept.gauge:
        model = tiny_model(num_hidden_layers=2, **sizes)
        if layout.asynchronous:
            late = AsynchronousModel(model, layout, mesh, SETTINGS)
            result = train_asynchronously(late, (TEXT[0], TEXT[1]), kept)
        else:
            plain = parallelize(model, mesh, micro_batch=1, zero_stage=layout.zero_stage)
            result = train(plain, layout, (TEXT[0], TEXT[1]), SETTINGS, kept)
    return [record.loss for record in result.records]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def swap(path: Path) -> None:
    """The file of the same name of the other checkpoint."""
    shutil.copyfile(path.parent.parent / "step_00000002" / path.name, path)


KINDS: dict[str, Callable[[Path], None]] = {
    "flip": flip, "truncate": truncate, "zero": zero, "delete": Path.unlink, "swap": swap,
}  # fmt: skip
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", MANIFEST)


def told_of(kind: str, name: str) -> str:
    """What a damage is told as."""
    if kind == "delete":
        return f"{name} is missing"
    if name == MANIFEST:
        return "manifest.json is of step 2; " if kind == "swap" else "manifest.json is damaged; "
    return f"{name} has " if kind == "truncate" else f"{name} holds other bytes than were written; "


def on_rank_0(action: Callable[[], object]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def damaged_one_by_one(fields: dict[str, Any], folder: str) -> dict[str, Any]:
    """What each damage to the newest checkpoint is told as, and what "auto" and a step by number make of it."""
    root, told = Path(folder), {}
    whole = Checkpoints(folder=root / "whole")
    told["losses"] = trained(fields, whole, Resume())
    copy = Checkpoints(folder=root / "copy")
    for kind, damage in KINDS.items():
        for name in FILES:
            on_rank_0(partial(shutil.copytree, whole.folder, copy.folder))
            on_rank_0(partial(damage, copy.folder / "step_00000004" / name))
            with pytest.raises(CheckpointError) as error:
                copy.load(UNUSED, [], Resume(choice="yes"))
            told[f"{kind} {name}"] = str(error.value)
            on_rank_0(partial(shutil.rmtree, copy.folder))
    on_rank_0(partial(shutil.copytree, whole.folder, copy.folder))
    on_rank_0(lambda: flip(whole.folder / "step_00000004" / "__0_0.distcp"))
    told["auto"] = trained(fields, whole, Resume(choice="auto"))
    on_rank_0(lambda: flip(copy.folder / "step_00000004" / "__1_0.distcp"))
    told["by number"] = trained(fields, copy, Resume(choice="2"))
    on_rank_0(lambda: flip(copy.folder / "step_00000004" / "__1_0.distcp"))
    on_rank_0(lambda: shutil.rmtree(copy.folder / "step_00000002"))
    with pytest.raises(CheckpointError) as error:
        trained(fields, copy, Resume(choice="auto"))
    told["none"] = str(error.value)
    return told


UNUSED: Any = None
"""A model that nothing is loaded into: a damaged checkpoint is told before the model is looked at."""


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_damage_is_named_and_an_older_whole_checkpoint_taken(ranks, tmp_path, fields):
    first, second = ranks(2)(damaged_one_by_one, fields, str(tmp_path))
    assert first == second
    for kind in KINDS:
        for name in FILES:
            told = first[f"{kind} {name}"]
            assert f"step_00000004: {told_of(kind, name)}" in told
            assert told.endswith("; step_00000002 is whole: go on from it with --resume 2")
            assert "\n" not in told
    assert first["none"].endswith("; no other checkpoint is whole: start anew with another --out")
    assert first["auto"] == first["by number"] == first["losses"][2:]  # to the bit: the same layout
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["step_00000002", "step_00000004"]


def in_background() -> Background:
    return Background(timeout_s=60.0)


def on_a_full_disk(fields: dict[str, Any], folder: str, later: bool) -> str:
    """Rank 1 may write files of 4 KiB only, from the second checkpoint on."""
    checkpoints = Checkpoints(folder=Path(folder), background=in_background() if later else None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    plain = Checkpoints.save

    def save(self: Checkpoints, *arguments: Any, step: int, **options: Any) -> Path:
        if step == 4 and dist.get_rank() == 1:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return plain(self, *arguments, step=step, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(CheckpointError) as error:
            trained(fields, checkpoints, Resume())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(error.value)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_a_full_disk_leaves_the_last_checkpoint(ranks, tmp_path, fields, later):
    first, second = ranks(2)(on_a_full_disk, fields, str(tmp_path), later)
    assert first == second
    assert first.endswith(
        "step_00000004 could not be written: rank 1: File too large; "
        "step_00000002 is whole: go on from it with --resume 2"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def resumed_otherwise(fields: dict[str, Any], folder: str) -> list[str]:
    root = Path(folder)
    trained(
        fields, Checkpoints(folder=root, settings={"seed": 0, "model.num_attention_heads": 4, "steps": 3}), Resume()
    )
    other = Checkpoints(folder=root, settings={"seed": 1, "model.num_attention_heads": 2, "steps": 4, "new": 1})
    longer = Checkpoints(folder=root, settings={"seed": 0, "model.num_attention_heads": 4, "steps": 5})
    told = []
    for written, resume, sizes in (
        (other, Resume(choice="2"), {}),
        (other, Resume(choice="2", anyway=True), {}),
        (longer, Resume(choice="2"), {}),
        (other, Resume(choice="2", anyway=True), {"intermediate_size": 80}),
    ):
        try:
            told.append(str(len(trained(fields, written, resume, **sizes))))
        except CheckpointError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("fields", [LAYOUTS["z3"], LAYOUTS["async"]], ids=["z3", "async"])
def test_other_settings_are_told_and_refused_unless_asked_for(ranks, tmp_path, fields):
    first, second = ranks(2)(resumed_otherwise, fields, str(tmp_path))
    assert first == second
    refused, anyway, longer, other_shapes = first
    assert "step_00000002 was written with seed=0 (now 1), model.num_attention_heads=4 (now 2)" in refused
    assert "add --resume-anyway" in refused
    assert anyway == longer == "2"
    assert "step_00000002 does not fit this model: rank" in other_shapes
    assert "\n" not in other_shapes


def test_nothing_is_pruned_before_its_successor_was_read_back(ranks, tmp_path):
    with pytest.raises(
        AssertionError, match=r"__0_0\.distcp holds other bytes than were written, when it was read back"
    ):
        ranks(2)(on_a_disk_that_forgets, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def on_a_disk_that_forgets(folder: str) -> None:
    plain = checkpoints.damage

    def damage(place: Path, *arguments: Any) -> list[str]:
        if place.name == "partial_00000004" and dist.get_rank() == 0:
            flip(place / "__0_0.distcp")
        return plain(place, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "damage", damage)
        trained({"dp": 2}, Checkpoints(folder=Path(folder), keep=1), Resume())


def written_later(fields: dict[str, Any], folder: str) -> tuple[list[float], list[float]]:
    """Losses with checkpoints in the background, and of going on from the first of them."""
    kept = Checkpoints(folder=Path(folder), background=in_background())
    losses = trained(fields, kept, Resume())
    return losses, trained(fields, kept, Resume(choice="2"))


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_a_checkpoint_in_the_background_holds_the_step_it_was_taken_at(ranks, tmp_path, fields):
    at_once = ranks(2)(trained, fields, Checkpoints(folder=tmp_path / "at_once"), Resume())[0]
    for losses, again in ranks(2)(written_later, fields, str(tmp_path / "later")):
        assert losses == at_once
        assert again == at_once[2:]
    for step in ("step_00000002", "step_00000004"):
        files = [{path.name for path in (tmp_path / kind / step).iterdir()} for kind in ("at_once", "later")]
        assert files[0] == files[1]


def failing_in_the_background(folder: str) -> tuple[int, str]:
    """Rank 1 cannot write the one checkpoint that is asked for: at which step this rank ends, and what it says."""
    layout = Layout(global_batch=4, seq_len=24, micro_batch=1, dp=2)
    settings = TrainSettings(steps=400, warmup_steps=2, held_out_batches=0, checkpoint_every=1)
    plain, slow = Checkpoints.save, checkpoints.damage
    last = [0]

    def save(self: Checkpoints, *arguments: Any, step: int, **options: Any) -> Any:
        return plain(self, *arguments, step=step, **options) if step == 3 else None

    def damage(*arguments: Any) -> list[str]:
        time.sleep(0.2 * (1 + dist.get_rank()))  # some steps later, and not on all ranks at once
        return ["__1_0.distcp is missing"] if dist.get_rank() == 1 else slow(*arguments)

    kept = TrainingRun(
        gauge=MemoryGauge(torch.device("cpu")),
        checkpoints=Checkpoints(folder=Path(folder), background=in_background()),
        on_step=lambda record: last.__setitem__(0, record.step),
    )
    with pytest.MonkeyPatch.context() as patch, kept.gauge:
        patch.setattr(Checkpoints, "save", save)
        patch.setattr(checkpoints, "damage", damage)
        model = parallelize(tiny_model(num_hidden_layers=2), init_mesh(dp=2, device_type="cpu"), micro_batch=1)
        with pytest.raises(CheckpointError) as error:
            train(model, layout, (TEXT[0], TEXT[1]), settings, kept)
    return last[0], str(error.value)


def test_a_failure_in_the_background_ends_all_ranks_at_one_step(ranks, tmp_path):
    first, second = ranks(2)(failing_in_the_background, str(tmp_path))
    assert first == second
    step, told = first
    assert 3 <= step < 399
    assert "step_00000003 could not be written: rank 1: __1_0.distcp is missing, when it was read back" in told
    assert not list(tmp_path.iterdir())


def gone_back(folder: str) -> list[str]:
    """What is there after a run to step 4 with three kept, then one from step 2 that ends at step 3."""
    kept = Checkpoints(folder=Path(folder), keep=3)
    trained({"dp": 2}, kept, Resume())
    on_rank_0(lambda: (kept.folder / "step_00000004").rename(kept.folder / "step_00000009"))
    with pytest.raises(CheckpointError) as renamed:
        trained({"dp": 2}, kept, Resume(choice="yes"))
    on_rank_0(lambda: (kept.folder / "step_00000009").rename(kept.folder / "step_00000004"))
    with pytest.raises(CheckpointError) as absent:
        trained({"dp": 2}, kept, Resume(choice="3"))
    layout = Layout(global_batch=4, seq_len=24, micro_batch=1, dp=2)
    settings = TrainSettings(steps=3, warmup_steps=2, held_out_batches=0, checkpoint_every=3)
    with MemoryGauge(torch.device("cpu")) as gauge:
        run = TrainingRun(gauge=gauge, checkpoints=kept, resume=Resume(choice="2"))
        model = parallelize(tiny_model(num_hidden_layers=2), init_mesh(dp=2, device_type="cpu"), micro_batch=1)
        train(model, layout, (TEXT[0], TEXT[1]), settings, run)
    return [str(renamed.value), str(absent.value), *sorted(path.name for path in kept.folder.iterdir())]


def test_going_back_leaves_the_other_run(ranks, tmp_path):
    """Kept, its later checkpoints would be the newest ones: those of the new run would go first, and `auto` err."""
    first, second = ranks(2)(gone_back, str(tmp_path))
    assert first == second
    renamed, absent, *left = first
    assert "step_00000009: manifest.json is of step 4; step_00000002 is whole" in renamed
    assert absent.endswith("holds no checkpoint of step 3: it has 2, 4")
    assert left == ["step_00000002", "step_00000003"]


def seen_otherwise(folder: str) -> str:
    """Rank 1 alone finds other settings than the checkpoint's (a clock or a file system that differs)."""
    trained({"dp": 2}, Checkpoints(folder=Path(folder), settings={"data": "one"}), Resume())
    found = Checkpoints(folder=Path(folder), settings={"data": "one" if dist.get_rank() == 0 else "other"})
    agreed = trained({"dp": 2}, found, Resume(choice="2"))
    with pytest.raises(CheckpointError) as error:
        trained({"dp": 2}, Checkpoints(folder=Path(folder), settings={"data": "other"}), Resume(choice="2"))
    return f"{len(agreed)} {error.value}"


def test_one_rank_decides_whether_settings_are_the_same(ranks, tmp_path):
    first, second = ranks(2)(seen_otherwise, str(tmp_path))
    assert first == second
    assert first.startswith("2 ")
    assert "was written with other data (files, their sizes and times, the tokenizer" in first


def test_which_checkpoint_is_meant():
    assert [bool(Resume(choice=choice)) for choice in ("no", "yes", "auto", "7")] == [False, True, True, True]
    assert Resume(choice="step_00000040").step == Resume(choice="40").step == 40
    for senseless in ("maybe", "-3", "step_x", ""):
        with pytest.raises(ValueError, match="give auto, the step of a checkpoint"):
            Resume(choice=senseless)
