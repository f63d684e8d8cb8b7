"""Training state on disk, readable under any layout, and refused where it is not what was written.

torch.distributed.checkpoint does the work: each rank writes its own part, and a reader of another layout finds its part
by name. Here is what it leaves open. A stop at any moment is safe: a checkpoint is written beside its place, read back,
and renamed when it is whole; older ones go only after that. What was damaged since is told before it is loaded. What
fails on one rank is one error on all, in one line that says which checkpoint is whole.
"""

import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from fourfold.launch.training.agreement import gathered, on_rank_0
from fourfold.launch.training.background import Background
from fourfold.launch.training.manifest import MANIFEST, Checksum, ChecksummingFileSystem, Manifest, damage
from fourfold.launch.training.undrained import make_room, other_layout
from fourfold.parallel.decoder.stage import DecoderStage

_LAYER = re.compile(r"model\.model\.layers\.(\d+)\.")
_NAME = re.compile(r"step_(\d{8})")
_LEFTOVERS = ("partial_*", "removed_*")
_RATIO = "updates_per_step"
# Names instead of positions, so that stages and shards of another layout find their part.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or not be taken; the same on every rank."""


class HasStage(Protocol):
    """A ParallelModel, or this rank's stage of an asynchronous pipeline."""

    stage: DecoderStage


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """From which checkpoint a run goes on.

    Attributes:
        choice: "no", "yes" (the newest, refused where it is damaged), "auto" (the newest whole one, from scratch where
            there is none), or the step of one, as "40" or "step_00000040".
        anyway: also where the run that wrote it had other settings.
    """

    choice: str = "no"
    anyway: bool = False

    def __post_init__(self) -> None:
        if self.choice not in ("no", "yes", "auto") and self.step is None:
            raise ValueError(f"--resume {self.choice}: give auto, the step of a checkpoint, or nothing for the newest")

    @property
    def step(self) -> int | None:
        """The step that is asked for by number."""
        digits = self.choice.removeprefix("step_")
        return int(digits) if digits.isdecimal() and len(digits) <= 8 else None

    def __bool__(self) -> bool:
        return self.choice != "no"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """The checkpoints of one run: a folder of `step_XXXXXXXX`.

    Attributes:
        settings: of this run, flat; written with each checkpoint, and compared where one is taken.
        keep: how many of the newest stay.
        background: where checkpoints are written while the training goes on; None for at once.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 2
    background: Background | None = None

    def refuse_overwriting(self) -> None:
        """Raises CheckpointError where there are checkpoints of an earlier run, which a new one would replace.

        Every rank calls; the first one looks.
        """
        found: list[Path] = on_rank_0(self._all)
        if found:
            raise CheckpointError(
                f"{self.folder} holds {found[-1].name} of an earlier run: add --resume, or give another --out"
            )

    def save(
        self,
        model: HasStage,
        optimizer: Optimizer | list[Optimizer],
        *,
        step: int,
        updates_per_step: int = 1,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write `step_XXXXXXXX`; every rank calls. It is whole on return, and of the older ones `keep - 1` are left.

        In the background, what is to be written is copied on return; it is whole after `wait`, which this calls for the
        checkpoint before.

        Args:
            updates_per_step: more than one where a step's micro-batches update one by one.
            extra: further tensors, under names that no other stage uses.
        Raises:
            CheckpointError: it could not be written (a full disk), or reads back otherwise; the older ones are left.
                In the background, that of the checkpoint before.
        Cost: each weight and optimizer state is written once over all ranks, and read once. In the background also a
            copy of this rank's part in host memory, and the time of copying.
        """
        target = self.folder / f"step_{step:08d}"
        if self.background is None:
            state = _state(model, optimizer, {"step": step, _RATIO: updates_per_step, "extra": extra or {}})
            self._write(target, step, state, None)
            return target
        self.background.wait()
        state = _state(model, optimizer, {"step": step, _RATIO: updates_per_step, "extra": extra or {}})
        copied, group = BlockingAsyncStager().stage(state), self.background.group
        self.background.start(lambda: self._write(target, step, copied, group))
        return target

    def wait(self) -> None:
        """Until nothing is being written; every rank calls. Raises CheckpointError as `save`."""
        if self.background is not None:
            self.background.wait()

    @property
    def failed(self) -> bool:
        """Whether what this rank wrote in the background has failed; the others may not know it yet."""
        return self.background is not None and self.background.failed

    def _write(self, target: Path, step: int, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        partial = self.folder / f"partial_{step:08d}"
        try:
            on_rank_0(lambda: _remove_leftovers(self.folder), group)
            files = _write(partial, state, group)
            manifest = Manifest(step=step, settings=self.settings, files=files)
            on_rank_0(lambda: _put_in_place(manifest, partial, target), group)
            on_rank_0(lambda: self._remove_others(step), group)
        except ValueError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
            raise CheckpointError(
                f"{target} could not be written: {error}; {self._advice(self._newest_whole(group))}"
            ) from None

    def load(
        self,
        model: HasStage,
        optimizer: Optimizer | list[Optimizer],
        resume: Resume,
        *,
        updates_per_step: int = 1,
        extra: dict[str, Tensor] | None = None,
    ) -> int:
        """Load the checkpoint that `resume` means into model and optimizer; every rank calls.

        Args:
            extra: tensors to fill; those that the checkpoint has not are taken out, and those for micro-batches in
                flight (undrained.py) get the size that was written.
        Returns:
            The step it was written after; 0 where "auto" has found none.
        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model, of a run with other settings, of
            one with other updates a step (their hyper-parameters and counts differ), or with micro-batches in flight
            of another layout.
        Cost: each file is read twice over all ranks, once to compare its checksum.
        """
        chosen = self._choose(resume)
        if chosen is None:
            return 0
        path, manifest = chosen
        # torch reads the names it is asked for and passes over the rest, so a deeper model would load without a word.
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        num_layers = len({match[1] for name in names if (match := _LAYER.match(name))})
        if num_layers != model.stage.num_layers:
            raise CheckpointError(f"{path} is of a model of {num_layers} layers, but this has {model.stage.num_layers}")
        self._compare_settings(path, manifest, resume)
        # The model's own tensors say which part of which shard this rank reads.
        weights, states = get_state_dict(model.stage, optimizer, options=_OPTIONS)
        extra = {} if extra is None else extra
        saved = {name.removeprefix("extra."): entry for name, entry in names.items() if name.startswith("extra.")}
        other = other_layout(saved, extra)
        if other is not None:
            raise CheckpointError(
                f"{path} has micro-batches in flight of the layout {other}: go on with that; without "
                "checkpoints_in_flight its next checkpoint is drained, which any layout can read"
            )
        for name in [name for name in extra if name not in saved]:
            del extra[name]
        make_room(extra, {name: getattr(entry, "size", ()) for name, entry in saved.items()})
        state: dict[str, Any] = {"model": weights, "optimizer": states, "step": 0, "extra": extra}
        state |= {_RATIO: 1} if _RATIO in names else {}
        try:
            load(state, checkpoint_id=path)
        except (CheckpointException, Exception) as error:
            raise CheckpointError(f"{path} does not fit this model: {failure_in_one_line(error)}") from None
        if state.get(_RATIO, 1) != updates_per_step:
            raise CheckpointError(
                f"{path} was written with {state.get(_RATIO, 1)} updates a step, and this layout makes "
                f"{updates_per_step}: keep its schedule, dp and micro_batch, or start anew"
            )
        set_state_dict(model.stage, optimizer, model_state_dict=weights, optim_state_dict=states, options=_OPTIONS)
        return int(state["step"])

    def _choose(self, resume: Resume) -> tuple[Path, Manifest] | None:
        """The checkpoint that `resume` means, verified; None where "auto" has none to choose from."""
        found: list[Path] = on_rank_0(self._all)
        if resume.step is not None:
            there, found = found, [path for path in found if _step_of(path) == resume.step]
            if not found:
                known = ", ".join(str(_step_of(path)) for path in there) or "none"
                raise CheckpointError(f"{self.folder} holds no checkpoint of step {resume.step}: it has {known}")
            for later in [path for path in there if _step_of(path) > _step_of(found[0])]:
                _tell(f"going back to {found[0].name}: {later.name} goes as soon as a new one is whole")
        if not found:
            if resume.choice == "auto":
                return None
            raise CheckpointError(f"{self.folder} holds no complete checkpoint: train without --resume first")
        damaged: list[str] = []
        for path in reversed(found):
            manifest, problem = _verified(path)
            if manifest is not None:
                for told in damaged:
                    _tell(f"{told}; going on from {path.name}")
                return path, manifest
            damaged.append(f"{path}: {problem}")
            if resume.choice != "auto":
                break
        raise CheckpointError(f"{damaged[0]}; {self._advice(self._newest_whole())}")

    def _newest_whole(self, group: dist.ProcessGroup | None = None) -> Path | None:
        """The newest checkpoint that verifies; every rank calls."""
        for path in reversed(on_rank_0(self._all, group)):
            if _verified(path, group)[0] is not None:
                return Path(path)
        return None

    @staticmethod
    def _advice(whole: Path | None) -> str:
        if whole is None:
            return "no other checkpoint is whole: start anew with another --out"
        return f"{whole.name} is whole: go on from it with --resume {_step_of(whole)}"

    def _compare_settings(self, path: Path, manifest: Manifest, resume: Resume) -> None:
        """Refuse, or with `resume.anyway` tell, what this run does otherwise than the one that wrote `path`."""
        # What rank 0 finds counts: where another rank saw it otherwise, it alone would stop.
        changed: dict[str, str] = on_rank_0(lambda: self._changed(manifest))
        refused = [told for name, told in changed.items() if name not in MAY_CHANGE]
        if refused and not resume.anyway:
            raise CheckpointError(
                f"{path} was written with {', '.join(refused)}: resume with what it was written with, "
                "or add --resume-anyway"
            )
        if changed:
            _tell(f"{path.name} was written with {', '.join(changed.values())}")

    def _changed(self, manifest: Manifest) -> dict[str, str]:
        """What this run has otherwise than the one of `manifest`, in words, by the settings' names."""
        old, new = {**_ABSENT_BEFORE, **manifest.settings}, self.settings
        changed = {name: f"{name}={old[name]!r} (now {new[name]!r})" for name in new if name in old}
        changed = {name: words for name, words in changed.items() if old[name] != new[name]}
        if "data" in changed:  # a checksum, which says nothing to a reader
            changed["data"] = "other data (files, their sizes and times, the tokenizer, the weights' sources)"
        return changed

    def _all(self) -> list[Path]:
        """Checkpoints by their names, oldest first, whole or not."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())

    def _remove_others(self, step: int) -> None:
        """All but the newest up to `step`, which has just been verified.

        What is of a later step was damaged, or left by going back to an earlier one: taken up again, it would be the
        other run that goes on.
        """
        found = self._all()
        for later in [path for path in found if _step_of(path) > step]:
            _remove(later)
        for old in [path for path in found if _step_of(path) <= step][: -self.keep]:
            _remove(old)


_ABSENT_BEFORE: Mapping[str, Any] = {"packing": False, "data_weights": []}
"""What checkpoints that say nothing of these settings were written with."""
MAY_CHANGE = ("steps",)
"""Settings that a resumed run may have otherwise without being asked to: a longer run is the same run."""


def _state(model: HasStage, optimizer: Optimizer | list[Optimizer], rest: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's part of what a checkpoint holds."""
    weights, states = get_state_dict(model.stage, optimizer, options=_OPTIONS)
    return {"model": weights, "optimizer": states, **rest}


def _write(partial: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Checksum]:
    """Write this rank's shards into `partial` and read them back; returns all ranks' checksums by file.

    Raises:
        ValueError: on every rank, where one of them failed.
    """
    writer, files = FileSystemWriter(partial), ChecksummingFileSystem()
    writer.fs = files
    problem = None
    try:
        save(state, storage_writer=writer, process_group=group)
    except (CheckpointException, OSError) as error:
        problem = files.failure or failure_in_one_line(error)
    else:
        found = damage(partial, files.written, list(files.written))
        files.failure = problem = f"{found[0]}, when it was read back" if found else None
    outcomes = gathered((files.failure, problem, files.written), group)
    for rank, (failure, _, _) in enumerate(outcomes):
        if failure is not None:  # the rank that has it says it more plainly than what torch tells the others
            raise ValueError(f"rank {rank}: {failure}")
    for _, told, _ in outcomes:
        if told is not None:
            raise ValueError(told)
    return {name: checksum for _, _, written in outcomes for name, checksum in written.items()}


def _put_in_place(manifest: Manifest, partial: Path, target: Path) -> None:
    manifest.write(partial)
    if target.exists():  # of a step that was taken again
        _remove(target)
    partial.rename(target)


def _remove(checkpoint: Path) -> None:
    """A stop in the middle leaves no half of a checkpoint under its name."""
    removed = checkpoint.with_name(f"removed_{checkpoint.name}")
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def _remove_leftovers(folder: Path) -> None:
    """What a run that was stopped in the middle of a save has left."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _LEFTOVERS:
        for left in folder.glob(pattern):
            shutil.rmtree(left)


def _verified(path: Path, group: dist.ProcessGroup | None = None) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint whose files are all as they were written, or what is wrong; every rank calls."""
    try:
        manifest: Manifest = on_rank_0(lambda: Manifest.read(path), group)
    except ValueError as error:
        return None, str(error)
    if manifest.step != _step_of(path):
        return None, f"{MANIFEST} is of step {manifest.step}"
    mine = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
    problems = [problem for rank in gathered(damage(path, manifest.files, mine), group) for problem in rank]
    return (None, ", ".join(problems[:3])) if problems else (manifest, "")


def failure_in_one_line(error: BaseException) -> str:
    """The cause that torch gathered from the ranks, in one line: of the lowest rank that has one."""
    failures = getattr(error, "failures", None)
    if failures:
        rank = min(failures)
        cause = failures[rank][0]
        return f"rank {rank}: {_first_line(cause)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _tell(words: str) -> None:
    if dist.get_rank() == 0:
        print(f"note: {words}", file=sys.stderr, flush=True)
