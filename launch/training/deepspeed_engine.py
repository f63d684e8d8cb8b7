"""`engine = "deepspeed"`: the same model, data and optimizer, with DeepSpeed's ZeRO instead of FSDP2's.

DeepSpeed is configured by the JSON that `layout-advisor export LAYOUT --to deepspeed` writes. What the two do not mean
alike is refused before a rank waits for another.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from fourfold.launch.training.optimizers import make_optimizers
from fourfold.launch.training.pretrained import load_pretrained
from fourfold.launch.training.settings import TrainSettings, precision_of
from fourfold.layouts.inputs.layout import Layout
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.output.export import deepspeed_config
from fourfold.parallel.decoder.deepspeed_model import DeepSpeedModel


def check_engine(layout: Layout, settings: TrainSettings, *, resume: str = "no") -> None:
    """Refuse what DeepSpeed has not, or means otherwise; nothing where the engine is the native one.

    Args:
        resume: as of the training's options.
    Raises:
        ValueError: names the value and the mend; also where DeepSpeed is not installed.
    """
    if settings.engine != "deepspeed":
        return
    precision = precision_of(layout, settings) or ("bf16-mixed" if torch.cuda.is_available() else "fp32")
    absent = [
        (f"schedule={layout.schedule!r}", layout.asynchronous, "it drains its pipeline; use schedule='1f1b' and pp=1"),
        *((f"{axis}={getattr(layout, axis)}", getattr(layout, axis) > 1, f"its ZeRO shards over dp alone; use {axis}=1")
          for axis in ("pp", "cp", "tp")),
        (f"checkpointing={layout.checkpointing!r}", layout.checkpointing not in ("none", "full"),
         "its JSON says of no layer what to keep; use checkpointing='none' or 'full'"),
        ("sharded_accumulation=true", layout.sharded_accumulation,
         "its ZeRO 2 and 3 always shard at every micro-batch; use sharded_accumulation=false"),
        ("compile=true", bool(layout.compile), "layers run as they are; use compile=false"),
        (f"optimizer={settings.optimizer!r}", settings.optimizer != "adamw", "use optimizer='adamw'"),
        (f"precision={precision!r}", precision not in ("fp32", "bf16-mixed"),
         "its own bf16 also rounds and reduces gradients in bf16; use precision='fp32' or 'bf16-mixed'"),
        (f"checkpoint_every={settings.checkpoint_every}", settings.checkpoint_every > 0,
         "its checkpoints are not the ones that this training verifies; use checkpoint_every=0 and export"),
        (f"resume={resume!r}", resume != "no", "there are no checkpoints of it; leave resume out"),
    ]  # fmt: skip
    for value, found, why in absent:
        if found:
            raise ValueError(f"{value} with engine='deepspeed': {why}, or engine='native'")
    if find_spec("deepspeed") is None:
        raise ValueError(
            "engine='deepspeed': the package deepspeed is not installed; pip install 'fourfold[deepspeed]', "
            "or use engine='native'"
        )


def configuration(layout: Layout, model: ModelConfig, settings: TrainSettings) -> dict[str, Any]:
    """The exported JSON of `layout`, with fp32 weights and gradients and the training's clipping, without an optimizer.

    Products in bf16 are the model's own doing, see DeepSpeedModel.
    """
    exported = deepspeed_config(replace(layout, precision="auto", compile=None), model)
    del exported["optimizer"]
    return exported | {"bf16": {"enabled": False}, "gradient_clipping": settings.max_norm}


def deepspeed_model(
    whole: nn.Module,
    mesh: DeviceMesh,
    settings: TrainSettings,
    *,
    layout: Layout,
    model: ModelConfig,
    pretrained: Path | None,
) -> DeepSpeedModel:
    """The model under DeepSpeed; every rank calls. Arguments and errors as `build`'s, `whole` on the meta device."""
    made = DeepSpeedModel(
        whole, mesh, micro_batch=layout.micro_batch, checkpointing=layout.checkpointing,
        precision=precision_of(layout, settings), seed=settings.seed,
    )  # fmt: skip
    if pretrained is not None:
        load_pretrained(pretrained, made)

    def optimizer() -> Optimizer:
        (only,) = make_optimizers(made, settings)
        return only

    made.initialize(optimizer, configuration(layout, model, settings))
    return made
