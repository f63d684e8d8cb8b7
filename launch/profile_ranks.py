"""The rank entry of a profile: `torchrun ... -m fourfold.launch.profile_ranks --out cluster.toml`, on every host.

`python -m fourfold.profiling.run` is the same. profiling times a layer as training cuts it without knowing how that is
done; this file hands it the functions of fourfold.parallel that do it.
"""

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fourfold.launch.error_file import recorded
from fourfold.launch.refusal import leave, refuse
from fourfold.parallel import use_ring_attention
from fourfold.parallel.decoder import tensor_parallel
from fourfold.parallel.decoder.choice import Choice
from fourfold.parallel.decoder.compiled import BACKEND, chosen_backend, compile_layer
from fourfold.profiling.ranks import chosen_device, profile_ranks
from fourfold.profiling.settings import parse_settings
from fourfold.profiling.shapes import model_shape, read_config


class TrainingParallelism:
    """profiling's `Parallelism`, by the functions that `fourfold.parallel.parallelize` itself calls."""

    def cut_layer(self, layer: nn.Module, tp_mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
        tensor_parallel.cut_layer(layer, tp_mesh, sequence_parallel=sequence_parallel)

    def cut_ends(self, model: Any, tp_mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
        model.is_first = model.is_last = True  # a whole model is the first stage and the last one
        tensor_parallel.cut_ends(model, tp_mesh, sequence_parallel=sequence_parallel)

    def compiles_on(self, device_type: str) -> bool:
        return chosen_backend(None, device_type, Choice()) is not None

    def compile_layer(self, layer: nn.Module) -> None:
        compile_layer(layer, BACKEND)

    def put_ring_around(self, model: Any, cp_group: dist.ProcessGroup) -> None:
        use_ring_attention(model, cp_group)


@recorded
def main() -> None:
    """Profile on the ranks that torchrun started. Exit code 2 and one line for what a user got wrong."""
    # Refuse what can be refused before the ranks meet.
    try:
        settings = parse_settings()
        device = chosen_device(settings.device)
        if settings.model:
            model_shape(read_config(settings.model))
    except ValueError as error:
        refuse(error)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # A lost rank ends the others within this time, should the launcher not have ended them.
    limit = datetime.timedelta(seconds=max(120.0, 4 * settings.seconds))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=limit, device_id=device if device.type == "cuda" else None)
    try:
        profile_ranks(settings, TrainingParallelism())
    except ValueError as error:  # every rank's, or rank 0's of what an interrupted profile left
        refuse(error)
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
