"""Which layout a training runs under, and which model: from a file, from a layout's name, or planned. No torch."""

import re
from math import prod
from pathlib import Path

from fourfold.launch.train_options import TrainOptions
from fourfold.layouts.inputs.cluster import load_cluster
from fourfold.layouts.inputs.layout import Layout, check, read_layout_file
from fourfold.layouts.inputs.layout_words import parse_layout
from fourfold.layouts.inputs.model import ModelConfig, load_model
from fourfold.layouts.search.rank import advice, rank_layouts
from fourfold.layouts.search.request import SearchRequest

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


def chosen_layout(options: TrainOptions) -> tuple[Layout, ModelConfig]:
    """The layout and the model that `options` mean.

    Raises:
        ValueError: a file that is none, keys that are needed and absent, or two that disagree; nothing that fits.
    """
    if options.layout.endswith(".toml"):
        return _from_file(options)
    if options.model is None:
        raise ValueError("no model: give --model (a Hugging Face folder, config.json or preset), or a layout file")
    for name in ("global_batch", "seq_len"):
        if not getattr(options, name):
            raise ValueError(f"no {name}: give --{name.replace('_', '-')}, or a layout file")
    model = load_model(options.model)
    if options.layout == "plan":
        return _planned(options, model), model
    sizes = [int(size) for size in re.findall(r"\b(?:dp|pp|cp|tp)(\d{1,9})\b", options.layout)]
    layout = parse_layout(
        options.layout,
        num_devices=options.ranks or prod(sizes),
        global_batch=options.global_batch,
        seq_len=options.seq_len,
    )
    check(layout, model)
    return layout, model


def _from_file(options: TrainOptions) -> tuple[Layout, ModelConfig]:
    layout, model = read_layout_file(options.layout)
    for name in ("global_batch", "seq_len"):
        asked, has = getattr(options, name), getattr(layout, name)
        if asked not in (0, has):
            raise ValueError(f"{name}={asked}, but {options.layout} has {has}: leave one of them out")
    if options.ranks not in (0, layout.world_size):
        raise ValueError(
            f"ranks={options.ranks}, but {options.layout} is of {layout.world_size}: leave ranks out, or plan again"
        )
    if options.model is not None:
        given = load_model(options.model)
        for name in ("num_params", "num_layers", "hidden_size", "num_heads", "vocab_size"):
            if getattr(given, name) != getattr(model, name):
                raise ValueError(
                    f"{options.layout} was planned for a model with {name}={getattr(model, name)}, "
                    f"and {options.model} has {getattr(given, name)}: plan again"
                )
        model = given
    return layout, model


def _planned(options: TrainOptions, model: ModelConfig) -> Layout:
    if options.cluster is None:
        raise ValueError("layout='plan' needs the machine: give --cluster (cluster.toml, as `profile` writes it)")
    cluster = load_cluster(options.cluster)
    ranks = options.ranks or cluster.num_devices
    if not ranks:
        raise ValueError(f"--cluster {options.cluster} has as many devices as asked for: give --ranks")
    request = SearchRequest(num_devices=ranks, global_batch=options.global_batch, seq_len=options.seq_len)
    plan = rank_layouts(model, cluster, request, top=1)
    if not plan.layouts:
        raise ValueError(advice(plan))
    return plan.layouts[0].layout


def model_folder(options: TrainOptions) -> Path | None:
    """The folder that the model's pretrained weights are read from; None where they are drawn.

    Raises:
        ValueError: pretrained weights are asked for, and the folder has none.
    """
    folder = Path(options.model) if options.model is not None else None
    has = folder is not None and any(folder.glob("*.safetensors"))
    if options.weights == "random":
        return None
    if folder is not None and not has and folder.is_dir():
        other = next((path.name for path in sorted(folder.iterdir()) if path.suffix in _OTHER_WEIGHTS), None)
        if other is not None:
            raise ValueError(
                f"--model {options.model} has its weights in {other}, which is not read: save them as .safetensors "
                "(save_pretrained does), or give weights='random' to draw others"
            )
    if options.weights == "auto" and not has:
        return None
    if not has:
        raise ValueError(f"weights='pretrained', but --model {options.model} is no folder with .safetensors files")
    return folder
