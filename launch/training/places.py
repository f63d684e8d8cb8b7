"""Where a training reads and writes: what would destroy something, or train on what should be held out, is refused.

Everything here is looked at before the ranks meet, not after hours of training.
"""

import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from fourfold.launch.train_options import TrainOptions
from fourfold.launch.training.agreement import gathered, on_rank_0

_EXPORTED = re.compile(r"(generation_)?config\.json|model([-\d]|of)*\.safetensors|model\.safetensors\.index\.json")
_OF_TOKENIZERS = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template).*|.*\.(model|tiktoken|bpe|jinja)"
)


def check_export(options: TrainOptions) -> None:
    """Refuse a folder for the trained model that holds something else, or cannot be written.

    An earlier export is replaced where a run goes on, and nothing else ever is.

    Raises:
        ValueError: names the folder and the mend.
    """
    if options.export is None:
        return
    export, place = Path(options.export), Path(options.export).resolve()
    for name in ("model", "tokenizer", "out"):
        other = getattr(options, name)
        if other is not None and Path(other).resolve() == place:
            raise ValueError(f"export={options.export!r} is the folder of {name}, which it would replace: give another")
    if export.exists() and options.resume == "no":
        raise ValueError(f"export={options.export!r} is there already: give another folder")
    if export.exists():
        known = [path.name for path in Path(options.tokenizer).iterdir()] if options.tokenizer is not None else []
        for path in sorted(export.iterdir()) if export.is_dir() else [export]:
            own = _EXPORTED.fullmatch(path.name) or _OF_TOKENIZERS.fullmatch(path.name) or path.name in known
            if not (path.is_file() and own and export.is_dir()):
                raise ValueError(
                    f"export={options.export!r} holds {path.name}, which no export has written: give another folder"
                )
    check_writable(place.parent, f"export={options.export!r}")


def check_writable(folder: Path, what: str) -> None:
    """Make `folder` and see that files can be written there. Raises ValueError, which begins with `what`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}: give a place that can be written") from None


def check_data(train: tuple[Path, ...], held_out: tuple[Path, ...]) -> None:
    """Refuse files that would be trained on twice, or both trained on and held out.

    Raises:
        ValueError: names the file and the mend.
    """
    counted = Counter(path.resolve() for path in train)
    twice = next((path for path in train if counted[path.resolve()] > 1), None)
    if twice is not None:
        raise ValueError(f"data has {twice} more than once: name each file once, or weigh sources with data_weights")
    both = next((path for path in held_out if path.resolve() in counted), None)
    if both is not None:
        raise ValueError(
            f"{both} is in data and in validation, which nothing is to be trained on: leave it out of data"
        )


WRITTEN = re.compile(
    r"(tokens|checkpoints|tensorboard|wandb|metrics\.csv|log\.jsonl|result\.json|\.lock|\.seen_by.*)(\.partial)?"
)
"""What a run writes in its folder."""


def outside(files: list[Path], out: str | None, word: str, key: str) -> list[Path]:
    """`files` without what a run writes in its folder while it reads them.

    Args:
        word, key: what meant the files, for the error.
    Raises:
        ValueError: all of them are such.
    """
    if out is None:
        return files
    folder = Path(out).resolve()
    kept = []
    for path in files:
        place = path.resolve()
        inside = place.relative_to(folder).parts[0] if folder in place.parents else ""
        if not WRITTEN.fullmatch(inside):
            kept.append(path)
    if files and not kept:
        raise ValueError(f"{key}={word!r} is what a run writes in out={out!r}: move the files, or give another out")
    return kept


def check_shared(folder: Path) -> None:
    """See that all ranks write to one place; every rank calls.

    Raises:
        ValueError: on every rank: some do not see what rank 0 has written. Their shards of a checkpoint would be
            missing when it is read.
    """
    mark: str = on_rank_0(lambda: _make_mark(folder))
    blind = [rank for rank, sees in enumerate(gathered((folder / mark).exists())) if not sees]
    on_rank_0(lambda: (folder / mark).unlink())
    if blind:
        raise ValueError(
            f"--out {folder}: ranks {', '.join(map(str, blind[:8]))} do not see what rank 0 writes there: "
            "give a folder on a file system that all hosts share"
        )


def _make_mark(folder: Path) -> str:
    mark = f".seen_by_{os.getpid()}_of_{dist.get_world_size()}"
    (folder / mark).write_text("")
    return mark
