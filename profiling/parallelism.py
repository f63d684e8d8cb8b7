"""What a profile is given to time layers as training cuts them; fourfold.launch.profile_ranks gives it."""

from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


class Parallelism(Protocol):
    """The ways in which training spreads a layer over ranks. Each changes a transformers model in place."""

    def cut_layer(self, layer: nn.Module, tp_mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
        """Replace a decoder layer's parameters by DTensors on `tp_mesh`; every rank of it calls.

        With `sequence_parallel` its input and output are this rank's tp-th of the tokens.
        """

    def cut_ends(self, model: Any, tp_mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
        """The same for embedding, last norm and head; logits leave as this rank's part of the vocabulary."""

    def compiles_on(self, device_type: str) -> bool:
        """Whether training compiles the layers of one rank by itself, as this rank sees it."""

    def compile_layer(self, layer: nn.Module) -> None:
        """Let calls of `layer` run compiled, as training does."""

    def put_ring_around(self, model: Any, cp_group: dist.ProcessGroup) -> None:
        """Make the attention of `model` a ring's over `cp_group`, which takes `ring_seq_len` with every call."""
