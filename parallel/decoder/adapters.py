"""peft's LoRA adapters in a decoder: which of them a layout trains exactly, and their way into a folder of peft's.

An adapter is two small matrices beside one that stays as it is. They lie inside the decoder's layers, so every axis
that takes whole layers takes them along: replicas, shards of ZeRO, a ring, pipeline stages, streaming. Tensor
parallelism cuts the matrix itself, and has no cut for them (decoder.limits). peft saves adapters from a whole model,
which no rank has here: they are gathered and named as peft names them.
"""

import copy
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fourfold.parallel.decoder.pretrained_folder import gathered_parts, raise_together
from fourfold.parallel.decoder.stage import DecoderStage

_FILE = "adapter_model.safetensors"
_MERGE = (
    "merge the adapters first (merge_and_unload()), or train them with stream_backprop, FSDP or DDP around the model"
)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def has_adapters(model: nn.Module) -> bool:
    """Whether this is a PeftModel."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def without_wrapper(model: nn.Module) -> tuple[nn.Module, bool]:
    """The transformers model, and whether peft has put adapters in it.

    Raises:
        ValueError: another kind of adapter than plain LoRA of matrices in the decoder's layers, or dropout in one; a
            model inside peft's wrapper instead of the wrapper.
    """
    if not has_adapters(model):
        return model, False
    adapted = cast(Any, model)
    for name, config in adapted.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ValueError(f"adapter {name!r} is peft's {kind}: parallelize takes LoRA; {_MERGE}")
        for setting, plain in (("lora_dropout", 0.0), ("bias", "none"), ("layer_replication", None)):
            if getattr(config, setting, plain) != plain:
                raise ValueError(
                    f"{setting}={getattr(config, setting)!r} of adapter {name!r} is not supported by parallelize: "
                    f"set it to {plain!r}"
                )
    base = adapted.get_base_model()
    for name, module in base.named_modules():
        if type(module).__module__.startswith("peft."):
            _check_module(name, module)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and not is_adapter(name):
            raise ValueError(
                f"{name} is trained beside the adapters, and would not be saved with them: freeze it "
                f"(requires_grad_(False)), or {_MERGE}"
            )
    if any(parameter.is_meta for name, parameter in base.named_parameters() if is_adapter(name)):
        for name, config in adapted.peft_config.items():
            if config.init_lora_weights is not True:
                raise ValueError(
                    f"init_lora_weights={config.init_lora_weights!r} of adapter {name!r} on the meta device: "
                    "set it to True, or build the model with its weights"
                )
    return base, True


def _check_module(name: str, module: nn.Module) -> None:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind != "peft.tuners.lora.layer.Linear" or not name.startswith("model.layers.") or module.lora_variant:
        raise ValueError(
            f"module {name!r} is peft's {type(module).__name__}: parallelize takes plain LoRA of the matrices in "
            f"model.layers; choose such target_modules, or {_MERGE}"
        )
    if cast(Any, module).merged or cast(Any, module).disable_adapters:
        raise ValueError(f"the adapters of {name!r} are merged or disabled: give them back, or {_MERGE}")


def drawn_adapters(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The matrices of `module`, by name, whose adapters have no weights yet."""
    return [
        (path, part)
        for path, part in module.named_modules()
        if hasattr(part, "reset_lora_parameters") and any(p.is_meta for p in cast(Any, part).lora_A.parameters())
    ]


def draw_adapters(matrices: list[tuple[str, nn.Module]], name: str, seed: int) -> None:
    """Give adapters peft's first weights, the same under every layout: each matrix draws by its own name.

    Args:
        matrices: of `drawn_adapters`, with storage by now.
        name: of the module in the whole model.
    """
    for path, part in matrices:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(crc32(f"{seed} {name} {path} lora".encode()))
            for adapter in cast(Any, part).lora_A:
                cast(Any, part).reset_lora_parameters(adapter, True)


@torch.no_grad()
def write_adapters(
    folder: Path, stage: DecoderStage, adapted: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None = None
) -> None:
    """Write a folder that PeftModel.from_pretrained loads onto the same base model; every rank of the mesh calls.

    Args:
        folder: made if it does not exist; other adapters than "default" go into folders of their names in it.
        adapted: peft's wrapper of the model that the stage was cut from, for its configurations.
        dtype: that the weights are stored in; None for that of training.
    Raises:
        ValueError: on every rank, where the folder holds adapters or cannot be written.
    Cost: every adapter travels once to the first rank, which holds all of them.
    """
    gathered: dict[str, torch.Tensor] = {}
    for weights in gathered_parts(stage, mesh, wanted=is_adapter):
        gathered |= {
            f"base_model.model.{name}": value.to("cpu", dtype or value.dtype) for name, value in weights.items()
        }
    is_writer = not any(mesh.get_coordinate() or ())
    raise_together(_written(folder, cast(Any, adapted), gathered) if is_writer else "", mesh)


def _written(folder: Path, adapted: Any, gathered: dict[str, torch.Tensor]) -> str:
    """What went wrong in writing; empty where nothing did."""
    from peft.utils import get_peft_model_state_dict

    try:
        for name, config in adapted.peft_config.items():
            into = folder if name == "default" else folder / name
            into.mkdir(parents=True, exist_ok=True)
            if (into / _FILE).exists():
                return f"{into} holds an adapter already ({_FILE}): give another folder"
            weights = get_peft_model_state_dict(
                adapted, state_dict=gathered, adapter_name=name, save_embedding_layers=False
            )
            save_file({key: value.contiguous() for key, value in weights.items()}, into / f"{_FILE}.partial")
            config = copy.deepcopy(config)
            config.inference_mode = True
            config.save_pretrained(str(into))
            (into / f"{_FILE}.partial").rename(into / _FILE)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}): free space, or give another folder"
    except Exception as error:  # safetensors has its own kinds
        return f"{folder} cannot be written ({error}): free space, or give another folder"
    return ""
