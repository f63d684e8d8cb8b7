"""Weights from a Hugging Face folder into a model on its mesh, and back out into one.

torch.distributed.checkpoint reads safetensors by name and slice: a rank opens only what it keeps of a weight.
"""

import shutil
from pathlib import Path
from typing import Protocol

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from fourfold.launch.training.agreement import on_rank_0
from fourfold.launch.training.checkpoints import HasStage, failure_in_one_line


def load_pretrained(folder: Path, model: HasStage) -> None:
    """Copy the weights of `folder` into `model`, in its own dtype; every rank calls.

    Raises:
        ValueError: a weight is missing, damaged, or of another shape; the same on every rank.
    Cost: each rank reads its own slices.
    """
    weights = dict(model.stage.state_dict())
    if model.stage.config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights.pop("lm_head.weight", None)  # it is the embedding
    try:
        load(weights, storage_reader=HuggingFaceStorageReader(str(folder)))
    except (CheckpointException, Exception) as error:
        raise ValueError(f"{folder}: its weights do not fit this model: {failure_in_one_line(error)}") from None


class CanBeSaved(Protocol):
    """A ParallelModel, or an asynchronous pipeline between two runs."""

    def save_pretrained(self, folder: Path) -> None: ...


def export_model(model: CanBeSaved, folder: Path, tokenizer: Path | None) -> None:
    """Write `folder` as transformers loads it, with the tokenizer's files; every rank calls.

    An earlier export is replaced, once this one is whole.

    Raises:
        ValueError: on every rank, where it could not be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
    model.save_pretrained(partial)
    on_rank_0(lambda: _put_in_place(partial, folder, tokenizer))


def _put_in_place(partial: Path, folder: Path, tokenizer: Path | None) -> None:
    if tokenizer is not None:
        for path in tokenizer.iterdir():
            if path.is_file() and not (partial / path.name).exists() and path.suffix not in (".safetensors", ".bin"):
                shutil.copyfile(path, partial / path.name)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
