"""A trained decoder as a folder that transformers loads, whatever layout it was trained under.

torch.distributed.checkpoint writes what the same software reads back; this writes what everybody reads: config.json and
safetensors under the names of the whole model. No rank ever holds the model: one layer at a time is gathered from its
shards, sent to the first rank if another stage has it, and written to a file of its own.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fourfold.parallel.decoder.stage import DecoderStage

INDEX = "model.safetensors.index.json"


@torch.no_grad()
def write_pretrained(
    folder: Path, stage: DecoderStage, whole: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None = None
) -> None:
    """Write `folder` from the first rank; every rank of the mesh must call.

    Args:
        folder: made if it does not exist. It may hold a tokenizer, but no weights yet.
        stage: this rank's part, whose parameters may be cut over tp and sharded over dp and cp.
        whole: the model that it was cut from, for its config.
        dtype: that weights are stored in, and the config names; None for that of training, fp32 but for pure bf16.
    Raises:
        ValueError: on every rank, where the folder holds weights or cannot be written.
    Cost: every weight travels once to the first rank; the largest layer, whole, on each rank at a time.
    """
    is_writer = not any(mesh.get_coordinate() or ())
    writer = _Writer(folder) if is_writer else None
    num_files = stage.num_layers + 2
    for weights in gathered_parts(stage, mesh):
        if writer is not None:
            writer.add({name: value.to("cpu", dtype or value.dtype) for name, value in weights.items()}, num_files)
    if writer is not None:
        writer.finish(whole, dtype or next(stage.parameters()).dtype)
    raise_together(writer.error if writer is not None else "", mesh)


def gathered_parts(
    stage: DecoderStage, mesh: DeviceMesh, *, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Tensor]]:
    """Each part's weights, whole, by name and stage by stage, on the first rank; elsewhere empty; every rank calls.

    A part is the embedding, a layer, or the norm with the head.

    Args:
        wanted: of a parameter's name, whether it is gathered.
    Cost: each wanted weight travels once to the first rank.
    """
    group, num_stages = mesh.get_group("pp"), mesh["pp"].size()
    position = mesh.get_local_rank("pp")
    # Of each stage one rank sends: the others have the same weights, or gave their parts of them to it.
    sends = all(mesh.get_local_rank(axis) == 0 for axis in ("dp", "cp", "tp"))
    for sender in range(num_stages):
        parts = _parts(stage, wanted) if sender == position else []
        count = torch.tensor(len(parts), device=_device_of(stage))
        if sender and sends:
            _pass_to_first(count, sender, position, group)
        for index in range(int(count)):
            weights = {name: _whole_tensor(value) for name, value in parts[index].items()} if parts else {}
            if sender and sends:
                weights = _send_part(weights, sender, position, group, _device_of(stage))
            yield weights if position == 0 and sends else {}


def _parts(stage: DecoderStage, wanted: Callable[[str], bool]) -> list[dict[str, nn.Parameter]]:
    """This stage's parameters part by part, by their names in the whole model."""
    tied = bool(stage.config.tie_word_embeddings)
    named: dict[str, dict[str, nn.Parameter]] = {}
    for name, part in stage.named_parts():
        every = {f"{name}.{path}": parameter for path, parameter in part.named_parameters()}
        own = {path: parameter for path, parameter in every.items() if wanted(path)}
        elsewhere = name == "lm_head" or (name == "model.embed_tokens" and not stage.is_first)
        if own and not (tied and elsewhere):  # the first stage's embedding again
            named[name] = own
    first = [named.pop("model.embed_tokens")] if "model.embed_tokens" in named else []
    last = named.pop("model.norm", {}) | named.pop("lm_head", {})
    return [*first, *named.values(), *([last] if last else [])]


def _whole_tensor(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().contiguous()


def _device_of(stage: DecoderStage) -> torch.device:
    return next(stage.parameters()).device


def _pass_to_first(value: Tensor, sender: int, position: int, group: dist.ProcessGroup) -> None:
    """From stage `sender` to stage 0, in place; other stages pass by."""
    if position == sender:
        dist.send(value, group=group, group_dst=0)
    elif position == 0:
        dist.recv(value, group=group, group_src=sender)


def _send_part(
    weights: dict[str, Tensor], sender: int, position: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """One part's weights from stage `sender`, on stage 0."""
    if position == sender:
        shapes = [(name, tuple(value.shape), value.dtype) for name, value in weights.items()]
        dist.send_object_list([shapes], group=group, group_dst=0)
    elif position == 0:
        announced: list[Any] = [None]
        dist.recv_object_list(announced, group=group, group_src=sender)
        weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in announced[0]}
    for value in weights.values():
        _pass_to_first(value, sender, position, group)
    return weights


class _Writer:
    """Files of a folder. What goes wrong is kept until every rank can be told, since they wait for the next part."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.error = folder, ""
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
            if there or (folder / INDEX).exists():
                self.error = f"{folder} holds weights already ({(there or [INDEX])[0]}): give another folder"
        except OSError as error:
            self.error = f"{folder} cannot be written ({error.strerror}): give another folder"

    def add(self, weights: dict[str, Tensor], num_files: int) -> None:
        """One more file."""
        if self.error:
            return
        number = len(set(self._weight_map.values())) + 1
        name = f"model-{number:05}-of-{num_files:05}.safetensors"
        try:
            save_file(weights, self.folder / f"{name}.partial", metadata={"format": "pt"})
            os.replace(self.folder / f"{name}.partial", self.folder / name)
        except Exception as error:  # safetensors has its own kinds; all of them end the saving
            self.error = f"{self.folder / name} cannot be written ({error}): free space, or give another folder"
            return
        self._weight_map |= dict.fromkeys(weights, name)
        self._total_bytes += sum(value.numel() * value.element_size() for value in weights.values())

    def finish(self, whole: nn.Module, dtype: torch.dtype) -> None:
        """Config, and last the index: without it a folder does not load."""
        if self.error:
            return
        model = cast(Any, whole)
        config = type(model.config).from_dict(model.config.to_dict())
        config.dtype = dtype
        config.architectures = [type(model).__name__]
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._weight_map}
        try:
            config.save_pretrained(self.folder)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(self.folder)
            (self.folder / f"{INDEX}.partial").write_text(json.dumps(index, indent=2) + "\n")
            os.replace(self.folder / f"{INDEX}.partial", self.folder / INDEX)
        except OSError as error:
            self.error = f"{self.folder} cannot be written ({error.strerror}): free space, or give another folder"


def raise_together(error: str, mesh: DeviceMesh) -> None:
    """ValueError on every rank of the mesh, with the writer's words; returns where there are none."""
    said: list[Any] = [error]
    for axis in ("tp", "cp", "pp", "dp"):  # from the first rank along one axis after the other, so to all
        if mesh[axis].size() > 1:
            dist.broadcast_object_list(said, group=mesh.get_group(axis), group_src=0)
    if said[0]:
        raise ValueError(said[0])
