"""From a layout to a model on its mesh: checks, process groups, one warm-up step, weights."""

import gc
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import DistNetworkError
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.launch.training.async_loop import AsynchronousModel, held_out_loss_asynchronously
from fourfold.launch.training.chunks import chunks_of
from fourfold.launch.training.deepspeed_engine import deepspeed_model
from fourfold.launch.training.loop import held_out_loss
from fourfold.launch.training.memory_use import MemoryGauge
from fourfold.launch.training.optimizers import make_optimizers
from fourfold.launch.training.pretrained import load_pretrained
from fourfold.launch.training.rows import Rows
from fourfold.launch.training.settings import TrainSettings, precision_of
from fourfold.layouts.inputs.layout import Layout, check_runnable
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.parallel import ParallelModel, init_mesh, parallelize


def check_world(layout: Layout, model: ModelConfig) -> None:
    """Raises ValueError where the ranks that were started are not the layout's, or this runtime cannot run it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != layout.world_size:
        raise ValueError(
            f"the layout {layout} needs {layout.world_size} ranks, but {world_size} were started: "
            f"use torchrun --nproc-per-node {layout.world_size}, or another layout"
        )
    check_runnable(layout, model)
    if torch.cuda.is_available():
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_world_size > torch.cuda.device_count():
            raise ValueError(f"{local_world_size} ranks on this host, but {torch.cuda.device_count()} CUDA devices")


def meet(layout: Layout, *, timeout_s: float) -> DeviceMesh:
    """The layout's mesh; every rank calls.

    Args:
        timeout_s: after which a hang is told by HangWatch; torch's own limit comes later, should that not end the rank.
    Raises:
        ValueError: the port at which they meet is taken.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    limit = timedelta(seconds=2 * timeout_s + 60)
    try:
        return init_mesh(dp=layout.dp, pp=layout.pp, cp=layout.cp, tp=layout.tp, timeout=limit)
    except DistNetworkError as error:
        where, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ValueError(
            f"the ranks cannot meet at {where}, port {port}: {str(error).splitlines()[0]}; give another MASTER_PORT "
            "(torchrun --master-port), or see whether an earlier run is still there"
        ) from None


def build(
    layout: Layout, model: ModelConfig, settings: TrainSettings, mesh: DeviceMesh, pretrained: Path | None = None
) -> tuple[ParallelModel | AsynchronousModel, MemoryGauge]:
    """Build the layout's model; every rank calls.

    Args:
        pretrained: the folder of its weights; None for random ones, the same under every layout.
    Returns:
        The model, and the gauge that counts its memory from before its weights were made.
    Raises:
        ValueError: weights that do not fit the model.
    """
    if settings.engine == "deepspeed":
        gauge = MemoryGauge(torch.device(mesh.device_type))
        whole = empty_model(model.config)
        return deepspeed_model(whole, mesh, settings, layout=layout, model=model, pretrained=pretrained), gauge
    # One small step, so that what is measured afterwards is the model's own.
    _warm_up(layout, model, settings, mesh)
    gauge = MemoryGauge(torch.device(mesh.device_type))
    built = _parallel_model(layout, model.config, mesh, settings)
    if pretrained is not None:
        load_pretrained(pretrained, built)
    return built, gauge


def exported_loss(
    folder: Path, layout: Layout, settings: TrainSettings, mesh: DeviceMesh, held_out: Tensor | Rows
) -> float:
    """The held-out loss of the model in `folder`, in fp32 and under the same layout; every rank calls.

    What a training reports of the model that it leaves: read back from where it was left.
    """
    config = load_model(folder).config
    layout, settings = replace(layout, precision="auto"), replace(settings, precision="fp32")
    model = _parallel_model(layout, config, mesh, settings)
    load_pretrained(folder, model)
    if isinstance(model, AsynchronousModel):
        return held_out_loss_asynchronously(model, held_out, settings.held_out_batches)
    return held_out_loss(model, layout, held_out, settings.held_out_batches)


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The whole model of a config.json, on the meta device.

    Raises:
        ValueError: a value that transformers does not take.
    """
    words = dict(config)
    try:
        with torch.device("meta"):
            made: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(words.pop("model_type"), **words))
    except Exception as error:  # of many kinds; a KeyError's text is the value that was not found
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"transformers takes no model of this config: {reason}") from None
    return made


def _parallel_model(
    layout: Layout, config: Mapping[str, Any], mesh: DeviceMesh, settings: TrainSettings
) -> ParallelModel | AsynchronousModel:
    whole = empty_model(config)
    if layout.asynchronous:
        return AsynchronousModel(whole, layout, mesh, settings)
    return parallelize(
        whole,
        mesh,
        micro_batch=layout.micro_batch,
        checkpointing=layout.checkpointing,
        stream=chunks_of(layout),
        zero_stage=layout.zero_stage,
        precision=precision_of(layout, settings),
        sharded_accumulation=layout.sharded_accumulation,
        sequence_parallel=layout.sequence_parallel,
        compile=layout.compile,
        vp=layout.vp,
        schedule=layout.schedule,
        seed=settings.seed,
        embedding_counts_as=layout.embedding_counts_as,
        head_counts_as=layout.head_counts_as,
    )


def _warm_up(layout: Layout, model: ModelConfig, settings: TrainSettings, mesh: DeviceMesh) -> None:
    """One step of a model of the same kind and the smallest size that the layout can cut.

    Libraries load and connections open now, so that the first step's time and the memory are the model's own.
    """
    width = 16 * layout.tp
    small = {
        "hidden_size": width, "intermediate_size": width, "num_attention_heads": layout.tp,
        "num_key_value_heads": layout.tp, "head_dim": 16, "vocab_size": width,
        "num_hidden_layers": layout.pp * layout.vp, "layer_types": None, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    settings, layout = (
        TrainSettings(steps=1, precision=settings.precision, optimizer=settings.optimizer),
        replace(layout, embedding_counts_as=0, head_counts_as=0),
    )
    if layout.asynchronous:
        layout = replace(layout, seq_len=4 * layout.cp * layout.tp)
    tiny = _parallel_model(layout, {**model.config, **small}, mesh, settings)
    if isinstance(tiny, AsynchronousModel):
        rows = torch.zeros(layout.global_batch // layout.dp, layout.seq_len, dtype=torch.int64)
        tiny.pipeline.run(tiny.micro_batches(lambda: rows))
    else:
        optimizers = make_optimizers(tiny, settings)
        tiny.forward_backward(torch.zeros(layout.micro_batch, 4 * layout.cp * layout.tp, dtype=torch.int64))
        tiny.clip_grad_norm_(1.0)
        for optimizer in optimizers:
            optimizer.step()
        del optimizer, optimizers
    del tiny
    gc.collect()  # a pipeline refers to itself; what it holds must be gone before memory is counted
